"""Flags of TRL and transformers that would mislead here: accepted without effect, or with a harmful one.

Each refusal says what to do instead. Every flag that is not listed here is passed on to its library as it is.
"""

import difflib
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from tinydpo.config.arguments import as_list
from tinydpo.errors import UserError

# `DPOTrainer` checks a loss's name only at its first step, after the reference pass.
LOSSES = {
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
}  # fmt: skip
SMOOTHED_LOSSES = {"exo_pair", "robust", "aot", "aot_unpaired"}
ADAPTER_FLAGS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "use_rslora", "use_dora", "load_in_4bit", "load_in_8bit",
)  # fmt: skip
# What most runs set: a training script's --help shows these alone, and they are suggested for a misspelt flag.
FIRST_FLAGS = (
    "model_name_or_path", "ref_model_name_or_path", "dataset_name", "output_dir", "max_length", "beta", "loss_type",
    "learning_rate", "num_train_epochs", "max_steps", "pairs_per_step", "per_device_train_batch_size", "use_peft",
    "bf16", "seed",
)  # fmt: skip
SCHEDULES_WITHOUT_WARMUP = {"constant", "reduce_lr_on_plateau", "greedy"}
Settings = dict[str, Any]  # every key of a run with its value

REFUSED_ALWAYS = {
    "truncation_mode": "but pairs are fitted to max_length by a rule of their own (README); leave it out",
    "padding_free": "but packing is --shared_prefix true, the default; leave this out",
    "dataset_text_field": "but rows are read by their keys (docs/your-own-data.md); pass --column instead",
    "dataset_kwargs": "but rows are read by their keys (docs/your-own-data.md); leave it out",
    "assistant_only_loss": "but the loss is already on answers only; leave it out",
    "bf16_full_eval": "but it would round the weights, and then save them; leave it out",
    "fp16_full_eval": "but it would round the weights, and then save them; leave it out",
    "resume_from_checkpoint": "but a run resumes from its last checkpoint by itself; to go back, delete later ones",
    "save_only_model": "but a checkpoint without the optimizer cannot be resumed; leave it out",
    "enable_jit_checkpoint": "but SIGTERM saves a checkpoint already (docs/reliability.md); leave it out",
    "auto_find_batch_size": "but it would change the pairs per step; lower --per_device_train_batch_size instead",
    "dataloader_drop_last": "but it would leave pairs out of evaluation; leave it out",
    "hub_strategy": "but a run is pushed once, when it is finished; leave it out",
    "hub_always_push": "but a run is pushed once, when it is finished; leave it out",
    "packing": "but packing is --shared_prefix true, the default; leave this out",
    "packing_strategy": "but rows are packed by a rule of their own; leave it out",
    "shuffle_dataset": "but every epoch already shuffles the rows; leave it out",
    "pad_token": "but batches are padded with the tokenizer's own token, which no result depends on; leave it out",
    "eval_packing": "but packing is --shared_prefix true, the default; leave this out",
    "batch_eval_metrics": "but metrics are computed over all rows at once; leave it out",
    "eval_do_concat_batches": "but metrics are computed over all rows at once; leave it out",
    "use_liger_kernel": "but its kernels replace the checked forward of packed rows; leave it out",
}
# What shards a model is checked before anything is loaded, from the accelerate file (`launch`).
REFUSED_ALWAYS |= dict.fromkeys(
    ("fsdp", "fsdp_config", "deepspeed"),
    "but the accelerate file decides that; start with accelerate_configs/fsdp.yaml, zero2.yaml or zero3.yaml",
)
REFUSED_IN_STAGE = {
    "sft": {},
    "dpo": {"label_smoothing_factor": "but DPO does not read it; pass --label_smoothing instead (docs/losses.md)"},
    "reward": {
        "label_smoothing_factor": "but a reward model's training does not read it; leave it out",
        **dict.fromkeys((*ADAPTER_FLAGS, "use_peft"), "but a reward model is trained and saved whole; leave it out"),
    },
}
REFUSED_FOR_PACKED_ROWS = {
    "pad_to_multiple_of": "but TRL's collator does not pad packed rows; pass --shared_prefix false, or leave it out",
    "neftune_noise_alpha": "but its noise depends on a sequence's length; pass --shared_prefix false, or leave it out",
}


def list_refused_flags(flags: Collection[str]) -> set[str]:
    """Those that a script with these flags refuses in every run."""
    stage = "reward" if "center_rewards_coefficient" in flags else "dpo" if "beta" in flags else "sft"
    return {*REFUSED_ALWAYS, *REFUSED_IN_STAGE[stage]}


