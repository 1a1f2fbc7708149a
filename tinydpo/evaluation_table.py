"""An evaluation as a stranger reads it: a plain-text table that says what each number means, and a few answers."""

from collections.abc import Sequence
from typing import Any


def table(results: dict[str, Any]) -> str:
    """`eval_results.json` as aligned text. A share whose 95 % interval holds one half is said to be no better."""
    r, settings = results, results["settings"]
    room = settings["max_length"] // 2
    lines = [
        f"policy     {settings['model_name_or_path']}",
        f"reference  {settings['ref_model_name_or_path']}",
        f"{r['pairs']} held-out pairs at β {r['beta']:g}; both models' answers to {settings['num_prompts']} held-out",
        f"prompts at temperature {settings['temperature']:g}, top_k {settings['top_k']}, top_p {settings['top_p']:g}",
        "",
        f"{'':<25}{'policy':>8}{'reference':>11}",
    ]

    def line(label: str, policy: float, meaning: str, ref: float | None = None) -> None:
        first, *more = meaning.split("\n")
        reference = "" if ref is None else f"{ref:.3f}"
        lines.append(f"{label:<25}{policy:>8.3f}{reference:>11}   {first}")
        lines.extend(" " * 47 + text for text in more)

    def both(label: str, name: str, meaning: str) -> None:
        line(label, r[f"{name}_policy"], meaning, r[f"{name}_ref"])

    line(
        "reward accuracy",
        r["reward_accuracy"],
        "share of pairs whose chosen has the higher implicit reward\n"
        f"(β log π/π_ref; ties count as wrong);\n{beside_chance(r['reward_accuracy_ci95'])}",
    )
    line(
        "reward margin",
        r["reward_margin"],
        f"± {1.96 * r['reward_margin_se']:.3f}: implicit reward of chosen minus rejected, mean",
    )
    line("DPO loss", r["dpo_loss"], "-log σ(margin), mean: 0.693 for the reference itself, lower is better")
    both("NLL of chosen", "nll_chosen", "nats a token with the end token: lower means it finds them likelier")
    both(
        "raw likelihood accuracy",
        "raw_likelihood_accuracy",
        "BIASED BY LENGTH, the earlier script's figure: how often chosen is\n"
        "likelier than rejected; shorter answers are likelier whatever they say",
    )
    off = (settings["temperature"], settings["top_k"], settings["top_p"]) != (1, 0, 1)
    line(
        "KL per sequence",
        r["kl_per_sequence"],
        f"± {1.96 * r['kl_per_sequence_se']:.3f} nats: how far the policy has moved from the reference"
        + "\nNO KL: temperature, top_k or top_p made the samples unlike the policy" * off,
    )
    line("KL per token", r["kl_per_token"], "nats: the same sum over all sampled tokens")
    both("mean answer length", "mean_length", f"tokens with the end token, of at most {room}")
    both("ended by themselves", "ended", f"share of answers with an end token within {room} tokens")
    if "win_rate_vs_ref" in r:
        both("reward", "reward", f"mean of {' + '.join(settings['reward_funcs'])}")
        line(
            "win rate",
            r["win_rate_vs_ref"],
            "how often the policy's answer has the higher reward, ties half;\n" + beside_chance(r["win_rate_ci95"]),
        )
    return "\n".join(lines)


def beside_chance(interval: Sequence[float]) -> str:
    """The interval in words, with a warning where it cannot be told apart from a coin."""
    low, high = interval
    return f"95 % between {low:.3f} and {high:.3f}" + ", not told apart from chance (0.5)" * (low <= 0.5 <= high)


def side_by_side(samples: Sequence[dict[str, Any]], width: int = 400) -> str:
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
