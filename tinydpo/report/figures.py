"""The report's figures in matplotlib: small enough for a phone, in colours that colour-blind readers distinguish."""

import base64
import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinydpo.evaluation.metrics import Z95
from tinydpo.evaluation.winrate import OPPONENTS
from tinydpo.training.curves import BLUE, GREY, ORANGE, draw_panel, select_panels

SKY = "#56B4E9"  # this, green and pink are also from the palette of Okabe and Ito
METHODS = {  # color and marker of a curve in the frontier
    "DPO": (BLUE, "o"),
    "IPO": (ORANGE, "s"),
    "hinge": ("#009E73", "D"),
    "conservative DPO": ("#CC79A7", "^"),
    "shuffled labels": ("black", "x"),
}
WIN_RATES = (
    ("raw", "win_rate", "win_rate_ci95"),
    ("length-controlled", "length_controlled_win_rate", "length_controlled_ci95"),
)
LINEAR_KL = 16  # nats; farther runs have mostly collapsed
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "text.parse_math": False,  # names come from the data: a dollar sign is a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "tinydpo",  # the same figure is written as the same bytes
}
SMALL_LABEL = {"textcoords": "offset points", "fontsize": 7}


def to_data_uri(figure: Figure) -> str:
    """A figure as an SVG image inside the page; the same figure gives the same text."""
    svg = io.BytesIO()
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of characters that matplotlib's font lacks: the reader's fonts draw the text
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(svg.getvalue()).decode()


@rc_context(STYLE)
def draw_training_curves(log_history: list[dict[str, Any]]) -> list[Figure]:
    """A figure for each panel that the run logged: loss, reward accuracy, margin, rewards."""
    figures = []
    for panel in select_panels(log_history):
        figure, axes = _make_figure(4.4, 3)
        draw_panel(axes, panel, log_history)
        figures.append(figure)
    return figures


@rc_context(STYLE)
def draw_margin_histogram(margins: Sequence[float]) -> Figure:
    """Implicit reward margins of held-out pairs; the outermost bars also count what is beyond 99 % of them."""
    values = np.nan_to_num(np.asarray(margins, dtype=float))  # NaN, of a policy that diverged, counts as wrong
    width = (np.quantile(np.abs(values), 0.99) or 1.0) / 20
    right = np.clip(values[values > 0], width / 2, 19.5 * width)
    wrong = np.clip(values[values <= 0], -19.5 * width, -width / 2)  # ties are wrong
    shares = [f"{len(right) / len(values):.1%} right", f"{len(wrong) / len(values):.1%} wrong"]
    edges = width * np.arange(-20, 21)  # zero is an edge, so no bar has both right and wrong pairs
    figure, axes = _make_figure()
    axes.hist([right, wrong], edges, stacked=True, rwidth=0.9, color=[BLUE, ORANGE], label=shares)
    axes.axvline(0, color="black", linewidth=1)
    axes.legend()
    axes.set(xlabel="implicit reward of chosen minus rejected, β × nats", ylabel="held-out pairs")
    return figure


@rc_context(STYLE)
def draw_reward_histogram(
    every: Sequence[float], chosen: Sequence[float], rejected: Sequence[float], reward: str
) -> Figure:
    """Rewards of all sampled answers, and of those that became the chosen and the rejected side of a pair."""
    figure, axes = _make_figure()
    edges = np.histogram_bin_edges(np.asarray(every, dtype=float), 40)
    axes.hist(every, edges, histtype="step", color=GREY, label="all answers")
    axes.hist(chosen, edges, histtype="step", color=BLUE, label="chosen")
    axes.hist(rejected, edges, histtype="step", color=ORANGE, linestyle="--", label="rejected")
    axes.legend()
    axes.set(xlabel=f"reward: {_shorten(reward, 60)}", ylabel="answers")
    return figure


