"""Statistics of result rows: means with bootstrap intervals, click curves, clicks to a quality, paired tests.

Structures and seeds of one subject are not independent: the bootstrap draws subjects, each with everything that was
measured on it. Structures weigh equally within a mean.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.evaluation.protocols import PROTOCOLS, protocol_of
from samed3d.evaluation.protocols.samed3d import DELAY_SECONDS
from samed3d.evaluation.results import (
    Row,
    by_model,
    clicks_of,
    curves,
    group_by,
    rounded,
    score,
    structure_key,
    subject_key,
)
from samed3d.metrics import area_under_curve, clicks_to, monotone_share

DRAWS = 2000
QUALITIES = (0.8, 0.85, 0.9)
FALL = 0.01
"""A click counts as having lowered the Dice when it did by more than this."""
ALL_PAIRS = 4
"""Up to this many models are compared each with each, more only with the first."""

Curves = dict[str, dict[int, "Estimate"]]
"""Click curves by model: the mean after each click."""
Scores = dict[str, "Estimate"]
"""Scores of one model by name (``headline``)."""


@dataclass(frozen=True)
class Estimate:
    """The mean of all values that are numbers, nan where there is none, and its interval from ``low`` to ``high``.

    The interval is nan for fewer than two subjects. ``subjects`` gave a number, ``measurements`` are the numbers and
    ``missing`` the values that were nan.
    """

    mean: float
    low: float
    high: float
    subjects: int
    measurements: int
    missing: int = 0


@dataclass(frozen=True)
class PairedDifference:
    """How much higher one model scores than another on the same structures with the same seeds.

    ``difference`` is the first minus the second. Both p are two-sided: ``p_bootstrap`` is twice the share of bootstrap
    draws whose mean lies on the other side of zero, ``p_wilcoxon`` is of the signed-rank test on the subjects' mean
    differences. ``better``, ``equal`` and ``worse`` count the pairs by the first, ``unpaired`` the measurements that
    only one of the two has.
    """

    difference: Estimate
    p_bootstrap: float
    p_wilcoxon: float
    better: int
    equal: int
    worse: int
    unpaired: int = 0


def mean_with_interval(values: Sequence[float], subjects: Sequence[Hashable]) -> Estimate:
    """The mean of some values with a 95 % percentile bootstrap interval over the subject of each value; nan is missing.

    The draws have a fixed seed, so that the same values give the same interval.

    Raises:
        ValueError: if the two differ in length.

    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3; clusters drawn whole.
    """
    sums, counts = _per_subject(values, subjects)
    total = int(counts.sum())
    low = high = math.nan
    if len(sums) > 1:
        low, high = map(float, np.percentile(_drawn_means(sums, counts), (2.5, 97.5)))
    mean = float(sums.sum() / total) if total else math.nan
    return Estimate(mean, low, high, len(sums), total, len(values) - total)


def paired_difference(
    first: Mapping[Hashable, float], second: Mapping[Hashable, float], subject_of: Mapping[Hashable, Hashable]
) -> PairedDifference:
    """Compare two models on the measurements that both have; keys are structure, seed and click.

    Raises:
        ValueError: if they have no measurement in common.
    """
    keys = [k for k in first if k in second and not (math.isnan(first[k]) or math.isnan(second[k]))]
    if not keys:
        raise ValueError("the two have no measurement in common")
    differences = np.array([first[k] - second[k] for k in keys])
    subjects = [subject_of[k] for k in keys]
    sums, counts = _per_subject(differences, subjects)
    p_bootstrap = math.nan
    if len(sums) > 1:
        means = _drawn_means(sums, counts)
        # One is added to both so that no p is zero: the bootstrap resolves no less than one in its draws.
        tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
        p_bootstrap = min(1.0, 2 * (tail + 1) / (DRAWS + 1))
    return PairedDifference(
        mean_with_interval(differences.tolist(), subjects),
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
    """P values corrected for multiple testing; nan stays nan and is not counted.

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


def _per_subject(values: Sequence[float] | NDArray, subjects: Sequence[Hashable]) -> tuple[NDArray, NDArray]:
    """Sum and number of each subject's values that are not nan."""
    if len(values) != len(subjects):
        raise ValueError(f"values and subjects must have one length, got {len(values)} and {len(subjects)}")
    known = [(value, subject) for value, subject in zip(values, subjects, strict=True) if not math.isnan(value)]
    by_subject = group_by(known, lambda pair: pair[1]).values()
    sums = np.array([sum(value for value, _ in mine) for mine in by_subject], dtype=np.float64)
    return sums, np.array([len(mine) for mine in by_subject], dtype=np.float64)


def _drawn_means(sums: NDArray, counts: NDArray) -> NDArray[np.float64]:
    """The mean of each draw of as many subjects as there are."""
    times = _draws(len(sums))
    return (times @ sums) / (times @ counts)


