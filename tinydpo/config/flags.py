"""Flags of TRL and transformers that could only be ignored here, or do harm: refused, with what to do instead.

A training takes every flag of its libraries, but brings its own tokens, packed rows and checkpoints. What those leave
no place for must not be accepted as if it acted. `tests/config/test_flags.py` holds every flag of the libraries to
act, to stand here, or to be the library's own matter.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple

from tinydpo.errors import UserError

# What `DPOTrainer` knows by name at its first step only, after the reference pass.
LOSSES = {
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
}  # fmt: skip
DIVERGENCES = {"reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"}
METRICS = {"loss", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"}  # the last of a mixture of experts
DPO_METRICS = {
    *(f"{of}/{side}" for of in ("rewards", "logps", "logits") for side in ("chosen", "rejected")),
    "rewards/accuracies", "rewards/margins",
}  # fmt: skip
REWARD_METRICS = {"loss", "num_tokens", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"}
SMOOTHED, SORTED = {"exo_pair", "robust", "aot", "aot_unpaired"}, {"aot", "aot_unpaired"}
Run = dict[str, Any]  # every key of a run with its value


class Refused(NamedTuple):
    """Flags (names with a blank between them) that are refused, `why`, and in which runs: in all by default."""

    flags: str
    why: str
    when: Callable[[Run], bool] | None = None


def _losses(run: Run) -> set[str]:
    return set(run["loss_type"]) if isinstance(run["loss_type"], list) else set()  # SFT's is one, TRL checks it


def _is_dpo(run: Run) -> bool:
    return "beta" in run


def _is_reward(run: Run) -> bool:
    return "center_rewards_coefficient" in run


def _metrics(run: Run) -> set[str]:
    return REWARD_METRICS if _is_reward(run) else METRICS | (DPO_METRICS if _is_dpo(run) else set())


REFUSED = (
    Refused(
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save "
        "lora_task_type use_rslora use_dora load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant "
        "bnb_4bit_quant_storage use_peft",
        "but a reward model is trained and saved whole, to load as one; leave it out",
        _is_reward,
    ),
    # Rows are read, cut, tokenized and packed before TRL sees them.
    Refused("truncation_mode", "but pairs are fitted to max_length by a rule of their own (README); leave it out"),
    Refused("padding_free", "but packed rows hold no padding already; leave it out"),
    Refused(
        "packing packing_strategy eval_packing",
        "but rows are packed already, up to --row_length tokens, and no example is cut for it; leave it out",
        lambda run: run["shared_prefix"],
    ),
    Refused(
        "pad_to_multiple_of",
        "but packed rows are not padded to one length; leave it out, or pass --shared_prefix false",
        lambda run: run["shared_prefix"],
    ),
    Refused(
        "dataset_text_field dataset_kwargs", "but rows are read by their keys (docs/your-own-data.md); leave it out"
    ),
    Refused(
        "shuffle_dataset",
        "but every epoch draws its rows in another order already (--train_sampling_strategy); leave it out",
    ),
    Refused(
        "assistant_only_loss",
        "but the loss is on answers alone already; --completion_only_loss false puts it on prompts as well",
    ),
    Refused("pad_token", "but padding is masked, whatever its token; set it in the model's own tokenizer, if at all"),
    Refused("length_column_name", "but rows bring no lengths; they are counted where a sampler asks; leave it out"),
    # Evaluation while training keeps metrics and no predictions.
    Refused(
        "prediction_loss_only include_for_metrics batch_eval_metrics eval_do_concat_batches eval_accumulation_steps "
        "label_names",
        "but evaluation while training keeps no predictions; leave it out (scripts/evaluate.py measures more)",
    ),
    Refused(
        "bf16_full_eval fp16_full_eval",
        "but it would round the weights, and then save them; leave it out: evaluation computes as training does",
    ),
    # A run's folder, batch and processes have an owner each.
    Refused(
        "do_train do_eval do_predict", "but training scripts train, and evaluate by --eval_strategy; leave it out"
    ),
    Refused("save_only_model", "which leaves out of a checkpoint what a run needs to go on; leave it out"),
    Refused("enable_jit_checkpoint", "but SIGTERM makes a checkpoint already (docs/reliability.md); leave it out"),
    Refused(
        "auto_find_batch_size",
        "but a smaller batch would change the pairs of a step; lower --per_device_train_batch_size, and with "
        "--pairs_per_step accumulation makes up for it",
    ),
    Refused(
        "accelerator_config",
        "but batches are counted by --pairs_per_step, and the accelerate file says where a run goes; leave it out",
    ),
    Refused("dataloader_drop_last", "which would leave pairs out of evaluation too; leave it out"),
    Refused("dataset_num_proc", "but must be at least 1", lambda run: run["dataset_num_proc"] < 1),
    Refused(
        "dataloader_persistent_workers dataloader_multiprocessing_context",
        "which needs workers; pass --dataloader_num_workers as well, or leave it out",
        lambda run: not run["dataloader_num_workers"],
    ),
    Refused(
        "activation_offloading",
        "which moves activations off a GPU, and this run is on CPUs; leave it out",
        lambda run: run["use_cpu"],
    ),
    Refused(
        "use_liger_kernel liger_kernel_config",
        "but Liger's kernels come in after packed rows were held against the plain forward, and TRL is to drop them; "
        "leave it out",
    ),
    Refused("debug", "but TPU metrics are for TPUs; leave it out", lambda run: "tpu" in str(run["debug"])),
    Refused("use_cache", "but training never generates, and has nothing to cache; leave it out"),
    Refused(
        "neftune_noise_alpha",
        "but its noise goes by a sequence's length, and packed rows hold several; leave it out, or pass "
        "--shared_prefix false",
        lambda run: run["shared_prefix"],
    ),
    # Half of a setting.
    Refused(
        "activation_checkpointing_kwargs",
        "which is for activation checkpointing; pass --activation_checkpointing true as well, or leave it out",
        lambda run: not run["activation_checkpointing"],
    ),
    Refused(
        "load_best_model_at_end save_strategy",
        "but without evaluations none is the best; pass an --eval_strategy as well",
        lambda run: run["eval_strategy"] == "no" and (run["load_best_model_at_end"] or run["save_strategy"] == "best"),
    ),
    Refused(
        "num_train_epochs", "but must be above 0", lambda run: run["num_train_epochs"] <= 0 and run["max_steps"] <= 0
    ),
    Refused("precompute_ref_batch_size", "but must be at least 1", lambda run: run["precompute_ref_batch_size"] < 1),
    Refused(
        "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save use_rslora "
        "use_dora load_in_4bit load_in_8bit",
        "which is for adapters; pass --use_peft true as well, or leave it out",
        lambda run: not run["use_peft"],
    ),
    Refused(
        "lora_dropout",
        "but training switches dropout off; pass --lora_dropout 0",
        lambda run: run["lora_dropout"] > 0 and run.get("disable_dropout", True),
    ),
    Refused("lora_task_type", "but what trains is a causal language model; leave it out"),
    Refused(
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
        "which is for weights in 4 bits; pass --load_in_4bit true as well, or leave it out",
        lambda run: not run["load_in_4bit"],
    ),
    Refused(
        "warmup_steps lr_scheduler_kwargs",
        "which --lr_scheduler_type constant does not read; pass constant_with_warmup, or leave it out",
        lambda run: run["lr_scheduler_type"] == "constant",
    ),
    Refused(
        "metric_for_best_model",
        "which no evaluation while training gives (eval_loss is one; train_results.json holds them all)",
        lambda run: run["metric_for_best_model"].removeprefix("eval_") not in _metrics(run),
    ),
    # DPO's loss.
    Refused("loss_type", f"but DPO's losses are {', '.join(sorted(LOSSES))}", lambda run: bool(_losses(run) - LOSSES)),
    Refused(
        "loss_type",
        "but exo_pair needs label smoothing; pass --label_smoothing 1e-3 or the like",
        lambda run: "exo_pair" in _losses(run) and run["label_smoothing"] <= 0,
    ),
    Refused("beta", "but must be above 0", lambda run: run["beta"] <= 0),
    Refused("ld_alpha", "but must lie between 0 and 1", lambda run: not 0 <= run["ld_alpha"] <= 1),
    Refused(
        "label_smoothing",
        "which none of its losses reads (docs/losses.md); --loss_type robust does, and for conservative DPO see "
        "recipes/gpt2-medium-hh/dpo-conservative.yaml",
        lambda run: not _losses(run) & SMOOTHED,
    ),
    Refused(
        "label_smoothing",
        "but the robust loss takes a share of flipped labels of at least 0 and below 0.5",
        lambda run: "robust" in _losses(run) and not 0 <= run["label_smoothing"] < 0.5,
    ),
    Refused(
        "label_smoothing_factor",
        "which DPO does not read; pass --label_smoothing, with a loss that does (docs/losses.md)",
        _is_dpo,
    ),
    Refused(
        "label_smoothing_factor",
        "which neither the dft loss nor a reward model's reads; leave it out",
        lambda run: run.get("loss_type") == "dft" or _is_reward(run),
    ),
    Refused(
        "f_divergence_type",
        f"but the divergences are {', '.join(sorted(DIVERGENCES))}",
        lambda run: run["f_divergence_type"] not in DIVERGENCES,
    ),
    Refused(
        "f_alpha_divergence_coef",
        "which is for --f_divergence_type alpha_divergence; pass that as well, or leave it out",
        lambda run: run["f_divergence_type"] != "alpha_divergence",
    ),
    Refused(
        "discopop_tau",
        "which is for --loss_type discopop; pass that as well, or leave it out",
        lambda run: "discopop" not in _losses(run),
    ),
    Refused(
        "use_weighting",
        "but the aot losses sort a batch's answers, so that weights would go to other pairs; pass another --loss_type",
        lambda run: bool(_losses(run) & SORTED),
    ),
    Refused(
        "ref_model_mixup_alpha ref_model_sync_steps",
        "which is for a reference that moves; pass --sync_ref_model true as well, or leave it out",
        lambda run: not run["sync_ref_model"],
    ),
    Refused("ref_model_sync_steps", "but must be at least 1", lambda run: run["ref_model_sync_steps"] < 1),
    Refused(
        "sync_ref_model",
        "but log-probs computed beforehand are those of a reference that stands still; pass "
        "--precompute_ref_log_probs false as well",
        lambda run: run["precompute_ref_log_probs"],
    ),
    Refused(
        "sync_ref_model",
        "but an adapter's reference is the base below it, which does not move; pass --use_peft false",
        lambda run: run["use_peft"],
    ),
    Refused(
        "sync_ref_model",
        "but --ref_model_name_or_path names a reference that stands still; leave one of the two out",
        lambda run: bool(run.get("ref_model_name_or_path")),
    ),
    Refused(
        "train_sampling_strategy",
        "whose batches hold uneven numbers of pairs, of which a loss over pairs would count those in small batches "
        "for more; group_by_length saves padding too",
        lambda run: run["train_sampling_strategy"] == "batch_rebalance" and (_is_dpo(run) or _is_reward(run)),
    ),
)


def check_flags(stage: str, run: Run, *configs: Any) -> None:
    """Refuse a run that sets what would have no effect, or a wrong one.

    Args:
        stage: "sft", "dpo" or "reward".
        run: every key of the run with its value.
        configs: the libraries' dataclasses, or instances of them, that the flags come from.

    Raises:
        UserError: naming the flag, its value, and what to do instead.
    """
    defaults = {field.name: _default(field) for config in configs for field in fields(config)}
    for flags, why, when in REFUSED:
        for flag in flags.split():
            value = run.get(flag)
            unset = value in (None, defaults.get(flag)) or (value is False and defaults[flag] is None)
            if not unset and (when is None or when(run)):
                raise UserError(f"{flag} is {value}, {why}")


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def check_reporters(training: Any) -> None:
    """Make a run's reporters, and an optimizer and a schedule like its own.

    Args:
        training: transformers' `TrainingArguments`.

    Raises:
        UserError: one of them cannot be made (a package is missing, an option unknown), or would not read an option.
    """
    for name in training.report_to:
        try:
            _make_reporter(name)
        except (RuntimeError, ImportError, ValueError) as error:
            raise UserError(f"report_to is {name}: {error} Or pass --report_to none") from None
    try:
        _make_optimizer(training)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        settings = f"optim is {training.optim.value}, lr_scheduler_type {training.lr_scheduler_type.value}"
        raise UserError(f"{settings}: {error}") from None


def _make_reporter(name: str) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import get_reporting_integration_callbacks

    (reporter,) = get_reporting_integration_callbacks([name])
    made = reporter.__new__(reporter)
    try:
        made.__init__()
    except Exception:
        made.__class__ = TrainerCallback  # half a reporter prints a traceback when it goes
        raise


def _make_optimizer(training: Any) -> None:
    import torch
    from transformers import Trainer, get_scheduler

    if training.optim_target_modules and not any(name in training.optim.value for name in ("galore", "apollo")):
        raise ValueError("optim_target_modules is for galore and apollo; leave it out")
    if any("=" not in part for part in (training.optim_args or "=").split(",")):
        raise ValueError(f"optim_args is {training.optim_args}; write name=value, with commas between several")
    if training.optim_target_modules:
        with contextlib.suppress(ValueError):  # it wants a model, after it has looked for its package
            Trainer.get_optimizer_cls_and_kwargs(training)
        return
    plain = copy.copy(training)
    plain.optim_args = None
    made, options = Trainer.get_optimizer_cls_and_kwargs(training)
    if training.optim_args and options == Trainer.get_optimizer_cls_and_kwargs(plain)[1]:
        raise ValueError(f"this optimizer reads nothing of optim_args {training.optim_args}; leave it out")
    if not isinstance(made, type):
        return  # it takes a whole model
    optimizer = made([torch.nn.Parameter(torch.zeros(1, device=training.device))], **options)
    schedule = training.lr_scheduler_kwargs
    get_scheduler(training.lr_scheduler_type, optimizer, training.get_warmup_steps(100), 100, schedule)
