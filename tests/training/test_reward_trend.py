"""The sentence under a run's curves: what its rewards did, and what to do where they went astray."""

from typing import Any

import pytest

from tinydpo.training.curves import describe_rewards


def log(chosen: float, rejected: float, accuracy: float, prefix: str = "") -> list[dict[str, Any]]:
    """A log that ends so, in nats at β 0.1, after steps of noise."""
    rewards = {"rewards/chosen": 0.1 * chosen, "rewards/rejected": 0.1 * rejected, "rewards/accuracies": accuracy}
    noise = {"rewards/chosen": 99.0, "rewards/rejected": 99.0, "rewards/accuracies": 0.5}
    return [noise] * 9 + [{f"{prefix}{key}": value for key, value in rewards.items()}]


@pytest.mark.parametrize(
    ("ends", "kl", "expected", "unexpected"),
    [
        ((-3, -9, 0.7), None, "that is expected", "lower"),
        ((2, -5, 0.7), None, "2.0 nats likelier", "expected"),
        ((-45, -80, 0.9), None, "lower --learning_rate, or raise --beta", "expected"),
        ((-3, -60, 1.0), 70.0, "100% of the pairs apart and is 70 nats", "expected"),
        ((-3, -60, 1.0), 9.0, "that is expected", "too far"),
        ((-5, -4, 0.45), None, "not learned to prefer the chosen", "expected"),
    ],
)
def test_the_sentence_is_chosen_by_the_runs_own_numbers(ends: tuple, kl: float | None, expected: str, unexpected: str):
    for prefix in ("", "eval_"):
        told = describe_rewards(log(*ends, prefix), 0.1, kl)
        assert expected in told and unexpected not in told, f"a user draws the wrong conclusion: {told}"


def test_held_out_rewards_come_first():
    told = describe_rewards(log(-3, -9, 0.7, "eval_") + log(5, 1, 0.9), 0.1)
    assert "3.0 nats less likely" in told, f"training pairs speak for the run although held-out ones are there: {told}"


def test_a_run_without_rewards_says_nothing():
    assert describe_rewards([{"loss": 2.0}], 0.1) == ""