@rc_context(STYLE)
def draw_accuracy_by_subset(subsets: dict[str, dict[str, Any]]) -> Figure:
    """Reward accuracy of each subset with its 95 % interval, and a line at chance."""
    names = [f"{_shorten(name)}  (n = {subset['pairs']:,})" for name, subset in subsets.items()]
    shares = [subset["reward_accuracy"] for subset in subsets.values()]
    bars = _get_bars(shares, [subset["reward_accuracy_ci95"] for subset in subsets.values()])
    figure, axes = _make_figure(4.6, 1.0 + 0.32 * len(names))
    axes.errorbar(shares, range(len(names)), xerr=bars, color=BLUE, linestyle="", marker="o")
    axes.axvline(0.5, color=GREY, linewidth=1, linestyle=":")
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), xlabel="reward accuracy, share of pairs (dotted: chance)")
    axes.set_yticks(range(len(names)), names)
    return figure


@rc_context(STYLE)
def draw_win_rates(comparisons: Sequence[dict[str, Any]]) -> Figure:
    """Raw and length-controlled win rates with their 95 % intervals over the sampling temperature."""
    figure, axes = _make_figure(4.8, 3.8)
    shift = 0.0
    for (opponent, name), color in zip(OPPONENTS.items(), (ORANGE, BLUE), strict=True):
        rows = [row for row in comparisons if row["opponent"] == opponent]
        for kind, rate, interval in WIN_RATES:
            rates = [row[rate] for row in rows]
            axes.errorbar(
                [row["temperature"] + shift for row in rows], rates, _get_bars(rates, [row[interval] for row in rows]),
                label=f"against {name}, {kind}", color=color, marker="o" if kind == "raw" else "s", markersize=5,
                elinewidth=0.8, linestyle="-" if kind == "raw" else "--",
            )  # fmt: skip
            shift += 0.01  # side by side, so that the bars do not overlap
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle=":")
    axes.set(xlabel="sampling temperature", ylabel="policy's win rate, ties half", ylim=(0, 1))
    axes.set_xticks(sorted({row["temperature"] for row in comparisons}))
    axes.margins(x=0.2)
    figure.legend(loc="outside lower center")
    return figure


@rc_context(STYLE)
def draw_frontier(result: dict[str, Any]) -> Figure:
    """Reward against KL(policy ‖ reference) as in the DPO paper's Figure 2 (arXiv 2305.18290).

    Each method and learning rate is a curve from the SFT model through the last checkpoint of each β, the mean over
    seeds. Earlier checkpoints are faint dots. Bars are 95 % intervals over prompts. `result` is `frontier.json`,
    with the `rounds` of `rounds.json` if there are any.
    """
    figure, axes = _make_figure(5.4, 4.6)
    rounds = result.get("rounds", [])
    sft = result["sft"] if "sft" in result else rounds[0]
    if result.get("best_of_n"):
        _draw_best_of_n(axes, result["best_of_n"])
    curves: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for point in result["points"]:
        curves.setdefault((point["curve"], point.get("learning_rate")), []).append(point)
    for number, ((method, rate), points) in enumerate(curves.items()):
        label = _shorten(method) + (f", learning rate {rate:g}" if rate else "")
        # On every curve the labels would overlap.
        _draw_method(axes, method, label, points, start=(0.0, sft["reward"]), name_betas=number == 0)
    if rounds:
        _draw_with_bars(axes, rounds, color=SKY, marker="P", markersize=6, linewidth=1.6, label="on-policy rounds")
    for one in rounds[1:]:
        axes.annotate(one["name"], (one["kl"], one["reward"]), (8, -7), **SMALL_LABEL, color=SKY)
    axes.plot(0, sft["reward"], marker="*", markersize=9, color="black")
    axes.annotate("SFT", (0, sft["reward"]), (4, -11), textcoords="offset points")
    axes.set(xlabel="KL(policy ‖ reference), nats per answer", ylabel=f"mean reward: {_shorten(result['reward'], 60)}")
    axes.margins(x=0.03)
    if max(point["kl"] for point in [*result["points"], *rounds]) > 2 * LINEAR_KL:
        # One run that collapses would squeeze the others.
        axes.set_xscale("symlog", base=2, linthresh=LINEAR_KL, linscale=3)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"{axes.get_xlabel()} (logarithmic beyond {LINEAR_KL})")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _draw_best_of_n(axes: Axes, best: Sequence[dict[str, Any]]) -> None:
    label = f"best of N = {best[-1]['n']}"
    axes.plot(*_get_columns(best), color=GREY, linestyle="--", linewidth=1, marker=".", markersize=4, label=label)
    for point in best[1:]:
        place = (point["kl"], point["reward"])
        axes.annotate(f"{point['n']}", place, (-4, 0), **SMALL_LABEL, color=GREY, ha="right")


