"""The words of an evaluation: what each figure means and how sure it is. Table, card and report take them from here.

A new metric needs a function in `metrics`, its call in scripts/evaluate.py, and one `make_row` here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinydpo.evaluation.metrics import Z95

MOST_SUBSETS = 8  # rows; the report's figure has more, eval_results.json has all


class Estimate(NamedTuple):
    """A figure and, if it has one, its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """The figure, its interval in brackets."""
        return f"{self.value:.3f}" + ("" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})")

    def includes(self, value: float) -> bool:
        """Whether the interval includes this value."""
        return self.low is not None and self.low <= value <= self.high


class Row(NamedTuple):
    """A figure of the policy, perhaps with the reference's, and what they mean (line breaks are for the table).

    `chance` is the policy's value if there is no effect; if the interval includes it, the texts say `nothing`.
    """

    label: str
    meaning: str
    policy: Estimate
    ref: Estimate | None = None
    chance: float | None = None
    unit: str = ""
    nothing: str = "inconclusive"

    def says_nothing(self) -> bool:
        """Whether the interval includes what chance would give."""
        return self.chance is not None and self.policy.includes(self.chance)

    def warning(self) -> str:
        """What to say of an interval that includes chance, else ""."""
        return f"includes {self.chance:g}: {self.nothing}" if self.says_nothing() else ""


def make_row(results: dict[str, Any], name: str, label: str, meaning: str, **more: Any) -> Row:
    """The row of a figure, or of the policy's and the reference's if there are two (`<name>_policy`, `<name>_ref`)."""
    if name in results:
        return Row(label, meaning, _estimate(results, name), **more)
    return Row(label, meaning, _estimate(results, f"{name}_policy"), _estimate(results, f"{name}_ref"), **more)


def _estimate(results: dict[str, Any], name: str) -> Estimate:
    """A figure with the interval that it has, or that its standard error gives."""
    value = results[name]
    if f"{name}_ci95" in results:
        return Estimate(value, *results[f"{name}_ci95"])
    if f"{name}_se" in results:
        half = Z95 * results[f"{name}_se"]
        return Estimate(value, value - half, value + half)
    return Estimate(value)


def headline_rows(results: dict[str, Any]) -> list[Row]:
    """The figures of `eval_results.json`, in the order to read them in."""
    return [
        *_accuracy_rows(results),
        *_reward_model_rows(results),
        *_likelihood_rows(results),
        *_kl_rows(results),
        *_answer_rows(results),
        *_reward_rows(results),
    ]


def _accuracy_rows(results: dict[str, Any]) -> list[Row]:
    meaning = "share of pairs whose chosen answer has the higher implicit reward\n(β log π/π_ref; ties count as wrong)"
    rows = [make_row(results, "reward_accuracy", "reward accuracy", meaning, chance=0.5)]
    if "reward_accuracy_whole" in results and "reward_accuracy_cut" in results:
        for part, which in (("whole", "both answers whole"), ("cut", "an answer that max_length cuts")):
            name = f"reward_accuracy_{part}"
            meaning = f"the same over {results[f'{name}_pairs']} pairs with {which}"
            rows.append(make_row(results, name, f"… {part}", meaning, chance=0.5))
    return rows + _subset_rows(results.get("subsets", {}), "reward_accuracy", "reward accuracy", 0.5)


def _reward_model_rows(results: dict[str, Any]) -> list[Row]:
    if "explicit_accuracy" not in results:
        return []
    accuracy = "share of the same pairs whose chosen it scores higher"
    difference = "reward accuracy minus the reward model's"
    rows = []
    for name, label, meaning, chance in (
        ("explicit_accuracy", "reward model's accuracy", accuracy, 0.5),
        ("implicit_minus_explicit", "implicit less explicit", difference, 0.0),
    ):
        rows.append(make_row(results, name, label, meaning, chance=chance))
        rows += _subset_rows(results.get("explicit_subsets", {}), name, label, chance)
    return rows


def _subset_rows(subsets: dict[str, Any], name: str, label: str, chance: float) -> list[Row]:
    rows = []
    for subset, figures in list(subsets.items())[:MOST_SUBSETS]:
        meaning = f"{label} over {figures['pairs']} pairs of {subset}"
        rows.append(make_row(figures, name, f"… {subset[:20]}", meaning, chance=chance))
    return rows


