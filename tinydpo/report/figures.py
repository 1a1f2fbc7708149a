"""The report's figures: axes named with their units, curves named where they end, colours that everyone tells apart.

Each is a matplotlib `Figure` of its own, small enough to be read at the width of a phone. `svg` puts one into a page,
in the page's own colours.
"""

import re
import warnings
from collections.abc import Iterable, Sequence
from io import StringIO
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tinydpo.evaluation.metrics import Z95, wilson_interval
from tinydpo.training.curves import BLUE, GREY, ORANGE, draw_panel, select_panels

GREEN, PINK, SKY, BLACK = "#009E73", "#CC79A7", "#56B4E9", "#000000"  # Okabe and Ito's again
METHODS = {"DPO": BLUE, "IPO": ORANGE, "hinge": GREEN, "conservative DPO": PINK, "shuffled labels": BLACK}
MARKERS = dict(zip(METHODS, "osD^x", strict=True))  # a second way to tell the methods apart
FAR = 16  # nats; farther runs have mostly collapsed
OPPONENTS = {"ref": ("reference's answers", BLUE), "chosen": ("dataset's answers", ORANGE)}
KINDS = (
    ("raw", "win_rate", "win_rate_ci95"),
    ("length-controlled", "length_controlled_win_rate", "length_controlled_ci95"),
)
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # names are data: a dollar sign is a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "tinydpo",  # the same figure is written as the same bytes
}
styled = matplotlib.rc_context(STYLE)


class Group(NamedTuple):
    """`right` of the `n` held-out pairs that `name` says have the higher implicit reward on chosen."""

    name: str
    right: int
    n: int


@styled
def draw_training_curves(log_history: list[dict[str, Any]]) -> list[Figure]:
    """Loss and, where the run has them, reward accuracy, margin and rewards over optimizer steps, a figure each."""
    figures = []
    for panel in select_panels(log_history):
        figure, axes = _figure(4.4, 3)
        draw_panel(axes, panel, log_history)
        figures.append(figure)
    return figures


@styled
def draw_margin_histogram(margins: Sequence[float]) -> Figure:
    """Implicit reward margins of n held-out pairs, those above zero in another colour.

    What lies beyond the 99th percentile of their absolute values is counted in the outermost bars.
    """
    values = np.asarray(margins, dtype=float)
    values = values[np.isfinite(values)]
    width = (float(np.quantile(np.abs(values), 0.99)) if len(values) else 0.0) / 20 or 1.0
    edges = width * np.arange(-20, 21)  # zero is an edge: no bar holds both right and wrong
    figure, axes = _figure()
    for side, colour, x, align, part in (
        ("right", BLUE, 0.98, "right", values[values > 0]),
        ("wrong", ORANGE, 0.02, "left", np.minimum(values[values <= 0], -width / 2)),  # ties stand left of zero
    ):
        axes.hist(np.clip(part, edges[0] + width / 2, edges[-1] - width / 2), edges, color=colour, rwidth=0.9)
        told = f"{len(part) / max(1, len(values)):.1%} {side}"
        axes.text(x, 0.99, told, transform=axes.transAxes, ha=align, va="top", color=colour)
    top = axes.get_ylim()[1]
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.set(
        xlabel="implicit reward of chosen minus rejected, β × nats", ylabel="held-out pairs", ylim=(0, 1.15 * top)
    )
    return figure


@styled
def draw_reward_histogram(
    every: Sequence[float], chosen: Sequence[float], rejected: Sequence[float], reward: str
) -> Figure:
    """Rewards of all sampled answers, and of those that became the chosen and the rejected side of a pair."""
    figure, axes = _figure()
    edges = np.histogram_bin_edges(np.asarray(every, dtype=float), 40)
    for values, name, colour, line in (
        (every, "all answers", GREY, "-"), (chosen, "chosen", BLUE, "-"), (rejected, "rejected", ORANGE, "--"),
    ):  # fmt: skip
        axes.hist(values, edges, histtype="step", color=colour, linestyle=line, label=name)
    axes.legend(frameon=False)
    axes.set(xlabel=f"reward: {_short(reward, 60)}", ylabel="answers")
    return figure


