"""How sure a mean is, and whether two models differ: bootstrap intervals over subjects and paired tests.

Structures of one subject are not independent, and neither are its seeds: what is drawn anew is always the subject with
all that was measured on it. Structures weigh equally within the mean. Numbers only; no files and no text. Read
``saved.py`` for where the rows come from, ``report.py`` for where the numbers go.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and how sure it is.

    Attributes:
        mean: Over all values that are numbers; nan where there is none.
        low: Lower end of the interval; nan for fewer than two subjects, which say nothing about others.
        high: Upper end.
        subjects: How many subjects gave a number.
        measurements: How many values were numbers.
        missing: How many values were nan and are in no mean.
    """

    mean: float
    low: float
    high: float
    subjects: int
    measurements: int
    missing: int = 0


@dataclass(frozen=True)
class PairedDifference:
    """What one model scores above another on the same structures with the same seeds.

    Attributes:
        difference: Mean of the first minus the second, with its interval.
        p_bootstrap: Two-sided, from the bootstrap over subjects: how often the mean difference falls on the other side
            of zero, doubled.
        p_wilcoxon: Two-sided Wilcoxon signed-rank test on the subjects' mean differences.
        better: Pairs in which the first scores higher.
        equal: Pairs in which both score the same.
        worse: Pairs in which the first scores lower.
        unpaired: Measurements of either that the other lacks.
    """

    difference: Estimate
    p_bootstrap: float
    p_wilcoxon: float
    better: int
    equal: int
    worse: int
    unpaired: int = 0


def mean_with_interval(
    values: Sequence[float], subjects: Sequence[Hashable], rng: np.random.Generator | None = None, draws: int = DRAWS
) -> Estimate:
    """The mean of some values with a 95 % percentile bootstrap interval over subjects.

    Args:
        values: One per measurement; nan counts as missing.
        subjects: Whom each value was measured on, as long as ``values``.
        rng: Of the draws; without it one of seed 0, so that the same values give the same interval.
        draws: How many.

    Raises:
        ValueError: if the two do not have one length.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3; clusters drawn whole.
    """
    sums, counts, missing = _per_subject(values, subjects)
    total = int(counts.sum())
    mean = float(sums.sum() / total) if total else math.nan
    if len(sums) < 2:
        return Estimate(mean, math.nan, math.nan, len(sums), total, missing)
    low, high = np.percentile(_drawn_means(sums, counts, rng, draws), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(mean, float(low), float(high), len(sums), total, missing)


def paired_difference(
    first: Mapping[Hashable, float],
    second: Mapping[Hashable, float],
    subject_of: Mapping[Hashable, Hashable],
    rng: np.random.Generator | None = None,
    draws: int = DRAWS,
) -> PairedDifference:
    """Compare two models on the measurements that both have.

    Args:
        first: A score per measurement, by a key that names structure, seed and click.
        second: Of the other model.
        subject_of: The subject of each key.
        rng: Of the draws; without it one of seed 0.
        draws: How many.

    Raises:
        ValueError: if they have no measurement in common.
    """
    keys = [k for k in first if k in second and not (math.isnan(first[k]) or math.isnan(second[k]))]
    if not keys:
        raise ValueError("the two have no measurement in common")
    differences = np.array([first[k] - second[k] for k in keys])
    subjects = [subject_of[k] for k in keys]
    sums, counts, _ = _per_subject(differences, subjects)
    estimate = mean_with_interval(differences.tolist(), subjects, rng, draws)
    p_bootstrap = math.nan
    if len(sums) > 1:
        means = _drawn_means(sums, counts, rng, draws)
        # One is added to both so that no p is zero: a bootstrap cannot know of less than one in its draws.
        tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
        p_bootstrap = min(1.0, 2 * (tail + 1) / (draws + 1))
    return PairedDifference(
        estimate,
        p_bootstrap,
        wilcoxon(sums / counts),
        better=int(np.count_nonzero(differences > 0)),
        equal=int(np.count_nonzero(differences == 0)),
        worse=int(np.count_nonzero(differences < 0)),
        unpaired=len(set(first) ^ set(second)),
    )


def wilcoxon(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the signed-rank test; 1 where all differences are zero, nan for fewer than two of them."""
    if len(differences) < 2:
        return math.nan
    if not np.any(differences):
        return 1.0
    from scipy import stats

    return float(stats.wilcoxon(differences, zero_method="wilcox").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for how many there are; nan stays nan and is not counted.

    Source:
        Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected = list(map(float, p_values))
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def _per_subject(values: Sequence[float] | NDArray, subjects: Sequence[Hashable]) -> tuple[NDArray, NDArray, int]:
    """Sum and number of each subject's values, and how many values were nan."""
    if len(values) != len(subjects):
        raise ValueError(f"values and subjects must have one length, got {len(values)} and {len(subjects)}")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(s, len(numbers)) for s in subjects], dtype=np.int64)
    array = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(array)
    sums = np.bincount(index[known], weights=array[known], minlength=len(numbers))
    counts = np.bincount(index[known], minlength=len(numbers))
    return sums[counts > 0], counts[counts > 0].astype(np.float64), int(np.count_nonzero(~known))


def _drawn_means(sums: NDArray, counts: NDArray, rng: np.random.Generator | None, draws: int) -> NDArray[np.float64]:
    """The mean of each draw of as many subjects as there are."""
    times = _default_draws(len(sums), draws) if rng is None else _draw(len(sums), draws, rng)
    return (times @ sums) / (times @ counts)


@lru_cache(maxsize=32)  # a report asks for thousands of intervals over the same few numbers of subjects
def _default_draws(subjects: int, draws: int) -> NDArray[np.float32]:
    times = _draw(subjects, draws, np.random.default_rng(0))
    times.setflags(write=False)
    return times


def _draw(subjects: int, draws: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """How often each subject is drawn, (draws, subjects)."""
    return rng.multinomial(subjects, np.full(subjects, 1 / subjects), size=draws).astype(np.float32)
