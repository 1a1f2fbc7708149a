"""The model card: data, revision, beta, length rule, results and, where HH's text was used, its content notice."""

from pathlib import Path
from typing import Any

from tinydpo.config.arguments import list_sources
from tinydpo.data.notice import CONTENT_NOTICE, is_hh
from tinydpo.files import public_name
from tinydpo.training.curves import describe_rewards


def write_card(
    folder: Path,
    resolved: dict[str, Any],
    summary: dict[str, Any],
    results: dict[str, Any],
    log_history: list[dict[str, Any]],
) -> None:
    """Write `README.md` for a finished run.

    Args:
        folder: the run's folder.
        resolved: every key of the run with its value.
        summary: what fitting did to each split.
        results: the metrics of training and evaluation.
        log_history: what the trainer logged.
    """
    from huggingface_hub import ModelCard, ModelCardData

    datasets, model = list_sources(resolved), resolved["model_name_or_path"]
    reference = resolved.get("ref_model_name_or_path")
    named = [*(one.name for one in datasets), model, *[reference] * bool(reference)]
    names = {name: public_name(name) for name in named}
    local = {name for name in names if Path(name).exists()}  # what the Hub does not have is unlinked
    explicit = "center_rewards_coefficient" in resolved
    kind = "reward-model" if explicit else "dpo" if "beta" in resolved else "sft"
    data = ModelCardData(
        library_name="transformers",
        base_model=None if model in local else model,
        datasets=list(dict.fromkeys(one.name for one in datasets if one.name not in local)) or None,
        pipeline_tag="text-classification" if kind == "reward-model" else None,
        tags=["trl", kind, "tinydpo"],
    )
    ModelCard.from_template(
        data,
        template_path=Path(__file__).with_name("templates") / "card.md",
        title=f"{folder.parent.name}/{folder.name}",
        run=resolved,
        names=names,
        local=local,
        datasets=datasets,
        kind=kind,
        loss=_format_loss(resolved) if "beta" in resolved else None,
        train=summary["train"],
        results={k: v for k, v in results.items() if isinstance(v, int | float) and _describes_model(k)},
        trend=describe_rewards(log_history, resolved["beta"]) if "beta" in resolved else "",
        notice=CONTENT_NOTICE if is_hh(resolved["dataset_name"]) else None,
    ).save(folder / "README.md")


def _describes_model(figure: str) -> bool:
    """Whether a figure says something of the model; `total_flos` is transformers' guess at a padded batch."""
    return "per_second" not in figure and figure != "total_flos"


def _format_loss(resolved: dict[str, Any]) -> str:
    weights = resolved.get("loss_weights")
    losses = [f"{w} {loss}" for w, loss in zip(weights, resolved["loss_type"], strict=True)] if weights else None
    smoothed = f", label smoothing {resolved['label_smoothing']}" if resolved.get("label_smoothing") else ""
    return " + ".join(losses or resolved["loss_type"]) + smoothed