@styled
def draw_accuracy(groups: Sequence[Group]) -> Figure:
    """Reward accuracy of each group with its 95 % Wilson interval, beside chance."""
    figure, axes = _figure(4.6, 1.0 + 0.32 * len(groups))
    for y, (_, right, n) in enumerate(groups):
        _dot(axes, right / n, y, wilson_interval(right, n), BLUE)
    _share_axis(axes, [f"{_short(group.name)}  (n = {group.n:,})" for group in groups])
    axes.set(xlabel="reward accuracy, share of pairs")
    return figure


def name_opponent(comparison: dict[str, Any]) -> tuple[str, str]:
    """Name and colour of what the policy was compared with."""
    return OPPONENTS.get(comparison["opponent"], (_short(comparison["opponent"]), GREEN))


@styled
def draw_win_rates(comparisons: Sequence[dict[str, Any]]) -> Figure:
    """Win rates with their 95 % intervals, raw and length-controlled: over temperature, where there are several."""
    series = []
    for name, colour in dict.fromkeys(name_opponent(row) for row in comparisons):
        rows = sorted(
            (row for row in comparisons if name_opponent(row)[0] == name), key=lambda row: row["temperature"]
        )
        for kind, share, interval in KINDS:
            points = [(r["temperature"], r[share], r[interval]) for r in rows if r.get(share) is not None]
            if points:
                series.append((name, kind, colour, points))
    if len({row["temperature"] for row in comparisons}) > 1:
        return _over_temperature(series)
    figure, axes = _figure(4.8, 1.0 + 0.34 * len(series))
    for y, (_, kind, colour, [(_, share, interval)]) in enumerate(series):
        _dot(axes, share, y, interval, colour, hollow=kind != "raw")
    _share_axis(axes, [f"{name},\n{kind}" for name, kind, *_ in series])
    axes.set(xlabel="policy's win rate, ties half")
    return figure


def _over_temperature(series: Iterable[tuple[str, str, str, list[tuple[float, float, Sequence[float]]]]]) -> Figure:
    figure, axes = _figure()
    ends = []
    for name, kind, colour, points in series:
        hollow = kind != "raw"
        x, y = [p[0] for p in points], [p[1] for p in points]
        reach = np.abs(np.array([p[2] for p in points]).T - np.array(y))
        axes.errorbar(
            x, y, reach, color=colour, marker="o", markersize=5, markerfacecolor="none" if hollow else colour,
            linestyle="--" if hollow else "-", elinewidth=0.8,
        )  # fmt: skip
        ends.append((x[-1], y[-1], f"{name},\n{kind}", colour))
    axes.axhline(0.5, color=GREY, linewidth=1, linestyle=":")
    axes.set(xlabel="sampling temperature", ylabel="policy's win rate, ties half", ylim=(0, 1))
    _name_ends(axes, ends, lines=2)
    return figure


