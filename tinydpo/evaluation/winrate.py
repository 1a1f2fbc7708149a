"""Win rates: which answers are judged, and what the outcomes say, with a rate that length has no part in."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinydpo.evaluation.arguments import ComparisonArguments
from tinydpo.evaluation.judge import Judge
from tinydpo.evaluation.metrics import Z95, wilson_interval
from tinydpo.evaluation.table import Estimate, Row
from tinydpo.files import public_name

OPPONENTS = {"chosen": "the dataset's chosen answers", "ref": "the reference's answers"}
MOST_INVALID = 0.05  # of the pairs, unsaid; more of them may be of one kind, which the rate then lacks
RIDGE = 0.01  # a prior of standard deviation 10 on the logits: felt only where the data alone would say infinity


@dataclass
class WinrateArguments(ComparisonArguments):
    """Which answers the judge compares: four questions for each prompt, at each temperature."""

    temperatures: list[float] = field(
        default_factory=lambda: [1.0], metadata={"help": "Both models sample at each; the judge is asked for each."}
    )
    calibration_pairs: int = field(
        default=64,
        metadata={"help": "Labelled pairs that the judge is asked about first, two questions for each; 0: none."},
    )

    def __post_init__(self):
        """Refuse what cannot be sampled, too (ValueError)."""
        super().__post_init__()
        if not self.temperatures or min(self.temperatures) <= 0:
            raise ValueError(f"temperatures must be above 0, got {self.temperatures}")
        self.temperatures = sorted(set(self.temperatures))
        if self.calibration_pairs < 0:
            raise ValueError(f"calibration_pairs must be at least 0, got {self.calibration_pairs}")


def cut_answers(texts: Sequence[str], tokenizer: Any, room: int) -> list[str]:
    """Answers cut to the `room` tokens that a sampled answer has; whole, the dataset's would have an advantage."""
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
    return tokenizer.batch_decode([one[:room] for one in ids], skip_special_tokens=True)


def judge_answers(
    judge: Judge,
    prompts: Sequence[str],
    policy: Sequence[str],
    others: Sequence[str],
    opponent: str,
    temperature: float,
) -> dict[str, Any]:
    """The `comparison` of the policy's answers with an opponent's (a key of `OPPONENTS`), asked of a judge.

    Raises:
        UserError: the judge cannot be asked, or none of its verdicts can be read.
    """
    outcomes = judge.compare(prompts, policy, others, f"judge: against {opponent} at {temperature:g}")
    if (figures := summarize_outcomes(outcomes, policy, others)) is None:
        raise judge.unreadable(f"{len(outcomes)} pairs against {opponent}")
    return {"opponent": opponent, "temperature": temperature, **figures}


def summarize_outcomes(
    outcomes: Sequence[float | None], policy: Sequence[str], opponent: Sequence[str]
) -> dict[str, Any] | None:
    """The figures of n judged pairs of answers.

    Args:
        outcomes: 1, 0.5 or 0 for the policy's answer; None (invalid) is counted and left out of every rate.
        policy: its answers.
        opponent: the other answers.

    Returns:
        Counts, both win rates (ties half) with 95 % intervals, and mean lengths in words; None if none is valid.
    """
    valid = np.array([value is not None for value in outcomes])
    if not valid.any():
        return None
    words = np.array([[len(text.split()) for text in pair] for pair in zip(policy, opponent, strict=True)])
    scores = np.array(outcomes, dtype=object)[valid].astype(float)
    rate, *interval = length_controlled_rate(scores, words[valid, 0] - words[valid, 1])
    return {
        "prompts": len(outcomes),
        "wins": int((scores == 1).sum()),
        "ties": int((scores == 0.5).sum()),
        "losses": int((scores == 0).sum()),
        "invalid": int((~valid).sum()),
        "win_rate": float(scores.mean()),
        "win_rate_ci95": list(wilson_interval(float(scores.sum()), len(scores))),
        "length_controlled_win_rate": rate,
        "length_controlled_ci95": interval,
        "mean_length_policy": float(words[:, 0].mean()),
        "mean_length_opponent": float(words[:, 1].mean()),
    }


def length_controlled_rate(outcomes: np.ndarray, differences: np.ndarray) -> tuple[float, float, float]:
    """The win rate between answers of equal length, with its 95 % interval.

    A logistic regression of the outcome on the length difference, read at difference 0: the idea of length-controlled
    AlpacaEval (arXiv 2404.04475), whose terms for model and instruction are left out here. The interval is that of
    the intercept, by the curvature of the likelihood; like Wilson's for the raw rate it takes a tie for as noisy as a
    win or loss, so it is rather too wide than too narrow. Where one side is always the longer, equal length lies
    outside the data, and the interval says so by its width.

    Args:
        outcomes: n ≥ 1 values of 1, 0.5 or 0, (n,).
        differences: length of the policy's answer minus the other's, (n,), in any unit.
    """
    unit = np.sqrt(np.mean(np.square(differences))) or 1.0
    x = np.stack([np.ones(len(outcomes)), differences / unit], axis=1)

    def loss(w: np.ndarray) -> float:
        return float((np.logaddexp(0, x @ w) - outcomes * (x @ w)).sum() + RIDGE / 2 * w @ w)

    w = np.zeros(2)
    for _ in range(100):
        p = _sigmoid(x @ w)
        curvature = (x.T * (p * (1 - p))) @ x + RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, x.T @ (p - outcomes) + RIDGE * w)
        while loss(w - step) > loss(w) + 1e-9:  # Newton's full step can overshoot where answers separate
            step /= 2
        w = w - step
        if np.abs(step).max() < 1e-8:
            break
    half = Z95 * np.sqrt(np.linalg.inv(curvature)[0, 0])
    return tuple(float(_sigmoid(value)) for value in (w[0], w[0] - half, w[0] + half))


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return (1 + np.tanh(z / 2)) / 2


