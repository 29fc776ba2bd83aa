"""Tables and charts of result rows, for the report of one run, the comparison of several, and files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from samed3d.data.exposure import NOT_UNSEEN
from samed3d.evaluation.results import PromptStrategy, Row, SavedRun, by_model, clicks_of, group_by, grouped, score
from samed3d.evaluation.statistics import (
    QUALITIES,
    Compared,
    Curves,
    Estimate,
    Scores,
    estimate,
    headline,
    scores_of_curve,
)
from samed3d.pages import (
    FAINT,
    SERIES_COLOURS,
    TEXT,
    Cell,
    Table,
    chart,
    count,
    interval_text,
    seconds_text,
    svg_in_page,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN_CLICKS = 6
FEW_LINES, FEW_SMALL_LINES = 5, 3  # up to so many lines of a chart have bands
_IN_THE_TABLES = ("area", "clicks to", "failures at", "monotone")
_MARKERS, _DASHES = "os^D", ("-", "--", ":", "-.")
_PERCENTILES = (5, 25, 50, 75, 95)


# Tables

_HEADS = {
    **{"measurements": "measured", "nsd": "NSD", "hd95_mm": "HD95, mm"},
    **{f"clicks to {q:g}": f"{'clicks ' * (q == QUALITIES[0])}to {q:.2f}" for q in QUALITIES},
}
"""Column heads of the scores whose name is not the head."""
BEHAVIOUR = ("nsd", "hd95_mm", *(f"clicks to {q:g}" for q in QUALITIES), "obeyed", "lowered", "first", "later")


def score_table(
    head: Sequence[str], lines: Iterable[tuple[Sequence[str], Scores]], columns: Sequence[str], digits: int = 3
) -> Table:
    """A table of scores, of which every page, terminal and file has its own selection.

    ``head`` is of the columns that say what a line is of, ``columns`` are names of scores. ``subjects`` and
    ``measurements`` are those of the Dice after the last click; ``digits`` are of scores from 0 to 1.
    """
    heads = [
        click_head(int(name.split()[-1])) if name.startswith("dice after") else _HEADS.get(name, name)
        for name in columns
    ]
    cells = [[*who, *(score_cell(scores, name, digits) for name in columns)] for who, scores in lines]
    return Table([*head, *heads], cells, left=len(head))


def score_cell(scores: Scores, name: str, digits: int = 3) -> Cell:
    """One score as text; empty where it is missing."""
    if name in ("subjects", "measurements"):
        last = [found for key, found in scores.items() if key.startswith("dice after")][-1]
        return str(getattr(last, name))
    found = scores.get(name)
    if found is None or math.isnan(found.mean):
        return ""
    if name in ("first", "later"):
        return seconds_text(found.mean)
    if name in ("obeyed", "lowered"):
        return f"{100 * found.mean:.0f} %"
    if name.startswith("clicks to"):
        return f"{found.mean:.1f}", f"{100 * scores[name.replace('clicks to', 'failures at')].mean:.0f} % never"
    return estimate_cell(found, 1 if name == "hd95_mm" else digits)


def estimate_cell(e: Estimate, digits: int, sign: bool = False) -> Cell:
    """A mean with its interval below."""
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{e.mean:{form}}", interval_text(e.low, e.high, form)


def p_text(p: float) -> str:
    """A p value to two digits; empty for nan."""
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def click_head(click: int) -> str:
    """Column head of a number of clicks."""
    return "first prompt" if click == 0 else count(click, "click")


def some_clicks(rows: Sequence[Row], most: int) -> list[str]:
    """The Dice after up to so many of the click numbers, the first and the last among them, evenly spread."""
    clicks = clicks_of(rows)
    if len(clicks) > most:
        clicks = sorted({clicks[round(i * (len(clicks) - 1) / (most - 1))] for i in range(most)})
    return [f"dice after {click}" for click in clicks]


def score_tables(rows: Sequence[Row]) -> list[Table]:
    """Dice by click, then surface scores, clicks needed and behaviour, of every model by group."""
    lines = [
        ((group if n == 0 else "", model), headline(mine))
        for group, of_group in grouped(rows, lambda r: r["group"], lambda g: (g in NOT_UNSEEN, g)).items()
        for n, (model, mine) in enumerate(by_model(of_group).items())
    ]
    missing = [m for m in ("nsd", "hd95_mm", "obeyed") if all(math.isnan(score(r, m)) for r in rows)]
    dice = ["subjects", "measurements", *some_clicks(rows, _SHOWN_CLICKS), "area"]
    behaviour = [name for name in BEHAVIOUR if name not in missing]
    return [score_table(["group", "model"], lines, columns, 2) for columns in (dice, behaviour)]


def own_scores(run: SavedRun, strategy: PromptStrategy) -> list[Table]:
    """The protocol's own scores, which only ``results.json`` has, one per column; no table where it has none."""
    lines: dict[tuple[str, str], Scores] = {}
    for line in run.results.get("scores", []):
        name = line.get("score", "")
        if name.startswith(_IN_THE_TABLES) or any(line.get(k) != v for k, v in asdict(strategy).items()):
            continue
        low, high = line.get("interval") or (math.nan, math.nan)
        value = math.nan if line.get("value") is None else float(line["value"])
        who = (str(line.get("group", "")), str(line["model"]))
        lines.setdefault(who, {})[name] = Estimate(value, low, high, 0, 0)
    names = list(dict.fromkeys(name for found in lines.values() for name in found))
    return [score_table(["group", "model"], lines.items(), names)] if lines else []


