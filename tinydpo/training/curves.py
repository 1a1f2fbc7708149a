"""A run's curves from the trainer's log, and one sentence on its implicit rewards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"  # colour-blind readers can distinguish them (Okabe and Ito 2008)
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
    """The panels for which a run's log has values."""
    logged = {key for entry in log_history for key in entry}
    return [panel for panel in PANELS if any(key in logged for key, *_ in panel[2])]


def draw_panel(axes: Any, panel: Panel, log_history: list[dict[str, Any]]) -> None:
    """Draw a panel's lines over optimizer steps on matplotlib axes."""
    title, unit, lines = panel
    is_dpo = any("rewards/chosen" in entry for entry in log_history)
    for key, name, colour in lines:
        if is_dpo and key == "eval_loss":
            name = "held out, sigmoid loss"  # whatever loss is trained
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) < 12 else None  # a line of few points would hardly be seen
            axes.plot(steps, values, color=colour, marker=marker, markersize=3, label=name)
    axes.legend(frameon=False)
    axes.set(title=title, xlabel="optimizer step", ylabel=unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02)


def draw_curves(log_history: list[dict[str, Any]], path: Path) -> None:
    """Draw every panel of a trainer's `state.log_history` side by side, to a PNG."""
    from matplotlib.figure import Figure

    panels = select_panels(log_history)
    if not panels:
        return
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, panel, log_history)
    figure.savefig(path, dpi=120)


def describe_rewards(log_history: Sequence[dict[str, Any]], beta: float) -> str:
    """A sentence on a run's last implicit rewards, held-out ones if there are any; "" if the log has no rewards."""
    chosen = _get_last(log_history, "rewards/chosen")
    rejected = _get_last(log_history, "rewards/rejected")
    if chosen is None or rejected is None:
        return ""
    sentence = (  # a reward is β·log π/π_ref, so that reward / β is in nats
        f"The policy makes chosen answers {_format_nats(chosen / beta)} and rejected ones "
        f"{_format_nats(rejected / beta)} than its reference does"
    )
    if chosen <= rejected:
        return f"{sentence}: it has not learned to prefer the chosen ones"
    if chosen < 0:
        return f"{sentence}; chosen answers may become less likely too: DPO trains the margin (arXiv 2404.12358)"
    return sentence


def _format_nats(nats: float) -> str:
    return f"{abs(nats):.1f} nats {'likelier' if nats >= 0 else 'less likely'}"


def _get_last(log_history: Sequence[dict[str, Any]], key: str) -> float | None:
    """The last held-out value, else the mean of the last tenth of the training ones."""
    held_out = [entry[f"eval_{key}"] for entry in log_history if f"eval_{key}" in entry]
    trained = [entry[key] for entry in log_history if key in entry]
    last = held_out[-1:] or trained[-max(1, len(trained) // 10) :]
    return float(np.mean(last)) if last else None
