"""A run's folder: begun once, resumed if cut short, refused if its recipe changed, finished when the results are in.

What a folder holds: `run_config.yaml` (every key as it came to run), `data_summary.json`,
`environment.json`, the checkpoints while training, then model, tokenizer,
generation config, `trainer_state.json`, `curves.png`, a model card, and last `train_results.json`, which marks it as
finished.
"""

import importlib.metadata
import json
import platform
import subprocess
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import yaml
from filelock import FileLock, Timeout

from tinydpo.config.arguments import find_reference, list_sources
from tinydpo.errors import Stopped, UserError, get_rank
from tinydpo.files import RUN_CONFIG, find_difference, find_run_folder, read_json, write_atomic, write_json
from tinydpo.models.loading import hash_weights

SUMMARY, ENVIRONMENT, FINISHED = "data_summary.json", "environment.json", "train_results.json"
LOCK = ".lock"
PACKAGES = ("tinydpo", "torch", "trl", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "tokenizers")
# Where and how loudly a recipe runs, not what it trains: these may differ between a run and its continuation.
NOT_COMPARED = {
    "accelerate_config", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor",
    "dataset_num_proc", "ddp_timeout", "disable_tqdm", "hub_always_push", "hub_model_id", "hub_private_repo",
    "hub_revision", "hub_strategy", "local_rank", "log_level", "log_level_replica", "output_dir",
    "per_device_eval_batch_size", "precompute_ref_batch_size", "project", "push_to_hub", "report_to",
    "resume_from_checkpoint", "run_name", "save_total_limit", "trackio_space_id",
}  # fmt: skip
FOLLOWS_FROM_PAIRS_PER_STEP = {"gradient_accumulation_steps", "per_device_train_batch_size"}
SECRETS = {"hub_token"}


def is_finished(output_dir: str, resolved: dict[str, Any]) -> bool:
    """Whether the folder holds this very run, finished (then it says so).

    Args:
        output_dir: the run's folder.
        resolved: every key of the run with its value.

    Raises:
        UserError: if the folder cannot be written, is being trained into, or holds a run of another recipe (naming
            the first key that differs).
    """
    from accelerate.utils import broadcast_object_list

    folder = Path(output_dir)
    if (folder / RUN_CONFIG).exists():
        _check_same_recipe(folder, resolved)
    if broadcast_object_list([(folder / FINISHED).exists()])[0]:  # on other machines the folder may be another
        if not get_rank():
            print(f"{folder} holds this run, finished; delete the folder to train again.")
        return True
    _check_writable(folder)
    if folder.exists():
        with lock_folder(folder):  # refused now, and not after an hour of reference log-probs
            pass
    return False


def _check_same_recipe(folder: Path, resolved: dict[str, Any]) -> None:
    before, now = yaml.safe_load((folder / RUN_CONFIG).read_text()) or {}, _to_yaml_values(resolved)
    follows = FOLLOWS_FROM_PAIRS_PER_STEP if now.get("pairs_per_step") else set()
    if key := find_difference(before, now, NOT_COMPARED | follows):
        raise UserError(
            f"{folder} holds a run with {key}: {before.get(key)}, this one has {key}: {now.get(key)}; "
            "pass another --output_dir, or delete the folder"
        )


def _check_writable(folder: Path) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(
            f"output_dir {folder}: {nearest} cannot be written to ({error.strerror}); choose another"
        ) from None


def lock_folder(folder: Path) -> AbstractContextManager:
    """Hold a run's folder while its main process lives; the system lets go of it however that ends.

    Raises:
        UserError: another process holds it.
    """
    if get_rank():
        return nullcontext()
    try:
        return FileLock(folder / LOCK, timeout=0).acquire()
    except Timeout:
        raise UserError(
            f"another run is training into {folder}; wait until it is done, end it, or pass another --output_dir"
        ) from None


def _to_yaml_values(resolved: dict[str, Any]) -> dict[str, Any]:
    """As YAML can hold it and without secrets; what is unset is left out."""
    kept = {key: value for key, value in resolved.items() if value not in (None, []) and key not in SECRETS}
    return json.loads(json.dumps(kept, default=lambda value: getattr(value, "value", str(value)), sort_keys=True))


