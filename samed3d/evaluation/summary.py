"""From rows to the ``summary`` and ``scores`` of ``results.json``: means per click, and figures of whole series of
clicks.

Structures weigh equally; intervals are over subjects (``statistics.py``). Read ``report.py`` for what a person is
shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from samed3d.evaluation.protocols import PROTOCOLS, protocol_of
from samed3d.evaluation.protocols.samed3d import DELAY_SECONDS
from samed3d.evaluation.rows import Row, curves
from samed3d.evaluation.statistics import mean_with_interval
from samed3d.metrics import area_under_curve, clicks_to, monotone_share

QUALITIES = (0.8, 0.85, 0.9)
WAY = ("model", "protocol", "policy", "prompt")


def by_way(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows by model, protocol, policy and first prompt."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in WAY), []).append(row)
    return found


def summarise(rows: Sequence[Row], clicks: Sequence[int]) -> list[dict[str, Any]]:
    """Means per way, group or source, and click, with 95 % intervals.

    Args:
        rows: Of ``cases.csv``.
        clicks: Which clicks to report; protocols with clicks of their own report all of theirs, a first box or scribble
            is click 0.
    """
    lines = []
    for way, mine in by_way(rows).items():
        protocol = PROTOCOLS.get(way[1])
        fixed = protocol is not None and protocol.fixed_clicks is not None
        shown = [c for c in sorted({row["click"] for row in mine}) if fixed or c == 0 or c in clicks]
        for key in ("group", "source"):
            for value in sorted({row[key] for row in mine}):
                for click in shown:
                    if chosen := [row for row in mine if row[key] == value and row["click"] == click]:
                        about = dict(zip(WAY, way, strict=True)) | {"by": key, "value": value, "click": click}
                        lines.append(about | _means(chosen))
    return lines


def score_series(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Figures of whole series per way and group: area, clicks to a quality, failures, monotony, and the protocol's
    own.
    """
    lines = []
    for way, mine in by_way(rows).items():
        per_case = [
            {"subject": curve[0]["subject"], "group": curve[0]["group"], "score": score, "value": value}
            for curve in curves(mine)
            for score, value in _of_curve(curve).items()
        ]
        if way[1] in PROTOCOLS:
            per_case += protocol_of(way[1]).scores(mine)
        for group in sorted({row["group"] for row in mine}):
            own = [line for line in per_case if line["group"] == group]
            for score in dict.fromkeys(line["score"] for line in own):
                chosen = [line for line in own if line["score"] == score]
                about = dict(zip(WAY, way, strict=True)) | {"group": group, "score": score}
                lines.append(
                    about | _estimate([line["value"] for line in chosen], [line["subject"] for line in chosen])
                )
    return lines


def _of_curve(curve: Sequence[Row]) -> dict[str, float]:
    """Figures of one structure; a quality that is never reached costs one click more than were given."""
    clicked = [row for row in curve if row["click"] > 0]
    if not clicked:
        return {}
    scores = [row["dice"] for row in curve]
    figures = {"area": area_under_curve([row["dice"] for row in clicked])}
    last = clicked[-1]["click"]
    for quality in QUALITIES:
        reached = clicks_to(scores, quality, first_click=curve[0]["click"])
        figures[f"clicks to {quality:g}"] = float(last + 1 if reached is None else reached)
        figures[f"failures at {quality:g}"] = float(reached is None)
        if clicked[0]["policy"] == "noisy":
            spent = [row for row in curve if reached is None or row["click"] <= reached]
            figures[f"seconds to {quality:g}"] = sum(row["seconds"] + DELAY_SECONDS for row in spent)
    share = monotone_share(scores)
    if share is not None:
        figures["monotone"] = share
    return figures


def _means(rows: Sequence[Row]) -> dict[str, Any]:
    subjects = [row["subject"] for row in rows]
    dice = mean_with_interval([row["dice"] for row in rows], subjects)
    obeyed = [row["obeyed"] for row in rows if row.get("obeyed") is not None]
    line: dict[str, Any] = {"dice": round(dice.mean, 4), "interval": _ends(dice.low, dice.high)}
    for key, digits in (("nsd", 4), ("nsd_subvoxel", 4), ("hd95_mm", 3)):
        values = [row[key] for row in rows if row.get(key) is not None]
        line[key] = round(float(np.mean(values)), digits) if values else None
    line["obeyed"] = round(float(np.mean(obeyed)), 4) if obeyed else None
    line["median_seconds"] = round(float(np.median([row["seconds"] for row in rows])), 3)
    return line | {"subjects": dice.subjects, "measurements": dice.measurements}


def _estimate(values: Sequence[float], subjects: Sequence[str]) -> dict[str, Any]:
    found = mean_with_interval(values, subjects)
    mean = None if math.isnan(found.mean) else round(found.mean, 4)
    return {
        "value": mean,
        "interval": _ends(found.low, found.high),
        "subjects": found.subjects,
        "measurements": found.measurements,
    }


def _ends(low: float, high: float) -> list[float] | None:
    """An interval for JSON; one subject alone has none."""
    return None if math.isnan(low) or math.isnan(high) else [round(low, 4), round(high, 4)]
