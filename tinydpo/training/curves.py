"""A run's curves from the trainer's log, as a picture to be read: labelled axes, lines named where they end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # told apart by colour-blind readers (Okabe and Ito 2008)
Panel = tuple[str, str, list[tuple[str, str, str]]]


def _train_and_eval(key: str) -> list[tuple[str, str, str]]:
    return [(key, "train", GREY), (f"eval_{key}", "held out", BLUE)]


# title, unit of the y axis, and the log keys with the name and colour of their line
PANELS = [
    ("Loss", "nats", _train_and_eval("loss")),
    ("Reward accuracy", "share of pairs", _train_and_eval("rewards/accuracies")),
    ("Reward margin", "beta × nats", _train_and_eval("rewards/margins")),
    ("Accuracy", "share of pairs", _train_and_eval("accuracy")),  # of an explicit reward model
    ("Margin", "chosen minus rejected", _train_and_eval("margin")),
    ("Rewards", "beta × nats", [("rewards/chosen", "chosen", BLUE), ("rewards/rejected", "rejected", ORANGE)]),
]  # fmt: skip


def select_panels(log_history: list[dict[str, Any]]) -> list[Panel]:
    """The panels that a run's log has something for."""
    logged = {key for entry in log_history for key in entry}
    return [panel for panel in PANELS if any(key in logged for key, *_ in panel[2])]


def draw_panel(axes: Any, panel: Panel, log_history: list[dict[str, Any]]) -> None:
    """Draw a panel's lines over optimizer steps, each named where it ends, on matplotlib axes."""
    title, unit, lines = panel
    drawn = []
    for key, name, colour in lines:
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            marker = "o" if len(points) < 12 else None
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=3)
            drawn.append((points[-1], name, colour))
    drawn.sort(key=lambda line: line[0][1])
    for place, (end, name, colour) in enumerate(drawn):
        shift = 6 * (2 * place - len(drawn) + 1)  # apart, where two lines end at the same height
        axes.annotate(
            name, end, (4, shift), textcoords="offset points", color=colour, va="center", annotation_clip=False
        )
    axes.set(title=title, xlabel="optimizer step", ylabel=unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def draw_curves(log_history: list[dict[str, Any]], path: Path) -> None:
    """Draw loss and, where the run has them, reward accuracy, margin and rewards over steps, to a PNG.

    Args:
        log_history: `trainer.state.log_history`.
        path: the PNG to write.
    """
    from matplotlib.figure import Figure

    if panels := select_panels(log_history):
        figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            draw_panel(axes, panel, log_history)
        figure.savefig(path, dpi=120)


FAR = 20.0  # nats an answer: e to the minus 20 of what the reference gave it
EXPECTED = (
    "that is expected where the reference was trained on such answers: over its own answers log π/π_ref averages to "
    "-KL, so what they lose others gain (arXiv 2404.12358), and only the margin is trained"
)


def describe_rewards(log_history: Sequence[dict[str, Any]], beta: float, kl: float | None = None) -> str:
    """A sentence on the run's last implicit rewards, held-out ones where there are some; "" where none were logged.

    Args:
        log_history: `trainer.state.log_history` of a DPO run.
        beta: the run's β, by which rewards are log π/π_ref in nats.
        kl: KL(policy ‖ reference) in nats an answer, where an evaluation has measured it.
    """
    chosen, rejected, right = (_last(log_history, f"rewards/{name}") for name in ("chosen", "rejected", "accuracies"))
    if chosen is None or rejected is None or right is None:
        return ""
    chosen, rejected = chosen / beta, rejected / beta
    moved = f"chosen answers {_likelier(chosen)} and rejected ones {_likelier(rejected)}"
    told = f"The policy makes {moved} than its reference"
    advice = "lower --learning_rate, or raise --beta"
    if chosen <= rejected:
        return (
            f"{told}, so it has not learned to prefer the chosen: look at the rows first, then raise --learning_rate"
        )
    if max(chosen, rejected) < -FAR:
        return f"{told}, {FAR:.0f} nats and more: it is leaving what it could write; {advice}"
    if right > 0.99 and kl is not None and kl > FAR:
        return (
            f"{told}, tells {right:.0%} of the pairs apart and is {kl:.0f} nats from its reference: too far; {advice}"
        )
    return f"{told}: {EXPECTED}" if chosen < 0 else told


def _likelier(nats: float) -> str:
    return f"{abs(nats):.1f} nats {'likelier' if nats >= 0 else 'less likely'}"


def _last(log_history: Sequence[dict[str, Any]], key: str) -> float | None:
    """The last held-out value, or the mean of the last tenth of the training ones."""
    for name, share in ((f"eval_{key}", 0.0), (key, 0.1)):
        values = [entry[name] for entry in log_history if name in entry]
        if values:
            return float(np.mean(values[-max(1, round(share * len(values))) :]))
    return None
