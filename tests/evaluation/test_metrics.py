"""The arithmetic of an evaluation, against known values and properties, and the words of its table."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinydpo.evaluation.metrics import (
    accuracy_by_cut,
    accuracy_by_subset,
    kl_metrics,
    pair_metrics,
    paired_accuracies,
    rank_correlation,
    reward_metrics,
    wilson_interval,
)
from tinydpo.evaluation.table import Estimate, Row, format_interval, make_row, summarize_results
from tinydpo.training.logps import PairLogps


def test_wilson_interval_has_known_values():
    # Newcombe 1998 (Statistics in Medicine 17:857-872), table I, method 3.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(29, 29)[1] == pytest.approx(1), "the interval of a perfect accuracy must reach 1"
    assert wilson_interval(0, 0) == (0, 1)


floats = st.floats(-500, 0)


@given(st.lists(st.tuples(floats, floats, floats, floats), min_size=1, max_size=20), st.floats(0.01, 2))
def test_pair_metrics_have_their_properties(rows: list[tuple[float, ...]], beta: float):
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = np.array(rows).T
    ones = np.ones(len(rows), dtype=int)
    policy = PairLogps(policy_chosen, policy_rejected, ones, ones)
    ref = PairLogps(ref_chosen, ref_rejected, ones, ones)
    metrics = pair_metrics(policy, ref, beta)
    low, high = metrics["reward_accuracy_ci95"]
    assert 0 <= low <= metrics["reward_accuracy"] <= high <= 1
    assert math.isfinite(metrics["dpo_loss"]) and metrics["dpo_loss"] >= 0, "the loss overflows on large margins"
    itself = pair_metrics(policy, policy, beta)
    assert itself["reward_accuracy"] == 0, "a tie must count as wrong"
    assert itself["dpo_loss"] == pytest.approx(math.log(2)), "the loss of an untrained policy must be ln 2"


def test_pairs_with_a_cut_answer_are_counted_separately():
    margins = np.array([1.0, -1.0, 0.0, 2.0, 3.0])
    whole = ["both", "both", "both", "chosen", "neither"]
    results = accuracy_by_cut(margins, whole)
    assert (results["reward_accuracy_whole"], results["reward_accuracy_whole_pairs"]) == (1 / 3, 3)
    assert (results["reward_accuracy_cut"], results["reward_accuracy_cut_pairs"]) == (1, 2)
    assert results["reward_accuracy_cut_ci95"] == list(wilson_interval(2, 2))
    assert "reward_accuracy_cut" not in accuracy_by_cut(margins[:3], whole[:3])


@given(st.lists(st.tuples(st.sampled_from(["helpful", "harmless", "x" * 60]), st.floats(-3, 3)), min_size=1))
def test_accuracies_of_subsets_add_up_to_the_whole(pairs: list[tuple[str, float]]):
    names = [name for name, _ in pairs]
    margins = np.array([margin for _, margin in pairs])
    subsets = accuracy_by_subset(margins, names)["subsets"]
    assert set(subsets) == (set(names) if len(set(names)) > 1 else set())
    counts = [figures["pairs"] for figures in subsets.values()]
    assert counts == sorted(counts, reverse=True), "the largest does not come first"
    right = sum(figures["pairs"] * figures["reward_accuracy"] for figures in subsets.values())
    assert not subsets or right == pytest.approx((margins > 0).sum())
    assert set(accuracy_by_subset(np.append(margins, 0), [*names, None])["subsets"]) == set(subsets)


def test_win_rate_counts_ties_half():
    metrics = reward_metrics(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 3.0, 5.0]))
    assert metrics["win_rate_vs_ref"] == 0.5
    assert (metrics["reward_policy"], metrics["reward_ref"]) == (1.5, 2.5)


def test_difference_of_accuracies_has_the_interval_of_a_paired_bootstrap():
    counts = (500, 60, 40, 400)  # both right, implicit only, explicit only, neither
    implicit = np.repeat([True, True, False, False], counts)
    explicit = np.repeat([True, False, True, False], counts)
    results = paired_accuracies(implicit, explicit)
    assert results["explicit_accuracy"] == 0.54
    assert results["explicit_accuracy_ci95"] == list(wilson_interval(540, 1000))
    assert results["implicit_minus_explicit"] == pytest.approx(0.02)
    rng = np.random.default_rng(1)
    differences = implicit.astype(float) - explicit
    resampled = [differences[rng.integers(1000, size=1000)].mean() for _ in range(4000)]
    expected = np.quantile(resampled, (0.025, 0.975))
    assert results["implicit_minus_explicit_ci95"] == pytest.approx(expected, abs=2e-3)
    assert paired_accuracies(implicit, implicit)["implicit_minus_explicit_ci95"] == [0, 0]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3, 4], [5, 5, 5, 5], 0.0),
        ([86, 97, 99, 100, 101, 103, 106, 110, 112, 113], [2, 20, 28, 27, 50, 29, 7, 17, 6, 12], -29 / 165),
        ([1, 2, 2, 3], [1, 3, 2, 3], 0.8333333),  # ties: ranks 1, 2.5, 2.5, 4 and 1, 3.5, 2, 3.5
    ],
)
def test_rank_correlation_is_spearmans(one: list[float], other: list[float], expected: float):
    assert rank_correlation(np.array(one), np.array(other)) == pytest.approx(expected, abs=1e-6)


def test_interval_that_does_not_beat_chance_has_a_verdict():
    noise = Row("win rate", "", Estimate(0.52, 0.48, 0.56), chance=0.5)
    clear = Row("win rate", "", Estimate(0.55, 0.51, 0.6), chance=0.5)
    assert format_interval(noise) == "95 % interval 0.480 to 0.560, includes 0.5: inconclusive"
    assert format_interval(clear) == "95 % interval 0.510 to 0.600"
    worse = Row("win rate", "", Estimate(0.3, 0.2, 0.4), chance=0.5)
    assert format_interval(worse) == "95 % interval 0.200 to 0.400, below 0.5"


def test_single_answer_has_no_interval():
    kl = kl_metrics([np.array([-1.0])], [np.array([-3.0])])
    assert kl["kl_per_sequence_se"] is None, "one answer is printed as if it were certain"
    row = make_row(kl, "kl_per_sequence", "KL", "")
    assert str(row.policy) == "2.000"


@pytest.mark.parametrize(
    ("accuracy", "pairs", "expected"),
    [(0.754, 500, "75.4% of 500 held-out pairs (95 % interval 71.4% to 79.0%): better than chance."),
     (9 / 14, 14, "includes 50 %: inconclusive. About 48 pairs would settle it; without a test split"),
     (0.5, 14, "inconclusive. KL"), (0.3, 100, "worse than chance.")],
    ids=["better", "too few pairs", "no difference", "worse"],
)  # fmt: skip
def test_the_summary_says_whether_it_worked(accuracy: float, pairs: int, expected: str):
    sampling = {"temperature": 1, "top_k": 0, "top_p": 1}
    results = {"reward_accuracy": accuracy, "pairs": pairs, "kl_per_sequence": 3.0, "settings": sampling,
               "ended_policy": 0.11, "ended_ref": 0.56}  # fmt: skip
    summary = summarize_results(results)
    assert expected in summary and "KL from its reference: 3.0 nats." in summary
    assert "11% of its answers end on their own (reference: 56%). So that more answers end" in summary
    assert "So that more answers end" not in summarize_results(results | {"ended_policy": 0.5})
    reshaped = results | {"settings": sampling | {"top_k": 50}}
    assert "nats" not in summarize_results(reshaped), "samples that are not the policy's give no KL"