@styled
def draw_frontier(result: dict[str, Any]) -> Figure:
    """Reward against KL(policy ‖ reference) as in the DPO paper's Figure 2 (arXiv 2305.18290), a curve a method.

    A curve, of one learning rate, goes from the SFT model through the last checkpoint of each β, the mean over seeds;
    earlier checkpoints are faint. Joining these too would draw how one run moves as if it were a trade-off. β stands
    on the first curve only, bars are 95 % intervals over prompts. On-policy rounds are a curve from one to the next.

    Args:
        result: what `frontier.json` holds, with the `rounds` of `rounds.json` where there are some (`rounds.beside`).
    """
    figure, axes = _figure(5.4, 4)
    ends: list[tuple[float, float, str, str]] = []
    rounds = result.get("rounds", [])
    sft = result.get("sft") or next(iter(rounds), None)
    order = list(dict.fromkeys(point["curve"] for point in result["points"]))
    if best := result.get("best_of_n"):
        x, y = _columns(best)
        axes.plot(x, y, color=GREY, linestyle="--", linewidth=1, marker=".", markersize=4)
        for point in best[1:]:
            axes.annotate(f"{point['n']}", (point["kl"], point["reward"]), (-4, 0), **_SMALL, color=GREY, ha="right")
        ends.append((x[-1], y[-1], f"best of N = {best[-1]['n']}", GREY))
    methods: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for point in sorted(result["points"], key=lambda p: p["step"]):
        methods.setdefault((point["curve"], point.get("learning_rate")), []).append(point)
    for (curve, rate), points in sorted(methods.items(), key=lambda item: order.index(item[0][0])):
        last = {(p["beta"], p["seed"]): p for p in points}.values()
        colour, marker = METHODS.get(curve, GREY), MARKERS.get(curve, "o")
        axes.plot(*_columns(points), color=colour, linestyle="", marker=marker, markersize=3, alpha=0.35)
        axes.plot(*_columns(last), color=colour, linestyle="", marker=marker, markersize=4.5)
        reach = [Z95 * p["kl_se"] for p in last], [Z95 * p["reward_se"] for p in last]
        axes.errorbar(*_columns(last), *reach[::-1], linestyle="", elinewidth=0.7, ecolor=colour, alpha=0.5)
        means = sorted(
            (*np.mean(_columns(p for p in last if p["beta"] == beta), axis=1).tolist(), beta)
            for beta in {p["beta"] for p in last}
        )
        start = [(0.0, sft["reward"])] if sft else []
        x, y = zip(*start, *(mean[:2] for mean in means), strict=True)
        axes.plot(x, y, color=colour, linewidth=1.2, linestyle=":" if curve == "shuffled labels" else "-")
        if curve == order[0]:  # on every curve the labels would cover each other
            for kl, reward, beta in means:
                axes.annotate(f"β {beta:g}", (kl, reward), (-3, 6), **_SMALL, color=colour, ha="right")
        ends.append((x[-1], y[-1], _short(curve) + (f", {rate:g}" if rate else ""), colour))
    if rounds:
        x, y = _columns(rounds)
        reach = [Z95 * one["reward_se"] for one in rounds], [Z95 * one["kl_se"] for one in rounds]
        axes.errorbar(x, y, *reach, color=SKY, marker="P", markersize=6, linewidth=1.6, elinewidth=0.8)
        for one in rounds[1:]:
            axes.annotate(one["name"], (one["kl"], one["reward"]), (8, -7), **_SMALL, color=SKY)
        ends.append((x[-1], y[-1], "on-policy rounds", SKY))
    if sft:
        axes.plot(0, sft["reward"], marker="*", markersize=9, color=BLACK)
        axes.annotate("SFT", (0, sft["reward"]), (4, -11), textcoords="offset points", color=BLACK)
    axes.set(xlabel="KL(policy ‖ reference), nats per answer", ylabel=f"mean reward: {_short(result['reward'], 60)}")
    axes.margins(x=0.03)
    if (farthest := max((point["kl"] for point in [*result["points"], *rounds]), default=0)) > 2 * FAR:
        axes.set_xscale("symlog", linthresh=FAR, linscale=3)  # one run that collapses would press the others together
        ticks = [*range(0, FAR, 4), *(FAR * 2**power for power in range(int(np.log2(farthest / FAR)) + 1))]
        axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(-0.5, 1.15 * farthest)
        axes.set_xlabel(f"{axes.get_xlabel()} (logarithmic beyond {FAR})")
    _name_ends(axes, ends)
    return figure


