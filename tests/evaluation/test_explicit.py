"""An explicit reward model beside the implicit reward: a paired interval, and ranks that agree or do not."""

import numpy as np
import pytest

from tinydpo.evaluation.metrics import paired_accuracies, rank_correlation, wilson_interval


def judges(both: int, implicit: int, explicit: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """How many pairs which of the two is right on."""
    counts = (both, implicit, explicit, neither)
    return tuple(np.repeat(right, counts) for right in ([True, True, False, False], [True, False, True, False]))


def test_the_interval_is_that_of_a_paired_bootstrap():
    implicit, explicit = judges(500, 60, 40, 400)
    told = paired_accuracies(implicit, explicit)
    assert told["explicit_accuracy"] == 0.54 and told["explicit_accuracy_ci95"] == list(wilson_interval(540, 1000))
    assert told["implicit_minus_explicit"] == pytest.approx(0.02)
    rng = np.random.default_rng(1)
    apart = implicit.astype(float) - explicit
    drawn = [apart[rng.integers(1000, size=1000)].mean() for _ in range(4000)]
    assert told["implicit_minus_explicit_ci95"] == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=2e-3)
    low, high = told["implicit_minus_explicit_ci95"]
    assert high - low < 0.05, "as wide as two accuracies of their own: pairs are not resampled as pairs"


def test_two_judges_that_agree_differ_by_nothing():
    implicit, explicit = judges(7, 0, 0, 3)
    told = paired_accuracies(implicit, explicit)
    assert told["implicit_minus_explicit"] == 0 and told["implicit_minus_explicit_ci95"] == [0, 0]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 400], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [5, 5, 5, 5], 0.0),
        ([86, 97, 99, 100, 101, 103, 106, 110, 112, 113], [2, 20, 28, 27, 50, 29, 7, 17, 6, 12], -29 / 165),
        ([1, 2, 2, 3], [1, 3, 2, 3], 0.8333333),  # ties: ranks 1, 2.5, 2.5, 4 and 1, 3.5, 2, 3.5
    ],
)
def test_rank_correlation_is_spearmans(one: list[float], other: list[float], expected: float):
    assert rank_correlation(np.array(one), np.array(other)) == pytest.approx(expected, abs=1e-6)
