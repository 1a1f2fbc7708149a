"""How training may end before its last step: told to stop, or diverged.

transformers' own `enable_jit_checkpoint` waits three seconds in each process by itself, so that several processes stop
at different steps and wait for each other for ever. Here they agree at the end of each step.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinydpo.errors import UserError, iter_causes, print_stderr

DIVERGENCE_FACTOR = (
    100.0  # times the first logged loss, or nats where that was below one: no run comes back from there
)


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


class LearningCheck(TrainerCallback):
    """Looks at the weights before and after the first step whose learning rate is above 0, and never again.

    Raises:
        UserError: no trainable tensor changed.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._before: torch.Tensor | None = None
        self._done = False

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Before the forward pass: DeepSpeed takes the step inside the backward pass."""
        if not self._done and any(group["lr"] > 0 for group in optimizer.param_groups):
            self._before = _sums(model)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Compare; a step that fp16's loss scaling skipped was none."""
        if self._done or self._before is None or getattr(optimizer, "step_was_skipped", False):
            return
        self._done, changed = True, (_sums(model) != self._before).any().float()
        changed = changed.to(args.device)  # offloaded shards lie elsewhere
        if torch.distributed.is_initialized():  # each process may hold other shards
            torch.distributed.all_reduce(changed, torch.distributed.ReduceOp.MAX)
        if not changed:
            raise UserError(
                f"step {state.global_step} changed no weight: the gradients are zero, or learning_rate "
                f"{args.learning_rate} is too small a step for weights in this dtype; raise --learning_rate, pass "
                "--dtype float32, or leave out --load_in_4bit"
            )


@torch.no_grad()
def _sums(model: torch.nn.Module) -> torch.Tensor:
    """The sum of every trainable tensor (this process's part of it), without a copy of any."""
    parts = (get_local_shard(parameter) for parameter in model.parameters() if parameter.requires_grad)
    return torch.stack([part.sum(dtype=torch.float32 if part.is_mps else torch.float64) for part in parts])


def get_local_shard(parameter: torch.Tensor) -> torch.Tensor:
    """What of a parameter lies in this process: all of it, or a shard (ZeRO-3's `ds_tensor`, FSDP2's DTensor)."""
    shard = getattr(parameter, "ds_tensor", parameter)
    return shard.to_local() if hasattr(shard, "to_local") else shard


STARTED_BY = os.getppid()  # read at once: who starts a script may be gone before its first step
GLOO = "gloo/transport"  # its errors are plain RuntimeErrors that begin with the file in gloo's source
# What gloo and NCCL say of others, and not of a wrong setting on this machine.
GONE = ("closed", "reset", "broken pipe", "timed out", "timeout", "remote")


@contextlib.contextmanager
def report_lost_peers() -> Iterator[None]:
    """Around all that processes do together: end this one with a sentence and status 1 when another is gone.

    Gone is who closed its connections, as the system does for a killed process, or did not answer for `--ddp_timeout`
    seconds.
    """
    try:
        yield
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not (sign := find_lost_peer(error)):
            raise
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(5)  # one voice a machine: meanwhile the launcher ends the others
        reason = sign.splitlines()[0].partition(". ")[0]
        print_stderr(
            "error: another process of this run died or does not answer any more, its own log says why; run the same "
            f"command on every machine again: it goes on from the last checkpoint ({reason})"
        )
        os._exit(1)  # the orderly way out would wait for the lost process


def find_lost_peer(error: BaseException) -> str:
    """What the network said of another process that is gone, or "" where an error comes of something else."""
    from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

    for one in iter_causes(error):
        between = isinstance(one, (DistBackendError, DistNetworkError, DistStoreError)) or GLOO in str(one)
        if between and any(sign in str(one).lower() for sign in GONE):
            return str(one)
    return ""
