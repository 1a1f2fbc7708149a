"""The model card of a finished run: where it comes from, how to use it, how pairs were cut, and its results."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from transformers.utils import cached_file

from tinydpo.config.arguments import list_sources
from tinydpo.data.notice import CONTENT_NOTICE, is_hh
from tinydpo.data.rows import ASSISTANT
from tinydpo.files import public_name
from tinydpo.run_folder import RunFolder, is_chat_data
from tinydpo.training.curves import describe_rewards
from tinydpo.training.setup import PreparedRun

TEMPLATE = Path(__file__).with_name("templates") / "card.md"
FROM_BASE = ("license", "license_name", "license_link", "language")  # claimed only if the base's card does
NO_METRICS = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_num_tokens")
TAGS = {"sft": "sft", "dpo": "dpo", "reward": "reward-model"}


def write_card(
    run: RunFolder, prepared: PreparedRun, trained: int, results: dict[str, Any], log: list[dict[str, Any]]
) -> None:
    """Write the run's `README.md` from its settings, its results and what its trainer logged.

    `trained` are the pairs of an epoch: with --max_steps maybe fewer than all.
    """
    settings = prepared.settings
    is_dpo = prepared.stage == "dpo"
    datasets = list_sources(settings)
    model = settings["model_name_or_path"]
    used = [source.name for source in datasets] + [model]
    if settings.get("ref_model_name_or_path"):
        used.append(settings["ref_model_name_or_path"])
    local = {name for name in used if Path(name).exists()}  # the Hub knows nothing of these
    base = read_base_metadata(model, settings.get("model_revision"))
    base_model = model
    if model in local:  # of a run of ours, what that one started from
        base_model = base.get("base_model") if RunFolder(model).is_started else None
    data = ModelCardData(
        library_name="peft" if settings.get("use_peft") else "transformers",
        base_model=base_model,
        datasets=[source.name for source in datasets if source.name not in local] or None,
        pipeline_tag="text-classification" if prepared.stage == "reward" else "text-generation",
        tags=["trl", TAGS[prepared.stage], "tinydpo"],
        **{key: base.get(key) for key in FROM_BASE},
    )
    train = prepared.summary["train"]
    last_prompt = prepared.tokenizer.decode(prepared.train[-1]["prompt_ids"])
    card = ModelCard.from_template(
        data,
        template_path=TEMPLATE,
        title=f"{run.path.parent.name}/{run.path.name}",
        path=public_name(str(run.path)),
        stage=prepared.stage,
        run=settings,
        names={name: public_name(name) for name in used},
        local=local,
        datasets=datasets,
        loss=format_loss(settings) if is_dpo else None,
        train=train,
        is_chat=is_chat_data(train),
        is_dialogue=last_prompt.endswith(ASSISTANT),
        steps=log[-1],
        trained=trained,
        held_out=len(prepared.test or ()),
        results={
            name: value for name, value in results.items() if name.startswith("eval_") and name not in NO_METRICS
        },
        packages=run.read_environment().get("packages", {}),
        curves=run.curves_file.name if run.curves_file.exists() else None,
        trend=describe_rewards(log, settings["beta"]) if is_dpo else "",
        notice=CONTENT_NOTICE if is_hh(settings["dataset_name"]) else None,
    )
    card.save(run.card_file)


def read_base_metadata(name: str, revision: str | None) -> dict[str, Any]:
    """The header of the card of the model that a run starts from; {} if that has none."""
    try:
        return metadata_load(cached_file(name, "README.md", revision=revision)) or {}
    except (OSError, ValueError, yaml.YAMLError):  # no reason to lose a trained model
        return {}


def format_loss(settings: dict[str, Any]) -> str:
    """A DPO run's loss in words, such as `1.0 sigmoid + 0.5 sft, label smoothing 0.1`."""
    losses = settings["loss_type"]
    if settings.get("loss_weights"):
        losses = [f"{weight} {loss}" for weight, loss in zip(settings["loss_weights"], losses, strict=True)]
    text = " + ".join(losses)
    if settings.get("label_smoothing"):
        text += f", label smoothing {settings['label_smoothing']}"
    return text
