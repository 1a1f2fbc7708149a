"""Losses and metrics that are one value however pairs come in batches and over however many processes.

TRL's are means over a micro-batch, which it averages as if all held as much: a last one of one pair counts like one of
sixteen, and where a loss is a mean over tokens, short answers count more in small batches. Here each such mean has the
weight of what it is a mean over, summed over an optimizer step (the loss), or all since the log before (metrics), in
all processes. accelerate fills the last batches of an epoch with rows from its start; here no row comes twice.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from accelerate import data_loader
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

SPARE = "spare"  # marks a batch that counts for nothing
PAIRS, CHOSEN, REJECTED, ANSWERS = "pairs", "chosen", "rejected", "answers"  # the last three are tokens


class NoRowTwice(data_loader.BatchSamplerShard):
    """A process's share of the batches; where others have one more, a row to keep pace with them, for each of them
    waits for all to compute."""

    @property
    def ends_spare(self) -> bool:
        """Whether the last batch of this process is none of its own."""
        own = not (self.split_batches or self.drop_last)
        return own and 0 < len(self.batch_sampler) % self.num_processes <= self.process_index

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rows of each batch."""
        if self.split_batches or self.drop_last:
            yield from super().__iter__()
            return
        first = None
        for number, batch in enumerate(self.batch_sampler):
            first = first or batch[:1]
            if number % self.num_processes == self.process_index:
                yield batch
        if self.ends_spare:
            yield first


