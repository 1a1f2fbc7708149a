"""A run's curves from the trainer's log, as a picture to be read: labelled axes, lines named where they end."""

from pathlib import Path
from typing import Any

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
