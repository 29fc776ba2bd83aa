"""``report.html``: a results folder as a page that a person wants to read, in one file that opens without a network.

Everything on it comes from ``cases.csv``, ``results.json`` and, for the pictures, ``prompts.jsonl`` with the images
themselves. Numbers are made in ``summaries.py``, charts in ``figures.py``, pictures in ``pictures.py``, the page's look
in ``page.py``; here is the order and the words. Not here: two runs side by side (``compare.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from samed3d.evaluation import figures
from samed3d.evaluation.page import folded, page, pairs, paragraph, table, write_page
from samed3d.evaluation.results import (
    TRAINED_ON,
    PromptStrategy,
    Row,
    SavedRun,
    grouped,
    modality_class,
    read_run,
    score,
    size_class,
    size_order,
    untrained,
)
from samed3d.evaluation.statistics import Curves, Estimate, click_curve, differences, model_curves
from samed3d.evaluation.tables import curve_table, difference_figure, difference_table, own_scores, score_tables

REPORT_HTML = "report.html"
PICTURE_SECONDS = 120.0
_FEW_LINES, _FEW_SMALL_LINES = 5, 3
_IN_THE_TABLES = ("area", "clicks to", "failures at", "monotone")
_PERCENTILES = (5, 25, 50, 75, 95)
_NAVIGATION = """<nav><a href="#scores">Scores</a><a href="#curves">Click curves</a><a href="#differences">Differences</a>
<a href="#cases">Cases</a><a href="#time">Time</a><a href="#how">How this was measured</a></nav>"""
_SCORES_NOTE = """Dice after each number of clicks: mean over structures, below it the 95 % bootstrap interval over subjects (none for a
single subject). The score after n clicks is the score after n clicks, never the best so far. Area: under the click curve, divided by
its width. NSD and HD95 after the last click; a missing mask has the image's diagonal as its HD95. Clicks to 0.80: mean, structures that
never get there counted with one click more than were given, and their share. Obeyed: the clicked voxel has the click's sign. Lowered:
clicks after which Dice fell by more than 0.01. First and later: median time per prompt."""
_TESTS_NOTE = """Dice of the first model minus Dice of the second on the same structure, seed and number of clicks. Intervals and both
tests take subjects, not structures, as the unit: a bootstrap over subjects, and a Wilcoxon signed-rank test on the subjects' mean
differences, corrected after Holm for all tests in the table. Fewer than six subjects cannot give a Wilcoxon p under 0.05."""
_TIME_NOTE = """From giving the prompt to having the mask, on the machine and under the load of this run: to be compared within this
page only. Line: 5 % to 95 %, bar: quartiles."""
_TRAINED_ON_ALL = """Every subject here was trained on by the first checkpoint: these numbers say how well it remembers, not how
accurate it is."""
_TRAINED_ON_SOME = """rows are of subjects that the first checkpoint was trained on. They have lines of their own in the tables of
scores and are left out of everything else."""
_UNEVEN = "the models were not measured on the same number of structures and clicks; only the paired differences compare like with like. Rows"
_FOOT = """Rows: cases.csv, one per model, structure, seed and click. Prompts: prompts.jsonl. This page is made from them by samed3d
evaluate report."""


def write_report(folder: Path, *, picture_seconds: float = PICTURE_SECONDS) -> Path:
    """Write ``report.html`` beside the results.

    Args:
        folder: What ``samed3d evaluate`` wrote.
        picture_seconds: How long pictures of cases may take to be made, by giving the model the saved prompts again; 0
            makes none.

    Returns:
        The page's path.

    Raises:
        InputError: if the folder holds no results, or cannot be written to.
    """
    run = read_run(folder)
    pictures = ""
    if picture_seconds > 0:
        from samed3d.evaluation.pictures import picture_section

        pictures = picture_section(run, picture_seconds)
    path = folder / REPORT_HTML
    write_page(path, page("samed3d evaluation", report_body(run, pictures)))
    return path


def report_body(run: SavedRun, pictures: str = "") -> str:
    """The page's content; ``pictures`` is a section that is ready."""
    strategies = run.strategies
    parts = [_title(run), *(paragraph(w, "warn") for w in _warnings(run)), *_in_short(run, strategies[0])]
    parts.append(_NAVIGATION)
    scores = [
        _about(run, strategy) + score_tables(run.of(strategy)) + own_scores(_own(run, strategy))
        for strategy in strategies
    ]
    parts.append(
        '<h2 id="scores">Scores</h2>' + paragraph(_SCORES_NOTE, "faint") + _first_open("Scores", strategies, scores)
    )
    parts.append(
        '<h2 id="curves">Click curves</h2>'
        + _first_open("Click curves", strategies, [_curves(run, strategy) for strategy in strategies])
    )
    parts.append('<h2 id="differences">Differences between models</h2>' + _differences(run, strategies))
    parts.append('<h2 id="cases">Cases</h2>' + (pictures or paragraph("Pictures were not asked for.", "faint")))
    parts.append('<h2 id="time">Time per prompt</h2>' + _latency(run))
    parts.append('<h2 id="how">How this was measured</h2>' + _how(run))
    return "\n".join(parts)


