"""The figures of an evaluation, as functions of log-probs, answers and rewards: arithmetic only, no model."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from tinydpo.engine.logps import PairLogps
from tinydpo.evaluation.sampling import Answers

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
    return {"subsets": group_by_subset(subsets, lambda part: share_with_interval("reward_accuracy", margins[part] > 0))}


def group_by_subset(subsets: Sequence[str], figures: Callable[[np.ndarray], dict[str, Any]]) -> dict[str, dict[str, Any]]:
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
