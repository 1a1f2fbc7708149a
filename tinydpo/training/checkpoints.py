"""Checkpoints that are complete or do not count.

transformers resumes from the highest-numbered folder, whatever is in it: a truncated file is a traceback, and a
missing optimizer silently changes the result. Here a checkpoint's last file, its manifest, lists all others
with their digests. A folder that does not match its manifest is set aside, and the one before it is used.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_model, save_model
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints

from tinydpo.errors import UserError
from tinydpo.files import hash_file, read_json, write_json

MANIFEST = "complete.json"
REFERENCE = "reference.safetensors"  # the weights of a reference that --sync_ref_model moves


class SafeCheckpointsMixin:
    """For a `Trainer`: writes manifests, deletes older checkpoints only after that, and saves only finite weights."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: TRL would write one at every checkpoint, and `card` writes it when there are results."""

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        state = super()._init_training_state(max_steps, steps_per_epoch, epochs, checkpoint, trial)
        epochs_trained, batches_to_skip = state
        if checkpoint:
            self._total_train_tokens = self.state.stateful_callbacks.get("num_tokens", 0)
            self._load_synced_reference(Path(checkpoint) / REFERENCE)
        if self.state.global_step >= max_steps:
            epochs_trained = epochs  # inside an epoch, transformers would train one step more
        return epochs_trained, batches_to_skip

    def _load_synced_reference(self, file: Path) -> None:
        if not getattr(self.args, "sync_ref_model", False):
            return
        if not file.exists():
            raise UserError(
                f"{file.parent} does not hold the reference that --sync_ref_model has moved (none does under FSDP or "
                "DeepSpeed); pass another --output_dir to start again"
            )
        load_model(self.accelerator.unwrap_model(self.ref_model), file)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:
            raise UserError(
                f"push_to_hub is true, but the Hub repository could not be created ({error}); log in with `hf auth "
                "login`, check --hub_model_id and the network, or drop --push_to_hub"
            ) from error

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.check_finite_weights()
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / MANIFEST).unlink(missing_ok=True)
        # transformers would delete old checkpoints before this one is complete.
        limit = self.args.save_total_limit
        self.args.save_total_limit = None
        self.state.stateful_callbacks["num_tokens"] = self._total_train_tokens  # TRL would count from 0 after a resume
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save and getattr(self.args, "sync_ref_model", False) and not is_sharded:
                save_model(self.accelerator.unwrap_model(self.ref_model), str(folder / REFERENCE))
        except Exception:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)  # useless, and on a full disk the next try needs its space
            raise
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.args.should_save:
            write_json(folder / MANIFEST, hash_files(folder))
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint)

    def check_finite_weights(self) -> None:
        """Refuse to save weights that hold infinities or NaN (UserError, in all processes)."""
        is_finite = True
        for parameter in self.model.parameters():
            # What this process holds of it: all, or a shard (ZeRO-3's `ds_tensor`, FSDP2's DTensor).
            shard = getattr(parameter, "ds_tensor", parameter)
            shard = shard.to_local() if hasattr(shard, "to_local") else shard
            if parameter.requires_grad and not shard.isfinite().all():
                is_finite = False
        if not all(gather_object([is_finite])):
            raise UserError(
                f"at step {self.state.global_step} the weights hold infinities or NaN and are not saved; lower "
                "--learning_rate and pass another --output_dir"
            )


def find_resume_checkpoint(trainer: Any) -> str | None:
    """The run's last complete checkpoint, the same in all processes; None without one."""
    checkpoint = None
    if trainer.is_world_process_zero():
        checkpoint = find_last_complete(Path(trainer.args.output_dir))
    checkpoint = broadcast_object_list([checkpoint])[0]
    if checkpoint is None:
        return None
    if not all(gather_object([Path(checkpoint).is_dir()])):
        raise UserError(
            f"not every machine of this run has {checkpoint}, from which it resumes; they need one shared --output_dir"
        )
    trainer.accelerator.print(f"Resuming from {checkpoint}.")
    return checkpoint


def find_last_complete(run: Path) -> str | None:
    """The last complete checkpoint of a run, or None.

    Broken ones after it are set aside. They are kept for inspection until the next start.
    """
    for earlier in run.glob("_broken-*"):
        shutil.rmtree(earlier)
    for path in reversed(sort_checkpoints(str(run))):
        fault = find_fault(Path(path))
        if not fault:
            return path
        # Left there, it would count as the newest when old ones are deleted. The Hub's clients skip an underscore.
        aside = run / f"_broken-{Path(path).name}"
        Path(path).rename(aside)
        print(f"warning: {path} cannot be resumed from ({fault}); set aside as {aside.name}", file=sys.stderr)
    return None


def find_fault(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or "" if it is complete."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
    except UserError:
        return f"{MANIFEST} is damaged"
    if not manifest:
        return "it was not written to its end"
    digests = hash_files(checkpoint)
    for name, digest in manifest.items():
        if digests.get(name) != digest:
            return f"{name} is missing or damaged"
    return ""


def hash_files(checkpoint: Path) -> dict[str, str]:
    """Every file of a checkpoint except its manifest, with its SHA-256."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and MANIFEST not in path.name]
    return {path.relative_to(checkpoint).as_posix(): hash_file(path) for path in files}
