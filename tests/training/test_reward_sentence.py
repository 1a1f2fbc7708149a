"""The sentence under a run's curves: what its implicit rewards did."""

import pytest

from tinydpo.training.curves import describe_rewards

NOISE = [{"rewards/chosen": 99.0, "rewards/rejected": 99.0}] * 9


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (
            {"rewards/chosen": 0.2, "rewards/rejected": -0.5},
            "answers 2.0 nats likelier and rejected ones 5.0 nats less",
        ),
        ({"rewards/chosen": -0.3, "rewards/rejected": -0.9}, "DPO trains the margin (arXiv 2404.12358)"),
        ({"eval_rewards/chosen": -0.5, "eval_rewards/rejected": -0.4}, "not learned to prefer the chosen"),
    ],
)
def test_the_sentence_follows_from_the_last_rewards(last: dict[str, float], words: str):
    assert words in describe_rewards([*NOISE, last], beta=0.1)
    assert describe_rewards([{"loss": 2.0}], beta=0.1) == "", "a run without rewards has a sentence on them"
