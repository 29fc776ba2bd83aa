"""Saved runs side by side: one table, and a paired test wherever two runs hold the same structures, seeds and clicks.

Runs that were clicked under other prompt strategies, or kept from other subjects, do not compare; putting them into one table needs a
word from the user, and the table says so. Nothing is measured here. Read ``summaries.py`` for the numbers,
``report.py`` for one run alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from samed3d.errors import InputError
from samed3d.evaluation import figures
from samed3d.evaluation.page import page, paragraph, table, write_page
from samed3d.evaluation.results import (
    PromptStrategy,
    Row,
    SavedRun,
    clicks_of,
    group_by,
    read_run,
    structure_key,
    untrained,
)
from samed3d.evaluation.statistics import (
    Compared,
    Headline,
    PairedDifference,
    click_curve,
    compare_rows,
    corrected,
    headline,
)
from samed3d.evaluation.tables import cell, difference_figure, difference_table, p_text

COMPARE_HTML = "compare.html"
_SHOWN_CLICKS = 3


@dataclass(frozen=True)
class Entry:
    """One model of one run under one prompt strategy.

    Attributes:
        name: ``RUN: MODEL``, the model alone where only one run has it.
        run: Which run.
        model: As the run calls it.
        strategy: How it was prompted.
        rows: Its rows of subjects it was not trained on.
    """

    name: str
    run: str
    model: str
    strategy: PromptStrategy
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side: every model of every run, what is not alike between the runs, and the paired differences."""

    entries: list[Entry]
    unlike: list[str]
    differences: list[tuple[PromptStrategy, list[Compared]]]


def compare_runs(folders: Sequence[Path], *, anyway: bool = False) -> Comparison:
    """Read runs and compare them.

    Args:
        folders: Two or more results folders.
        anyway: Put runs side by side that are not alike; they are tested only where they are.

    Raises:
        InputError: if fewer than two folders are given, one holds no results or is given twice, or the runs are not
            alike and
            ``anyway`` was not said.
    """
    if len(folders) < 2:
        raise InputError(f"comparing needs at least two results folders, got {len(folders)}")
    if len({f.resolve() for f in folders}) < len(folders):
        raise InputError(f"each results folder can be given once, got {', '.join(map(str, folders))}")
    runs = dict(zip(_short_names(folders), map(read_run, folders), strict=True))
    unlike = differences_of_settings(runs)
    if unlike and not anyway:
        raise InputError(
            f"these runs do not compare: {'; '.join(unlike)}; measure them alike, or say --anyway to see them side by side"
        )
    models = [model for run in runs.values() for model in run.models]
    entries = [
        Entry(model if models.count(model) == 1 else f"{short}: {model}", short, model, strategy, mine)
        for short, run in runs.items()
        for strategy in run.strategies
        for model in run.models
        if (mine := [r for r in untrained(run.of(strategy)) if r["model"] == model])
    ]
    return Comparison(entries, unlike, _tested(entries, list(runs)))


def differences_of_settings(runs: dict[str, SavedRun]) -> list[str]:
    """What makes runs incomparable, in words: other prompt strategies, other subjects kept back, another split, data
    with nothing shared.
    """
    found = []
    for what, value_of in (
        ("prompt strategies", lambda run: " / ".join(sorted(map(str, run.strategies)))),
        ("split", lambda run: str(run.settings.get("split", "not stated"))),
        ("subjects kept from training", lambda run: _kept(run)),
        ("tolerance of NSD in mm", lambda run: str(run.settings.get("ask", {}).get("tolerance_mm", "not stated"))),
    ):
        values = {short: value_of(run) for short, run in runs.items()}
        if len(set(values.values())) > 1:
            found.append(f"{what} ({'; '.join(f'{short}: {value}' for short, value in values.items())})")
    structures = [{structure_key(r) for r in run.rows} for run in runs.values()]
    if not set.intersection(*structures) and not any("prompt strategies" in f for f in found):
        found.append("data (no structure and seed in common)")
    return found


