"""The figures of an evaluation, as functions of log-probs, answers and rewards: arithmetic only, no model."""

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from tinydpo.logps import PairLogps
from tinydpo.sampling import Answers

Z95 = NormalDist().inv_cdf(0.975)


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n, right near 0 and 1 too (Wilson 1927, JASA 22:209-212). n = 0 gives (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    share, shrink = successes / n, 1 + Z95**2 / n
    center = (share + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def pair_metrics(policy: PairLogps, ref: PairLogps, beta: float) -> dict[str, Any]:
    """What the log-probs of n ≥ 1 held-out pairs say.

    The implicit reward of a completion is r = β log π/π_ref (DPO, arXiv 2305.18290, section 4); the margin is
    r(chosen) − r(rejected); the loss −log σ(margin) (eq. 7). A margin of 0 counts as wrong: it prefers nothing.

    Returns:
        `pairs`, `reward_accuracy` with `reward_accuracy_ci95`, `reward_margin` with its standard error, `dpo_loss`,
        `nll_chosen_*` (nats a token: all chosen tokens together) and `raw_likelihood_accuracy_*`.
    """
    margins = beta * ((policy.chosen - ref.chosen) - (policy.rejected - ref.rejected))
    n, right = len(margins), int((margins > 0).sum())
    return {
        "pairs": n,
        "reward_accuracy": right / n,
        "reward_accuracy_ci95": list(wilson_interval(right, n)),
        "reward_margin": float(margins.mean()),
        "reward_margin_se": standard_error(margins),
        "dpo_loss": float(np.logaddexp(0, -margins).mean()),
        "beta": beta,
        "nll_chosen_policy": float(-policy.chosen.sum() / policy.chosen_tokens.sum()),
        "nll_chosen_ref": float(-ref.chosen.sum() / ref.chosen_tokens.sum()),
        "raw_likelihood_accuracy_policy": float((policy.chosen > policy.rejected).mean()),
        "raw_likelihood_accuracy_ref": float((ref.chosen > ref.rejected).mean()),
    }


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


def length_metrics(policy: Answers, ref: Answers) -> dict[str, float]:
    """Mean length in tokens (end token included) and share of answers that end by themselves, of both models."""
    return {
        "mean_length_policy": float(np.mean([len(ids) for ids in policy.ids])),
        "mean_length_ref": float(np.mean([len(ids) for ids in ref.ids])),
        "ended_policy": float(np.mean(policy.ended)),
        "ended_ref": float(np.mean(ref.ended)),
    }


def reward_metrics(policy: np.ndarray, ref: np.ndarray) -> dict[str, Any]:
    """Mean rewards (n,) of both models' answers, and how often the policy's is higher, ties counting half."""
    wins = float((policy > ref).sum() + (policy == ref).sum() / 2)
    return {
        "reward_policy": float(policy.mean()),
        "reward_ref": float(ref.mean()),
        "win_rate_vs_ref": wins / len(policy),
        "win_rate_ci95": list(wilson_interval(wins, len(policy))),
    }