def train(trainer: Any, resolved: dict[str, Any], summary: dict[str, Any], texts: Any) -> None:
    """Train, or go on from the last whole checkpoint, evaluate, and write everything that a run's folder holds.

    Args:
        trainer: a TRL trainer, ready.
        resolved: every key of the run with its value.
        summary: what fitting did to each split.
        texts: of the pairs that it trains on.

    Raises:
        UserError: the run cannot go on; its last whole checkpoint stays.
        Stopped: the process was told to stop, and a checkpoint holds what was trained.
    """
    from tinydpo.training.callbacks import LearningCheck, StopOnDivergence, StopOnSignal
    from tinydpo.training.checkpoints import find_resume_checkpoint
    from tinydpo.training.throughput import Throughput

    folder, told, speed = Path(trainer.args.output_dir), StopOnSignal(), Throughput(trainer)
    trainer.callback_handler.callbacks.insert(0, speed)  # before those that report a log elsewhere
    for callback in (told, StopOnDivergence(), LearningCheck()):
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        write_run_inputs(trainer, folder, resolved, summary, texts)
        checkpoint = find_resume_checkpoint(trainer)
        try:
            results = trainer.train(resume_from_checkpoint=checkpoint).metrics
        except UnpicklingError:
            raise UserError(
                f"{checkpoint} holds something else than tensors and numbers, which could run code and is not loaded; "
                "delete it and run the same command again"
            ) from None
        finally:
            told.on_train_end()  # which a run that fails does not come to; who goes on after it must end on SIGTERM
        if checkpoint:  # transformers counts what this process trained, and not what those before it did
            results = {name: value for name, value in results.items() if not name.startswith("train_")}
        stopped = told.reason and trainer.state.global_step < trainer.state.max_steps
        if not stopped:
            save_results(trainer, folder, resolved, summary, results | speed.total)
    # While waiting, gloo's threads let go of the last tensors; at exit they would wait for Python's lock, which waits
    # for them, for ever.
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    if stopped:
        step = trainer.state.global_step
        raise Stopped(
            f"stopped by {told.reason} after step {step}; the same command goes on from {folder}/checkpoint-{step}"
        )


def write_run_inputs(
    trainer: Any, folder: Path, resolved: dict[str, Any], summary: dict[str, Any], texts: Any
) -> None:
    """Write what is known before training; refuse to go on with a run whose data or first weights have changed."""
    from accelerate.utils import broadcast_object_list

    from tinydpo.models.loading import record_base_weights

    main, other = trainer.is_world_process_zero(), []
    weights = record_base_weights(resolved) | record_reference_weights(resolved) if main else {}
    if main and any(folder.glob("checkpoint-*")):
        data, before = read_json(folder / SUMMARY), read_json(folder / ENVIRONMENT)
        other = [one.name for one in list_sources(resolved)] if data and data != summary else []
        for name, digest in (("model_name_or_path", "base_sha256"), ("ref_model_name_or_path", "ref_sha256")):
            other += [resolved[name]] if before.get(digest) and before[digest] != weights.get(digest) else []
    if other := broadcast_object_list([other])[0]:
        raise UserError(
            f"{other[0]} has changed since the run in {folder} began; delete that, or pass another --output_dir"
        )
    if not main:
        return
    write_atomic(folder / RUN_CONFIG, yaml.safe_dump(_to_yaml_values(resolved)))
    write_json(folder / SUMMARY, summary)
    write_json(folder / ENVIRONMENT, describe_environment(trainer.args.seed) | weights)


def save_results(
    trainer: Any, folder: Path, resolved: dict[str, Any], summary: dict[str, Any], results: dict[str, Any]
) -> None:
    """Evaluate, save the model, draw and describe it; the results come last and mark the run as finished."""
    from tinydpo.models.stop_tokens import reset_generation_config
    from tinydpo.training.card import write_card
    from tinydpo.training.curves import draw_curves

    if trainer.eval_dataset is not None:
        results |= trainer.evaluate()
    if (model := trainer.accelerator.unwrap_model(trainer.model)).can_generate():
        reset_generation_config(model, trainer.processing_class)
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        draw_curves(trainer.state.log_history, folder / "curves.png")
        write_card(folder, resolved, summary, results, trainer.state.log_history)
        write_json(folder / FINISHED, results)
        print(f"Done: {folder} holds the model, its card (README.md) and curves.png.")
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def was_trained_on_chat(model: str) -> bool | None:
    """Whether a chat template wrote the rows that `model` was trained on, most of them; None where no run says so."""
    rows = read_json(find_run_folder(model) / SUMMARY).get("train", {})
    return is_chat_data(rows) if "templated" in rows else None


def is_chat_data(rows: dict[str, Any]) -> bool:
    """Whether a chat template wrote most rows of a split, by its summary."""
    return 2 * rows["templated"] > rows["pairs_in"]


def describe_environment(seed: int) -> dict[str, Any]:
    """Versions, commit, device and seed of this process."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "seed": seed,
        "git_commit": commit,
        "device": device,
        "python": platform.python_version(),
        "packages": versions,
    }


def record_reference_weights(resolved: dict[str, Any]) -> dict[str, str]:
    """For a run's `environment.json`: the weights of such a reference in a local folder; revisions tell the Hub's."""
    reference = find_reference(resolved)
    return {"ref_sha256": hash_weights(Path(reference.name))} if reference and Path(reference.name).is_dir() else {}