def _title(run: SavedRun) -> str:
    cases = {(r["source"], r["case"]) for r in run.rows}
    subjects = {(r["source"], r["subject"]) for r in run.rows}
    structures = {(r["source"], r["case"], r["label"]) for r in run.rows}
    sources = {r["source"] for r in run.rows}
    shown = ", ".join(run.models[:3]) + (f" and {len(run.models) - 3} more" if len(run.models) > 3 else "")
    more = len(run.strategies) - 3
    names = "; ".join(map(str, run.strategies[:3])) + (f"; and {more} more" if more > 0 else "")
    told = (
        f"{_count(len(structures), 'structure')} in {_count(len(cases), 'image')} of {_count(len(subjects), 'subject')} "
        f"from {_count(len(sources), 'data set')}; {_count(len({r['seed'] for r in run.rows}), 'seed')}"
    )
    return f"<h1>Evaluation: {escape(shown)}</h1>" + paragraph(f"{names}. {told}.", "faint")


def _warnings(run: SavedRun) -> list[str]:
    """What a reader must know before any number."""
    found = [str(w) for w in run.results.get("warnings", [])]
    trained = sum(r["group"] == TRAINED_ON for r in run.rows)
    if trained == len(run.rows):
        found.append(_TRAINED_ON_ALL)
    elif trained:
        found.append(f"{trained} of {len(run.rows)} {_TRAINED_ON_SOME}")
    for strategy in run.strategies:
        counts = {m: sum(r["model"] == m for r in run.of(strategy)) for m in run.models}
        if len({n for n in counts.values() if n}) > 1:
            found.append(f"{strategy}: {_UNEVEN}: {', '.join(f'{m} {n}' for m, n in counts.items() if n)}.")
    return found


def _in_short(run: SavedRun, strategy: PromptStrategy) -> list[str]:
    lines = []
    rows = untrained(run.of(strategy))
    for model in run.models:
        mine = [r for r in rows if r["model"] == model]
        if mine:
            curve = click_curve(mine)
            first, last = min(curve), max(curve)
            end = f" and <b>{_plain(curve[last])}</b> after {last}" if last > first else ""
            begin = "the first prompt" if first == 0 else _count(first, "click")
            lines.append(f"<li><b>{escape(model)}</b>: Dice <b>{_plain(curve[first])}</b> after {begin}{end}, "
                         f"{_count(curve[last].measurements, 'measurement')}, {_count(curve[last].subjects, 'subject')}</li>")  # fmt: skip
    return ["<ul>", *lines, "</ul>"]


def _curves(run: SavedRun, strategy: PromptStrategy) -> str:
    rows = untrained(run.of(strategy))
    dice = model_curves(rows)
    parts = ['<figure><div class="charts">', _chart(run, dice, "All structures", "Dice")]
    if any(not math.isnan(score(r, "nsd")) for r in rows):
        parts.append(_chart(run, model_curves(rows, "nsd"), "All structures", "NSD"))
    bands = (
        "bands are 95 % bootstrap intervals over subjects" if len(dice) <= _FEW_LINES else "the table has the intervals"
    )
    caption = f"Mean over structures; {bands}. Point at a mark for its numbers."
    parts.append(
        f"</div><figcaption>{caption}</figcaption></figure>"
        + folded("These numbers as a table", curve_table({"all": dice}))
    )
    splits: tuple[tuple[str, Callable[[Row], str], Callable[[str], object] | None], ...] = (
        ("By dataset", lambda r: r["source"], None),
        ("By modality", modality_class, None),
        ("By size of the structure", size_class, size_order),
    )
    for title, name_of, order in splits:
        split = grouped(rows, name_of, order)
        curves = {name: model_curves(of_one) for name, of_one in split.items()}
        charts = [
            _chart(run, curves[name], f"{name} ({_people(of_one)})", "Dice", small=True)
            for name, of_one in split.items()
        ]
        parts.append(f"<h3>{title}</h3>" + figures.legend_of([(m, run.models.index(m)) for m in dice]))
        bands = (
            ""
            if len(dice) <= _FEW_SMALL_LINES
            else " Bands are left out of charts with many lines; the table has the intervals."
        )
        caption = f"<figcaption>In brackets the number of subjects.{bands}</figcaption>"
        parts.append(f'<figure><div class="charts">{"".join(charts)}</div>{caption}</figure>')
        parts.append(folded("These numbers as a table", curve_table(curves)))
    return "".join(parts)


def _chart(run: SavedRun, curves: Curves, title: str, y_label: str, small: bool = False) -> str:
    series = []
    for model, curve in curves.items():
        known = {c: e for c, e in curve.items() if e.measurements}
        if known:
            es = list(known.values())
            notes = [f"{_count(e.subjects, 'subject')}, {_count(e.measurements, 'measurement')}" for e in es]
            ends = ([e.mean for e in es], [e.low for e in es], [e.high for e in es])
            series.append(figures.Series(model, list(known), *ends, style=run.models.index(model), notes=notes))
    bands = len(series) <= (_FEW_SMALL_LINES if small else _FEW_LINES)
    return figures.click_chart(series, title, y_label, small=small, bands=bands) if series else ""