def format_caveats(results: dict[str, Any], comparison: dict[str, Any]) -> str:
    """What a reader of a comparison's rates has to know beside them, each after a semicolon."""
    invalid = comparison["invalid"] / comparison["prompts"]
    told = [f"{invalid:.0%} of the pairs are invalid"] if invalid > MOST_INVALID else []
    if calibration := results.get("calibration"):
        low, high = calibration["agreement_ci95"]
        if high < 0.5:
            told.append("the judge sides against the data's labels")
        elif low <= 0.5:
            told.append("the judge is not told apart from a coin")
    return "".join(f"; {one}" for one in told)


def _format_invalid_bounds(comparison: dict[str, Any]) -> str:
    n, invalid = comparison["prompts"], comparison["invalid"]
    if invalid <= MOST_INVALID * n:
        return ""
    won = comparison["wins"] + comparison["ties"] / 2
    return f"; all for one side they would make it {won / n:.3f} or {(won + invalid) / n:.3f}"


def describe_judge(calibration: dict[str, Any]) -> str:
    """What a calibration says of the judge, in words that follow its name."""
    c, (low, high) = calibration, calibration["agreement_ci95"]
    return (
        f"sides with the data's labels on {c['agreement']:.3f} of {c['pairs']} held-out pairs (ties half, 95 % "
        f"between {low:.3f} and {high:.3f}); {c['turned_share']:.0%} of its verdicts turn with the order, "
        f"{c['invalid']} pairs are invalid"
    )


def winrate_rows(results: dict[str, Any]) -> list[Row]:
    """The figures of `winrate.json` for those who read no table: the judge's own, then a win rate a comparison."""
    judge, rows = public_name(results["judge"]), []
    if c := results.get("calibration"):
        rows.append(
            Row(
                "the judge's agreement",
                f"how often {judge} sides with the data's labels on {c['pairs']} held-out pairs, ties half; "
                f"{c['turned_share']:.0%} of its verdicts turn with the order",
                Estimate(c["agreement"], *c["agreement_ci95"]),
                chance=0.5,
                nothing="it is not told apart from a coin",
            )
        )
    for c in results["comparisons"]:
        controlled = Estimate(c["length_controlled_win_rate"], *c["length_controlled_ci95"])
        rows.append(
            Row(
                f"win rate against {OPPONENTS.get(c['opponent'], c['opponent'])}",
                f"how often {judge} prefers the policy's answer at temperature {c['temperature']:g}, ties half; "
                f"judges like length: length-controlled it is {controlled}{format_caveats(results, c)}",
                Estimate(c["win_rate"], *c["win_rate_ci95"]),
                chance=0.5,
            )
        )
    return rows


def format_winrates(results: dict[str, Any]) -> str:
    """`winrate.json` as text; where an interval holds one half, it says that no winner can be named."""
    settings, tokens = results["settings"], results["tokens"]
    room = settings["max_length"] // 2
    lines = [
        f"policy     {settings['model_name_or_path']}",
        f"reference  {settings['ref_model_name_or_path']}",
        f"judge      {results['judge']}, asked in both orders; ties, and verdicts that go by the order, count half",
        f"answers    at most {room} tokens, the dataset's chosen ones cut there too",
    ]
    if calibration := results.get("calibration"):
        first, more = describe_judge(calibration).split("; ")
        lines[3:3] = [f"           {first};", f"           {more}"]
    for c in results["comparisons"]:
        beside = format_caveats(results, c)
        lines += [
            "",
            f"against {OPPONENTS[c['opponent']]}, temperature {c['temperature']:g}",
            f"  win rate           {_rate(c['win_rate'], c['win_rate_ci95'])}{beside}",
            f"  length-controlled  {_rate(c['length_controlled_win_rate'], c['length_controlled_ci95'])}{beside}",
            f"  {c['prompts']} prompts: {c['wins']} wins, {c['ties']} ties, {c['losses']} losses, "
            f"{c['invalid']} invalid (left out{_format_invalid_bounds(c)})",
            f"  mean length {c['mean_length_policy']:.1f} words, the others' {c['mean_length_opponent']:.1f}",
        ]
    lines += [
        "",
        f"{tokens['verdicts_asked']} verdicts asked for now, {tokens['verdicts_cached']} known from before; together "
        f"{tokens['prompt']} prompt and {tokens['completion']} completion tokens",
    ]
    return "\n".join(lines)


def _rate(rate: float, interval: Sequence[float]) -> str:
    low, high = interval
    verdict = ": no winner can be named" * (low <= 0.5 <= high)
    return f"{rate:.3f}  (95 % between {low:.3f} and {high:.3f}{verdict})"
