"""TRL's trainers on fitted pairs: losses, metrics, PEFT, checkpoints and logging stay TRL's."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOTrainer, SFTTrainer
from trl.trainer import dpo_trainer, sft_trainer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from tinydpo.data.pairs import MANY_ROWS
from tinydpo.data.sources import hide_progress_bars
from tinydpo.engine.by_length import ByLength
from tinydpo.engine.means import SPARE, PairsAlike, TokensAlike
from tinydpo.engine.reference_cache import hash_split, on_every_machine
from tinydpo.training.checkpoints import SealedCheckpointsMixin
from tinydpo.training.throughput import Counts

HEAD = "float32"  # part of the name of cached reference log-probs: earlier ones were rounded to the blocks' dtype


class Float32HeadMixin:
    """For a TRL trainer: its fused LM head computes in float32, outside autocast, for policy and reference alike.

    TRL has it round logits to the blocks' dtype; `models.precision` says what that does to pretrained models.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """TRL's own arguments."""
        fuse = partial(add_fused_lm_head, cast_lm_head_to_fp32=True)
        with (
            patch.object(dpo_trainer, "add_fused_lm_head", fuse),
            patch.object(sft_trainer, "add_fused_lm_head", fuse),
        ):
            super().__init__(*args, **kwargs)


class TokenCounterMixin:
    """For a TRL trainer: `counted` is what its training steps have computed, without a wait for the device."""

    counted = Counts()

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's, counted."""
        self.counted = self.counted.plus(Counts() if inputs.get(SPARE) else self.computed(inputs))
        return super().training_step(model, inputs, *args, **kwargs)

    def computed(self, inputs: dict[str, Any]) -> Counts:
        """What a batch is to compute."""
        rows, packed, mask = inputs["input_ids"], inputs.get("packed"), inputs.get("attention_mask")
        completions = inputs.get("completion_mask")  # SFT's batches have labels
        pairs = len(rows) if completions is None else len(rows) // 2
        if packed:
            return Counts(pairs, packed["tokens"], packed["targets"].numel(), packed["input_ids"].numel())
        if completions is not None:
            scored, prompts = completions.sum(), (mask - completions)[:pairs].sum()
            return Counts(pairs, prompts + scored, scored)
        scored = (inputs["labels"][:, 1:] != -100).sum()
        free = mask is None  # `--packing`: all examples stand in one row
        examples, tokens = (inputs["position_ids"].eq(0).sum(), rows.numel()) if free else (pairs, mask.sum())
        return Counts(examples, tokens, scored)


class FittedDPOTrainer(SealedCheckpointsMixin, ByLength, Float32HeadMixin, TokenCounterMixin, PairsAlike, DPOTrainer):
    """`DPOTrainer` for pairs that are tokens already (`prompt_ids`, `chosen_ids`, `rejected_ids`).

    TRL tokenizes from text and cuts after the first `max_length` tokens, which takes the signal from a third of HH's
    pairs; fitted pairs need neither.
    """

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def cost(self, tokens: Callable[[str], np.ndarray]) -> np.ndarray:
        """Both sequences of a pair are padded to the longer one."""
        return tokens("prompt_ids") + np.maximum(tokens("chosen_ids"), tokens("rejected_ids"))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """TRL's own, with all that changes the log-probs in the cache's key, not data and weights alone."""
        if is_deepspeed_zero3_enabled() and isinstance(self._precompute_model_hash, str):
            self._precompute_model_hash = hash_split(self.ref_model or self.model)
        weights = self._precompute_model_hash
        args = self.args
        precision = (args.bf16, args.fp16, args.tf32, self.model.config._attn_implementation)
        self._precompute_model_hash = Hasher.hash((weights, self.ld_alpha, precision, type(self).__name__, HEAD))
        key = broadcast_object_list([Hasher.hash((dataset._fingerprint, self._precompute_model_hash))])[0]
        cached = Path(dataset._get_cache_file_path(key))
        try:
            with on_every_machine(self.accelerator, cached):
                return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = weights


class FittedSFTTrainer(SealedCheckpointsMixin, ByLength, Float32HeadMixin, TokenCounterMixin, TokensAlike, SFTTrainer):
    """`SFTTrainer` without dropout, for which `SFTConfig`, unlike `DPOConfig`, has no option.

    With it 1 and 2 processes, which draw other masks, would not agree.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        """TRL's own arguments."""
        super().__init__(*args, **kwargs)
        disable_dropout_in_model(self.model)


def build_sft_rows(pairs: Dataset, completion_only: bool = True) -> Dataset:
    """The chosen answers of fitted pairs as `SFTTrainer` reads them without preparing them again.

    Args:
        pairs: rows with `prompt_ids` and `chosen_ids`.
        completion_only: whether prompts carry no loss.

    Returns:
        A row for each, with `input_ids` and `labels` (-100 where a token carries no loss).
    """

    def rows(batch: dict[str, list]) -> dict[str, list]:
        both = list(zip(batch["prompt_ids"], batch["chosen_ids"], strict=True))
        return {
            "input_ids": [prompt + chosen for prompt, chosen in both],
            "labels": [([-100] * len(prompt) if completion_only else prompt) + chosen for prompt, chosen in both],
        }

    with hide_progress_bars(small=len(pairs) < MANY_ROWS):
        return pairs.map(rows, batched=True, remove_columns=pairs.column_names, desc="Joining prompts and answers")