def _differences(run: SavedRun, strategies: Sequence[PromptStrategy]) -> str:
    if len(run.models) < 2:
        return paragraph("One model was measured: there is nothing to compare.", "faint")
    parts = [paragraph(_TESTS_NOTE, "faint")]
    for strategy in strategies:
        found = differences(
            untrained(run.of(strategy)), [m for m in run.models if any(r["model"] == m for r in run.of(strategy))]
        )
        if found:
            parts.append(_strategy_heading(strategy, strategies) + difference_figure(found) + difference_table(found))
    return "".join(parts)


def _latency(run: SavedRun) -> str:
    lines, rows_of_table = [], []
    for model in run.models:
        mine = [r for r in run.rows if r["model"] == model and score(r, "seconds") > 0]
        begins = min((r["click"] for r in mine), default=0)
        first, later = [r for r in mine if r["click"] == begins], [r for r in mine if r["click"] != begins]
        for what, chosen in (("first prompt", first), ("later clicks", later)):
            if not chosen:
                continue
            a, b, c, d, e = (max(1e-4, float(v)) for v in np.percentile([r["seconds"] for r in chosen], _PERCENTILES))
            lines.append(figures.Spread(f"{model}, {what}", (a, b, c, d, e), run.models.index(model)))
            encode = [v for r in chosen if not math.isnan(v := score(r, "encode_seconds"))]
            memory = [v for r in chosen if not math.isnan(v := score(r, "peak_mib"))]
            cells = [escape(model), what, str(len(chosen)), *map(figures.seconds_text, (a, b, c, d, e))]
            cells += [
                figures.seconds_text(float(np.median(encode))) if encode else "",
                f"{max(memory):,.0f} MiB" if memory else "",
            ]
            rows_of_table.append(cells)
    if not lines:
        return paragraph("No times were recorded.", "faint")
    head = ["model", "", "prompts", "5 %", "25 %", "median", "75 %", "95 %", "encoding, median", "peak memory"]
    chart = figures.spread_chart(lines, "Time per prompt", "seconds, logarithmic")
    numbers = folded("These numbers as a table", table(head, rows_of_table, left=2))
    return paragraph(_TIME_NOTE, "faint") + f"<figure>{chart}</figure>" + numbers


def _how(run: SavedRun) -> str:
    results = run.results
    command = results.get("command")
    command = " ".join(map(str, command)) if isinstance(command, list) else command
    parts = [f"<pre>{escape(str(command))}</pre>" if command else paragraph("The command was not recorded.", "faint")]
    about = [("revision", str(results["revision"]))] if results.get("revision") else []
    parts.append(pairs(about + flattened(run.settings)))
    parts.append("<h3>Environment</h3>" + pairs(flattened(results.get("environment", {}))))
    parts.append(paragraph(_FOOT, "faint"))
    return "".join(parts)


def flattened(entry: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines ``outer inner``: value; what was not set is left out."""
    if isinstance(entry, dict):
        return [
            line
            for key, value in entry.items()
            for line in flattened(value, f"{prefix} {key}".strip().replace("_", " "))
        ]
    if entry is None or entry == []:
        return []
    return [(prefix, ", ".join(map(str, entry)) if isinstance(entry, list | tuple) else str(entry))]


def _first_open(what: str, strategies: Sequence[PromptStrategy], contents: Sequence[str]) -> str:
    """The first prompt strategy in full, the others to open."""
    others = "".join(
        folded(f"{what}: {strategy}", content) for strategy, content in zip(strategies[1:], contents[1:], strict=True)
    )
    return (f"<h3>{escape(str(strategies[0]))}</h3>" if others else "") + contents[0] + others


def _about(run: SavedRun, strategy: PromptStrategy) -> str:
    """What the protocol is, and what flatters in it."""
    about = run.results.get("protocols", {}).get(strategy.protocol, {})
    title, flattering = about.get("title", ""), about.get("flattering", "")
    warned = paragraph(f"These scores flatter: {flattering}.", "warn") if flattering else ""
    return (paragraph(f"{strategy.protocol}: {title}.", "faint") if title else "") + warned


def _own(run: SavedRun, strategy: PromptStrategy) -> list[dict[str, Any]]:
    """The protocol's own figures, which only ``results.json`` has."""
    return [
        line
        for line in run.results.get("scores", [])
        if (line.get("protocol"), line.get("policy"), line.get("prompt"))
        == (strategy.protocol, strategy.policy, strategy.prompt)
        and not line.get("score", "").startswith(_IN_THE_TABLES)
    ]


def _strategy_heading(strategy: PromptStrategy, strategies: Sequence[PromptStrategy]) -> str:
    return f"<h3>{escape(str(strategy))}</h3>" if len(strategies) > 1 else ""


def _plain(e: Estimate) -> str:
    return f"{e.mean:.2f}</b>{figures.interval_text(e.low, e.high, '.2f')}<b>"


def _people(rows: Sequence[Row]) -> str:
    return str(len({(r["source"], r["subject"]) for r in rows}))


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")