def _draw_method(
    axes: Axes, method: str, label: str, points: list[dict[str, Any]], start: tuple[float, float], name_betas: bool
) -> None:
    color, marker = METHODS.get(method, (GREY, "o"))
    by_step = sorted(points, key=lambda point: point["step"])
    last = list({(point["beta"], point["seed"]): point for point in by_step}.values())
    axes.plot(*_get_columns(points), color=color, linestyle="", marker=marker, markersize=3, alpha=0.35)
    style = {"color": color, "ecolor": (color, 0.5), "linestyle": "", "marker": marker, "markersize": 4.5}
    _draw_with_bars(axes, last, label=label, **style)
    means = []
    for beta in sorted({point["beta"] for point in last}):
        kl, reward = np.mean(_get_columns([point for point in last if point["beta"] == beta]), axis=1)
        means.append((kl, reward))
        if name_betas:
            axes.annotate(f"β {beta:g}", (kl, reward), (-3, 6), **SMALL_LABEL, color=color, ha="right")
    line = ":" if method == "shuffled labels" else "-"
    axes.plot(*zip(start, *sorted(means), strict=True), color=color, linewidth=1.2, linestyle=line)


def _draw_with_bars(axes: Axes, points: Sequence[dict[str, Any]], **style: Any) -> None:
    """Points of the frontier with their 95 % intervals in both directions."""
    kl_bars = Z95 * np.array([point["kl_se"] for point in points], dtype=float)  # NaN, no bar, for None
    reward_bars = Z95 * np.array([point["reward_se"] for point in points], dtype=float)
    axes.errorbar(*_get_columns(points), xerr=kl_bars, yerr=reward_bars, elinewidth=0.7, **style)


@rc_context(STYLE)
def draw_rewards_over_rounds(rounds: Sequence[dict[str, Any]]) -> Figure:
    """Mean reward of each round's answers over KL from the first model, a panel for each of several rewards.

    Where the reward that made the pairs rises and a different one falls, the policy exploits the first
    (over-optimization: Gao et al. 2022, arXiv 2210.10760).
    """
    names = list(rounds[0]["rewards"])
    figure = Figure(figsize=(3.2 * len(names), 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        kl = [one["kl"] for one in rounds]
        means = [one["rewards"][name]["mean"] for one in rounds]
        bars = Z95 * np.array([one["rewards"][name]["se"] for one in rounds], dtype=float)
        axes.errorbar(kl, means, bars, color=BLUE, marker="o", markersize=5, elinewidth=0.8)
        for one, x, y in zip(rounds, kl, means, strict=True):
            axes.annotate(one["name"], (x, y), (4, -10), **SMALL_LABEL, color=BLUE)
        axes.set(title=_shorten(name), xlabel="KL from the first model, nats per answer", ylabel="mean reward")
        axes.margins(x=0.15)
    return figure


def _make_figure(width: float = 4.8, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _get_bars(values: Sequence[float], intervals: Sequence[Sequence[float]]) -> np.ndarray:
    """Lengths of the error bars below and above n values, (2, n)."""
    return np.abs(np.array(intervals).T - np.array(values))


def _get_columns(points: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [point["kl"] for point in points], [point["reward"] for point in points]


def _shorten(text: str, most: int = 28) -> str:
    """A name from the data as a label: printable, and not wider than the figure."""
    text = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))
    return text if len(text) <= most else text[: most - 1] + "…"
