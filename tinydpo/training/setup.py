"""Everything before a trainer is built, after the flags: processes, the run's folder, tokenizer, models and data.

Each check comes before the expensive work that it could save.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from filelock import Timeout
from transformers import AutoModel, AutoModelForCausalLM

from tinydpo.config.arguments import DataArguments, RunArguments, find_reference, list_sources
from tinydpo.config.launch import prepare_process
from tinydpo.data.inspect import format_data_notes
from tinydpo.data.pairs import load_pairs
from tinydpo.data.splits import HOLD_OUT_SEED
from tinydpo.errors import UserError, get_rank
from tinydpo.files import check_output_folder, find_difference
from tinydpo.models.hub import explain_load_errors
from tinydpo.models.loading import (
    DIGESTS,
    apply_tokenizer_flags,
    check_model,
    check_same_vocabulary,
    hash_start_weights,
    load_tokenizer,
    refuse_adapter,
)
from tinydpo.run_folder import RunFolder
from tinydpo.training.throughput import warn_of_long_run

# Where a run executes and reports, not what it trains: these settings may change before it is resumed.
NOT_COMPARED = {
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "dataset_num_proc", "ddp_timeout", "disable_tqdm", "hub_always_push", "hub_model_id", "hub_private_repo",
    "hub_revision", "hub_strategy", "local_rank", "log_level", "log_level_replica", "output_dir",
    "per_device_eval_batch_size", "precompute_ref_batch_size", "project", "push_to_hub", "report_to",
    "run_name", "save_total_limit", "trackio_space_id",
}  # fmt: skip


class PreparedRun(NamedTuple):
    """What a trainer needs besides its model, and what is recorded in its folder."""

    stage: str  # "sft", "dpo" or "reward"
    settings: dict[str, Any]  # every setting with its value
    tokenizer: Any
    train: Dataset  # fitted pairs
    test: Dataset | None  # None without evaluation
    summary: dict[str, Any]  # what fitting did to each split
    digests: dict[str, str]  # of the local weights that it starts from


def prepare_training(
    stage: str, data: DataArguments, run: RunArguments, training: Any, model: Any, settings: dict[str, Any]
) -> PreparedRun | None:
    """Check everything and load the data; None where the folder already holds this very run, finished.

    `stage` is "sft", "dpo" or "reward", `model` TRL's `ModelConfig`, `settings` every setting with its value.
    """
    prepare_process(training, model, run.accelerate_config)
    folder = RunFolder(training.output_dir)
    check_same_settings(folder, settings, (data, run, training, model))
    finished = broadcast_object_list([folder.is_finished])[0]  # machines may not share the folder
    if not finished:
        check_output_folder(training.output_dir, folder.config_file.name)
        if folder.path.exists():
            with lock_folder(folder):  # a second run is refused now, not after an hour of reference log-probs
                pass
    tokenizer, shapes = load_and_check_models(stage, training, model, settings)
    need_pairs = stage != "sft"  # SFT does without rejected answers
    splits = load_pairs(data, tokenizer, training.max_length, need_pairs, training.dataset_num_proc)
    summary = {name: split.summary for name, split in splits.items()}
    digests = check_same_inputs(folder, settings, summary)
    if finished:
        if not get_rank():
            print(f"{training.output_dir} holds this run, finished; delete the folder to train again.")
            if training.push_to_hub:
                print("This command pushed nothing; docs/your-own-data.md shows how to upload a finished run.")
        return None
    notes = format_data_notes(summary)
    if notes and not get_rank():
        print(notes)
    if training.use_cpu and not get_rank():
        warn_of_long_run(stage, training, shapes, splits["train"].pairs)
    test = None
    if training.eval_strategy != "no":
        test = splits["test"].pairs
        if len(test) > run.eval_pairs:  # the same rows in every run
            test = test.shuffle(seed=HOLD_OUT_SEED).select(range(run.eval_pairs))
    return PreparedRun(stage, settings, tokenizer, splits["train"].pairs, test, summary, digests)


def check_same_settings(run: RunFolder, settings: dict[str, Any], configs: Iterable[Any]) -> None:
    """Refuse to resume a run whose settings differ; `configs` are the dataclasses whose fields are their keys."""
    before = to_yaml_values(run.read_config())  # without what older versions stored
    if not before:
        return
    now = to_yaml_values(settings)
    defaults = to_yaml_values({field.name: field.default for config in configs for field in fields(config)})
    ignored = set(NOT_COMPARED)
    if now.get("pairs_per_step"):  # from which these follow
        ignored |= {"gradient_accumulation_steps", "per_device_train_batch_size"}
    # After an upgrade, TRL and transformers have new flags, which change nothing at their defaults; some are gone.
    ignored |= {key for key in now.keys() - before.keys() if now[key] == defaults.get(key)}
    ignored |= before.keys() - settings.keys()
    key = find_difference(before, now, ignored)
    if key:
        raise UserError(
            f"{run.path} holds a run with {key}: {before.get(key)}, this one has {key}: {now.get(key)}; "
            "choose another --output_dir (make: NAME=…), or delete the folder"
        )


def check_same_inputs(run: RunFolder, settings: dict[str, Any], summary: dict[str, Any]) -> dict[str, str]:
    """Refuse to resume a run whose data or starting weights have changed; returns the weights' digests now."""
    digests = {}
    error = None
    if not get_rank():  # which alone may have the models
        digests = hash_start_weights(settings)
        changed = find_changed_input(run, settings, summary, digests)
        if changed and (run.is_finished or any(run.path.glob("checkpoint-*"))):
            error = f"{changed} has changed since the run in {run.path} started"
    error = broadcast_object_list([error])[0]
    if error:
        raise UserError(f"{error}; delete the run, or pass another --output_dir")
    return digests