def curve_table(split: Mapping[str, Curves]) -> Table:
    """Dice after each click of each model, for each part of the rows."""
    lines = [
        ((name if n == 0 else "", model), scores_of_curve(curve))
        for name, curves in split.items()
        for n, (model, curve) in enumerate(curves.items())
    ]
    clicks = sorted({click for curves in split.values() for curve in curves.values() for click in curve})
    columns = ["subjects", "measurements", *(f"dice after {click}" for click in clicks)]
    return score_table(["", "model"], lines, columns)


def label_curves(rows: Sequence[Row]) -> dict[tuple[str, str, int, str], dict[int, Scores]]:
    """(model, source, label, its name) to the estimates of ``dice``, ``nsd`` and ``hd95_mm`` after each click."""
    groups = group_by(rows, lambda row: (row["model"], row["source"], row["label"], row["name"]))
    columns = ("dice", "nsd", "hd95_mm")
    return {
        key: {
            click: {column: estimate(mine, column) for column in columns}
            for click, mine in sorted(group_by(groups[key], lambda row: int(row["click"])).items())
        }
        for key in sorted(groups)
    }


def label_table(rows: Sequence[Row]) -> Table | None:
    """Dice by label after the first and the last click; None where there is one label only."""
    lines = [
        ((source, name or f"label {label}", model), {f"dice after {n}": found["dice"] for n, found in curve.items()})
        for (model, source, label, name), curve in label_curves(rows).items()
    ]
    table = score_table(["data set", "label", "model"], lines, ["subjects", *some_clicks(rows, 2)])
    return table if len({who[:2] for who, _ in lines}) > 1 else None


def difference_table(found: Sequence[Compared]) -> Table:
    """All differences with both tests."""
    head = ["first", "second", "score", "difference", "p bootstrap", "p Wilcoxon", "p corrected"]
    lines = []
    for c in found:
        r, d = c.result, c.result.difference
        ps = [p_text(p) for p in (r.p_bootstrap, r.p_wilcoxon, c.corrected)]
        pairs = f"{r.better} / {r.equal} / {r.worse}"
        lines.append([c.first, c.second, c.what, estimate_cell(d, 3, sign=True), *ps, pairs, str(d.subjects)])
    return Table([*head, "better / equal / worse", "subjects"], lines, left=3)


# Charts


