"""What a DPO run's rewards did, in one sentence: nothing is asked more often than whether chosen ones may fall."""

from collections.abc import Sequence
from typing import Any

import numpy as np

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