@styled
def draw_rewards_over_rounds(rounds: Sequence[dict[str, Any]]) -> Figure:
    """Mean reward of each round's answers by each of several rewards, a panel each over KL from the first model.

    One that the pairs were made by and one that they were not part where the policy exploits the first
    (over-optimisation: Gao et al. 2022, arXiv 2210.10760).
    """
    names = list(rounds[0]["rewards"])
    figure = Figure(figsize=(3.2 * len(names), 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        means, errors = ([one["rewards"][name][key] for one in rounds] for key in ("mean", "se"))
        x, reach = [one["kl"] for one in rounds], [Z95 * error for error in errors]
        axes.errorbar(x, means, reach, color=BLUE, marker="o", markersize=5, elinewidth=0.8)
        for one, at, mean in zip(rounds, x, means, strict=True):
            axes.annotate(one["name"], (at, mean), (4, -10), **_SMALL, color=BLUE)
        axes.set(title=_short(name), xlabel="KL from the first model, nats per answer", ylabel="mean reward")
        axes.margins(x=0.15)
    return figure


def _columns(points: Iterable[dict[str, Any]]) -> tuple[list[float], list[float]]:
    points = list(points)
    return [p["kl"] for p in points], [p["reward"] for p in points]


_SMALL = {"textcoords": "offset points", "fontsize": 7}


def to_svg(figure: Figure, prefix: str, alt: str) -> Markup:
    """A figure as inline SVG in the page's colours, the same bytes for the same figure.

    Args:
        figure: not yet drawn, its text in black.
        prefix: makes its ids unique on the page.
        alt: what it shows, for those who cannot see it.
    """
    written = StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that its own font lacks: the reader's will have them
        figure.savefig(written, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    text = written.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r'((?<=[\s"])id="|url\(#|xlink:href="#)', rf"\g<1>{prefix}-", text)
    for colour, name in ((BLUE, "blue"), (ORANGE, "orange"), (GREEN, "green"), (PINK, "pink"), (GREY, "grey")):
        text = re.sub(rf"(fill|stroke): {colour}", rf"\1: var(--{name})", text, flags=re.IGNORECASE)
    text = text.replace("stroke: #000000", "stroke: currentColor")
    head, _, body = text.partition(">")
    size = re.search(r'viewBox="[^"]*"', head)[0]
    opened = Markup('<svg class="chart" role="img" aria-label="{}" {}>{}')
    return opened.format(alt, Markup(size), Markup(body))


_METADATA = ("Creator", "Date", "Format", "Type")


def _figure(width: float = 4.8, height: float = 3.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _dot(axes: Axes, share: float, y: float, interval: Sequence[float], colour: str, hollow: bool = False) -> None:
    axes.plot(interval, (y, y), color=colour, linewidth=1.5)
    face = "none" if hollow else colour
    axes.plot(share, y, marker="o", markersize=6, color=colour, markerfacecolor=face, clip_on=False)
    axes.annotate(
        f"{share:.2f}", (share, y), (0, 5), textcoords="offset points", ha="center", color=colour, fontsize=8
    )


def _share_axis(axes: Axes, names: Sequence[str]) -> None:
    axes.axvline(0.5, color=GREY, linewidth=1, linestyle=":")
    axes.text(0.5, 1.0, "chance", transform=axes.get_xaxis_transform(), ha="center", va="bottom", color=GREY)
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.7))
    axes.set_yticks(range(len(names)), names)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _name_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]], lines: int = 1) -> None:
    """Name curves in the right margin at the height of their ends, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    ordered = sorted(ends, key=lambda end: end[1])
    places = [(y - low) / (high - low) for _, y, *_ in ordered]
    apart = min(0.06 * lines, 1 / max(1, len(places)))
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + apart)
    places = [min(place, 1 - apart * (len(places) - 1 - i)) for i, place in enumerate(places)]
    for (x, y, name, colour), place in zip(ordered, places, strict=True):
        axes.annotate(
            name, (x, y), (1.02, place), textcoords=axes.transAxes, color=colour, va="center", annotation_clip=False,
            linespacing=0.95, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5},
        )  # fmt: skip


def _short(text: str, most: int = 28) -> str:
    """A name that comes from the data, as a label: printable, and not wider than the figure."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return text if len(text) <= most else text[: most - 1] + "…"
