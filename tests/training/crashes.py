"""Runs of the scripts in processes of their own that die, or are told to, at a chosen place.

Children are forked from a server that has imported everything and computed nothing, so that each costs a second.
"""

import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["trl.trainer.dpo_trainer", "trl.trainer.sft_trainer", "tinydpo.training.trainers"])


def die(*_: Any, **__: Any) -> None:
    """As `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(write: Callable, half: Callable) -> Callable:
    """A writing function that is killed with half of its file on disk."""

    def writes_half(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        if path := half(*args, **kwargs):
            with open(path, "r+b") as file:
                file.truncate(Path(path).stat().st_size // 2)
            die()

    return writes_half


def _sixth_step() -> None:
    from transformers.trainer_callback import DefaultFlowCallback as flow

    step_end = flow.on_step_end
    flow.on_step_end = lambda s, args, state, *a, **k: (
        die() if state.global_step == 6 else step_end(s, args, state, *a, **k)
    )


def _half_of(name: str) -> None:
    """Killed while the first file of that name of checkpoint-8 is half written."""
    import safetensors.torch
    import torch
    import transformers.modeling_utils
    from transformers import TrainerState

    def in_eight(path: Any) -> str | None:
        return str(path) if Path(path).name == name and Path(path).parent.name == "checkpoint-8" else None

    torch.save = die_after(torch.save, lambda value, path, *a, **k: in_eight(path))
    half = die_after(safetensors.torch.save_file, lambda tensors, filename, *a, **k: in_eight(filename))
    safetensors.torch.save_file = transformers.modeling_utils.safe_save_file = half
    TrainerState.save_to_json = die_after(TrainerState.save_to_json, lambda state, path: in_eight(path))


def _before_the_seal() -> None:
    import tinydpo.training.checkpoints as checkpoints

    seal = checkpoints.write_json
    checkpoints.write_json = lambda path, value: die() if path.parent.name == "checkpoint-8" else seal(path, value)


def _half_deleted() -> None:
    import tinydpo.training.checkpoints as checkpoints

    def rotate(folder: str, *_: Any, **__: Any) -> None:
        if (Path(folder) / "checkpoint-8").exists():
            (Path(folder) / "checkpoint-4/model.safetensors").unlink()
            die()

    checkpoints.rotate_checkpoints = rotate


def _reference_pass() -> None:
    from tinydpo.training.trainers import SharedPrefixDPOTrainer as trainer

    compute, calls = trainer.compute_ref_log_probs, []
    trainer.compute_ref_log_probs = lambda *args: die() if calls.append(0) or len(calls) == 3 else compute(*args)


def _reference_cache() -> None:
    from datasets.arrow_writer import ArrowWriter

    write = ArrowWriter.finalize
    ArrowWriter.finalize = lambda self, *a, **k: (
        die() if "ref_chosen_logps" in str(self._features) else write(self, *a, **k)
    )


def _final_model() -> None:
    from transformers import Trainer

    save = Trainer.save_model

    def write_half(trainer: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if output_dir:  # a checkpoint's
            return save(trainer, output_dir, _internal_call)
        (Path(trainer.args.output_dir) / "model.safetensors").write_bytes(b"half")
        return die()

    Trainer.save_model = write_half


KILLED = {
    "in the sixth step": _sixth_step,
    **{
        f"while {name} is written": partial(_half_of, name)
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    },
    "before a checkpoint is sealed": _before_the_seal,
    "while an old checkpoint is deleted": _half_deleted,
    "while reference log-probs are computed": _reference_pass,
    "while they are cached": _reference_cache,
    "while the final model is written": _final_model,
}


def _run(prepare: Callable | None, script: str, argv: list[str], output: str, environment: dict[str, str]) -> None:
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os.environ.update(environment)
    import datasets.config
    import torch

    from tinydpo.errors import report_errors

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(output).parent / "cache"  # with no reference log-probs of another run
    if prepare:
        prepare()
    with report_errors():
        importlib.import_module(script).main(argv)


def start(
    script: str, argv: list[Any], output: Path, prepare: Callable | None = None, **environment: str
) -> multiprocessing.Process:
    """Start a script; `output` gets what it prints, `prepare` runs before it in its process."""
    argv = [str(part) for part in argv]
    child = SERVER.Process(target=_run, args=(prepare, script, argv, str(output), environment))
    child.start()
    return child


def run(script: str, argv: list[Any], output: Path, prepare: Callable | None = None, **environment: str) -> int:
    """`start`, and its exit code when it has ended (-9 for SIGKILL)."""
    child = start(script, argv, output, prepare, **environment)
    child.join(120)
    return child.exitcode
