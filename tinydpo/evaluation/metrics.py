"""The figures of an evaluation, as functions of log-probs, answers and rewards: arithmetic only, no model."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tinydpo.data.pairs import FittedSplit
from tinydpo.data.text import get_prompts
from tinydpo.evaluation.rewards import RewardArguments, RewardFunction, score_answers
from tinydpo.evaluation.sampling import Answers
from tinydpo.training.logps import PairLogps

Z95 = NormalDist().inv_cdf(0.975)


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n, right near 0 and 1 too (Wilson 1927, JASA 22:209-212). n = 0 gives (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    share, shrink = successes / n, 1 + Z95**2 / n
    center = (share + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def share_with_interval(name: str, right: np.ndarray) -> dict[str, Any]:
    """Under `name`, the share of n ≥ 1 flags that hold, and its interval under `name`_ci95."""
    return {name: float(right.mean()), f"{name}_ci95": list(wilson_interval(int(right.sum()), len(right)))}


def pair_rewards(policy: PairLogps, ref: PairLogps, beta: float) -> dict[str, np.ndarray]:
    """Columns (n,) over held-out pairs: `reward_chosen`, `reward_rejected` and `margin`, all implicit, and tokens.

    The implicit reward of a completion is r = β log π/π_ref (DPO, arXiv 2305.18290, section 4); the margin is
    r(chosen) − r(rejected).
    """
    chosen, rejected = beta * (policy.chosen - ref.chosen), beta * (policy.rejected - ref.rejected)
    columns = {"margin": chosen - rejected, "reward_chosen": chosen, "reward_rejected": rejected}
    return columns | {"chosen_tokens": policy.chosen_tokens, "rejected_tokens": policy.rejected_tokens}


def pair_metrics(policy: PairLogps, ref: PairLogps, beta: float) -> dict[str, Any]:
    """What the log-probs of n ≥ 1 held-out pairs say.

    The loss is −log σ(margin) (DPO, arXiv 2305.18290, eq. 7). A margin of 0 counts as wrong: it prefers nothing.

    Returns:
        `pairs`, `reward_accuracy` with `reward_accuracy_ci95`, `reward_margin` with its standard error, `dpo_loss`,
        `nll_chosen_*` (nats a token: all chosen tokens together) and `raw_likelihood_accuracy_*`.
    """
    margins = pair_rewards(policy, ref, beta)["margin"]
    losses = np.logaddexp(0, -margins)
    return {
        "pairs": len(margins),
        **share_with_interval("reward_accuracy", margins > 0),
        "reward_margin": float(margins.mean()),
        "reward_margin_se": standard_error(margins),
        "dpo_loss": float(losses.mean()),
        "dpo_loss_se": standard_error(losses),
        "beta": beta,
        "nll_chosen_policy": float(-policy.chosen.sum() / policy.chosen_tokens.sum()),
        "nll_chosen_ref": float(-ref.chosen.sum() / ref.chosen_tokens.sum()),
        "raw_likelihood_accuracy_policy": float((policy.chosen > policy.rejected).mean()),
        "raw_likelihood_accuracy_ref": float((ref.chosen > ref.rejected).mean()),
    }


def accuracy_by_cut(margins: np.ndarray, whole: Sequence[str]) -> dict[str, Any]:
    """Reward accuracy of n pairs, apart where `max_length` left both answers whole (`whole` is "both") and where not.

    Returns:
        `reward_accuracy_whole` and `reward_accuracy_cut`, each with its `_ci95` and `_pairs`; of no pairs, nothing.
    """
    right, both = margins > 0, np.array([which == "both" for which in whole])
    results: dict[str, Any] = {}
    for name, part in (("whole", right[both]), ("cut", right[~both])):
        if len(part):
            key = f"reward_accuracy_{name}"
            results |= share_with_interval(key, part) | {f"{key}_pairs": len(part)}
    return results


def accuracy_by_subset(margins: np.ndarray, subsets: Sequence[str]) -> dict[str, Any]:
    """`subsets`: reward accuracy of n pairs `by_subset`."""
    return {
        "subsets": group_by_subset(subsets, lambda part: share_with_interval("reward_accuracy", margins[part] > 0))
    }


def group_by_subset(
    subsets: Sequence[str], figures: Callable[[np.ndarray], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """`figures` of each subset's pairs, given as a mask, and their number, the largest first; of one subset, {}."""
    names, of = np.unique(subsets, return_inverse=True)
    masks = {str(name): of == index for index, name in enumerate(names)} if len(names) > 1 else {}
    largest = sorted(masks, key=lambda name: -masks[name].sum())
    return {name: {"pairs": int(masks[name].sum()), **figures(masks[name])} for name in largest}


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of `values` (n,); 0 for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def kl_metrics(policy_logps: list[np.ndarray], ref_logps: list[np.ndarray]) -> dict[str, float]:
    """KL(policy ‖ reference) in nats, estimated on n ≥ 1 answers sampled from the policy.

    Per sequence it is the mean over prompts of Σ_t log π(y_t)/π_ref(y_t), end token included: the unbiased estimate of
    what the DPO objective penalizes (arXiv 2305.18290, eq. 3), for answers no longer than those sampled. Per token it
    is all answers' log ratios over all their tokens. The arrays hold the same answers' per-token log-probs.
    """
    sums = np.array([(policy - ref).sum() for policy, ref in zip(policy_logps, ref_logps, strict=True)])
    return {
        "kl_per_sequence": float(sums.mean()),
        "kl_per_sequence_se": standard_error(sums),
        "kl_per_token": float(sums.sum() / sum(len(tokens) for tokens in policy_logps)),
    }


