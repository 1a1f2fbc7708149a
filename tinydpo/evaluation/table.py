"""Labels, meanings and intervals of an evaluation's figures, for the printed table, the model card and the report.

A new metric needs a function in `metrics`, its call in scripts/evaluate.py, and a line of `FIGURES` here.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tinydpo.errors import escape_controls
from tinydpo.evaluation.arguments import RewardArguments
from tinydpo.evaluation.metrics import Z95, wilson_interval

MOST_SUBSETS = 8  # rows; the report's figure has more, eval_results.json has all
# Name in eval_results.json (without _policy and _ref), label, value by chance, meaning (line breaks: for the table).
FIGURES = [
    ("reward_accuracy", "reward accuracy", 0.5,
     "share of pairs whose chosen answer has the higher implicit reward\n(β log π/π_ref; ties count as wrong)"),
    ("reward_accuracy_whole", "… whole", 0.5,
     "the same over {reward_accuracy_whole_pairs} pairs with both answers whole"),
    ("reward_accuracy_cut", "… cut", 0.5,
     "the same over {reward_accuracy_cut_pairs} pairs with an answer that max_length cuts"),
    ("explicit_accuracy", "reward model's accuracy", 0.5, "share of the same pairs whose chosen it scores higher"),
    ("implicit_minus_explicit", "implicit minus explicit", 0.0, "reward accuracy minus the reward model's"),
    ("reward_margin", "reward margin", 0.0, "implicit reward of chosen minus rejected, mean"),
    ("dpo_loss", "DPO loss", None, "-log σ(margin), mean: 0.693 for the reference itself, lower is better"),
    ("nll_chosen", "NLL of chosen", None, "nats per token, end token included: lower means likelier"),
    ("raw_likelihood_accuracy", "raw likelihood accuracy", None,
     "how often chosen is likelier than rejected\nunder the model alone; biased towards short answers"),
    ("kl_per_sequence", "KL per sequence", None, "how far the policy has moved from the reference{kl_warning}"),
    ("kl_per_token", "KL per token", None, "nats: the total divided by the sampled tokens"),
    ("mean_length", "mean answer length", None, "tokens, end token included, of at most {room}"),
    ("ended", "ended on their own", None, "share of answers with an end token within {room} tokens"),
    ("reward", "reward", None, "mean of {reward_name}"),
    ("win_rate_vs_ref", "win rate", 0.5, "how often the policy's answer has the higher reward; ties count half"),
    ("rank_correlation", "rank correlation", 0.0,
     "Spearman's, of the reward model with the reward functions,\nover both models' answers"),
]  # fmt: skip
KL_WARNING = "\nNO ESTIMATE OF THE KL: temperature, top_k or top_p changed the samples"


class Estimate(NamedTuple):
    """A figure and, if it has one, its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})")


class Row(NamedTuple):
    """A figure of the policy, perhaps with the reference's, and what they mean.

    `chance` is the policy's value if there is no effect; more is better.
    """

    label: str
    meaning: str
    policy: Estimate
    ref: Estimate | None = None
    chance: float | None = None
    unit: str = ""

    @property
    def verdict(self) -> str:
        """What the interval says if it includes chance, or is wholly below it; else ""."""
        if self.chance is None or self.policy.low is None or self.policy.low > self.chance:
            return ""
        is_below = self.policy.high < self.chance
        return f"below {self.chance:g}" if is_below else f"includes {self.chance:g}: inconclusive"


def headline_rows(results: dict[str, Any]) -> list[Row]:
    """The figures of `eval_results.json`, in the order to read them in."""
    settings = results["settings"]
    reward = RewardArguments(settings.get("reward_funcs"), settings.get("reward_model_name_or_path"))
    values = results | {
        "room": settings["max_length"] // 2,
        "reward_name": reward.name(),
        "kl_warning": "" if has_own_samples(settings) else KL_WARNING,
    }
    rows = []
    for name, label, chance, meaning in FIGURES:
        if name == "reward_accuracy_whole" and "reward_accuracy_cut" not in results:
            continue  # every answer is whole
        if name in results or f"{name}_policy" in results:
            rows.append(make_row(results, name, label, meaning.format(**values), chance))
        if name == "reward":
            for part, figures in results.get("rewards", {}).items():
                rows.append(make_row(figures, name, f"… {part[:20]}", f"mean of {part} alone"))
        subsets = results.get("subsets" if name == "reward_accuracy" else "explicit_subsets", {})
        for subset, figures in list(subsets.items())[:MOST_SUBSETS]:
            if name in figures:
                subset = escape_controls(subset)
                meaning = f"{label} over {figures['pairs']} pairs of {subset}"
                rows.append(make_row(figures, name, f"… {subset[:20]}", meaning, chance))
    return rows


def has_own_samples(settings: dict[str, Any]) -> bool:
    """Whether answers were sampled from the policy's own distribution: others give no estimate of its KL."""
    return (settings["temperature"], settings["top_k"], settings["top_p"]) == (1, 0, 1)