def _likelihood_rows(results: dict[str, Any]) -> list[Row]:
    margin = "implicit reward of chosen minus rejected, mean"
    loss = "-log σ(margin), mean: 0.693 for the reference itself, lower is better"
    nll = "nats per token, end token included: lower means likelier"
    raw = "how often chosen is likelier than rejected\nunder the model alone; biased towards short answers"
    return [
        make_row(results, "reward_margin", "reward margin", margin, chance=0.0),
        make_row(results, "dpo_loss", "DPO loss", loss),
        make_row(results, "nll_chosen", "NLL of chosen", nll),
        make_row(results, "raw_likelihood_accuracy", "raw likelihood accuracy", raw),
    ]


def _kl_rows(results: dict[str, Any]) -> list[Row]:
    settings = results["settings"]
    meaning = "how far the policy has moved from the reference"
    if (settings["temperature"], settings["top_k"], settings["top_p"]) != (1, 0, 1):
        meaning += "\nNO ESTIMATE OF THE KL: temperature, top_k or top_p changed the samples"
    return [
        make_row(results, "kl_per_sequence", "KL per sequence", meaning, unit="nats"),
        make_row(results, "kl_per_token", "KL per token", "nats: the same sum over all sampled tokens"),
    ]


def _answer_rows(results: dict[str, Any]) -> list[Row]:
    room = results["settings"]["max_length"] // 2
    ended = f"share of answers with an end token within {room} tokens"
    return [
        make_row(results, "mean_length", "mean answer length", f"tokens, end token included, of at most {room}"),
        make_row(results, "ended", "ended by themselves", ended),
    ]


def _reward_rows(results: dict[str, Any]) -> list[Row]:
    if "win_rate_vs_ref" not in results:
        return []
    settings = results["settings"]
    names = list(settings.get("reward_funcs") or [])
    if settings.get("reward_model_name_or_path"):
        names.append(Path(settings["reward_model_name_or_path"]).name)
    rows = [make_row(results, "reward", "reward", f"mean of {' + '.join(names)}")]
    for name, figures in results.get("rewards", {}).items():
        rows.append(make_row(figures, "reward", f"… {name[:20]}", f"mean of {name} alone"))
    win_rate = Estimate(results["win_rate_vs_ref"], *results["win_rate_ci95"])
    meaning = "how often the policy's answer has the higher reward, ties half"
    rows.append(Row("win rate", meaning, win_rate, chance=0.5))
    if "rank_correlation" in results:
        meaning = "Spearman's, of the reward model with the reward functions,\nover both models' answers"
        rows.append(make_row(results, "rank_correlation", "rank correlation", meaning, chance=0.0))
    return rows


def format_table(results: dict[str, Any]) -> str:
    """`eval_results.json` as aligned text."""
    settings = results["settings"]
    lines = [
        f"policy     {settings['model_name_or_path']}",
        f"reference  {settings['ref_model_name_or_path']}",
        f"{results['pairs']} held-out pairs at β {results['beta']:g}; both models' answers to "
        f"{settings['num_prompts']} held-out",
        f"prompts at temperature {settings['temperature']:g}, top_k {settings['top_k']}, top_p {settings['top_p']:g}",
        "",
        f"{'':<25}{'policy':>8}{'reference':>11}",
    ]
    for row in headline_rows(results):
        ref = f"{row.ref.value:.3f}" if row.ref else ""
        words = row.meaning.split("\n")
        if row.ref is None and row.policy.low is not None:
            words.append(format_interval(row))
        lines.append(f"{row.label:<25}{row.policy.value:>8.3f}{ref:>11}   {words[0]}")
        lines += [" " * 47 + line for line in words[1:]]
    return "\n".join(lines)


def format_interval(row: Row) -> str:
    """The policy's interval in words, with a warning if it includes chance."""
    interval = f"95 % interval {row.policy.low:.3f} to {row.policy.high:.3f} {row.unit}".rstrip()
    return f"{interval}, {row.warning()}" if row.says_nothing() else interval


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
    return "\n".join(lines)
