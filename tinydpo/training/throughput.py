"""How fast a run is, in its log: pairs and tokens a second, padding, and on known GPUs the share of their peak (MFU).

Counted from what the host knows of each batch, or the device tells when the loss is read, and timed between the ends
of steps: no device is waited for. The first step, which warms up, and what lies between steps (evaluation,
checkpoints) are left out. A run that went on from a checkpoint tells of what it trained since.
"""

import time
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback


class Counts(NamedTuple):
    """What a process's training steps computed: pairs (SFT: examples), tokens with each prompt once, those that carry
    a loss, and token positions, padding included (0 without packed rows, where TRL computes prompts twice)."""

    pairs: int | torch.Tensor = 0  # a scalar on the device where only that knows, read when the loss is
    tokens: int | torch.Tensor = 0
    scored: int | torch.Tensor = 0
    positions: int = 0

    def plus(self, other: "Counts", sign: int = 1) -> "Counts":
        """The sum, or with sign -1 the difference."""
        return Counts(*(mine + sign * its for mine, its in zip(self, other, strict=True)))


def forward_flop(model: Any, tokens: float, scored: float) -> float:
    """FLOP of a forward pass: two a weight and token in the blocks, and in the LM head for the tokens it scores.

    The count of docs/performance.md ("The floor"); attention scores, about 1 % at 128 tokens, are left out.
    """
    head = getattr(model.get_output_embeddings(), "weight", None)  # none in a reward model
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    blocks = sum(_count_weights(weight) for weight in model.parameters() if id(weight) not in embeddings | {id(head)})
    return 2 * blocks * tokens + (0 if head is None else 2 * _count_weights(head) * scored)


def _count_weights(weight: torch.Tensor) -> int:
    return getattr(weight, "ds_numel", weight.numel())  # ZeRO-3 leaves none of it outside a gather


class Throughput(TrainerCallback):
    """Adds the rates since the log before to each entry of a trainer's log; `total` are those of the whole run.

    Args:
        trainer: counts its batches in `counted`; its processes' counts are added up.
    """

    def __init__(self, trainer: Any):
        """Nothing is counted yet."""
        self._trainer, self._since = trainer, None
        self._seconds = self._logged_seconds = 0.0
        self._start, self._logged = None, Counts()
        self.total: dict[str, float] = {}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Go on after an evaluation or a checkpoint."""
        self._since = self._since or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the step's time; the first one of this process only sets the start."""
        now = time.perf_counter()
        if self._start is None:
            self._start = self._logged = self._trainer.counted
        else:
            self._seconds += now - self._since
        self._since = now

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock until the next step."""
        self._since = None

    on_save = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Add the rates to what is logged, in every process."""
        if "loss" not in logs:
            return
        counted = self._trainer.counted
        rates = self._rates(counted.plus(self._logged, -1), self._seconds - self._logged_seconds)
        self._logged, self._logged_seconds = counted, self._seconds
        logs |= rates
        state.log_history[-1] |= rates

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """The whole run's rates, with the steps since the last log."""
        if self._start is not None:
            self.total = self._rates(self._trainer.counted.plus(self._start, -1), self._seconds)

    def _rates(self, counts: Counts, seconds: float) -> dict[str, float]:
        counts = gather_object([Counts(*map(int, counts))])
        pairs, tokens, scored, positions = map(sum, zip(*counts, strict=True))
        if not pairs or not seconds:
            return {}
        rates = {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds}
        if positions:
            rates["padding"] = 1 - tokens / positions
        if peak := self._peak():
            model = self._trainer.accelerator.unwrap_model(self._trainer.model)
            rates["mfu"] = self._passes() * forward_flop(model, tokens, scored) / seconds / peak
        return {name: float(f"{rate:.4g}") for name, rate in rates.items()}

    def _passes(self) -> int:
        """Forward passes' worth of a step: one, two for the backward pass, and the reference's where it runs along."""
        return 3 + (getattr(self._trainer, "precompute_ref_logps", None) is False)

    def _peak(self) -> float | None:
        """FLOP a second of all GPUs at their data sheets' peak; None where it is unknown or not all weights train."""
        from trl.trainer.utils import get_peak_flops

        args, model = self._trainer.args, self._trainer.model
        if args.device.type != "cuda" or hasattr(model, "peft_config"):
            return None
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        peak = get_peak_flops(torch.cuda.get_device_name(args.device), dtype)
        return peak and peak * args.world_size
