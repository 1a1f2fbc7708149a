"""How fast a run is, in its log: pairs and tokens per second, padding, and on known GPUs the share of peak (MFU).

Counts come from the trainer, times from the ends of steps, so that no device is waited for. The first step, which
warms up, and what is between steps (evaluation, checkpoints) do not count. A resumed run starts at zero.
"""

import time
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback


class Counts(NamedTuple):
    """What a process's training steps computed; tensors are scalars on the device, read only when the loss is."""

    pairs: int | torch.Tensor = 0  # SFT: examples
    tokens: int | torch.Tensor = 0  # each prompt once
    scored: int | torch.Tensor = 0  # tokens that carry a loss
    positions: int = 0  # with padding; 0 without packed rows, where TRL computes prompts twice


def forward_flop(model: Any, tokens: float, scored: float) -> float:
    """FLOP of a forward pass: two per weight and token in the blocks, and in the LM head for the tokens it scores.

    The count of docs/performance.md ("The floor"); attention scores, about 1 % at 128 tokens, are left out.
    """
    head = getattr(model.get_output_embeddings(), "weight", None)  # a reward model has no LM head
    outside = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)} | {id(head)}

    def count(weight: torch.Tensor) -> int:
        return getattr(weight, "ds_numel", weight.numel())  # under ZeRO-3 a weight is empty outside a gather

    flop = 2 * tokens * sum(count(weight) for weight in model.parameters() if id(weight) not in outside)
    if head is not None:
        flop += 2 * scored * count(head)
    return flop


def warn_of_long_run(stage: str, training: Any, model: Any, pairs: Dataset) -> None:
    """Print how long a run takes at least on this CPU, if that is hours: its FLOP at the speed of matrix products.

    `training` are TRL's arguments; `model` may hold shapes alone; the first fitted pairs stand for all.
    """
    first = pairs[:1000]
    columns = ["chosen_ids"] if stage == "sft" else ["chosen_ids", "rejected_ids"]
    scored = sum(len(ids) for column in columns for ids in first[column]) / len(first["prompt_ids"])
    prompt = sum(len(ids) for ids in first["prompt_ids"]) / len(first["prompt_ids"])
    share = len(pairs) / training.world_size  # of each process
    drawn = training.num_train_epochs * share
    if training.max_steps > 0:
        drawn = training.max_steps * training.train_batch_size * training.gradient_accumulation_steps
    passes = 3 * drawn  # forward, and backward as two
    if stage == "dpo":
        passes += min(drawn, share)  # the reference, once
    flop = passes * forward_flop(model, prompt + scored, scored)

    matrix = torch.ones(1024, 1024, dtype=torch.bfloat16 if training.bf16 else torch.float32)
    matrix @ matrix  # warm up
    start = time.perf_counter()
    for _ in range(4):
        matrix @ matrix
    hours = flop / (4 * 2 * 1024**3) * (time.perf_counter() - start) / 3600
    if hours > 2:
        print(
            f"This takes at least {hours:,.0f} hours on this CPU. Use a GPU, or a smaller model and fewer pairs: "
            'RECIPE=recipes/smollm2-hh ARGS="--max_train_pairs 2000".'
        )


class Throughput(TrainerCallback):
    """Adds the rates since the previous log, of all processes together, to each entry of a trainer's log."""

    def __init__(self, trainer: Any):
        self.total: dict[str, float] = {}  # the rates of the whole run
        self._trainer = trainer
        self._step_start: float | None = None  # None while the clock is stopped
        self._seconds = 0.0
        self._first_counts: Counts | None = None  # at the end of the first step
        self._logged_counts = Counts()
        self._logged_seconds = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._step_start is None:
            self._step_start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self._first_counts is None:
            self._first_counts = self._logged_counts = self._trainer.counted
        else:
            self._seconds += now - self._step_start
        self._step_start = now

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._step_start = None  # stop the clock until the next step

    on_save = on_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        rates = self._compute_rates(self._logged_counts, self._seconds - self._logged_seconds)
        self._logged_counts = self._trainer.counted
        self._logged_seconds = self._seconds
        logs.update(rates)
        state.log_history[-1].update(rates)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if self._first_counts is not None:
            self.total = self._compute_rates(self._first_counts, self._seconds)

    def _compute_rates(self, before: Counts, seconds: float) -> dict[str, float]:
        computed = [int(now) - int(then) for now, then in zip(self._trainer.counted, before, strict=True)]
        pairs, tokens, scored, positions = (sum(column) for column in zip(*gather_object([computed]), strict=True))
        if not pairs or not seconds:
            return {}
        rates = {"pairs_per_second": pairs / seconds, "tokens_per_second": tokens / seconds}
        if positions:
            rates["padding"] = 1 - tokens / positions
        peak = self._get_peak_flops()
        if peak:
            model = self._trainer.accelerator.unwrap_model(self._trainer.model)
            # The backward pass costs two forward passes; the reference costs one where it runs at every step.
            passes = 4 if getattr(self._trainer, "precompute_ref_logps", None) is False else 3
            rates["mfu"] = passes * forward_flop(model, tokens, scored) / seconds / peak
        return {name: float(f"{rate:.4g}") for name, rate in rates.items()}

    def _get_peak_flops(self) -> float | None:
        """FLOP per second of all GPUs by their data sheets; None where that is unknown or not all weights train."""
        from trl.trainer.utils import get_peak_flops

        args = self._trainer.args
        if args.device.type != "cuda" or hasattr(self._trainer.model, "peft_config"):
            return None
        dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
        peak = get_peak_flops(torch.cuda.get_device_name(args.device), dtype)
        return peak * args.world_size if peak else None
