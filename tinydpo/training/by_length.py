"""`--train_sampling_strategy group_by_length`: batches of rows about as long, by the tokens that a row really costs.

transformers looks for a column of lengths, or counts `input_ids`: pairs have neither. And it draws from the process's
random state, so that a run that goes on in its second epoch would train on other batches.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices


class LengthSampler(LengthGroupedSampler):
    """transformers', drawn anew from `seed` in each `epoch`: alike in all processes, and after an interruption."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int, epoch: Callable[[], int]):
        """Args as transformers'; `epoch` is asked at each start."""
        super().__init__(batch_size, lengths=lengths)
        self._seed, self._epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        """The rows of one epoch by their index."""
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


class ByLength:
    """For a TRL trainer: its sampler by length, with `lengths` counted from the trainer's own rows."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        args, rows = self.args, train_dataset or self.train_dataset
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = args.train_batch_size * args.gradient_accumulation_steps
        seed = args.seed if args.data_seed is None else args.data_seed
        return LengthSampler(batch, self.lengths(rows), seed, lambda: int(self.state.epoch or 0))

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Any:
        args = self.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return LengthSampler(args.eval_batch_size, self.lengths(eval_dataset), args.seed, lambda: 0)

    def lengths(self, rows: Dataset) -> list[int]:
        """How many tokens each row costs."""
        table = rows.with_format("arrow")[:]
        return self.cost(lambda column: pc.list_value_length(table[column]).to_numpy()).tolist()

    def cost(self, tokens: Callable[[str], np.ndarray]) -> np.ndarray:
        """Tokens that each row costs, of the numbers of `tokens` in its columns."""
        return tokens("input_ids")