def comparison_text(comparison: Comparison) -> str:
    """The tables as plain text for a terminal."""
    parts = [f"Not alike: {told}" for told in comparison.unlike]
    for strategy in dict.fromkeys(e.strategy for e in comparison.entries):
        entries = [e for e in comparison.entries if e.strategy == strategy]
        clicks = _some_clicks(entries)
        lines = [["", "subjects", "measured", *(_click(c) for c in clicks), "area", "first", "later"]]
        for entry in entries:
            curve, h = click_curve(entry.rows), headline(entry.rows, entry.model)
            last = curve[max(curve)]
            scores = [f"{curve[c].mean:.3f}" if c in curve else "" for c in clicks]
            times = [figures.seconds_text(s) if not math.isnan(s) else "" for s in (h.first_seconds, h.later_seconds)]
            lines.append(
                [entry.name, str(last.subjects), str(last.measurements), *scores, f"{h.area.mean:.3f}", *times]
            )
        parts += [f"Dice, {strategy}", _aligned(lines)]
    for strategy, found in comparison.differences:
        lines = [["difference of Dice", "", "mean", "95 % interval", "p Wilcoxon", "corrected", "subjects"]]
        for c in found:
            d = c.result.difference
            ends = figures.interval_text(d.low, d.high).strip()
            ps = [p_text(p) or "none" for p in (c.result.p_wilcoxon, c.corrected)]
            lines.append([f"{c.first} - {c.second}", c.what, f"{d.mean:+.3f}", ends, *ps, str(d.subjects)])
        parts += [f"Paired, {strategy}", _aligned(lines, left=2)]
    if not comparison.differences:
        parts.append("No paired test: the runs have no structure, seed and click in common.")
    return "\n\n".join(parts)


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the comparison as a page that needs no other file.

    Raises:
        InputError: if it cannot be written.
    """
    runs = ", ".join(dict.fromkeys(e.run for e in comparison.entries))
    parts = [f"<h1>Comparison: {escape(runs)}</h1>"]
    parts += [
        paragraph(f"Not alike: {told}. Numbers that differ in this do not compare.", "warn")
        for told in comparison.unlike
    ]
    tested = dict(comparison.differences)
    for strategy in dict.fromkeys(e.strategy for e in comparison.entries):
        entries = [e for e in comparison.entries if e.strategy == strategy]
        parts.append(f"<h2>{escape(str(strategy))}</h2>" + _curves(entries) + _score_table(entries))
        if strategy in tested:
            parts.append(f"<h3>Paired differences</h3>{paragraph(_PAIRED_NOTE, 'faint')}")
            parts.append(difference_figure(tested[strategy]) + difference_table(tested[strategy]))
        else:
            parts.append(
                paragraph("No paired test: there are no two with a structure, seed and click in common.", "faint")
            )
    write_page(path, page(f"Comparison: {runs}", "\n".join(parts)))
    return path


_PAIRED_NOTE = """Dice of the first minus Dice of the second on the same structure, seed and click. Intervals and tests take subjects as the
unit; the corrected p is Wilcoxon's after Holm for all tests of this comparison."""


def _tested(entries: Sequence[Entry], runs: Sequence[str]) -> list[tuple[PromptStrategy, list[Compared]]]:
    """Paired differences between entries of different runs, the later run first: the same model where both runs have
    it, else all.
    """
    raw: list[tuple[PromptStrategy, tuple[str, str, str, PairedDifference]]] = []
    for strategy, here in group_by(entries, lambda entry: entry.strategy).items():
        for number, newer in enumerate(runs):
            for older in runs[:number]:
                a, b = ([e for e in here if e.run == run] for run in (newer, older))
                shared = {e.model for e in a} & {e.model for e in b}
                for x, y in ((x, y) for x in a for y in b if x.model == y.model or not shared):
                    raw += [(strategy, (x.name, y.name, *found)) for found in compare_rows(x.rows, y.rows)]
    lines = zip([strategy for strategy, _ in raw], corrected([found for _, found in raw]), strict=True)
    grouped = group_by(lines, lambda line: line[0])
    return [(strategy, [line for _, line in found]) for strategy, found in grouped.items()]


def _curves(entries: Sequence[Entry]) -> str:
    series = []
    for number, entry in enumerate(entries):
        curve = click_curve(entry.rows)
        es = list(curve.values())
        ends = ([e.mean for e in es], [e.low for e in es], [e.high for e in es])
        series.append(figures.Series(entry.name, list(curve), *ends, style=number))
    return f"<figure>{figures.click_chart(series, 'Dice by click', bands=len(series) <= 3)}</figure>"


def _score_table(entries: Sequence[Entry]) -> str:
    clicks = _some_clicks(entries)
    lines = []
    for entry in entries:
        h: Headline = headline(entry.rows, entry.model)
        last = h.dice[max(h.dice)]
        times = [figures.seconds_text(s) if not math.isnan(s) else "" for s in (h.first_seconds, h.later_seconds)]
        who = [escape(entry.name), f"{last.subjects}<small>{last.measurements} measured</small>"]
        lines.append(
            [
                *who,
                *(cell(h.dice.get(c), 3) for c in clicks),
                cell(h.area, 3),
                cell(h.nsd, 3),
                cell(h.hd95_mm, 1),
                *times,
            ]
        )
    head = ["run and model", "subjects", *(_click(c) for c in clicks), "area", "NSD", "HD95, mm", "first", "later"]
    return table(head, lines)


def _some_clicks(entries: Sequence[Entry]) -> list[int]:
    """First, last and what lies between, of all clicks that occur."""
    clicks = clicks_of([r for e in entries for r in e.rows])
    if len(clicks) <= _SHOWN_CLICKS:
        return clicks
    return sorted({clicks[round(i * (len(clicks) - 1) / (_SHOWN_CLICKS - 1))] for i in range(_SHOWN_CLICKS)})


def _kept(run: SavedRun) -> str:
    """What the run's models were kept from, in a few words."""
    kept = run.settings.get("kept_from")
    if not isinstance(kept, dict):
        return "not stated"
    held = sorted(kept.get("hold_out", ()))
    return f"{kept.get('validation_share')} of subjects with seed {kept.get('seed')}, {len(held)} sources held out" + (
        f" ({', '.join(held[:3])}{', ...' if len(held) > 3 else ''})" if held else ""
    )


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names where they differ, else as much of the path as makes them differ."""
    for length in range(1, max(len(f.resolve().parts) for f in folders) + 1):
        names = ["/".join(f.resolve().parts[-length:]) for f in folders]
        if len(set(names)) == len(names):
            return names
    return [str(f) for f in folders]


def _click(click: int) -> str:
    return "first prompt" if click == 0 else f"{click} click{'' if click == 1 else 's'}"


def _aligned(lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width; the first ``left`` to the left, numbers to the right."""
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(w) if n < left else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
