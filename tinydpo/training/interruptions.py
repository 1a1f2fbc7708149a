"""How training may end before its last step: told to stop, or diverged.

transformers' own `enable_jit_checkpoint` waits three seconds in each process by itself, so that several processes stop
at different steps and wait for each other for ever. Here they agree at the end of each step.
"""

import math
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinydpo.errors import UserError
from tinydpo.training.peers import STARTED_BY

DIVERGENCE_FACTOR = 100.0  # times the first logged loss, or nats where that was below one: no run comes back from there


class StopOnSignal(TrainerCallback):
    """Saves and stops after the step in which any process got SIGTERM (preemption) or lost its launcher."""

    def __init__(self):
        """Nothing is watched before training begins: until then SIGTERM ends the process as always."""
        self.reason = ""
        launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & set(os.environ)
        self._launcher = STARTED_BY if launched else None
        self._group, self._before, self._stopping = None, signal.getsignal(signal.SIGTERM), False

    def _told(self, number: int, frame: FrameType | None) -> None:
        self.reason = "SIGTERM"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch for SIGTERM from here on."""
        self._before = signal.signal(signal.SIGTERM, self._told)
        if args.world_size > 1:
            # On the CPU: a GPU is not waited for. The time limit is not handed down by itself.
            self._group = dist.new_group(backend="gloo", timeout=args.ddp_timeout_delta)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop all processes after the same step."""
        if self._launcher and os.getppid() != self._launcher:
            self.reason = self.reason or "the launcher's end"
        stop = torch.tensor(bool(self.reason), dtype=torch.int32)
        if self._group:
            dist.all_reduce(stop, dist.ReduceOp.MAX, group=self._group)
        if stop:
            self.reason = self.reason or "SIGTERM to another process"
            self._stopping = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # whoever sent the signal may not wait
            args.save_total_limit = None  # transformers may delete all but the best at the end

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Comes after a stop too: what an epoch's end asks for has been done, or must wait."""
        if self._stopping:
            control.should_save = control.should_evaluate = False

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """SIGTERM ends the process again: what follows can be made again from the last checkpoint."""
        signal.signal(signal.SIGTERM, self._before)


class StopOnDivergence(TrainerCallback):
    """Ends a run whose loss is no number any more, or a hundred times that of its start."""

    def __init__(self):
        """The first loss comes with the first log."""
        self._bound = math.inf

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Read the logged loss, a mean over processes and steps (UserError: it is not finite, or it exploded)."""
        if (loss := (logs or {}).get("loss")) is None:
            return
        if not abs(loss) <= self._bound or not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss:g} at step {state.global_step}: training has diverged; lower --learning_rate (now "
                f"{args.learning_rate:g}) and pass another --output_dir"
            )
        if self._bound == math.inf:
            self._bound = DIVERGENCE_FACTOR * max(1.0, abs(loss))


def ignore_group_sigterm(before: Callable[[int], None] | None, worker: int) -> None:
    """For a data loader's worker: end on SIGTERM from the process it works for, not from whoever ends the run.

    A signal to all processes of a run, as Slurm's and the launcher's are, would otherwise end the workers while their
    process still wants to save, and that one with them.

    Args:
        before: the loader's own `worker_init_fn`.
        worker: the worker's number.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    if before:
        before(worker)
