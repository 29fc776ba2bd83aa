"""Intervals and paired tests on values small enough to compute by hand, and their coverage on values whose truth is
known."""

import math

import numpy as np
import pytest

from samed3d.evaluation.statistics import holm, mean_with_interval, paired_difference, wilcoxon


def test_the_mean_weighs_measurements_and_the_interval_spans_the_subjects():
    found = mean_with_interval([0.2, 0.4, 0.9], ["a", "a", "b"])
    assert found.mean == pytest.approx(0.5)
    # Two subjects: both draws of one alone, means 0.3 and 0.9, have a chance of a quarter each, so the interval ends
    # there.
    assert (found.low, found.high) == (pytest.approx(0.3), pytest.approx(0.9))
    assert (found.subjects, found.measurements, found.missing) == (2, 3, 0)


def test_one_subject_has_no_interval_and_none_has_no_mean():
    alone = mean_with_interval([0.2, 0.4], ["a", "a"])
    assert alone.mean == pytest.approx(0.3)
    assert math.isnan(alone.low) and math.isnan(alone.high)
    nothing = mean_with_interval([], [])
    assert math.isnan(nothing.mean) and nothing.subjects == 0


def test_missing_values_are_counted_and_left_out():
    found = mean_with_interval([0.5, math.nan, 0.7, math.nan], ["a", "a", "b", "c"])
    assert found.mean == pytest.approx(0.6)
    assert (found.subjects, found.measurements, found.missing) == (2, 2, 2)


def test_equal_values_give_an_interval_of_no_width():
    found = mean_with_interval([0.25] * 6, list("abcdef"))
    assert found.low == found.mean == found.high == 0.25


def test_the_same_values_give_the_same_interval():
    values, subjects = list(np.random.default_rng(1).random(30)), list(range(30))
    assert mean_with_interval(values, subjects) == mean_with_interval(values, subjects)


def test_values_and_subjects_must_have_one_length():
    with pytest.raises(ValueError, match="one length, got 2 and 1"):
        mean_with_interval([1.0, 2.0], ["a"])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        of_subject = rng.normal(0.5, 0.2, size=25)  # what differs between subjects
        values = (of_subject[:, None] + rng.normal(0, 0.05, size=(25, 4))).ravel()
        found = mean_with_interval(list(values), list(np.repeat(np.arange(25), 4)))
        covered += found.low <= 0.5 <= found.high
    assert 0.88 <= covered / 200 <= 0.99  # a percentile interval of 25 subjects is a little too narrow


def test_drawing_subjects_is_wider_than_drawing_measurements():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.random(10), 20)  # twenty measurements of each subject that all say the same
    whole = mean_with_interval(list(values), list(np.repeat(np.arange(10), 20)))
    apart = mean_with_interval(list(values), list(range(200)))
    assert whole.high - whole.low > 3 * (apart.high - apart.low)


def pairs(first, second):
    """Scores of two models by (subject, number), one measurement per subject."""
    keys = [(s, 0) for s in range(len(first))]
    return dict(zip(keys, first, strict=True)), dict(zip(keys, second, strict=True)), {k: k[0] for k in keys}


def test_equal_runs_do_not_differ():
    scores = list(np.random.default_rng(0).random(12))
    found = paired_difference(*pairs(scores, scores))
    assert found.difference.mean == found.difference.low == found.difference.high == 0
    assert found.p_bootstrap == found.p_wilcoxon == 1
    assert (found.better, found.equal, found.worse) == (0, 12, 0)


def test_a_steady_difference_is_found_and_has_a_sign():
    rng = np.random.default_rng(0)
    base = rng.random(12)
    better = base + 0.1 + rng.normal(0, 0.01, 12)
    up, down = paired_difference(*pairs(better, base)), paired_difference(*pairs(base, better))
    assert up.difference.mean == pytest.approx(0.1, abs=0.01)
    assert up.difference.low > 0 > down.difference.high
    assert up.p_bootstrap < 0.01 and down.p_bootstrap < 0.01
    # Twelve differences of one sign: the exact p of the signed-rank test is two in 2 ** 12.
    assert up.p_wilcoxon == pytest.approx(2 / 2**12)
    assert (up.better, up.worse) == (12, 0) == (down.worse, down.better)


def test_noise_alone_is_seldom_called_a_difference():
    rng = np.random.default_rng(3)
    called = [
        paired_difference(*pairs(rng.normal(size=20), rng.normal(size=20))).p_bootstrap < 0.05 for _ in range(100)
    ]
    assert sum(called) <= 14


def test_only_what_both_have_is_compared():
    first, second, subjects = pairs([0.5, 0.6, math.nan], [0.4, 0.4, 0.4])
    second[(9, 0)] = 1.0
    found = paired_difference(first, second, subjects | {(9, 0): 9})
    assert found.difference.mean == pytest.approx(0.15)
    assert (found.difference.measurements, found.unpaired) == (2, 1)
    with pytest.raises(ValueError, match="no measurement in common"):
        paired_difference({(0, 0): 1.0}, {(1, 0): 1.0}, {(0, 0): 0, (1, 0): 1})


def test_one_subject_is_no_test():
    found = paired_difference({(0, 0): 1.0, (0, 1): 0.8}, {(0, 0): 0.5, (0, 1): 0.5}, {(0, 0): 0, (0, 1): 0})
    assert found.difference.mean == pytest.approx(0.4)
    assert math.isnan(found.p_bootstrap) and math.isnan(found.p_wilcoxon)


def test_many_structures_of_few_subjects_do_not_make_a_small_p():
    keys = [(s, n) for s in range(3) for n in range(100)]
    rng = np.random.default_rng(0)
    found = paired_difference(
        {k: 0.5 + rng.normal(0, 0.01) for k in keys}, dict.fromkeys(keys, 0.0), {k: k[0] for k in keys}
    )
    assert found.p_wilcoxon == pytest.approx(0.25)  # three subjects: two in 2 ** 3, whatever the number of structures
    assert wilcoxon(np.array([0.1])) != wilcoxon(np.array([0.1]))  # nan


def test_holm_corrects_from_the_smallest_on():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    with_nan = holm([math.nan, 0.02])
    assert math.isnan(with_nan[0]) and with_nan[1] == 0.02
