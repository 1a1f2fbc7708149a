"""An evaluation as a stranger reads it: what each figure means, how sure it is, and a few answers.

`headline` is the one place for the words; the printed table, the report and the model card take them from there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tinydpo.evaluation.metrics import Z95, wilson_interval

ROLES = ("policy", "ref")
CUT = (("whole", "both whole", "with both answers whole"), ("cut", "one cut", "with an answer that max_length cuts"))
EXPLICIT = (
    ("explicit_accuracy", "reward model's accuracy", "share of the same pairs whose chosen it scores higher", 0.5),
    (
        "implicit_minus_explicit",
        "implicit less explicit",
        "reward accuracy less the reward model's,\non the same pairs (paired bootstrap)",
        0.0,
    ),
)
MOST_SUBSETS = 8  # rows; the report's figure has more, eval_results.json has all


class Estimate(NamedTuple):
    """A figure and, where there is one, its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """The figure, its interval in brackets."""
        return f"{self.value:.3f}" + ("" if self.low is None else f" ({self.low:.3f} to {self.high:.3f})")

    def spread(self) -> str:
        """The interval: ± half of it where it is as wide to both sides."""
        low, value, high = self.low, self.value, self.high
        even = abs(high - 2 * value + low) < 1e-9
        return f"± {high - value:.3f}" if even else f"95 % between {low:.3f} and {high:.3f}"


class Row(NamedTuple):
    """A figure of the policy, the reference's beside it, and what they mean; `chance` is its value under no effect,
    and `nothing` what to say where its interval holds that."""

    label: str
    meaning: str
    policy: Estimate
    ref: Estimate | None = None
    chance: float | None = None
    unit: str = ""
    nothing: str = "no winner can be named"

    def says_nothing(self) -> bool:
        """Whether the interval holds what chance would give."""
        return self.chance is not None and self.policy.low is not None and _contains(self.policy[1:], self.chance)


def headline_rows(results: dict[str, Any]) -> list[Row]:
    """The figures of `eval_results.json` in the order to read them in, line breaks in their meanings."""
    r, settings = results, results["settings"]
    room, prompts = settings["max_length"] // 2, settings["num_prompts"]

    def around(name: str, r: dict[str, Any] = results) -> Estimate:
        half = Z95 * r[f"{name}_se"] if f"{name}_se" in r else None
        return Estimate(r[name]) if half is None else Estimate(r[name], r[name] - half, r[name] + half)

    def both(name: str) -> tuple[Estimate, Estimate]:
        return around(f"{name}_policy"), around(f"{name}_ref")

    def share(name: str) -> tuple[Estimate, ...]:
        return tuple(Estimate(s.value, *wilson_interval(s.value * prompts, prompts)) for s in both(name))

    def within(name: str, r: dict[str, Any] = results) -> Estimate:
        return Estimate(r[name], *r[f"{name}_ci95"])

    def of_subsets(where: str, name: str, of: str, chance: float) -> list[Row]:
        return [
            Row(f"… {subset[:20]}", f"{of} over {f['pairs']} pairs of {subset}", within(name, f), chance=chance)
            for subset, f in list(r.get(where, {}).items())[:MOST_SUBSETS]
        ]

    off = (settings["temperature"], settings["top_k"], settings["top_p"]) != (1, 0, 1)
    rows = [
        Row(
            "reward accuracy",
            "share of pairs whose chosen has the higher implicit reward\n(β log π/π_ref; ties count as wrong)",
            within("reward_accuracy"),
            chance=0.5,
        ),
        *(
            Row(
                f"… {which}",
                f"the same over {r[f'reward_accuracy_{name}_pairs']} pairs, {meaning}",
                within(f"reward_accuracy_{name}"),
                chance=0.5,
            )
            for name, which, meaning in CUT
            if {"reward_accuracy_whole", "reward_accuracy_cut"} <= r.keys()
        ),
        *of_subsets("subsets", "reward_accuracy", "reward accuracy", 0.5),
        *(
            row
            for name, label, meaning, chance in EXPLICIT
            if name in r
            for row in (
                Row(label, meaning, within(name), chance=chance),
                *of_subsets("explicit_subsets", name, label, chance),
            )
        ),
        Row(
            "reward margin",
            "implicit reward of chosen minus rejected, mean",
            around("reward_margin"),
            chance=0.0,
        ),
        Row("DPO loss", "-log σ(margin), mean: 0.693 for the reference itself, lower is better", around("dpo_loss")),
        Row(
            "NLL of chosen",
            "nats a token with the end token: lower means it finds them likelier",
            *both("nll_chosen"),
        ),
        Row(
            "raw likelihood accuracy",
            "BIASED BY LENGTH, the earlier script's figure: how often chosen is\n"
            "likelier than rejected; shorter answers are likelier whatever they say",
            *both("raw_likelihood_accuracy"),
        ),
        Row(
            "KL per sequence",
            "how far the policy has moved from the reference"
            + "\nNO KL: temperature, top_k or top_p made the samples unlike the policy" * off,
            around("kl_per_sequence"),
            unit="nats",
        ),
        Row("KL per token", "nats: the same sum over all sampled tokens", Estimate(r["kl_per_token"])),
        Row("mean answer length", f"tokens with the end token, of at most {room}", *both("mean_length")),
        Row("ended by themselves", f"share of answers with an end token within {room} tokens", *share("ended")),
    ]
    if "win_rate_vs_ref" in r:
        names = [*(settings.get("reward_funcs") or []), Path(settings.get("reward_model_name_or_path") or "").name]
        rows += [
            Row("reward", f"mean of {' + '.join(filter(None, names))}", *both("reward")),
            *(
                Row(f"… {name[:20]}", f"mean of {name} alone", *(around(f"reward_{role}", one) for role in ROLES))
                for name, one in r.get("rewards", {}).items()
            ),
            Row(
                "win rate",
                "how often the policy's answer has the higher reward, ties half",
                Estimate(r["win_rate_vs_ref"], *r["win_rate_ci95"]),
                chance=0.5,
            ),
        ]
    if "rank_correlation" in r:
        rows.append(
            Row(
                "rank correlation",
                "Spearman's, of the reward\nmodel with the reward functions, over both models' answers",
                within("rank_correlation"),
                chance=0.0,
            )
        )
    return rows