class CountsAlike:
    """For a TRL trainer: each pair (SFT: each token) of an optimizer step, and of a log's metrics, counts alike."""

    unit: str  # what a metric is a mean over, where `units` does not say otherwise
    units: ClassVar[dict[str, str]] = {}
    extremes: ClassVar[dict[str, Callable]] = {}  # metrics that are no means: how two of them become one

    def __init__(self, *args: Any, **kwargs: Any):
        """TRL's own arguments."""
        super().__init__(*args, **kwargs)
        self._tallies: dict[str, Counter] = {"train": Counter(), "eval": Counter()}
        self._extremes: dict[str, dict[str, float]] = {"train": {}, "eval": {}}

    def count(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor | int]:
        """How much of each unit a batch holds."""
        raise NotImplementedError

    def weighted(self, loss: torch.Tensor, counts: dict[str, Any], step: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """A batch's loss as it enters its optimizer step, of which `step` is what transformers counted; in evaluation,
        where that is None, its mean, and the means that this is the sum of, by unit."""
        raise NotImplementedError

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        with patch.object(data_loader, "BatchSamplerShard", NoRowTwice):
            return super()._get_dataloader(*args, **kwargs)

    def _is_spare(self) -> bool:
        """Whether the batch that the loader gave last only keeps pace with other processes."""
        state = self.accelerator.gradient_state
        if not (state.in_dataloader and state.end_of_dataloader):
            return False
        shard = state.active_dataloader.batch_sampler
        if isinstance(shard, data_loader.SkipBatchSampler):  # a run that goes on
            shard = shard.batch_sampler
        return isinstance(shard, NoRowTwice) and shard.ends_spare

    def get_batch_samples(self, epoch_iterator: Iterator[dict[str, Any]], *args: Any) -> tuple[list, Any]:
        """Those of transformers, with a mark on the batch that counts for nothing."""

        def marked() -> Iterator[dict[str, Any]]:
            for batch in epoch_iterator:
                yield batch | {SPARE: True} if self._is_spare() else batch

        return super().get_batch_samples(marked(), *args)

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's, on a batch that may count for nothing."""
        return super().prediction_step(model, inputs | {SPARE: self._is_spare()}, *args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss, weighted; its metrics stay in this process, with their weights, until the next log."""
        mode, before = "train" if self.model.training else "eval", self._total_train_tokens
        inputs = dict(inputs)
        spare, counts = inputs.pop(SPARE, False), self.count(inputs)
        mine = {name: lambda tensor: tensor for name in ("gather", "gather_for_metrics")}
        with patch.multiple(self.accelerator, **mine):
            given = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        step = num_items_in_batch if mode == "train" else None
        loss, parts = self.weighted(given[0] if return_outputs else given, counts, step)
        metrics = {name: values[-1] for name, values in self._metrics[mode].items() if name != "num_tokens"}
        self._metrics[mode].clear()
        if spare:
            loss, self._total_train_tokens = loss * 0, before
        else:
            weights = {unit: float(count) for unit, count in counts.items()}
            for name in self.extremes:
                self._widen(self._extremes[mode], name, metrics.pop(name))
            means = [(name, self.units.get(name, self.unit), value) for name, value in metrics.items()]
            if mode == "eval":  # a training step's loss is transformers' to log
                means += [("loss", unit, float(value)) for unit, value in parts.items()]
            tally = self._tallies[mode]
            tally.update(weights)
            tally.update({(name, unit): value * weights[unit] for name, unit, value in means})
        return (loss, given[1]) if return_outputs else loss

    def _in_step(self, batches: list[dict[str, Any]], device: torch.device, *units: str) -> torch.Tensor:
        """How much of each unit an optimizer step holds, as a process has it on average, (units,)."""
        counts = [self.count(batch) for batch in batches if SPARE not in batch]
        totals = [sum(count[unit] for count in counts) for unit in units]
        totals = torch.stack([torch.as_tensor(total, device=device, dtype=torch.float32) for total in totals])
        return self.accelerator.reduce(totals, "mean")

    def _widen(self, known: dict[str, float], name: str, value: float) -> None:
        known[name] = self.extremes[name](known.get(name, value), value)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's, with each metric (evaluation: and the loss) as one mean over all processes' pairs or tokens."""
        mode = "train" if self.model.training else "eval"
        tally, extremes, tokens = Counter(), {}, 0
        mine = (self._tallies[mode], self._extremes[mode], self._total_train_tokens)
        for theirs, bounds, seen in gather_object([mine]):
            tally.update(theirs)
            tokens += seen
            for name, value in bounds.items():
                self._widen(extremes, name, value)
        means: dict[str, float] = defaultdict(float)
        for key in [key for key in tally if isinstance(key, tuple)]:
            means[key[0]] += tally[key] / (tally[key[1]] or 1)  # a loss can have a mean of pairs and one of tokens
        if means:
            means["num_tokens"] = tokens
        self._metrics[mode].update({name: [value] for name, value in (means | extremes).items()})
        self._tallies[mode].clear()
        self._extremes[mode] = {}
        super().log(logs, *args, **kwargs)


class PairsAlike(CountsAlike):
    """`CountsAlike` for `DPOTrainer`: a pair's loss counts as every other's, and in the sft loss a chosen token's."""

    loss_is_scaled_for_ga = True
    unit = PAIRS
    units: ClassVar[dict[str, str]] = {
        "entropy": ANSWERS, "logits/chosen": CHOSEN, "logits/rejected": REJECTED, "mean_token_accuracy": CHOSEN,
    }  # fmt: skip

    def __init__(self, *args: Any, **kwargs: Any):
        """TRL's own arguments."""
        super().__init__(*args, **kwargs)
        # TRL's sum over its losses then keeps apart what is a mean over pairs, over tokens, and (of models with
        # experts) over neither.
        self.loss_weights = [
            torch.tensor([0.0, weight, 0.0] if loss == "sft" else [weight, 0.0, 0.0], device=self.accelerator.device)
            for loss, weight in zip(self.loss_types, self.loss_weights, strict=True)
        ]

    def count(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor | int]:
        """Pairs, and tokens of their answers."""
        chosen, rejected = (half.sum() for half in inputs["completion_mask"][:, 1:].chunk(2))
        pairs = len(inputs["completion_mask"]) // 2
        return {PAIRS: pairs, CHOSEN: chosen, REJECTED: rejected, ANSWERS: chosen + rejected}

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Pairs and chosen tokens, (2,)."""
        return self._in_step(batch_samples, device, PAIRS, CHOSEN)

    def weighted(self, loss: torch.Tensor, counts: dict[str, Any], step: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """See `CountsAlike`; `loss` is (3,): the means over pairs, over tokens, over neither."""
        rest = loss[2]
        parts = loss[:2] - rest
        if step is None:
            return loss.sum() - 2 * rest, {PAIRS: parts[0] + rest, CHOSEN: parts[1]}
        share = torch.stack([torch.as_tensor(counts[unit], device=step.device) for unit in (PAIRS, CHOSEN)]) / step
        return (parts * share).sum() + rest / self.current_gradient_accumulation_steps, {}


class RewardsAlike(CountsAlike):
    """`CountsAlike` for `RewardTrainer`, whose loss is a mean over pairs."""

    loss_is_scaled_for_ga = True
    unit = PAIRS
    extremes: ClassVar[dict[str, Callable]] = {"min_reward": min, "max_reward": max}

    def count(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor | int]:
        """Pairs."""
        return {PAIRS: len(inputs["input_ids"]) // 2}

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Pairs, ()."""
        return self._in_step(batch_samples, device, PAIRS)[0]

    def weighted(self, loss: torch.Tensor, counts: dict[str, Any], step: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """See `CountsAlike`."""
        return (loss, {PAIRS: loss}) if step is None else (loss * counts[PAIRS] / step, {})


class TokensAlike(CountsAlike):
    """`CountsAlike` for `SFTTrainer`, whose loss counts the tokens of a step itself."""

    unit = "tokens"

    def __init__(self, *args: Any, **kwargs: Any):
        """TRL's own arguments."""
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # read as: count the tokens of a step; the loss is TRL's for all models

    def count(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor | int]:
        """Tokens that carry loss."""
        return {self.unit: (inputs["labels"][:, 1:] != -100).sum()}

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        nothing = {"labels": torch.full((1, 2), -100)}
        counted = [nothing if SPARE in batch else batch for batch in batch_samples]
        return super()._get_num_items_in_batch(counted, device)

    def weighted(self, loss: torch.Tensor, counts: dict[str, Any], step: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """See `CountsAlike`."""
        return loss, {self.unit: loss}
