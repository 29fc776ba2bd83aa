"""From rows to the numbers of a report: headline scores, click curves by whatever one asks, differences between models.

Every mean carries its interval over subjects (``statistics.py``). Nothing is drawn or worded here. Read ``report.py``
next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from samed3d.evaluation.rows import Row
from samed3d.evaluation.saved import clicks_of, curves_of, score, structure_key, subject_key
from samed3d.evaluation.statistics import Estimate, PairedDifference, holm, mean_with_interval, paired_difference
from samed3d.metrics.curves import area_under_curve, clicks_to

QUALITIES = (0.8, 0.85, 0.9)
TRAINED_ON = "trained on"
FALL = 0.01
"""By more than this a click is said to have lowered the Dice."""
ALL_PAIRS = 4
"""Up to this many models are compared each with each, more only with the first."""


@dataclass(frozen=True)
class Effort:
    """How many clicks a Dice takes.

    Attributes:
        quality: The Dice.
        clicks: Mean number of clicks; one more than were given where it was not reached.
        failed: Share of curves that did not reach it.
    """

    quality: float
    clicks: Estimate
    failed: float


@dataclass(frozen=True)
class Headline:
    """What a model scores on some rows."""

    model: str
    dice: dict[int, Estimate]
    area: Estimate
    nsd: Estimate
    hd95_mm: Estimate
    efforts: tuple[Effort, ...]
    obeyed: float
    lowered: float
    first_seconds: float
    later_seconds: float


@dataclass(frozen=True)
class Compared:
    """One model against another in one score; ``corrected`` is the Wilcoxon p after Holm over all that were tested
    together.
    """

    first: str
    second: str
    what: str
    result: PairedDifference
    corrected: float


def untrained(rows: Sequence[Row]) -> list[Row]:
    """Rows of subjects that the model was not trained on; all rows where there are only others."""
    return [r for r in rows if r["group"] != TRAINED_ON] or list(rows)


def grouped(
    rows: Sequence[Row], name_of: Callable[[Row], str], order: Callable[[str], object] | None = None
) -> dict[str, list[Row]]:
    """Rows by a name, the names in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(name_of(row), []).append(row)
    return {name: found[name] for name in sorted(found, key=order or str.lower)}  # type: ignore[arg-type]


def by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by model, in the order of the rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def estimate(rows: Sequence[Row], metric: str) -> Estimate:
    """The mean of a column."""
    return mean_with_interval([score(r, metric) for r in rows], [subject_key(r) for r in rows])


def click_curve(rows: Sequence[Row], metric: str = "dice") -> dict[int, Estimate]:
    """The mean after each click, of the rows of one model."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(int(row["click"]), []).append(row)
    return {click: estimate(found[click], metric) for click in sorted(found)}


Curves = dict[str, dict[int, Estimate]]
"""Click curves by model."""


def model_curves(rows: Sequence[Row], metric: str = "dice") -> Curves:
    """The click curve of every model, in the order of the rows."""
    return {model: click_curve(mine, metric) for model, mine in by_model(rows).items()}


def headline(rows: Sequence[Row], model: str) -> Headline:
    """The headline scores of one model's rows, which all come from one way of clicking."""
    last = max(clicks_of(rows))
    final = [r for r in rows if r["click"] == last]
    curves = curves_of(rows, "dice")
    who = [subject_key(first) for first, _, _ in curves]
    areas = [_area(clicks, scores) for _, clicks, scores in curves]
    steps = [b - a for _, _, scores in curves for a, b in zip(scores, scores[1:], strict=False)]
    begins = min(clicks_of(rows))
    return Headline(
        model=model,
        dice=click_curve(rows),
        area=mean_with_interval(areas, who),
        nsd=estimate(final, "nsd"),
        hd95_mm=estimate(final, "hd95_mm"),
        efforts=tuple(_effort(curves, who, quality) for quality in QUALITIES),
        obeyed=_mean([score(r, "obeyed") for r in rows]),
        lowered=_mean([float(step < -FALL - 1e-9) for step in steps if not math.isnan(step)]),
        first_seconds=_median([r for r in rows if r["click"] == begins]),
        later_seconds=_median([r for r in rows if r["click"] != begins]),
    )


def differences(rows: Sequence[Row], models: Sequence[str]) -> list[Compared]:
    """Each pair of models on the structures and seeds that both were given: Dice after the first and the last click,
    and the area.

    With more than ``ALL_PAIRS`` models only the first is compared with each other one. Pairs with nothing in common are
    left out.
    """
    chosen = list(combinations(models, 2)) if len(models) <= ALL_PAIRS else [(models[0], other) for other in models[1:]]
    by_model = {m: [r for r in rows if r["model"] == m] for m in models}
    found: list[tuple[str, str, str, PairedDifference]] = []
    for a, b in chosen:
        found += [(a, b, what, result) for what, result in compare_rows(by_model[a], by_model[b])]
    corrected = holm([result.p_wilcoxon for *_, result in found])
    return [Compared(a, b, what, result, p) for (a, b, what, result), p in zip(found, corrected, strict=True)]


def compare_rows(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[str, PairedDifference]]:
    """What two models' rows differ by, paired by structure and seed: nothing where they share none or no click."""
    shared = sorted(set(clicks_of(first)) & set(clicks_of(second)))
    subjects = {structure_key(r): subject_key(r) for r in (*first, *second)}
    found = []
    for click in dict.fromkeys(shared[:1] + shared[-1:]):
        scores = [{structure_key(r): score(r, "dice") for r in rows if r["click"] == click} for rows in (first, second)]
        found.append((click_text(click), scores))
    if len(shared) > 1:
        areas = []
        for rows in (first, second):
            curves = curves_of([r for r in rows if r["click"] in shared], "dice")
            areas.append({structure_key(r): _area(clicks, scores) for r, clicks, scores in curves})
        found.append(("area under the curve", areas))
    return [(what, paired_difference(a, b, subjects)) for what, (a, b) in found if _share_a_number(a, b)]


def click_text(click: int) -> str:
    """``"after 3 clicks"``; click 0 is a box or scribble before any click."""
    return "after the first prompt" if click == 0 else f"after {click} click{'s' if click > 1 else ''}"


def _share_a_number(first: dict, second: dict) -> bool:
    return any(not (math.isnan(v) or math.isnan(second.get(k, math.nan))) for k, v in first.items())


def _effort(curves: Sequence[tuple[Row, list[int], list[float]]], who: Sequence[Hashable], quality: float) -> Effort:
    needed = [clicks_to(scores, quality, clicks[0]) for _, clicks, scores in curves]
    capped = [float(clicks[-1] + 1 if n is None else n) for n, (_, clicks, _) in zip(needed, curves, strict=True)]
    return Effort(quality, mean_with_interval(capped, who), _mean([float(n is None) for n in needed]))


def _area(clicks: Sequence[int], scores: Sequence[float]) -> float:
    """Mean height of the curve from the first click on; nan where a click between is missing, since the rest would
    weigh more.
    """
    clicked = [s for c, s in zip(clicks, scores, strict=True) if c > 0]
    whole = clicks[-1] - clicks[0] == len(clicks) - 1
    return area_under_curve(clicked) if clicked and whole else math.nan


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return float(np.mean(known)) if known else math.nan


def _median(rows: Sequence[Row]) -> float:
    """Median of the seconds that something took; a repeated perfect mask took none."""
    times = [s for r in rows if (s := score(r, "seconds")) > 0]
    return float(np.median(times)) if times else math.nan
