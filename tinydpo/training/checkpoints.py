"""Checkpoints that are whole or do not count: sealed when every file is written, and checked against the seal.

transformers resumes from the highest-numbered folder, whatever is in it: a truncated file is a traceback, a missing
optimizer silently changes the result. Here a checkpoint's last file, written when all processes are done, lists every
other one with its size. A folder that does not match its list is set aside for the one before it.
"""

import errno
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from tinydpo.errors import UserError, is_disk_full
from tinydpo.files import write_json
from tinydpo.training.callbacks import get_local_shard, ignore_group_sigterm

SEAL = "complete.json"


class SealedCheckpointsMixin:
    """For a `Trainer`: seals each checkpoint, deletes older ones only then, and saves no NaN or infinite weights.

    Its loaders' workers outlive a signal that ends the run, so that it can still save.
    """

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader = super()._get_dataloader(*args, **kwargs)
        workers = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper leaves starting them to this one
        workers.worker_init_fn = partial(ignore_group_sigterm, workers.worker_init_fn)
        return loader

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Not TRL's, at every checkpoint: `card` writes one when there are results to tell."""

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        finite = all(get_local_shard(p).isfinite().all() for p in model.parameters() if p.requires_grad)
        if not all(gather_object([bool(finite)])):  # told alike to all: each may hold other parts of the model
            raise UserError(
                f"at step {self.state.global_step} the weights hold infinities or NaN and are not saved; lower "
                "--learning_rate and pass another --output_dir"
            )
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / SEAL).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if not is_disk_full(error):
                raise
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # of no use, and the next try needs its space
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error  # not all say where
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process has a file of its own in there
        if self.args.should_save:
            write_json(folder / SEAL, list_files(folder))
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint, use_mtime=True)


def find_resume_checkpoint(trainer: Any) -> str | None:
    """The checkpoint asked for, else the run's last whole one; the same in all processes, all of which must see it.

    Raises:
        UserError: it is not whole, or not in this process's file system.
    """
    asked, main = trainer.args.resume_from_checkpoint, trainer.is_world_process_zero()
    wrong = next(filter(None, gather_object([find_fault(Path(asked)) if asked else ""])), "")
    if wrong:
        raise UserError(f"--resume_from_checkpoint {asked}: {wrong}; leave it out to go on from the last whole one")
    found = broadcast_object_list([(asked or find_last_complete(Path(trainer.args.output_dir))) if main else None])[0]
    if found and not all(gather_object([Path(found).is_dir()])):
        raise UserError(
            f"not every machine of this run has {found}, from which it goes on; they need one shared --output_dir"
        )
    if found:
        trainer.accelerator.print(f"Going on from {found}.")
    return found


def list_files(checkpoint: Path) -> dict[str, int]:
    """Every file of a checkpoint but its seal, with its size in bytes."""
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and SEAL not in path.name)
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}


def find_fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or "" if it is whole."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        sealed = json.loads((checkpoint / SEAL).read_text())
    except FileNotFoundError:
        return "its writing was cut short"
    except (ValueError, OSError):
        return f"{SEAL} is damaged"
    there = list_files(checkpoint)
    for name, size in sealed.items():
        if there.get(name) != size:
            return f"{name} is {'damaged' if name in there else 'missing'}"
    return ""


def find_last_complete(run: Path) -> str | None:
    """The last checkpoint of a run that is whole, or None. Later ones, with a warning, are renamed out of the way.

    Left where they are, they would count as the newest when older checkpoints are deleted. Those set aside by an
    earlier start are deleted then: kill after kill they would fill the disk. (The Hub's clients leave out what starts
    with an underscore.)
    """
    whole, broken = None, {}
    for checkpoint in map(Path, reversed(sort_checkpoints(str(run)))):
        if not (told := find_fault(checkpoint)):
            whole = str(checkpoint)
            break
        broken[checkpoint] = told
    if broken:
        for earlier in run.glob("_broken-*"):
            shutil.rmtree(earlier)
    for checkpoint, told in broken.items():
        aside = checkpoint.with_name(f"_broken-{checkpoint.name}")
        checkpoint.rename(aside)
        print(f"warning: {checkpoint} cannot be resumed from ({told}); set aside as {aside.name}", file=sys.stderr)
    return whole
