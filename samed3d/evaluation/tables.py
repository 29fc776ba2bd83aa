"""The tables of a report: scores, effort, curves, differences, as HTML. Numbers come from ``summaries.py``, the page
from ``report.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from samed3d.evaluation import figures
from samed3d.evaluation.page import table
from samed3d.evaluation.results import TRAINED_ON, Row, by_model, clicks_of, grouped, score
from samed3d.evaluation.statistics import Compared, Curves, Estimate, Headline, headline

_SHOWN_CLICKS = 6


def score_tables(rows: Sequence[Row]) -> str:
    """Dice by click, then surfaces, effort and behaviour, of every model by group; the rows are of one way of
    clicking.
    """
    groups = grouped(rows, lambda r: r["group"], lambda g: (g == TRAINED_ON, g))
    clicks = _some(clicks_of(rows), _SHOWN_CLICKS)
    has = {metric: any(not math.isnan(score(r, metric)) for r in rows) for metric in ("nsd", "hd95_mm", "obeyed")}
    head = ["group", "model", "subjects", "measured", *map(_clicks, clicks), "area"]
    more = [
        "group",
        "model",
        *["NSD"] * has["nsd"],
        *["HD95, mm"] * has["hd95_mm"],
        "clicks to 0.80",
        "to 0.85",
        "to 0.90",
    ]
    more += [*["obeyed"] * has["obeyed"], "lowered", "first", "later"]
    scores, efforts = [], []
    for group, of_group in groups.items():
        for n, (model, mine) in enumerate(by_model(of_group).items()):
            h = headline(mine, model)
            final = h.dice[max(h.dice)]
            who = [escape(group) if n == 0 else "", escape(model)]
            scores.append(
                [
                    *who,
                    str(final.subjects),
                    str(final.measurements),
                    *(cell(h.dice.get(c)) for c in clicks),
                    cell(h.area),
                ]
            )
            surfaces = [cell(h.nsd)] * has["nsd"] + [cell(h.hd95_mm, 1)] * has["hd95_mm"]
            behaviour = [
                *[_percent(h.obeyed)] * has["obeyed"],
                _percent(h.lowered),
                _seconds(h.first_seconds),
                _seconds(h.later_seconds),
            ]
            efforts.append([*who, *surfaces, *(_effort(h, n) for n in range(3)), *behaviour])
    return table(head, scores, left=2) + table(more, efforts, left=2)


def own_scores(lines: Sequence[dict[str, Any]]) -> str:
    """A protocol's own figures as ``results.json`` has them, a column per figure; nothing where there are none."""
    names = list(dict.fromkeys(line["score"] for line in lines))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        low, high = line.get("interval") or (math.nan, math.nan)
        value = math.nan if line.get("value") is None else float(line["value"])
        e = Estimate(value, low, high, int(line.get("subjects", 0)), int(line.get("measurements", 0)))
        rows.setdefault((str(line.get("group", "")), str(line["model"])), {})[line["score"]] = cell(e, 3)
    cells = [
        [escape(group), escape(model), *(found.get(n, "") for n in names)] for (group, model), found in rows.items()
    ]
    return table(["group", "model", *names], cells, left=2) if cells else ""


def curve_table(split: Mapping[str, Curves]) -> str:
    """Dice after each click of each model, for each part of the rows."""
    clicks = sorted({click for curves in split.values() for curve in curves.values() for click in curve})
    lines = []
    for name, curves in split.items():
        for n, (model, curve) in enumerate(curves.items()):
            last = curve[max(curve)]
            who = [escape(name) if n == 0 else "", escape(model), str(last.subjects), str(last.measurements)]
            lines.append(who + [cell(curve.get(c)) for c in clicks])
    return table(["", "model", "subjects", "measured", *map(_clicks, clicks)], lines, left=2)


def difference_figure(found: Sequence[Compared]) -> str:
    """A chart of all differences of one kind, the last click that was compared."""
    what = [c.what for c in found if c.what.startswith("after")][-1:]
    lines = [
        figures.Difference(
            f"{c.first} \u2212 {c.second}",
            c.result.difference.mean,
            c.result.difference.low,
            c.result.difference.high,
            c.what,
        )
        for c in found
        if c.what in what
    ]
    if not lines:
        return ""
    title = f"Difference of Dice {what[0]}, 95 % interval over subjects"
    return f"<figure>{figures.difference_chart(lines, title, 'difference of Dice')}</figure>"


def difference_table(found: Sequence[Compared]) -> str:
    """All differences with both tests."""
    head = [
        "first",
        "second",
        "score",
        "difference",
        "p bootstrap",
        "p Wilcoxon",
        "p corrected",
        "better / equal / worse",
        "subjects",
    ]
    lines = []
    for c in found:
        r, d = c.result, c.result.difference
        ps = [p_text(p) for p in (r.p_bootstrap, r.p_wilcoxon, c.corrected)]
        counts = f"{r.better} / {r.equal} / {r.worse}"
        lines.append(
            [
                escape(c.first),
                escape(c.second),
                c.what,
                cell(d, 3, sign=True),
                *map(escape, ps),
                counts,
                str(d.subjects),
            ]
        )
    return table(head, lines, left=3)


def cell(e: Estimate | None, digits: int = 2, sign: bool = False) -> str:
    """A mean with its interval below; nothing where there is none."""
    if e is None or math.isnan(e.mean):
        return ""
    form = f"{'+' if sign else ''}.{digits}f"
    ends = figures.interval_text(e.low, e.high, form).strip()
    return f"{e.mean:{form}}" + (f"<small>{ends}</small>" if ends else "")


def p_text(p: float) -> str:
    """A p value to two digits."""
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def _clicks(click: int) -> str:
    return "first prompt" if click == 0 else f"{click} click{'' if click == 1 else 's'}"


def _some(clicks: Sequence[int], most: int) -> list[int]:
    """Up to so many click numbers, spread over all with the ends."""
    if len(clicks) <= most:
        return list(clicks)
    return [clicks[round(i * (len(clicks) - 1) / (most - 1))] for i in range(most)]


def _effort(h: Headline, which: int) -> str:
    e = h.efforts[which]
    return f"{e.clicks.mean:.1f}<small>{_percent(e.failed)} never</small>" if e.clicks.measurements else ""


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.0f} %"


def _seconds(seconds: float) -> str:
    return "" if math.isnan(seconds) else figures.seconds_text(seconds)