def token_rewards(policy_logps: list[np.ndarray], ref_logps: list[np.ndarray], beta: float) -> list[list[float]]:
    """Implicit reward β log π/π_ref of every token of n answers, from their per-token log-probs."""
    return [(beta * (policy - ref)).tolist() for policy, ref in zip(policy_logps, ref_logps, strict=True)]


def length_metrics(policy: Answers, ref: Answers) -> dict[str, float]:
    """Mean length in tokens (end token included) and share of answers that end by themselves, of both models."""
    lengths = {role: np.array([len(ids) for ids in both.ids]) for role, both in (("policy", policy), ("ref", ref))}
    return {
        **{f"mean_length_{role}": float(tokens.mean()) for role, tokens in lengths.items()},
        **{f"mean_length_{role}_se": standard_error(tokens) for role, tokens in lengths.items()},
        "ended_policy": float(np.mean(policy.ended)),
        "ended_ref": float(np.mean(ref.ended)),
    }


def reward_metrics(policy: np.ndarray, ref: np.ndarray) -> dict[str, Any]:
    """Mean rewards (n,) of both models' answers, and how often the policy's is higher, ties counting half."""
    wins = float((policy > ref).sum() + (policy == ref).sum() / 2)
    return {
        "reward_policy": float(policy.mean()),
        "reward_ref": float(ref.mean()),
        "reward_policy_se": standard_error(policy),
        "reward_ref_se": standard_error(ref),
        "win_rate_vs_ref": wins / len(policy),
        "win_rate_ci95": list(wilson_interval(wins, len(policy))),
    }


def metrics_by_reward(names: Sequence[str], policy: np.ndarray, ref: np.ndarray) -> dict[str, Any]:
    """`rewards`: `reward_metrics` by each of several rewards alone, (rewards, n) of both models; of one, {}."""
    if len(names) < 2:
        return {}
    return {"rewards": {name: reward_metrics(*both) for name, *both in zip(names, policy, ref, strict=True)}}


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
        told["explicit_subsets"] = group_by_subset(
            held_out.pairs["subset"][:], lambda part: paired_accuracies(ours[part], its[part])
        )
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
