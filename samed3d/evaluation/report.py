"""``report.html``: the results of one run as a page, with tables, charts and pictures of cases (``pictures.py``).

The numbers come from ``cases.csv`` and ``results.json``, the words are in ``samed3d/templates/report.html``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from samed3d.data.exposure import NOT_UNSEEN, UNKNOWN
from samed3d.evaluation.cases import CaseSelection
from samed3d.evaluation.exports import downloads, write_exports
from samed3d.evaluation.pictures import case_pictures
from samed3d.evaluation.results import (
    PromptStrategy,
    Row,
    SavedRun,
    by_model,
    grouped,
    modality_class,
    read_run,
    score,
    size_class,
    size_order,
    untrained,
)
from samed3d.evaluation.statistics import differences, model_curves
from samed3d.evaluation.tables import (
    FEW_LINES,
    FEW_SMALL_LINES,
    curve_chart,
    curve_table,
    difference_chart,
    difference_table,
    latency_figure,
    own_scores,
    score_tables,
)
from samed3d.output import write_text
from samed3d.pages import SERIES_COLOURS, check_installed, count, interval_text, render

REPORT_HTML = "report.html"
PICTURE_SECONDS = 120.0
PACKAGES = ("jinja2", "matplotlib")


def write_report(folder: Path, *, picture_seconds: float = PICTURE_SECONDS) -> Path:
    """Write ``report.html`` into a results folder of ``samed3d evaluate``; returns the page's path.

    Args:
        folder: The results folder.
        picture_seconds: No picture of a case is begun after this time; 0 makes none.

    Raises:
        InputError: if the folder holds no results or cannot be written to, or a package of ``samed3d[evaluate]`` is
            missing.
    """
    check_installed("a report", *PACKAGES)
    run = read_run(folder)
    results, command, path = run.results, run.results.get("command", ""), folder / REPORT_HTML
    curves = model_curves(untrained(run.of(run.strategies[0])))
    page = render(
        "report.html",
        title="samed3d evaluation",
        models=run.models,
        strategies=[_strategy(run, strategy) for strategy in run.strategies],
        counts=_counts(run.rows),
        warnings=_warnings(run),
        in_short=[(model, min(c), c[min(c)], max(c), c[max(c)]) for model, c in curves.items()],
        pictures=case_pictures(run, picture_seconds) if picture_seconds > 0 else None,
        latency=latency_figure(run),
        command=" ".join(map(str, command)) if isinstance(command, list) else command,
        settings=flattened({"revision": results.get("revision") or None}) + flattened(run.settings),
        environment=flattened(results.get("environment", {})),
        count=count,
        downloads=downloads(write_exports(run)),
        estimate=lambda e: f"{e.mean:.2f} {interval_text(e.low, e.high, '.2f')}".strip(),
    )
    write_text(path, page)
    return path


def _strategy(run: SavedRun, strategy: PromptStrategy) -> dict[str, Any]:
    """What the page shows of one prompt strategy."""
    everything = run.of(strategy)
    rows, about = untrained(everything), run.results.get("protocols", {}).get(strategy.protocol, {})
    dice = model_curves(rows)
    charts = [curve_chart(dice, run.models, "All structures")]
    if any(not math.isnan(score(r, "nsd")) for r in rows):
        charts.append(curve_chart(model_curves(rows, "nsd"), run.models, "All structures", "NSD"))
    parts: tuple[tuple[str, Callable[[Row], str], Callable[[str], Any] | None], ...] = (
        ("By data set", lambda r: r["source"], None),
        ("By modality", modality_class, None),
        ("By size of the structure", size_class, size_order),
    )
    splits = []
    for title, name_of, order in parts:
        split = grouped(rows, name_of, order)
        curves = {name: model_curves(mine) for name, mine in split.items()}
        subjects = {name: len({(r["source"], r["subject"]) for r in mine}) for name, mine in split.items()}
        small = [curve_chart(c, run.models, f"{name} ({subjects[name]})", small=True) for name, c in curves.items()]
        splits.append((title, small, curve_table(curves)))
    compared = differences(rows, list(dice)) if len(dice) > 1 else []
    return {
        "name": str(strategy),
        "protocol": strategy.protocol,
        "title": about.get("title", ""),
        "bias": about.get("optimistic_bias") or about.get("flattering", ""),
        "tables": [*score_tables(everything), *own_scores(run, strategy)],
        "charts": charts,
        "curve_table": curve_table({"all": dice}),
        "legend": [(model, run.models.index(model) % len(SERIES_COLOURS)) for model in dice],
        "bands": (len(dice) <= FEW_LINES, len(dice) <= FEW_SMALL_LINES),
        "splits": splits,
        "difference_chart": difference_chart(compared),
        "difference_table": difference_table(compared) if compared else None,
    }


def _counts(rows: Sequence[Row]) -> str:
    def counted(noun: str, *keys: str) -> str:
        return count(len({tuple(row[key] for key in keys) for row in rows}), noun)

    structures, images = counted("structure", "source", "case", "label"), counted("image", "source", "case")
    subjects, sources = counted("subject", "source", "subject"), counted("data set", "source")
    return f"{structures} in {images} of {subjects} from {sources}; {counted('seed', 'seed')}"


def _warnings(run: SavedRun) -> list[str]:
    """What a reader must read before any number."""
    found = [str(warning) for warning in run.results.get("warnings", [])]
    trained = sum(r["group"] in NOT_UNSEEN for r in run.rows)
    if trained == len(run.rows):
        what = "The checkpoints were trained on every subject of this run"
        found.append(f"{what}: these numbers say how well they remember, not how accurate they are.")
    elif trained:
        found.append(
            f"{trained} of {len(run.rows)} rows are of subjects that the checkpoints were trained on. The tables of "
            "scores list them on lines of their own; everything else leaves them out."
        )
    if unknown := len({(r["source"], r["case"]) for r in run.rows if r["group"] == UNKNOWN}):
        found.append(f"Whether the models were trained on {count(unknown, 'case')} of this run is not known.")
    found += [
        f"{case} is {name}, on which a checkpoint was trained."
        for case, name in run.results.get("trained_as", {}).items()
    ]
    found += [
        f"{line[0].upper()}{line[1:]}." for line in CaseSelection([], run.results.get("left_out", {})).described()
    ]
    for strategy in run.strategies:
        counts = {model: len(rows) for model, rows in by_model(run.of(strategy)).items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{model} {n}" for model, n in counts.items())
            found.append(
                f"{strategy}: the models were not measured on the same number of structures and clicks; only the "
                f"paired differences compare like with like. Rows: {listed}."
            )
    return found


def flattened(entry: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines ``outer inner``: value; what was not set is left out."""
    if isinstance(entry, dict):
        lines = (flattened(value, f"{prefix} {key}".strip().replace("_", " ")) for key, value in entry.items())
        return [line for found in lines for line in found]
    if entry is None or entry == []:
        return []
    return [(prefix, ", ".join(map(str, entry)) if isinstance(entry, list | tuple) else str(entry))]
