"""How training ends before its last step: on Ctrl-C or SIGTERM, with its launcher, or because it diverged.

transformers' own `enable_jit_checkpoint` waits three seconds in each process by itself, so that several processes stop
at different steps and deadlock. Here they agree at the end of each step.
"""

import atexit
import math
import multiprocessing
import os
import signal
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from tinydpo.errors import UserError, get_rank

# Read when this module is imported, before the reference pass: the launcher may be gone when training begins.
LAUNCHER_PID = os.getppid()
LAUNCHER_VARIABLES = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}  # set by accelerate launch and torchrun
# A loss above this many times the first logged one (this many nats, where that was below one) does not recover.
DIVERGENCE_FACTOR = 100.0


class StopOnSignal(TrainerCallback):
    """Saves and stops after the step in which any process got Ctrl-C, SIGTERM (preemption) or lost its launcher."""

    def __init__(self):
        self.reason = ""  # what stopped the run, in words
        self.signal = signal.SIGTERM  # by which the exit status says so
        self._has_launcher = not LAUNCHER_VARIABLES.isdisjoint(os.environ)
        self._group = None
        self._previous_handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, self._handle_sigterm)
        signal.signal(signal.SIGINT, self._handle_ctrl_c)
        # Slurm and accelerate's launcher signal every process of a run. Data loader workers inherit this block: one
        # that ended would take its process down before it has saved.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        if args.world_size > 1:
            # Its own group on the CPU, so that no step waits for a GPU. It does not inherit --ddp_timeout by itself.
            self._group = dist.new_group(backend="gloo", timeout=args.ddp_timeout_delta)

    def _handle_sigterm(self, *_: Any) -> None:
        self.reason = self.reason or "SIGTERM"

    def _handle_ctrl_c(self, *_: Any) -> None:
        if self.reason:
            raise KeyboardInterrupt
        self.reason = "Ctrl-C"
        self.signal = signal.SIGINT
        if get_rank() == 0 and get_worker_info() is None:  # data loader workers inherit this handler
            # accelerate's launcher ends at once, and a second Ctrl-C no longer comes here.
            hint = "wait for the line that names it" if self._has_launcher else "Ctrl-C again ends the run at once"
            print(f"\nCtrl-C: saving a checkpoint after this step; {hint}", file=sys.__stderr__, flush=True)

    def restore_handlers(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if signal.SIGTERM in signal.sigpending():
            self._handle_sigterm()
        if self._has_launcher and os.getppid() != LAUNCHER_PID:  # orphans get a new parent
            self.reason = self.reason or "the launcher's end"
        stop = torch.tensor(bool(self.reason), dtype=torch.int32)
        if self._group:
            dist.all_reduce(stop, dist.ReduceOp.MAX, group=self._group)
        if stop:
            self.reason = self.reason or "SIGTERM to another process"
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False  # the sender of the signal may not wait for it
            args.save_total_limit = None  # at the end of training transformers may delete all but the best checkpoint

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop and self.reason:  # after the step that saved already
            control.should_save = False
            control.should_evaluate = False


class StopOnDivergence(TrainerCallback):
    """Ends a run whose loss is no longer finite, or a hundred times its first one."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        loss = logs["loss"]
        first = next(entry["loss"] for entry in state.log_history if "loss" in entry)  # before a resume, too
        if not math.isfinite(loss) or abs(loss) > DIVERGENCE_FACTOR * max(1.0, abs(first)):
            raise UserError(
                f"the loss is {loss:g} at step {state.global_step}: training has diverged; lower --learning_rate (now "
                f"{args.learning_rate:g}) and pass another --output_dir"
            )


@atexit.register
def kill_workers() -> None:
    """After an error workers may be left. Python would end them with SIGTERM, which they block, and wait forever."""
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would call their end an error
    for worker in workers:
        worker.kill()
