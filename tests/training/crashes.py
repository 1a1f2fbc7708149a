"""Runs of the scripts in processes of their own, which can be killed at a chosen place or sent a signal.

Children are forked from a server that has imported everything and computed nothing, so that each costs a second.
"""

import importlib
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["trl.trainer.dpo_trainer", "trl.trainer.sft_trainer", "trl.trainer.reward_trainer", "tinydpo.training.train"]
)


def die() -> None:
    """As `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_sixth_step() -> None:
    """Two steps after the checkpoint of the fourth, in the middle of an epoch."""
    from transformers import Trainer

    step = Trainer.training_step

    def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 5:
            die()
        return step(trainer, *args, **kwargs)

    Trainer.training_step = training_step


def die_in_second_checkpoint() -> None:
    """With half of its optimizer's file on disk."""
    import torch

    save = torch.save

    def save_half(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(value, path, *args, **kwargs)
        if Path(path).parts[-2:] == ("checkpoint-8", "optimizer.pt"):
            os.truncate(path, Path(path).stat().st_size // 2)
            die()

    torch.save = save_half


def die_in_reference_pass() -> None:
    """In its third batch."""
    from trl import DPOTrainer

    compute = DPOTrainer.compute_ref_log_probs
    batches = []

    def compute_ref_log_probs(*args: Any) -> Any:
        batches.append(None)
        if len(batches) == 3:
            die()
        return compute(*args)

    DPOTrainer.compute_ref_log_probs = compute_ref_log_probs


def die_before_results() -> None:
    """When the final model is written and nothing else."""
    from transformers import Trainer

    Trainer.save_state = lambda trainer: die()


def _run(prepare: Callable | None, script: str, argv: list[str], output: str) -> None:
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import datasets.config
    import torch

    from tinydpo.errors import report_errors

    torch.set_num_threads(1)
    datasets.config.HF_DATASETS_CACHE = Path(output).parent / "cache"  # with no reference log-probs of another run
    if prepare:
        prepare()
    with report_errors():
        importlib.import_module(script).main(argv)


def start(script: str, argv: list[Any], output: Path, prepare: Callable | None = None) -> multiprocessing.Process:
    """Start a script; `output` gets what it prints, `prepare` runs before it in its process."""
    child = SERVER.Process(target=_run, args=(prepare, script, [str(part) for part in argv], str(output)))
    child.start()
    return child
