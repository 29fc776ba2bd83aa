"""Saved runs side by side: one table, and a paired test wherever two runs hold the same structures, seeds and clicks.

Runs under different prompt strategies, or with different subjects held out, do not compare: putting them into one table
needs a word from the user, and the table says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

from samed3d.errors import InputError
from samed3d.evaluation import tables
from samed3d.evaluation.report import PACKAGES
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
from samed3d.evaluation.statistics import Compared, PairedDifference, click_curve, compare_rows, corrected, headline
from samed3d.output import check_output, write_text
from samed3d.pages import Table, check_installed, render

COMPARE_HTML = "compare.html"
_SHOWN_CLICKS = 3
_BY_CLICKS = ("area", "nsd", "hd95_mm")


@dataclass(frozen=True)
class ComparedModel:
    """One model of one run under one prompt strategy, with its rows of subjects that it was not trained on.

    ``name`` is ``RUN: MODEL``, or the model alone where only one run has it.
    """

    name: str
    run: str
    model: str
    strategy: PromptStrategy
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side: every model of every run, what is not alike between the runs, and the paired differences."""

    entries: list[ComparedModel]
    unlike: list[str]
    differences: list[tuple[PromptStrategy, list[Compared]]]


def compare_runs(folders: Sequence[Path], *, anyway: bool = False) -> Comparison:
    """Read runs and compare them; with ``anyway`` those too that are not alike, which are tested where they are.

    Raises:
        InputError: if fewer than two folders are given, one holds no results or is given twice, or the runs are not
            alike and ``anyway`` is False.
    """
    if len(folders) < 2:
        raise InputError(f"comparing needs at least two results folders, got {len(folders)}")
    if len({f.resolve() for f in folders}) < len(folders):
        raise InputError(f"each results folder can be given once, got {', '.join(map(str, folders))}")
    runs = dict(zip(_short_names(folders), map(read_run, folders), strict=True))
    unlike = differences_of_settings(runs)
    if unlike and not anyway:
        raise InputError(f"these runs do not compare: {'; '.join(unlike)}; measure them alike, or give --anyway")
    models = [model for run in runs.values() for model in run.models]
    entries = [
        ComparedModel(model if models.count(model) == 1 else f"{short}: {model}", short, model, strategy, mine)
        for short, run in runs.items()
        for strategy in run.strategies
        for model in run.models
        if (mine := [r for r in untrained(run.of(strategy)) if r["model"] == model])
    ]
    return Comparison(entries, unlike, _tested(entries, list(runs)))


def differences_of_settings(runs: dict[str, SavedRun]) -> list[str]:
    """What makes runs incomparable: prompt strategies, held-out subjects, split, tolerance, data without overlap."""
    found = []
    for what, value_of in (
        ("prompt strategies", lambda run: " / ".join(sorted(map(str, run.strategies)))),
        ("split", lambda run: str(run.settings.get("split", "not stated"))),
        ("subjects kept from training", _held_out),
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
    for strategy, entries in group_by(comparison.entries, lambda entry: entry.strategy).items():
        parts += [f"Dice, {strategy}", _score_table(entries).as_text()]
    for strategy, found in comparison.differences:
        parts += [f"Paired, {strategy}", tables.difference_table(found).as_text(intervals=True)]
    if not comparison.differences:
        parts.append("No paired test: the runs have no structure, seed and click in common.")
    return "\n\n".join(parts)


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the comparison as a page that needs no other file.

    Raises:
        InputError: if it cannot be written, or a package of ``samed3d[evaluate]`` is missing.
    """
    check_installed("a page", *PACKAGES)
    runs = ", ".join(dict.fromkeys(e.run for e in comparison.entries))
    tested = dict(comparison.differences)
    sections = []
    for strategy, entries in group_by(comparison.entries, lambda e: e.strategy).items():
        curves = {e.name: click_curve(e.rows) for e in entries}
        found = tested.get(strategy, [])
        sections.append(
            {
                "name": str(strategy),
                "chart": tables.curve_chart(curves, list(curves), "Dice by click"),
                "table": _score_table(entries),
                "difference_chart": tables.difference_chart(found),
                "difference_table": tables.difference_table(found) if found else None,
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    check_output(path, suffixes=(".html", ".htm"))
    page = render(
        "comparison.html", title=f"Comparison: {runs}", runs=runs, unlike=comparison.unlike, sections=sections
    )
    write_text(path, page)
    return path


def _tested(entries: Sequence[ComparedModel], runs: Sequence[str]) -> list[tuple[PromptStrategy, list[Compared]]]:
    """Paired differences between entries of different runs, the later run first: the same model where both runs have
    it, else all.
    """
    raw: list[tuple[str, str, str, PairedDifference]] = []
    strategies: list[PromptStrategy] = []
    for strategy, here in group_by(entries, lambda entry: entry.strategy).items():
        of_run = group_by(here, lambda entry: entry.run)
        for older, newer in combinations([run for run in runs if run in of_run], 2):
            shared = {e.model for e in of_run[newer]} & {e.model for e in of_run[older]}
            for x, y in product(of_run[newer], of_run[older]):
                if x.model == y.model or not shared:
                    found = compare_rows(x.rows, y.rows)
                    raw += [(x.name, y.name, *one) for one in found]
                    strategies += [strategy] * len(found)
    lines = group_by(zip(strategies, corrected(raw), strict=True), lambda line: line[0])
    return [(strategy, [line for _, line in found]) for strategy, found in lines.items()]


def _score_table(entries: Sequence[ComparedModel]) -> Table:
    """Dice by click, and the scores that depend on the number of clicks up to the last one that all entries have."""
    every = [set(clicks_of(entry.rows)) for entry in entries]
    shared = sorted(set.intersection(*every))
    until = f" to {tables.click_head(shared[-1])}" if shared and len(set(map(max, every))) > 1 else ""
    lines = []
    for entry in entries:
        alike = headline([row for row in entry.rows if row["click"] in shared]) if shared else {}
        others = {name: found for name, found in headline(entry.rows).items() if name not in _BY_CLICKS}
        lines.append(((entry.name,), others | {name: alike[name] for name in _BY_CLICKS if name in alike}))
    dice = tables.some_clicks([row for entry in entries for row in entry.rows], _SHOWN_CLICKS)
    columns = ["subjects", "measurements", *dice, *_BY_CLICKS, "first", "later"]
    table = tables.score_table(["run and model"], lines, columns)
    heads = {"area": f"area{until}", "NSD": f"NSD{until}", "HD95, mm": f"HD95{until}, mm"}
    return replace(table, head=[heads.get(head, head) for head in table.head])


def _held_out(run: SavedRun) -> str:
    """What was held out when the run's models were trained."""
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