def make_row(results: dict[str, Any], name: str, label: str, meaning: str, chance: float | None = None) -> Row:
    """The row of a figure, or of the policy's and the reference's if there are two (`<name>_policy`, `<name>_ref`)."""
    unit = "nats" if name == "kl_per_sequence" else ""
    if name in results:
        return Row(label, meaning, _estimate(results, name), None, chance, unit)
    return Row(label, meaning, _estimate(results, f"{name}_policy"), _estimate(results, f"{name}_ref"), chance, unit)


def _estimate(results: dict[str, Any], name: str) -> Estimate:
    """A figure with the interval that it has, or that its standard error gives."""
    value = results[name]
    interval = results.get(f"{name.removesuffix('_vs_ref')}_ci95")
    if interval:
        return Estimate(value, *interval)
    if results.get(f"{name}_se") is not None:
        half = Z95 * results[f"{name}_se"]
        return Estimate(value, value - half, value + half)
    return Estimate(value)


def format_table(results: dict[str, Any]) -> str:
    """`eval_results.json` as aligned text."""
    settings = results["settings"]
    lines = [
        f"policy     {settings['model_name_or_path']}",
        f"reference  {settings['ref_model_name_or_path']}",
        f"pairs      {results['pairs']} held-out, β {results['beta']:g}",
        f"answers    sampled for {settings['num_prompts']} held-out prompts, temperature {settings['temperature']:g}, "
        f"top_k {settings['top_k']}, top_p {settings['top_p']:g}",
        "",
        *format_rows(headline_rows(results)),
    ]
    return "\n".join(lines)


def summarize_results(results: dict[str, Any]) -> str:
    """What an evaluation says: has the policy learned, how far is it from its reference, do its answers end?"""
    sentences = [summarize_accuracy(results["reward_accuracy"], results["pairs"])]
    if has_own_samples(results["settings"]):
        kl = _estimate(results, "kl_per_sequence")
        is_moved = kl.low is None or kl.low > 0
        sentences.append(
            f"KL from its reference: {kl.value:.1f} nats."
            if is_moved
            else "It has not measurably moved from its reference."
        )
    policy, ref = (results[f"ended_{role}"] for role in ("policy", "ref"))
    sentences.append(f"{policy:.0%} of its answers end on their own (reference: {ref:.0%}).")
    if policy < ref - 0.15:
        sentences.append(
            "So that more answers end, raise beta or the weight of the chosen answers' NLL (docs/losses.md)."
        )
    return " ".join(sentences)


def summarize_accuracy(accuracy: float, pairs: int) -> str:
    """A sentence on the reward accuracy over held-out pairs, and whether that many can tell it from chance."""
    low, high = wilson_interval(accuracy * pairs, pairs)
    sentence = (
        f"The policy prefers the chosen answer on {accuracy:.1%} of {pairs:,} held-out pairs "
        f"(95 % interval {low:.1%} to {high:.1%})"
    )
    if high < 0.5:
        return f"{sentence}: worse than chance."
    if low > 0.5:
        return f"{sentence}: better than chance."
    sentence += ", which includes 50 %: inconclusive."
    if accuracy > 0.52:  # else thousands of pairs could not tell
        needed = math.ceil((Z95 / (2 * accuracy - 1)) ** 2)  # at which the interval of this share ends at one half
        sentence += f" About {needed:,} pairs would settle it"
        sentence += "; without a test split, --test_split_size in every stage holds out more."
    return sentence


def format_rows(rows: Sequence[Row]) -> list[str]:
    """Rows as lines of aligned text."""
    lines = [f"{'':<25}{'policy':>8}{'reference':>11}"]
    for row in rows:
        ref = f"{row.ref.value:.3f}" if row.ref else ""
        notes = row.meaning.split("\n")
        if row.ref is None and row.policy.low is not None:
            notes.append(format_interval(row))
        lines.append(f"{row.label:<25}{row.policy.value:>8.3f}{ref:>11}   {notes[0]}")
        lines += [" " * 47 + note for note in notes[1:]]
    return lines


def format_interval(row: Row) -> str:
    """The policy's interval, and its verdict if it has one."""
    interval = f"95 % interval {row.policy.low:.3f} to {row.policy.high:.3f} {row.unit}".rstrip()
    return f"{interval}, {row.verdict}" if row.verdict else interval


def format_samples(samples: Sequence[dict[str, Any]], width: int = 400) -> str:
    """Prompts (their last `width` characters) with both models' answers, from rows of `samples.jsonl`."""
    lines = []
    for sample in samples:
        prompt = sample["prompt"]
        start = "…" if len(prompt) > width else ""
        lines.append(f"\n── prompt ──\n{start}{prompt[-width:].strip()}")
        for role, title in (("policy", "policy"), ("ref", "reference")):
            facts = "ended by itself" if sample[f"ended_{role}"] else "cut off"
            if f"reward_{role}" in sample:
                facts += f", reward {sample[f'reward_{role}']:.3f}"
            lines.append(f"── {title} ({facts}) ──\n{sample[role].strip()}")
    return escape_controls("\n".join(lines), keep="\n\t")