def curve_chart(
    curves: Curves,
    models: Sequence[str],
    title: str,
    y_label: str = "Dice",
    small: bool = False,
    finish: Callable[[Figure, str], Any] = svg_in_page,
) -> Any:
    """Scores in [0, 1] over clicks, one line per model, with 95 % intervals as bands where there are few lines.

    The order of ``models``, all of the page, gives each its colour, marker and dash; ``small`` charts have no legend.
    ``finish`` makes the drawing from figure and title.
    """
    known = {model: {c: e for c, e in curve.items() if e.measurements} for model, curve in curves.items()}
    known = {model: curve for model, curve in known.items() if curve}
    if not known:
        return ""
    legend = 60 + 7 * min(34, max(map(len, known)))
    width, height, right = (264, 196, 12) if small else (396 + legend, 310, legend)
    with chart(width, height, left=46, right=right) as (figure, axes):
        for model, curve in known.items():
            n = models.index(model)
            clicks, colour = list(curve), SERIES_COLOURS[n % len(SERIES_COLOURS)]
            look: dict[str, Any] = {"marker": _MARKERS[n % 4], "markersize": 3.5 if small else 5, "color": colour}
            means, dashes = [e.mean for e in curve.values()], _DASHES[(n // 2 + n // 8) % 4]
            axes.plot(clicks, means, label=model[:34], linestyle=dashes, **look)
            ends = [(c, e.low, e.high) for c, e in curve.items() if not math.isnan(e.low)]
            if ends and len(known) <= (FEW_SMALL_LINES if small else FEW_LINES):
                at, low, high = zip(*ends, strict=True)
                axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
                axes.vlines(at, low, high, color=colour, linewidth=0.8 if len(at) > 1 else 2)
        ticks = sorted({click for curve in known.values() for click in curve})
        ticks = ticks if len(ticks) <= 12 else ticks[::2]
        axes.set_xticks(ticks, ["prompt" if click == 0 else str(click) for click in ticks])
        axes.set(title=title, xlabel="clicks", ylabel=y_label, ylim=(0, 1))
        if not small:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        return finish(figure, title)


@contextmanager
def _bar_chart(labels: Sequence[str]) -> Iterator[tuple[Figure, Axes]]:
    """Axes with one horizontal line per label, from below, and room for a number at its right."""
    left = 20 + 7 * min(60, max(map(len, labels)))
    with chart(left + 460, 70 + 26 * len(labels), left=left, right=70) as (figure, axes):
        axes.set_yticks(range(len(labels)), [label[:60] for label in labels])
        axes.set_ylim(-0.6, len(labels) - 0.4)
        yield figure, axes


def difference_chart(found: Sequence[Compared]) -> Any:
    """Differences of Dice after the last compared click, with their intervals, around a line at zero."""
    last = next((c.what for c in reversed(found) if c.what.startswith("after")), None)
    chosen = [c for c in found if c.what == last][::-1]
    if not chosen:
        return ""
    title = f"Difference of Dice {last}, 95 % interval over subjects"
    with _bar_chart([f"{c.first} \u2212 {c.second}" for c in chosen]) as (figure, axes):
        for y, c in enumerate(chosen):
            d = c.result.difference
            if not math.isnan(d.low):
                axes.hlines(y, d.low, d.high, color=SERIES_COLOURS[0], linewidth=2)
            axes.plot([d.mean], [y], "o", color=SERIES_COLOURS[0])
            axes.text(1.01, y, f"{d.mean:+.3f}", transform=axes.get_yaxis_transform(), va="center")
        axes.axvline(0, color=FAINT, linewidth=1)
        reach = 1.1 * max(0.05, *(abs(v) for v in axes.dataLim.intervalx))
        axes.set(title=title, xlabel="difference of Dice", xlim=(-reach, reach))
        return svg_in_page(figure, title)


def latency_figure(run: SavedRun) -> tuple[Any, Table] | None:
    """Chart and table of the seconds per prompt of each model; None where no times were recorded."""
    lines, rows = [], []
    for model, of_model in by_model(r for r in run.rows if score(r, "seconds") > 0).items():
        first = min(clicks_of(of_model))
        for what, is_first in (("first prompt", True), ("later clicks", False)):
            chosen = [r for r in of_model if (r["click"] == first) == is_first]
            if not chosen:
                continue
            spread = [max(1e-4, float(v)) for v in np.percentile([r["seconds"] for r in chosen], _PERCENTILES)]
            lines.append((f"{model}, {what}", run.models.index(model), spread))
            encode = [v for r in chosen if not math.isnan(v := score(r, "encode_seconds"))]
            memory = [v for r in chosen if not math.isnan(v := score(r, "peak_mib"))]
            encoding = seconds_text(float(np.median(encode))) if encode else ""
            peak = f"{max(memory):,.0f} MiB" if memory else ""
            rows.append([model, what, str(len(chosen)), *map(seconds_text, spread), encoding, peak])
    if not lines:
        return None
    with _bar_chart([label for label, *_ in lines[::-1]]) as (figure, axes):
        for y, (_, style, (p5, p25, median, p75, p95)) in enumerate(lines[::-1]):
            colour = SERIES_COLOURS[style % len(SERIES_COLOURS)]
            axes.hlines(y, p5, p95, color=colour, linewidth=2)
            axes.barh(y, p75 - p25, left=p25, height=0.5, color=colour, alpha=0.35)
            axes.plot([median], [y], "|", color=TEXT, markersize=14, markeredgewidth=2)
            axes.text(1.01, y, seconds_text(median), transform=axes.get_yaxis_transform(), va="center")
        axes.set_xscale("log")
        axes.set(title="Time per prompt", xlabel="seconds, logarithmic")
        head = ["model", "", "prompts", "5 %", "25 %", "median", "75 %", "95 %", "encoding, median", "peak memory"]
        return svg_in_page(figure, "Time per prompt"), Table(head, rows, left=2)
