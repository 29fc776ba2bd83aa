"""Tables and charts of result rows, for the report of one run, the comparison of several, and files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from samed3d.data.exposure import NOT_UNSEEN
from samed3d.evaluation.results import PromptStrategy, Row, SavedRun, by_model, clicks_of, grouped, score
from samed3d.evaluation.statistics import Compared, Curves, Estimate, headline
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


def estimate_cell(e: Estimate | None, digits: int = 2, sign: bool = False) -> Cell:
    """A mean with its interval below; empty where there is none."""
    if e is None or math.isnan(e.mean):
        return ""
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{e.mean:{form}}", interval_text(e.low, e.high, form)


def _percent(share: float) -> str:
    return "" if math.isnan(share) else f"{100 * share:.0f} %"


def p_text(p: float) -> str:
    """A p value to two digits; empty for nan."""
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def click_head(click: int) -> str:
    """Column head of a number of clicks."""
    return "first prompt" if click == 0 else count(click, "click")


def some_clicks(rows: Sequence[Row], most: int) -> list[int]:
    """Up to so many of the click numbers, the first and the last among them, evenly spread."""
    clicks = clicks_of(rows)
    if len(clicks) <= most:
        return clicks
    return sorted({clicks[round(i * (len(clicks) - 1) / (most - 1))] for i in range(most)})


def score_tables(rows: Sequence[Row]) -> list[Table]:
    """Dice by click, then surface scores, clicks needed and behaviour, of every model by group."""
    clicks = some_clicks(rows, _SHOWN_CLICKS)
    has = {metric: any(not math.isnan(score(r, metric)) for r in rows) for metric in ("nsd", "hd95_mm", "obeyed")}
    scores, efforts = [], []
    for group, of_group in grouped(rows, lambda r: r["group"], lambda g: (g in NOT_UNSEEN, g)).items():
        for n, (model, mine) in enumerate(by_model(of_group).items()):
            h = headline(mine, model)
            last, who = h.dice[max(h.dice)], [group if n == 0 else "", model]
            dice = [estimate_cell(h.dice.get(c)) for c in clicks]
            scores.append([*who, str(last.subjects), str(last.measurements), *dice, estimate_cell(h.area)])
            surfaces = [estimate_cell(h.nsd)] * has["nsd"] + [estimate_cell(h.hd95_mm, 1)] * has["hd95_mm"]
            needed: list[Cell] = [
                (f"{e.clicks.mean:.1f}", f"{_percent(e.failed)} never") if e.clicks.measurements else ""
                for e in h.efforts
            ]
            behaviour = [*[_percent(h.obeyed)] * has["obeyed"], _percent(h.lowered)]
            times = [seconds_text(h.first_seconds), seconds_text(h.later_seconds)]
            efforts.append([*who, *surfaces, *needed, *behaviour, *times])
    head = ["group", "model", "subjects", "measured", *map(click_head, clicks), "area"]
    more = ["group", "model", *["NSD"] * has["nsd"], *["HD95, mm"] * has["hd95_mm"]]
    more += ["clicks to 0.80", "to 0.85", "to 0.90", *["obeyed"] * has["obeyed"], "lowered", "first", "later"]
    return [Table(head, scores, left=2), Table(more, efforts, left=2)]


def own_scores(run: SavedRun, strategy: PromptStrategy) -> list[Table]:
    """The protocol's own scores, which only ``results.json`` has, one per column; no table where it has none."""
    rows: dict[tuple[str, str], dict[str, Cell]] = {}
    for line in run.results.get("scores", []):
        name = line.get("score", "")
        if name.startswith(_IN_THE_TABLES) or any(line.get(k) != v for k, v in asdict(strategy).items()):
            continue
        low, high = line.get("interval") or (math.nan, math.nan)
        value = math.nan if line.get("value") is None else float(line["value"])
        who = (str(line.get("group", "")), str(line["model"]))
        rows.setdefault(who, {})[name] = estimate_cell(Estimate(value, low, high, 0, 0), 3)
    names = list(dict.fromkeys(name for found in rows.values() for name in found))
    cells = [[*who, *(found.get(name, "") for name in names)] for who, found in rows.items()]
    return [Table(["group", "model", *names], cells, left=2)] if cells else []


def curve_table(split: Mapping[str, Curves]) -> Table:
    """Dice after each click of each model, for each part of the rows."""
    clicks = sorted({click for curves in split.values() for curve in curves.values() for click in curve})
    lines = []
    for name, curves in split.items():
        for n, (model, curve) in enumerate(curves.items()):
            last = curve[max(curve)]
            who = [name if n == 0 else "", model, str(last.subjects), str(last.measurements)]
            lines.append([*who, *(estimate_cell(curve.get(c), 3) for c in clicks)])
    return Table(["", "model", "subjects", "measured", *map(click_head, clicks)], lines, left=2)


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
