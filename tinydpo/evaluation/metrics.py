"""The figures of an evaluation: arithmetic on log-probs, answers and rewards, without a model.

Each function returns keys of `eval_results.json`. An interval is a 95 % interval under `<name>_ci95`, or a standard
error under `<name>_se` (null for a single value). scripts/evaluate.py calls the functions; `table` labels and explains
what they return.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from tinydpo.evaluation.sampling import Answers
from tinydpo.training.logps import PairLogps

Z95 = NormalDist().inv_cdf(0.975)
BOOTSTRAP_PAIRS = 10_000  # resamples
BOOTSTRAP_PROMPTS = 1_000  # resamples; each ranks all answers again


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n, also valid near 0 and 1 (Wilson 1927, JASA 22:209-212). n = 0 gives (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    shrink = 1 + Z95**2 / n
    center = (share + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of `values` (n,); None for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def share_with_interval(name: str, flags: np.ndarray) -> dict[str, Any]:
    """The share of n ≥ 1 flags that are true, and its interval."""
    return {name: float(flags.mean()), f"{name}_ci95": list(wilson_interval(int(flags.sum()), len(flags)))}


# Held-out pairs


def pair_rewards(policy: PairLogps, ref: PairLogps, beta: float) -> dict[str, np.ndarray]:
    """Columns (n,) over held-out pairs: implicit rewards, their margin, and token counts.

    The implicit reward of a completion is r = β log π/π_ref (DPO, arXiv 2305.18290, section 4); the margin is
    r(chosen) − r(rejected).
    """
    chosen = beta * (policy.chosen - ref.chosen)
    rejected = beta * (policy.rejected - ref.rejected)
    return {
        "margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "chosen_tokens": policy.chosen_tokens,
        "rejected_tokens": policy.rejected_tokens,
    }


def pair_metrics(policy: PairLogps, ref: PairLogps, beta: float) -> dict[str, Any]:
    """What the log-probs of n ≥ 1 held-out pairs say.

    The loss is −log σ(margin) (DPO, arXiv 2305.18290, eq. 7). A margin of 0 counts as wrong: it prefers nothing. NLL
    is in nats per token, over all chosen tokens together.
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
    """Reward accuracy of the pairs whose answers are both whole (`whole` is "both"), and of those with a cut one."""
    both_whole = np.array(whole) == "both"
    results: dict[str, Any] = {}
    for name, mask in (("reward_accuracy_whole", both_whole), ("reward_accuracy_cut", ~both_whole)):
        if mask.any():
            results |= share_with_interval(name, margins[mask] > 0)
            results[f"{name}_pairs"] = int(mask.sum())
    return results


def accuracy_by_subset(margins: np.ndarray, subsets: Sequence[str | None]) -> dict[str, Any]:
    """`subsets`: the reward accuracy of each subset's pairs; pairs without a subset (None) are left out."""
    return {
        "subsets": group_by_subset(subsets, lambda mask: share_with_interval("reward_accuracy", margins[mask] > 0))
    }


def group_by_subset(
    subsets: Sequence[str | None], compute: Callable[[np.ndarray], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """`compute` of each subset's mask (n,), and its number of pairs, the largest first; {} if there is only one."""
    masks = {name: np.array(subsets) == name for name in sorted(set(subsets) - {None})}
    if len(masks) < 2:
        return {}
    largest_first = sorted(masks.items(), key=lambda item: -item[1].sum())
    return {name: {"pairs": int(mask.sum()), **compute(mask)} for name, mask in largest_first}


def compare_with_reward_model(
    implicit: np.ndarray, explicit: np.ndarray, subsets: Sequence[str | None] | None
) -> dict[str, Any]:
    """`paired_accuracies` from both rewards' margins (n,), and the same of each subset in `explicit_subsets`."""
    results = paired_accuracies(implicit > 0, explicit > 0)
    if subsets is not None:
        results["explicit_subsets"] = group_by_subset(
            subsets, lambda mask: paired_accuracies(implicit[mask] > 0, explicit[mask] > 0)
        )
    return results


def paired_accuracies(implicit: np.ndarray, explicit: np.ndarray) -> dict[str, Any]:
    """A reward model's accuracy, and the implicit reward's minus it; flags (n,) say which pairs are ordered right."""
    n = len(explicit)
    differences = implicit.astype(int) - explicit.astype(int)
    # A paired bootstrap. A difference is -1, 0 or 1: resampling n pairs draws how many there are of each.
    shares = [float((differences == value).mean()) for value in (-1, 0, 1)]
    counts = np.random.default_rng(0).multinomial(n, shares, size=BOOTSTRAP_PAIRS)
    resampled = (counts[:, 2] - counts[:, 0]) / n
    return {
        **share_with_interval("explicit_accuracy", explicit),
        "implicit_minus_explicit": float(differences.mean()),
        "implicit_minus_explicit_ci95": np.quantile(resampled, (0.025, 0.975)).tolist(),
    }


# Sampled answers


def kl_metrics(policy_logps: list[np.ndarray], ref_logps: list[np.ndarray]) -> dict[str, Any]:
    """KL(policy ‖ reference) in nats, estimated on n ≥ 1 answers sampled from the policy.

    Per sequence it is the mean over prompts of Σ_t log π(y_t)/π_ref(y_t), end token included: the unbiased estimate of
    what the DPO objective penalizes (arXiv 2305.18290, eq. 3), for answers no longer than those sampled. Per token it
    is all answers' log ratios over all their tokens. The arrays are the same answers' per-token log-probs.
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


def length_metrics(policy: Answers, ref: Answers) -> dict[str, Any]:
    """Mean length in tokens (end token included) and share of answers that end by themselves, of both models."""
    results: dict[str, Any] = {}
    for role, answers in (("policy", policy), ("ref", ref)):
        lengths = np.array([len(ids) for ids in answers.ids])
        results[f"mean_length_{role}"] = float(lengths.mean())
        results[f"mean_length_{role}_se"] = standard_error(lengths)
        results |= share_with_interval(f"ended_{role}", np.array(answers.ended))
    return results


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


def compare_rewards(names: Sequence[str], policy: np.ndarray, ref: np.ndarray) -> dict[str, Any]:
    """`reward_metrics` of the sum of all rewards, and of several each alone in `rewards`; scores are (rewards, n)."""
    results = reward_metrics(policy.sum(0), ref.sum(0))
    if len(names) > 1:
        results["rewards"] = {name: reward_metrics(policy[i], ref[i]) for i, name in enumerate(names)}
    return results


def rank_agreement(policy: np.ndarray, ref: np.ndarray) -> dict[str, Any]:
    """`rank_correlation` of the last reward with the sum of the others; scores are (rewards, n) of both's answers."""
    model = np.stack([policy[-1], ref[-1]])
    functions = np.stack([policy[:-1].sum(0), ref[:-1].sum(0)])
    n = model.shape[1]
    samples = np.random.default_rng(0).integers(n, size=(BOOTSTRAP_PROMPTS, n))
    resampled = [rank_correlation(model[:, prompts], functions[:, prompts]) for prompts in samples]
    return {
        "rank_correlation": rank_correlation(model, functions),
        "rank_correlation_ci95": np.quantile(resampled, (0.025, 0.975)).tolist(),
    }


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, ties by their mean rank; 0 if all values of either are equal."""
    ranks = np.stack([pd.Series(values.ravel()).rank() for values in (first, second)])
    return float(np.corrcoef(ranks)[0, 1]) if ranks.std(1).all() else 0.0
