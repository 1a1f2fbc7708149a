"""TRL's `RewardTrainer` on fitted pairs: an explicit reward model, each pair's prompt computed once.

A reward model is a decoder with one output, read at the last token of `prompt + answer` that is not the pad token
(transformers' rule). `scripts/reward.py` pads with the token that ends an answer, so the score is that of an answer's
last word, whether it came to its end or was cut: what samples are scored by too. `packing` puts both answers behind
one prompt, and the scores come back in the order of TRL's padded batch, whose loss and metrics stay TRL's.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from tinydpo.errors import UserError
from tinydpo.models.precision import use_float32_head
from tinydpo.training.by_length import ByLength
from tinydpo.training.checkpoints import SealedCheckpointsMixin
from tinydpo.training.means import RewardsAlike
from tinydpo.training.packed_forward import INSTEAD, check_packable, get_mask_dtype, use_fused_gelu
from tinydpo.training.packing import Tree, build_additive_mask
from tinydpo.training.throughput import Counts
from tinydpo.training.trainers import PackedCollator, PackedTrainerMixin, TokenCounterMixin

# A causal LM has no score and a score needs no LM head: TRL keeps transformers from telling so, but not of GPT-2.
EXPECTED_KEY_MISMATCHES = {
    "_keys_to_ignore_on_load_missing": [r"^score\.weight$"],
    "_keys_to_ignore_on_load_unexpected": [r"^lm_head\."],
}


@dataclass
class PreferenceCollator(DataCollatorForPreference):
    """TRL's batch of pairs, each answer behind its prompt, and how many `tokens` there are with each prompt once."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """See TRL's."""
        joined = [
            {f"{part}_ids": [*row["prompt_ids"], *row[f"{part}_ids"]] for part in ("chosen", "rejected")}
            for row in examples
        ]
        tokens = sum(len(row[f"{part}_ids"]) for row in examples for part in ("prompt", "chosen", "rejected"))
        return super().torch_call(joined) | {"tokens": tokens}


@dataclass
class PackedRewardCollator(PackedCollator, PreferenceCollator):
    """TRL's batch of pairs, and each pair as one tree that ends where its scores are read."""

    def tree(self, row: dict[str, Any]) -> Tree:
        """A pair without what follows the last token that is not the pad token: no score sees it."""
        prompt = row["prompt_ids"]
        read = [self._upto_score([*prompt, *row[f"{part}_ids"]]) for part in ("chosen", "rejected")]
        shared = min(len(prompt), *map(len, read))
        return prompt[:shared], tuple(ids[shared:] for ids in read)

    def _upto_score(self, ids: list[int]) -> list[int]:
        last = next((at for at in reversed(range(len(ids))) if ids[at] != self.pad_token_id), 0)
        return ids[: last + 1]


class FittedRewardTrainer(SealedCheckpointsMixin, ByLength, TokenCounterMixin, RewardsAlike, RewardTrainer):
    """`RewardTrainer` for pairs that are tokens already (`prompt_ids`, `chosen_ids`, `rejected_ids`)."""

    def __init__(
        self, *given: Any, args: RewardConfig, processing_class: Any, data_collator: Any = None, **kwargs: Any
    ):
        """TRL's own arguments; the tokenizer has a pad token."""
        pad, multiple = processing_class.pad_token_id, args.pad_to_multiple_of
        collator = data_collator or PreferenceCollator(pad_token_id=pad, pad_to_multiple_of=multiple)
        with patch.multiple(PreTrainedModel, **EXPECTED_KEY_MISMATCHES):
            super().__init__(*given, args=args, processing_class=processing_class, data_collator=collator, **kwargs)
        self.model.config.fitted_to = self.args.max_length  # evaluation reads it and scores likewise
        use_float32_head(self.model)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["prompt_ids", "chosen_ids", "rejected_ids"]

    def cost(self, tokens: Callable[[str], np.ndarray]) -> np.ndarray:
        """Both sequences of a pair are padded to the longer one."""
        return tokens("prompt_ids") + np.maximum(tokens("chosen_ids"), tokens("rejected_ids"))

    def computed(self, inputs: dict[str, Any]) -> Counts:
        """See `Counted`: there is no LM head."""
        packed = inputs.get("packed")
        tokens, positions = (packed["tokens"], packed["input_ids"].numel()) if packed else (inputs["tokens"], 0)
        return Counts(len(inputs["input_ids"]) // 2, tokens, 0, positions)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's; the model has no use for the count of tokens."""
        inputs = {name: value for name, value in inputs.items() if name != "tokens"}
        return super().compute_loss(model, inputs, *args, **kwargs)


class PackedRewardTrainer(PackedTrainerMixin, FittedRewardTrainer):
    """`RewardTrainer` for fitted pairs, with each pair's prompt computed once and no padding."""

    collator = PackedRewardCollator
    checks = "scores"

    def cost(self, tokens: Callable[[str], np.ndarray]) -> np.ndarray:
        """Each part of a pair is computed once."""
        return sum(map(tokens, ("prompt_ids", "chosen_ids", "rejected_ids")))

    @staticmethod
    def pack_model(model: PreTrainedModel, row_length: int) -> None:
        """Have a reward model compute `packed` rows where a batch brings them.

        Raises:
            UserError: it cannot.
        """
        check_packable(model, row_length)
        if not hasattr(model, "score"):
            raise UserError(f"{type(model).__name__} has no linear head on its last layer; {INSTEAD}")
        use_fused_gelu(model)
        plain = model.forward

        @functools.wraps(type(model).forward)
        def forward(self: PreTrainedModel, *args: Any, packed: dict | None = None, **kwargs: Any) -> Any:
            if packed is None:
                return plain(*args, **kwargs)
            hidden = self.base_model(
                input_ids=packed["input_ids"],
                position_ids=packed["position_ids"],
                attention_mask=build_additive_mask(packed["segment_ids"], packed["prefix_ids"], get_mask_dtype(self)),
                use_cache=False,
            ).last_hidden_state
            return SequenceClassifierOutputWithPast(logits=self.score(hidden.flatten(0, 1)[packed["lasts"]]))

        model.forward = types.MethodType(forward, model)

    @staticmethod
    def checked(model: torch.nn.Module, batch: dict[str, Any], **packed: Any) -> torch.Tensor:
        """See `PackedTrainer`: a pair's two scores."""
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **packed).logits

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's, after the check."""
        self._check(model)
        return super().compute_loss(model, inputs, *args, **kwargs)