def suggest_flag(key: str, flags: Collection[str]) -> str | None:
    """The flag that an unknown key means, by its words (`epochs`, `lr`, `batch_size`) or its spelling, or None."""
    allowed = sorted(set(flags) - list_refused_flags(flags) - {"local_rank"})  # set by launchers
    words = _split_words(key)
    initials = {flag: "".join(word[:1] for word in flag.split("_")) for flag in allowed}
    fitting = [flag for flag in allowed if words <= _split_words(flag) or key == initials[flag]]
    first = [flag for flag in FIRST_FLAGS if flag in fitting]
    if first or len(fitting) == 1:
        return (first or fitting)[0]
    return next(iter(difflib.get_close_matches(key, allowed, n=1, cutoff=0.8)), None)


def _split_words(flag: str) -> set[str]:
    return {word.removesuffix("s") for word in flag.split("_")}


def check_flags(stage: str, settings: Settings, *configs: Any) -> None:
    """Refuse a run that sets a flag to something that would have no effect, or a wrong one.

    `settings` holds every key of the run; `configs` are the libraries' dataclasses that the flags come from.
    """
    from transformers.integrations import get_available_reporting_integrations  # takes seconds to import

    if not settings["max_length"]:
        raise UserError("max_length is not set, but pairs are fitted to a budget of tokens; pass --max_length 128")
    defaults = {field.name: field.default for config in configs for field in fields(config)}
    refused = REFUSED_ALWAYS | REFUSED_IN_STAGE[stage]
    if not settings["use_peft"]:
        reason = "but it is for adapters; pass --use_peft true as well, or leave it out"
        refused = dict.fromkeys(ADAPTER_FLAGS, reason) | refused
    elif settings["lora_dropout"] and settings.get("disable_dropout", True):
        refused["lora_dropout"] = "but models train without dropout here; leave it out"
    if settings["shared_prefix"]:
        refused |= REFUSED_FOR_PACKED_ROWS
    if settings["train_sampling_strategy"] in ("group_by_length", "batch_rebalance"):
        refused["train_sampling_strategy"] = "but steps would hold fewer pairs at an epoch's end; leave it out"
    schedule = settings["lr_scheduler_type"]
    if schedule in SCHEDULES_WITHOUT_WARMUP:
        refused["warmup_steps"] = f"but the schedule {schedule} does not warm up; pass --warmup_steps 0"
    eval_steps = settings["eval_steps"] or settings["logging_steps"]
    if settings["save_strategy"] == "steps" and settings["save_steps"] != eval_steps:
        refused["load_best_model_at_end"] = "but the best evaluation may have no checkpoint; pass --save_strategy best"
    if stage == "dpo":
        refused |= _refuse_for_dpo(settings)
    missing = set(as_list(settings["report_to"])) - {"none", "all", *get_available_reporting_integrations()}
    if missing:
        refused["report_to"] = f"but {', '.join(sorted(missing))} is not installed; install it, or leave it out"
    for flag, reason in refused.items():
        value = settings.get(flag)
        default = defaults.get(flag)
        if value != default and (value or default):  # None, False and [] all mean off
            raise UserError(f"{flag} is {value}, {reason}")


def _refuse_for_dpo(settings: Settings) -> dict[str, str]:
    refused = {}
    if not settings.get("ref_model_name_or_path"):
        refused["ref_model_revision"] = "but --ref_model_name_or_path is not set"
    losses = set(settings["loss_type"])
    if losses - LOSSES:
        refused["loss_type"] = f"but DPO's losses are {', '.join(sorted(LOSSES))}"
    elif "exo_pair" in losses and settings["label_smoothing"] <= 0:
        refused["loss_type"] = "but exo_pair needs label smoothing; pass --label_smoothing 1e-3 or the like"
    if not losses & SMOOTHED_LOSSES:
        refused["label_smoothing"] = f"but {', '.join(sorted(losses))} ignores it; for robust DPO see docs/losses.md"
    unweighted = losses & {"aot", "aot_unpaired", "hinge", "sft"}
    if unweighted:  # the aot losses sort answers; the gradients of the others fail in TRL 1.16
        refused["use_weighting"] = f"but TRL cannot weight {', '.join(sorted(unweighted))}; drop one"
    if settings["precompute_ref_log_probs"]:
        refused["sync_ref_model"] = "but the reference is fixed; pass --precompute_ref_log_probs false as well"
    elif settings["use_peft"] or settings.get("ref_model_name_or_path"):
        refused["sync_ref_model"] = "but an adapter's base and --ref_model_name_or_path are fixed; leave one out"
    return refused
