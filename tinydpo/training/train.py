"""Train a run into its folder: resume, train, evaluate, save.

The folder gets, in this order: `run_config.yaml`, `data_summary.json` and `environment.json`; checkpoints; then model,
tokenizer, generation config, `trainer_state.json`, `curves.png` and a model card; and, last, `train_results.json`,
which marks the run as finished.
"""

import importlib.metadata
import platform
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import upload_folder
from transformers.trainer_utils import sort_checkpoints

from tinydpo.errors import Stopped, UserError
from tinydpo.files import write_atomic, write_json
from tinydpo.models.stop_tokens import reset_generation_config
from tinydpo.run_folder import RunFolder
from tinydpo.training import curves
from tinydpo.training.callbacks import StopOnDivergence, StopOnSignal
from tinydpo.training.card import write_card
from tinydpo.training.checkpoints import MANIFEST, find_resume_checkpoint
from tinydpo.training.progress import show_progress
from tinydpo.training.setup import PreparedRun, lock_folder, to_yaml_values
from tinydpo.training.throughput import Throughput

PACKAGES = ("tinydpo", "torch", "trl", "transformers", "datasets", "accelerate", "peft", "bitsandbytes", "tokenizers")
# Checkpoints, and the files that hold paths of this machine (`runs/` is TensorBoard's).
NOT_PUSHED = ["_*", ".*", "checkpoint-*", "runs/*", "run_config.yaml", "training_args.bin", "trainer_state.json"]


def train(trainer: Any, prepared: PreparedRun) -> None:
    """Train, or resume from the last complete checkpoint, and write everything that a run's folder holds."""
    run = RunFolder(trainer.args.output_dir)
    stop = StopOnSignal()
    speed = Throughput(trainer)
    trainer.callback_handler.callbacks.insert(0, speed)  # before those that report a log elsewhere
    show_progress(trainer)
    trainer.add_callback(stop)
    trainer.add_callback(StopOnDivergence())
    if trainer.is_world_process_zero():
        run.path.mkdir(parents=True, exist_ok=True)
    is_restart = run.is_started
    with lock_folder(run):
        if trainer.is_world_process_zero():
            write_run_inputs(run, prepared, trainer.args)
        checkpoint = find_resume_checkpoint(trainer)
        if is_restart and checkpoint is None:
            trainer.accelerator.print(f"{run.path} holds no checkpoint: starting over.")
        try:
            results = trainer.train(resume_from_checkpoint=checkpoint).metrics
        except KeyboardInterrupt:
            complete = [path for path in sort_checkpoints(run.path) if Path(path, MANIFEST).exists()]
            resumes = f"resumes from {complete[-1]}" if complete else "starts over, as no checkpoint is complete"
            raise Stopped(f"interrupted; the same command {resumes}", signal.SIGINT) from None
        finally:
            stop.restore_handlers()  # from here on a signal ends the process at once
        if checkpoint:  # transformers counts only what this process trained
            results = {name: value for name, value in results.items() if not name.startswith("train_")}
        stopped = stop.reason and trainer.state.global_step < trainer.state.max_steps
        if not stopped:
            save_results(trainer, run, prepared, results | speed.total)
    # gloo's threads let go of the last tensors while this process waits. At exit they would need Python's lock, which
    # would wait for them: a deadlock.
    trainer.accelerator.wait_for_everyone()
    if stopped:
        trainer.end()
        step = trainer.state.global_step
        message = (
            f"stopped by {stop.reason} after step {step}; the same command resumes from {run.path}/checkpoint-{step}"
        )
        raise Stopped(message, stop.signal)


def write_run_inputs(run: RunFolder, prepared: PreparedRun, training: Any) -> None:
    """Write what is known before training."""
    write_atomic(run.config_file, yaml.safe_dump(to_yaml_values(prepared.settings)))
    write_json(run.summary_file, prepared.summary)
    write_json(run.environment_file, describe_environment(training.seed, training.use_cpu) | prepared.digests)


def describe_environment(seed: int, on_cpu: bool) -> dict[str, Any]:
    """Versions, commit, device, day and seed of this process."""
    commit = None
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    packages = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "seed": seed,
        "git_commit": commit,
        "device": get_device_name(on_cpu),
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "packages": packages,
    }


def get_device_name(on_cpu: bool) -> str:
    """The GPU's or the processor's name, as its maker writes it if the system tells."""
    if torch.cuda.is_available() and not on_cpu:
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, where `platform` knows the architecture alone
    names = re.findall(r"^model name\s*: (.*)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()


def save_results(trainer: Any, run: RunFolder, prepared: PreparedRun, results: dict[str, Any]) -> None:
    """Evaluate, save the model, draw and describe it; the results come last and mark the run as finished."""
    trainer.check_finite_weights()
    if trainer.eval_dataset is not None:
        results |= trainer.evaluate()
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True  # transformers has turned it off for training
    if model.can_generate():  # a reward model cannot
        reset_generation_config(model, trainer.processing_class)
    trainer.save_model(_internal_call=True)  # or it would push to the Hub before card and results exist
    trainer.save_state()
    if trainer.is_world_process_zero():
        curves.draw_curves(trainer.state.log_history, run.curves_file)
        write_card(run, prepared, len(trainer.train_dataset), results, trainer.state.log_history)
        if trainer.args.push_to_hub:
            push_run(trainer, run)
        write_json(run.results_file, results)  # after the push: if that fails, the same command tries again
        print(f"Done: {run.path} holds the model and its card (README.md).")


def push_run(trainer: Any, run: RunFolder) -> None:
    """Upload a run's folder; `Trainer.push_to_hub` would upload local paths, too."""
    try:
        upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=run.path,
            ignore_patterns=NOT_PUSHED,
            revision=trainer.args.hub_revision,
        )
    except Exception as error:
        raise UserError(f"{run.path} could not be pushed to the Hub ({error}); run the same command again") from error