@lru_cache(maxsize=32)  # a report asks for thousands of intervals over the same few numbers of subjects
def _draws(subjects: int) -> NDArray[np.float32]:
    """How often each subject is drawn, (DRAWS, subjects)."""
    chances = np.full(subjects, 1 / subjects)
    return np.random.default_rng(0).multinomial(subjects, chances, size=DRAWS).astype(np.float32)


@dataclass(frozen=True)
class Compared:
    """One model against another in one score; ``corrected`` is the Wilcoxon p, corrected for all tests of a table."""

    first: str
    second: str
    what: str
    result: PairedDifference
    corrected: float


def estimate(rows: Sequence[Row], metric: str) -> Estimate:
    """The mean of a column."""
    return mean_with_interval([score(row, metric) for row in rows], [subject_key(row) for row in rows])


def click_curve(rows: Sequence[Row], metric: str = "dice") -> dict[int, Estimate]:
    """The mean after each click, of the rows of one model."""
    by_click = group_by(rows, lambda row: int(row["click"]))
    return {click: estimate(by_click[click], metric) for click in sorted(by_click)}


def model_curves(rows: Sequence[Row], metric: str = "dice") -> Curves:
    """The click curve of every model, in the order of the rows."""
    return {model: click_curve(mine, metric) for model, mine in by_model(rows).items()}


def curve_scores(curve: Sequence[Row]) -> dict[str, float]:
    """Scores of one click curve: ``area``, ``clicks to Q``, ``failures at Q``, ``seconds to Q`` (noisy), ``monotone``.

    The area is nan where a click between is missing, since the others would weigh more. A quality that is never reached
    counts one click more than were given. A curve without clicks has no scores.
    """
    clicks, dice = [int(row["click"]) for row in curve], [score(row, "dice") for row in curve]
    clicked = [value for click, value in zip(clicks, dice, strict=True) if click > 0]
    if not clicked:
        return {}
    complete = clicks[-1] - clicks[0] == len(clicks) - 1
    found = {"area": area_under_curve(clicked) if complete else math.nan}
    for quality in QUALITIES:
        reached = clicks_to(dice, quality, first_click=clicks[0])
        found[f"clicks to {quality:g}"] = float(clicks[-1] + 1 if reached is None else reached)
        found[f"failures at {quality:g}"] = float(reached is None)
        if curve[0]["policy"] == "noisy":
            spent = [row for row in curve if reached is None or row["click"] <= reached]
            found[f"seconds to {quality:g}"] = sum(row["seconds"] + DELAY_SECONDS for row in spent)
    share = monotone_share(dice)
    return found if share is None else found | {"monotone": share}


def headline(rows: Sequence[Row]) -> Scores:
    """The scores of one model under one prompt strategy, by name.

    ``dice after N``; those of ``curve_scores``; ``nsd`` and ``hd95_mm`` after the last click; ``obeyed``; ``lowered``,
    the share of clicks that lowered the Dice by more than ``FALL``; ``first`` and ``later``, the median seconds.
    """
    clicks, found = clicks_of(rows), scores_of_curve(click_curve(rows))
    final = [row for row in rows if row["click"] == clicks[-1]]
    by_score = group_by(_lines_of_curves(rows), lambda line: line["score"])
    found |= {name: estimate(mine, "value") for name, mine in by_score.items()}
    steps = [score(b, "dice") - score(a, "dice") for curve in curves(rows) for a, b in pairwise(curve)]
    shares = {
        "obeyed": _mean([score(row, "obeyed") for row in rows]),
        "lowered": _mean([math.nan if math.isnan(step) else float(step < -FALL - 1e-9) for step in steps]),
        "first": _median_seconds([row for row in rows if row["click"] == clicks[0]]),
        "later": _median_seconds([row for row in rows if row["click"] != clicks[0]]),
    }
    found |= {name: Estimate(value, math.nan, math.nan, 0, 0) for name, value in shares.items()}
    return found | {"nsd": estimate(final, "nsd"), "hd95_mm": estimate(final, "hd95_mm")}


def scores_of_curve(curve: Mapping[int, Estimate]) -> Scores:
    """A click curve as scores ``dice after N``."""
    return {f"dice after {click}": found for click, found in curve.items()}


def _lines_of_curves(rows: Sequence[Row]) -> list[Row]:
    """A line with ``score`` and ``value`` for each score of each click curve."""
    return [
        curve[0] | {"score": name, "value": value}
        for curve in curves(rows)
        for name, value in curve_scores(curve).items()
    ]


def differences(rows: Sequence[Row], models: Sequence[str]) -> list[Compared]:
    """Each pair of models on the structures and seeds of both: Dice after the first and the last click, and the area.

    With more than ``ALL_PAIRS`` models only the first is compared with each other one. Pairs without a common structure
    are left out.
    """
    pairs = list(combinations(models, 2)) if len(models) <= ALL_PAIRS else [(models[0], other) for other in models[1:]]
    of_model = by_model(rows)
    return corrected(
        [
            (first, second, *result)
            for first, second in pairs
            for result in compare_rows(of_model.get(first, []), of_model.get(second, []))
        ]
    )


