"""TRL's `RewardTrainer` on fitted pairs: an explicit reward model, each pair's prompt computed once.

A reward model is a decoder with one output, read at the last token of `prompt + answer` that is not the pad token
(transformers' rule). `scripts/reward.py` pads with the token that ends an answer, so the score is that of an answer's
last word, whether the answer ended or was cut. Samples are scored by the same rule.
"""

import functools
import types
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from tinydpo.models.precision import get_compute_dtype, use_float32_head
from tinydpo.training.packed_forward import check_packable, use_fused_gelu
from tinydpo.training.packing import Tree, build_model_inputs
from tinydpo.training.throughput import Counts
from tinydpo.training.trainers import FittedTrainerMixin, PackedCollator, PackedTrainerMixin


@dataclass
class PreferenceCollator(DataCollatorForPreference):
    """TRL's batch of pairs, each answer behind its prompt."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        answers = ("chosen_ids", "rejected_ids")
        return super().torch_call([{name: row["prompt_ids"] + row[name] for name in answers} for row in examples])


@dataclass
class PackedRewardCollator(PackedCollator, PreferenceCollator):
    """TRL's batch of pairs, and each pair as one tree that ends where its scores are read."""

    def build_tree(self, row: dict[str, Any]) -> Tree:
        """A pair without the tokens behind the last one that is not the pad token: no score depends on them."""
        prompt = row["prompt_ids"]
        sequences = [self._cut_at_score([*prompt, *row[name]]) for name in ("chosen_ids", "rejected_ids")]
        shared = min(len(prompt), *map(len, sequences))
        return prompt[:shared], tuple(ids[shared:] for ids in sequences)

    def _cut_at_score(self, ids: list[int]) -> list[int]:
        last = next((i for i in reversed(range(len(ids))) if ids[i] != self.pad_token_id), 0)
        return ids[: last + 1]


class FittedRewardTrainer(FittedTrainerMixin, RewardTrainer):
    """`RewardTrainer` for rows with `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    def __init__(self, *, args: RewardConfig, processing_class: Any, data_collator: Any = None, **kwargs: Any):
        if data_collator is None:
            data_collator = PreferenceCollator(
                processing_class.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of
            )
        args.remove_unused_columns = False  # TRL's rows have no prompt; the collator takes what it needs
        super().__init__(args=args, processing_class=processing_class, data_collator=data_collator, **kwargs)
        self.model.config.fitted_to = args.max_length  # evaluation cuts what it scores to the same length

    def _prepare_models(self) -> None:
        use_float32_head(self.model)

    def count_batch(self, inputs: dict[str, Any]) -> Counts:
        # Prompts are counted twice, as they are computed; no LM head scores anything.
        return Counts(len(inputs["input_ids"]) // 2, inputs["attention_mask"].sum())

    def score_rows(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Rewards of each pair's chosen and rejected answer."""
        chosen, rejected = model(**inputs, use_cache=False).logits.flatten().chunk(2)
        return torch.stack([chosen, rejected], dim=1)

    def get_eval_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """`loss` is -log sigmoid(margin), whatever `center_rewards_coefficient` adds to it in training."""
        rewards = prediction.predictions.astype(np.float64)
        margins = rewards[:, 0] - rewards[:, 1]
        return {
            "loss": np.logaddexp(0, -margins).mean(),
            "accuracy": (margins > 0).mean(),
            "margin": margins.mean(),
            "min_reward": rewards.min(),
            "mean_reward": rewards.mean(),
            "max_reward": rewards.max(),
        }


class PackedRewardTrainer(PackedTrainerMixin, FittedRewardTrainer):
    """`FittedRewardTrainer` that computes each pair's prompt once, without padding."""

    collator_type = PackedRewardCollator

    def patch_model(self, model: PreTrainedModel) -> None:
        """Let a reward model compute `packed` rows when a batch has them (UserError: it cannot)."""
        check_packable(model, self.data_collator.row_length)
        use_fused_gelu(model)
        plain_forward = model.forward

        @functools.wraps(type(model).forward)
        def forward(self: PreTrainedModel, *args: Any, packed: dict | None = None, **kwargs: Any) -> Any:
            if packed is None:
                return plain_forward(*args, **kwargs)
            inputs = build_model_inputs(packed, get_compute_dtype(self))
            hidden = self.base_model(**inputs, use_cache=False).last_hidden_state
            return SequenceClassifierOutputWithPast(logits=self.score(hidden.flatten(0, 1)[packed["lasts"]]))

        model.forward = types.MethodType(forward, model)

    def compute_results(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        return self.score_rows(model, inputs)