def find_changed_input(
    run: RunFolder, settings: dict[str, Any], summary: dict[str, Any], digests: dict[str, str]
) -> str | None:
    """The dataset or model that has changed since the run started, or None."""
    for name, split in run.read_summary().items():
        if split["sha256"] != summary[name]["sha256"]:
            return " or ".join(source.name for source in list_sources(settings))
    before = run.read_environment()
    for setting, key in DIGESTS.items():
        if before.get(key) and before[key] != digests.get(key):
            return settings[setting]
    return None


def to_yaml_values(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as YAML can hold them, without secrets, unset values, and what concerns one launch on one machine."""
    dropped = {"accelerate_config", "hub_token", "use_cpu"}
    if settings.get("pairs_per_step"):
        dropped.add("gradient_accumulation_steps")
    kept = {key: value for key, value in settings.items() if value not in (None, []) and key not in dropped}
    return json.loads(json.dumps(kept, default=lambda value: getattr(value, "value", str(value)), sort_keys=True))


def lock_folder(run: RunFolder) -> AbstractContextManager:
    """Hold a run's folder while its main process lives (UserError: another one does)."""
    try:
        return nullcontext() if get_rank() else run.lock()
    except Timeout:
        raise UserError(
            f"another run is training into {run.path}; wait until it ends, or choose another --output_dir (make: "
            "NAME=…)"
        ) from None


def load_and_check_models(stage: str, training: Any, model: Any, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The tokenizer, and the model's shapes, after a check that model, reference and tokenizer fit together."""
    trust = training.trust_remote_code
    refuse_adapter(model.model_name_or_path)
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, trust)
    apply_tokenizer_flags(tokenizer, training)
    architecture = AutoModel if stage == "reward" else AutoModelForCausalLM  # a reward model gets a new head
    fits = (tokenizer, training.max_length, architecture, trust)
    shapes = check_model(model.model_name_or_path, model.model_revision, *fits)
    reference = find_reference(settings)
    if reference:
        refuse_adapter(reference.name)
        check_same_vocabulary(tokenizer, load_tokenizer(*reference, trust))
        check_model(*reference, *fits)
    return tokenizer, shapes


def load_reference(settings: dict[str, Any], training: Any, quantization_config: Any = None) -> Any:
    """The reference model for `DPOTrainer`, loaded as TRL loads the policy; None where the start model is it."""
    from trl.trainer.utils import create_model_from_path

    reference = find_reference(settings)
    if reference is None:
        return None
    kwargs = training.model_init_kwargs | {
        "device_map": None,
        "trust_remote_code": training.trust_remote_code,
        "revision": reference.revision or "main",
    }
    if quantization_config:
        kwargs["quantization_config"] = quantization_config
    with explain_load_errors("model", *reference):
        return create_model_from_path(reference.name, AutoModelForCausalLM, **kwargs)


@contextmanager
def explain_trainer_errors(model: Any) -> Iterator[None]:
    """Around building a trainer, which loads the model of TRL's `ModelConfig`: its errors become one sentence."""
    try:
        with explain_load_errors("model", model.model_name_or_path, model.model_revision, also=()):
            yield
    except (ValueError, NotImplementedError, ImportError) as error:
        raise UserError(str(error)) from None
