"""Win rates by a judge: raw, and length-controlled (what the rate would be between answers of equal length)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.hf_argparser import HfArg

from tinydpo.evaluation.arguments import ComparisonArguments
from tinydpo.evaluation.metrics import Z95, wilson_interval
from tinydpo.evaluation.table import Estimate, Row, format_interval, format_rows
from tinydpo.files import public_name

OPPONENTS = {"chosen": "the dataset's chosen answers", "ref": "the reference's answers"}
MOST_INVALID = 0.05  # a larger share of invalid pairs is mentioned with the win rate
RIDGE = 0.01  # a prior of standard deviation 10 on the logits: matters only where the data alone would say infinity


@dataclass
class WinrateArguments(ComparisonArguments):
    """Which answers the judge compares: four questions for each prompt, at each temperature."""

    temperatures: list[float] = HfArg(default_factory=lambda: [1.0], help="Both models sample at each of them.")
    calibration_pairs: int = HfArg(default=64, help="Labelled pairs that the judge is asked about first; 0: none.")

    def __post_init__(self):
        super().__post_init__()
        self.temperatures = sorted(set(self.temperatures))


def cut_answers(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> list[str]:
    """Answers cut to the tokens that a sampled one may have; the dataset's whole answers would have an advantage."""
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    return tokenizer.batch_decode([answer[:max_tokens] for answer in ids], skip_special_tokens=True)


def get_outcome(as_a: str, as_b: str) -> float | None:
    """1 if an answer, shown as A and then as B, wins in both orders, 0 if it loses in both; None if one is invalid."""
    if "invalid" in (as_a, as_b):
        return None
    if (as_a, as_b) == ("A", "B"):
        return 1.0
    return 0.0 if (as_a, as_b) == ("B", "A") else 0.5  # a tie, or the verdict changes with the order


def summarize_verdicts(
    verdicts: Sequence[tuple[str, str]], policy: Sequence[str], opponent: Sequence[str]
) -> dict[str, Any]:
    """The figures of n judged pairs of answers: counts, both win rates (ties half), and mean lengths in words.

    Verdicts are with the policy's answer as A, then as B. Invalid pairs are left out of the rates.
    """
    outcomes = [get_outcome(*pair) for pair in verdicts]
    valid = np.array([outcome is not None for outcome in outcomes])
    scores = np.array([outcome for outcome in outcomes if outcome is not None])
    policy_words = np.array([len(text.split()) for text in policy])
    opponent_words = np.array([len(text.split()) for text in opponent])
    rate, low, high = length_controlled_rate(scores, (policy_words - opponent_words)[valid])
    return {
        "prompts": len(outcomes),
        "wins": int((scores == 1).sum()),
        "ties": int((scores == 0.5).sum()),
        "losses": int((scores == 0).sum()),
        "invalid": int((~valid).sum()),
        "win_rate": float(scores.mean()),
        "win_rate_ci95": list(wilson_interval(float(scores.sum()), len(scores))),
        "length_controlled_win_rate": rate,
        "length_controlled_ci95": [low, high],
        "mean_length_policy": float(policy_words.mean()),
        "mean_length_opponent": float(opponent_words.mean()),
    }


def length_controlled_rate(outcomes: np.ndarray, differences: np.ndarray) -> tuple[float, float, float]:
    """The win rate between answers of equal length, with its 95 % interval.

    A logistic regression of the outcomes (1, 0.5 or 0) on the differences in length (policy's minus the other's), read
    at difference 0: the idea of length-controlled AlpacaEval (arXiv 2404.04475), without its terms for model and
    instruction. The interval is that of the intercept, by its profile likelihood: by the curvature alone, a side that
    wins every time would have an interval down to 0.2. It takes a tie for as noisy as a win or loss, so it is too wide
    rather than too narrow. If one side is always longer, it is wide.
    """
    x = differences / (np.sqrt(np.mean(np.square(differences))) or 1.0)

    def fit_slope(intercept: float) -> float:
        def slope_gradient(slope: float) -> float:
            return float(x @ (_sigmoid(intercept + slope * x) - outcomes)) + RIDGE * slope

        return _find_root(slope_gradient, 1_000.0)

    def intercept_gradient(intercept: float) -> float:
        return float((_sigmoid(intercept + fit_slope(intercept) * x) - outcomes).sum()) + RIDGE * intercept

    def loss(intercept: float) -> float:
        slope = fit_slope(intercept)
        logits = intercept + slope * x
        likelihood = float((outcomes * logits - np.logaddexp(0, logits)).sum())
        return RIDGE / 2 * (intercept**2 + slope**2) - likelihood

    best = _find_root(intercept_gradient, 50.0)
    limit = loss(best) + Z95**2 / 2
    low = _find_root(lambda intercept: limit - loss(min(intercept, best)), 50.0)
    high = _find_root(lambda intercept: loss(max(intercept, best)) - limit, 50.0)
    return float(_sigmoid(best)), float(_sigmoid(low)), float(_sigmoid(high))