def corrected(found: Sequence[tuple[str, str, str, PairedDifference]]) -> list[Compared]:
    """Differences (first, second, what, result) with their Wilcoxon p values corrected together."""
    p_values = holm([result.p_wilcoxon for *_, result in found])
    return [Compared(*one, p) for one, p in zip(found, p_values, strict=True)]


def compare_rows(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[str, PairedDifference]]:
    """Paired differences of two models by structure and seed; none where they share no structure or no click."""
    shared = sorted(set(clicks_of(first)) & set(clicks_of(second)))
    subjects = {structure_key(row): subject_key(row) for row in (*first, *second)}
    scores = [_scores_by_structure(rows, shared) for rows in (first, second)]
    found = []
    for what in scores[0]:
        a, b = (one[what] for one in scores)
        if any(not (math.isnan(value) or math.isnan(b.get(key, math.nan))) for key, value in a.items()):
            found.append((what, paired_difference(a, b, subjects)))
    return found


def _scores_by_structure(rows: Sequence[Row], clicks: Sequence[int]) -> dict[str, dict[Hashable, float]]:
    """What two models are compared in: Dice after the first and the last of the clicks, and the area between them."""
    found: dict[str, dict[Hashable, float]] = {}
    for click in dict.fromkeys((*clicks[:1], *clicks[-1:])):
        what = f"after {click} click{'s' if click > 1 else ''}" if click else "after the first prompt"
        found[what] = {structure_key(r): score(r, "dice") for r in rows if r["click"] == click}
    if len(clicks) > 1:
        shared = curves(row for row in rows if row["click"] in clicks)
        areas = {structure_key(curve[0]): curve_scores(curve).get("area", math.nan) for curve in shared}
        found["area under the curve"] = areas
    return found


def summarise(rows: Sequence[Row], clicks: Sequence[int]) -> list[dict[str, Any]]:
    """The ``summary`` of ``results.json``: means per model, prompt strategy, group or source, and click of ``clicks``.

    Protocols with a fixed number of clicks report all of theirs; a first box or scribble is click 0.
    """
    lines = []
    for about, mine in _by_model_and_strategy(rows):
        protocol = PROTOCOLS.get(about["protocol"])
        fixed = protocol is not None and protocol.fixed_clicks is not None
        shown = [click for click in clicks_of(mine) if fixed or click == 0 or click in clicks]
        for column in protocol.summary_columns if protocol else ("group", "source"):
            for value in sorted({row[column] for row in mine}):
                for click in shown:
                    if chosen := [row for row in mine if row[column] == value and row["click"] == click]:
                        lines.append(about | {"by": column, "value": value, "click": click} | _means(chosen))
    return lines


def score_series(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The ``scores`` of ``results.json``: those of the curves and the protocol's own, per model, strategy and group."""
    lines = []
    for about, mine in _by_model_and_strategy(rows):
        per_case = _lines_of_curves(mine)
        if about["protocol"] in PROTOCOLS:
            per_case += protocol_of(about["protocol"]).own_scores(mine)
        names = list(dict.fromkeys(line["score"] for line in per_case))
        by_score = group_by(per_case, lambda line: (line["group"], line["score"]))
        for group, name in sorted(by_score, key=lambda key: (key[0], names.index(key[1]))):
            found = estimate(by_score[group, name], "value")
            lines.append(about | {"group": group, "score": name, "value": rounded(found.mean, 4)} | _certainty(found))
    return lines


def _by_model_and_strategy(rows: Sequence[Row]) -> list[tuple[dict[str, Any], list[Row]]]:
    """Rows by model and prompt strategy, each with the columns that say so."""
    keys = ("model", "protocol", "policy", "prompt")
    groups = group_by(rows, lambda row: tuple(row[key] for key in keys)).values()
    return [({key: mine[0][key] for key in keys}, mine) for mine in groups]


def _means(rows: Sequence[Row]) -> dict[str, Any]:
    dice = estimate(rows, "dice")
    certainty = _certainty(dice)
    line: dict[str, Any] = {"dice": rounded(dice.mean, 4), "interval": certainty.pop("interval")}
    for column, digits in (("nsd", 4), ("nsd_subvoxel", 4), ("hd95_mm", 3), ("obeyed", 4)):
        line[column] = rounded(_mean([score(row, column) for row in rows]), digits)
    line["median_seconds"] = round(float(np.median([row["seconds"] for row in rows])), 3)
    return line | certainty


def _certainty(found: Estimate) -> dict[str, Any]:
    """Interval (null for one subject alone), subjects and measurements."""
    ends = None if math.isnan(found.low) else [round(found.low, 4), round(found.high, 4)]
    return {"interval": ends, "subjects": found.subjects, "measurements": found.measurements}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _median_seconds(rows: Sequence[Row]) -> float:
    """Of the prompts that took any time; a repeated perfect mask took none."""
    times = [seconds for row in rows if (seconds := score(row, "seconds")) > 0]
    return float(np.median(times)) if times else math.nan
