"""The model card: data, revision, beta, length rule, results and, where HH's text was used, its content notice."""

from pathlib import Path
from typing import Any

from tinydpo.data.notice import CONTENT_NOTICE, is_hh


def write_card(folder: Path, resolved: dict[str, Any], summary: dict[str, Any], results: dict[str, Any]) -> None:
    """Write `README.md` for a finished run.

    Args:
        folder: the run's folder.
        resolved: every key of the run with its value.
        summary: what fitting did to each split.
        results: the metrics of training and evaluation.
    """
    from huggingface_hub import ModelCard, ModelCardData

    dpo = "beta" in resolved
    dataset, base = str(resolved["dataset_name"]), str(resolved["model_name_or_path"])
    local = {name for name in (dataset, base) if Path(name).exists()}
    data = ModelCardData(
        library_name="transformers",
        base_model=None if base in local else base,
        datasets=None if dataset in local else [dataset],
        tags=["trl", "dpo" if dpo else "sft", "tinydpo"],
    )
    train = summary["train"]
    facts = {
        "Method": f"DPO (arXiv 2305.18290), loss {_loss(resolved)}, beta {resolved['beta']}{_adapter(resolved)}"
        if dpo
        else f"supervised fine-tuning on the preferred answers, completion tokens only{_adapter(resolved)}",
        "Starts from": _with_revision(base, resolved.get("model_revision"), base in local),
        "Data": _with_revision(dataset, resolved.get("dataset_revision"), dataset in local),
        "Pairs": f"{train['pairs_kept']:,} of {train['pairs_in']:,} kept, dropped: {train['dropped'] or 'none'}",
        "Length rule": f"{resolved['max_length']} tokens for prompt, completion and end token: the last human turn "
        f"is sure of {resolved['max_question_length']} of them, then completions come first and keep their "
        f"start, the prompt keeps its end ({train['completion_tokens_kept']:.1%} of completion tokens kept)",
        "Learning rate": f"{resolved['learning_rate']}, {resolved.get('pairs_per_step') or '?'} pairs per step, "
        f"{resolved['num_train_epochs']} epoch(s), seed {resolved['seed']}",
    }
    shown = {
        key: value for key, value in results.items() if isinstance(value, int | float) and "per_second" not in key
    }
    lines = [f"# {Path(folder).parent.name}/{Path(folder).name}", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {str(value).replace('|', '/')} |" for name, value in facts.items()]
    lines += ["", "## Results", "", "Evaluation is on held-out pairs.", "", "| metric | value |", "| --- | --- |"]
    lines += [f"| {key} | {value:.4g} |" for key, value in shown.items()]
    lines += [
        "",
        "![curves](curves.png)",
        "",
        "`run_config.yaml` holds every key of the run, `environment.json` its versions.",
    ]
    if is_hh(dataset):
        lines += ["", "## Content notice", "", CONTENT_NOTICE]
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n").save(folder / "README.md")


def _loss(resolved: dict[str, Any]) -> str:
    weights = resolved.get("loss_weights")
    losses = [f"{w} {loss}" for w, loss in zip(weights, resolved["loss_type"], strict=True)] if weights else None
    smoothed = f", label smoothing {resolved['label_smoothing']}" if resolved.get("label_smoothing") else ""
    return " + ".join(losses or resolved["loss_type"]) + smoothed


def _adapter(resolved: dict[str, Any]) -> str:
    if not resolved.get("use_peft"):
        return ""
    bits = next((f" on the base in {bits} bits" for bits in (4, 8) if resolved.get(f"load_in_{bits}bit")), "")
    return f"; a LoRA adapter of rank {resolved['lora_r']}{bits}"


def _with_revision(name: str, revision: str | None, local: bool) -> str:
    # A card may be published: it names a local file or folder, never the way to it.
    if local:
        return f"`{name if not Path(name).is_absolute() else Path(name).name}` (local)"
    return f"`{name}`" + (f" at `{revision}`" if revision else "")
