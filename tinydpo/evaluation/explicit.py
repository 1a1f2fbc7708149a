"""An explicit reward model beside DPO's implicit reward, on the same held-out pairs, and beside known rewards.

The pairs are those that the implicit reward judges, fitted to the token budget. The interval of the difference
resamples pairs: what is hard for one is hard for the other, and two intervals side by side would hide that.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tinydpo.data.asked import get_prompts
from tinydpo.data.pairs import FittedSplit
from tinydpo.evaluation.metrics import group_by_subset, share_with_interval
from tinydpo.evaluation.rewards import RewardArguments, RewardFunction, score_answers

RESAMPLES = 10_000, 1_000  # of pairs; of prompts, whose answers are ranked anew each time


def compare_with_reward_model(
    reward: RewardArguments,
    functions: Sequence[RewardFunction],
    held_out: FittedSplit,
    tokenizer: PreTrainedTokenizerBase,
    implicit: np.ndarray,
) -> dict[str, Any]:
    """A reward model's accuracy, and the implicit reward's less that; {} where none was asked for.

    Args:
        reward: what was asked for.
        functions: as `load_rewards` gives them, a reward model last.
        held_out: n pairs, fitted with the policy's tokenizer.
        tokenizer: the policy's.
        implicit: margins of the implicit reward, (n,).

    Returns:
        `explicit_accuracy` and `implicit_minus_explicit`, both with `_ci95`; of several subsets the same of each in
        `explicit_subsets`.
    """
    if not reward.reward_model_name_or_path:
        return {}
    chosen, rejected = score_pairs(functions[-1], held_out, tokenizer)
    ours, its = implicit > 0, chosen > rejected
    told = paired_accuracies(ours, its)
    if "subset" in held_out.pairs.column_names:
        told["explicit_subsets"] = group_by_subset(held_out.pairs["subset"][:], lambda part: paired_accuracies(ours[part], its[part]))
    return told


def score_pairs(
    model: RewardFunction, held_out: FittedSplit, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """A reward model's scores of chosen and of rejected answers, (n,) each, of pairs as they were fitted.

    Texts are cut as fitting cut them. A conversation comes whole, for the model's own template, and the model cuts it.
    """
    texts, pairs = held_out.texts, held_out.pairs

    def words(part: str) -> list[str]:
        return tokenizer.batch_decode(pairs[part][:], skip_special_tokens=True)

    both = zip(get_prompts(texts), words("prompt_ids"), strict=True)
    prompts = [fitted if isinstance(whole, str) else whole for whole, fitted in both]
    return tuple(
        score_answers([model], texts, words(part), pairs[part][:], prompts) for part in ("chosen_ids", "rejected_ids")
    )


def paired_accuracies(implicit: np.ndarray, explicit: np.ndarray) -> dict[str, Any]:
    """Two judges' shares of right pairs, the first less the second, with the interval of a paired bootstrap.

    Args:
        implicit: whether the implicit reward is right, (n,) bool.
        explicit: whether the reward model is, on the same pairs.
    """
    n = len(explicit)
    apart = implicit.astype(int) - explicit.astype(int)  # of each pair -1, 0 or 1: resampling draws so many of each
    shares = [float((apart == value).mean()) for value in (-1, 0, 1)]
    drawn = np.random.default_rng(0).multinomial(n, shares, size=RESAMPLES[0])
    return {
        **share_with_interval("explicit_accuracy", explicit),
        "implicit_minus_explicit": float(apart.mean()),
        "implicit_minus_explicit_ci95": np.quantile((drawn[:, 2] - drawn[:, 0]) / n, (0.025, 0.975)).tolist(),
    }


def rank_agreement(reward: RewardArguments, each: dict[str, np.ndarray]) -> dict[str, Any]:
    """`rank_correlation` of a reward model with the reward functions beside it over all sampled answers, and `_ci95`.

    Args:
        reward: what was asked for.
        each: every reward, a model's last, of the answers to the same n prompts by role, (rewards, n) each.

    Returns:
        {} where not both were asked for. The interval resamples prompts.
    """
    if not (reward.reward_funcs and reward.reward_model_name_or_path):
        return {}
    known, model = np.stack([(rewards[:-1].sum(0), rewards[-1]) for rewards in each.values()], axis=1)
    resampled = np.random.default_rng(0).integers(model.shape[1], size=(RESAMPLES[1], model.shape[1]))
    drawn = [rank_correlation(model[:, prompts], known[:, prompts]) for prompts in resampled]
    return {
        "rank_correlation": rank_correlation(model, known),
        "rank_correlation_ci95": np.quantile(drawn, (0.025, 0.975)).tolist(),
    }


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, ties by their mean rank; 0 where either ranks nothing."""
    ranks = np.stack([_ranks(values.ravel()) for values in (one, other)])
    return float(np.corrcoef(ranks)[0, 1]) if ranks.std(1).all() else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[places]
