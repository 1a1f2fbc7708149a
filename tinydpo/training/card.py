"""The model card of a finished run: where it comes from, how pairs were cut, its results, and HH's content notice."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tinydpo.config.arguments import list_sources
from tinydpo.data.notice import CONTENT_NOTICE, is_hh
from tinydpo.files import public_name
from tinydpo.run_folder import RunFolder
from tinydpo.training.curves import describe_rewards
from tinydpo.training.setup import PreparedRun

TEMPLATE = Path(__file__).with_name("templates") / "card.md"
TAGS = {"sft": "sft", "dpo": "dpo", "reward": "reward-model"}


def write_card(run: RunFolder, prepared: PreparedRun, results: dict[str, Any], log: list[dict[str, Any]]) -> None:
    """Write the run's `README.md` from its settings, its results and what its trainer logged."""
    settings = prepared.settings
    is_dpo = prepared.stage == "dpo"
    datasets = list_sources(settings)
    model = settings["model_name_or_path"]
    used = [source.name for source in datasets] + [model]
    if settings.get("ref_model_name_or_path"):
        used.append(settings["ref_model_name_or_path"])
    local = {name for name in used if Path(name).exists()}  # the Hub knows nothing of these
    data = ModelCardData(
        library_name="transformers",
        base_model=None if model in local else model,
        datasets=[source.name for source in datasets if source.name not in local] or None,
        pipeline_tag="text-classification" if prepared.stage == "reward" else None,
        tags=["trl", TAGS[prepared.stage], "tinydpo"],
    )
    figures = {name: value for name, value in results.items() if "per_second" not in name and name != "total_flos"}
    card = ModelCard.from_template(
        data,
        template_path=TEMPLATE,
        title=f"{run.path.parent.name}/{run.path.name}",
        stage=prepared.stage,
        run=settings,
        names={name: public_name(name) for name in used},
        local=local,
        datasets=datasets,
        loss=format_loss(settings) if is_dpo else None,
        train=prepared.summary["train"],
        results=figures,
        curves=run.curves_file.name if run.curves_file.exists() else None,
        trend=describe_rewards(log, settings["beta"]) if is_dpo else "",
        notice=CONTENT_NOTICE if is_hh(settings["dataset_name"]) else None,
    )
    card.save(run.card_file)


def format_loss(settings: dict[str, Any]) -> str:
    """A DPO run's loss in words, such as `1.0 sigmoid + 0.5 sft, label smoothing 0.1`."""
    losses = settings["loss_type"]
    if settings.get("loss_weights"):
        losses = [f"{weight} {loss}" for weight, loss in zip(settings["loss_weights"], losses, strict=True)]
    text = " + ".join(losses)
    if settings.get("label_smoothing"):
        text += f", label smoothing {settings['label_smoothing']}"
    return text