def _find_root(increasing: Callable[[float], float], bound: float) -> float:
    """Where an increasing function changes its sign, between -bound and bound, by bisection."""
    low, high = -bound, bound
    while high - low > 1e-8:
        middle = (low + high) / 2
        if increasing(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _sigmoid(z: np.ndarray | float) -> np.ndarray | float:
    return (1 + np.tanh(z / 2)) / 2


def format_caveats(results: dict[str, Any], comparison: dict[str, Any]) -> str:
    """Doubts about a comparison's win rates, each after a semicolon."""
    caveats = ""
    invalid_share = comparison["invalid"] / comparison["prompts"]
    if invalid_share > MOST_INVALID:
        caveats += f"; {invalid_share:.0%} of the pairs are invalid"
    if results.get("calibration"):
        low, high = results["calibration"]["agreement_ci95"]
        if high < 0.5:
            caveats += "; the judge sides against the labels"
        elif low <= 0.5:
            caveats += "; the interval of the judge's agreement with the labels includes 0.5: inconclusive"
    return caveats


def winrate_rows(results: dict[str, Any]) -> list[Row]:
    """`winrate.json` as rows of a table: how far the judge can be trusted, then a win rate for each comparison."""
    judge = public_name(results["judge"])
    rows = []
    calibration = results.get("calibration")
    if calibration:
        agreement = Estimate(calibration["agreement"], *calibration["agreement_ci95"])
        meaning = (
            f"share of {calibration['pairs']} held-out pairs on which {judge} agrees with the labels, ties half;\n"
            f"{calibration['order_flip_rate']:.0%} of its verdicts change with the order, "
            f"{calibration['invalid']} pairs are invalid"
        )
        rows.append(Row("the judge's agreement", meaning, agreement, chance=0.5))
    for comparison in results["comparisons"]:
        controlled = Estimate(comparison["length_controlled_win_rate"], *comparison["length_controlled_ci95"])
        equal_length = Row("at equal length", "", controlled, chance=0.5)
        meaning = (
            f"how often {judge} prefers the policy's answers to {OPPONENTS[comparison['opponent']]}; ties count half\n"
            f"(temperature {comparison['temperature']:g}; {comparison['wins']} wins, {comparison['ties']} ties, "
            f"{comparison['losses']} losses, {comparison['invalid']} invalid;\n"
            f"{comparison['mean_length_policy']:.0f} words against {comparison['mean_length_opponent']:.0f});\n"
            f"at equal length {controlled.value:.3f}, {format_interval(equal_length)}"
            f"{format_caveats(results, comparison)}"
        )
        label = "win rate over chosen" if comparison["opponent"] == "chosen" else "win rate over reference"
        rows.append(Row(label, meaning, Estimate(comparison["win_rate"], *comparison["win_rate_ci95"]), chance=0.5))
    return rows


def format_winrates(results: dict[str, Any]) -> str:
    """`winrate.json` as aligned text."""
    settings = results["settings"]
    tokens = results["tokens"]
    lines = [
        f"policy     {settings['model_name_or_path']}",
        f"reference  {settings['ref_model_name_or_path']}",
        f"answers    at most {settings['max_length'] // 2} tokens, the dataset's chosen ones cut there too",
        f"judge      {results['judge']}, asked in both orders: a verdict that changes with the order counts as a tie",
        "",
        *format_rows(winrate_rows(results)),
        "",
        f"{tokens['verdicts_asked']} verdicts asked for now, {tokens['verdicts_cached']} from earlier runs; together "
        f"{tokens['prompt']} prompt and {tokens['completion']} completion tokens",
    ]
    return "\n".join(lines)
