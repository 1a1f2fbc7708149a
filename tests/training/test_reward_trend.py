"""The sentence under a run's curves: what its implicit rewards did."""

from typing import Any

import pytest

from tinydpo.training.curves import describe_rewards


def log(chosen: float, rejected: float, prefix: str = "") -> list[dict[str, Any]]:
    """A log that ends at these log-ratios in nats, at β 0.1, after steps of noise."""
    noise = {"rewards/chosen": 99.0, "rewards/rejected": 99.0}
    return [noise] * 9 + [{f"{prefix}rewards/chosen": 0.1 * chosen, f"{prefix}rewards/rejected": 0.1 * rejected}]


@pytest.mark.parametrize("prefix", ["", "eval_"])
@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        (2, -5, "chosen answers 2.0 nats likelier and rejected ones 5.0 nats less likely"),
        (-3, -9, "is expected (arXiv 2404.12358)"),
        (-5, -4, "not learned to prefer the chosen"),
    ],
)
def test_the_sentence_follows_from_the_rewards(prefix: str, chosen: float, rejected: float, words: str):
    assert words in describe_rewards(log(chosen, rejected, prefix), 0.1)


def test_held_out_rewards_come_first():
    assert "3.0 nats less likely" in describe_rewards(log(-3, -9, "eval_") + log(5, 1), 0.1)


def test_a_run_without_rewards_has_no_sentence():
    assert describe_rewards([{"loss": 2.0}], 0.1) == ""