def format_table(results: dict[str, Any]) -> str:
    """`eval_results.json` as aligned text. A share whose 95 % interval holds one half is said to be no better."""
    settings = results["settings"]
    lines = [
        f"policy     {settings['model_name_or_path']}",
        f"reference  {settings['ref_model_name_or_path']}",
        f"{results['pairs']} held-out pairs at β {results['beta']:g}; both models' answers to "
        f"{settings['num_prompts']} held-out",
        f"prompts at temperature {settings['temperature']:g}, top_k {settings['top_k']}, top_p {settings['top_p']:g}",
        *filter(None, [format_trained_share(results)]),
        "",
        f"{'':<25}{'policy':>8}{'reference':>11}",
    ]
    for label, meaning, policy, ref, chance, unit, _ in headline_rows(results):
        if chance == 0.5:
            meaning += ";\n" + format_interval(policy[1:])
        elif ref is None and policy.low is not None:
            meaning = f"{policy.spread()}{' ' * bool(unit)}{unit}: {meaning}"
        first, *more = meaning.split("\n")
        lines.append(f"{label:<25}{policy.value:>8.3f}{f'{ref.value:.3f}' if ref else '':>11}   {first}")
        lines.extend(" " * 47 + text for text in more)
    return "\n".join(lines)


def format_trained_share(results: dict[str, Any]) -> str:
    """What to know of pairs whose prompts the policy was trained on; "" where there are none, or nothing is known."""
    count = round((results.get("trained_share") or 0) * results["pairs"])
    return (
        f"NOT HELD OUT: the policy was trained on the prompts of {count} of {results['pairs']} pairs" if count else ""
    )


def format_interval(interval: Sequence[float]) -> str:
    """The interval in words, with a warning where it cannot be told apart from a coin."""
    low, high = interval
    return f"95 % between {low:.3f} and {high:.3f}" + ", not told apart from chance (0.5)" * _contains(interval, 0.5)


def _contains(interval: Sequence[float], value: float) -> bool:
    return interval[0] <= value <= interval[1]


def format_samples(samples: Sequence[dict[str, Any]], width: int = 400) -> str:
    """Prompts (their last `width` characters) with both models' answers, from rows of `samples.jsonl`."""
    parts = []
    for sample in samples:
        prompt = sample["prompt"]
        parts.append("\n── prompt ──\n" + "…" * (len(prompt) > width) + prompt[-width:].strip())
        for role, title in (("policy", "policy"), ("ref", "reference")):
            end = "ended by itself" if sample[f"ended_{role}"] else "cut off"
            reward = f", reward {sample[f'reward_{role}']:.3f}" if f"reward_{role}" in sample else ""
            parts.append(f"── {title} ({end}{reward}) ──\n{sample[role].strip()}")
    return "\n".join(parts)
