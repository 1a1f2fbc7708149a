"""A run that learns nothing stops at its first step instead of after its last.

Gradients can be zero without a word (bitsandbytes on some CPUs, see `adapters`), and steps can be too small for the
weights' precision; the loss then moves with the batches and looks like training.
"""

from typing import Any

import torch
from transformers import TrainerCallback

from tinydpo.errors import UserError


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
