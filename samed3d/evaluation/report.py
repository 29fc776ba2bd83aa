"""The results of one run for readers and other programs: ``report.html``, tables and figures, text for a terminal.

The numbers come from ``cases.csv`` and ``results.json``, the words of the page from ``samed3d/templates/report.html``.
Beside it lie ``scores.csv``, ``per_label.csv``, ``scores.tex``, ``figures/*.svg`` and nnU-Net's ``summary.json``.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from samed3d.data.exposure import NOT_UNSEEN, UNKNOWN
from samed3d.evaluation import tables
from samed3d.evaluation.cases import CaseSelection
from samed3d.evaluation.pictures import case_pictures
from samed3d.evaluation.results import (
    PromptStrategy,
    Row,
    SavedRun,
    by_model,
    clicks_of,
    csv_text,
    group_by,
    grouped,
    modality_class,
    read_run,
    rounded,
    score,
    size_class,
    size_order,
    untrained,
)
from samed3d.evaluation.statistics import differences, model_curves
from samed3d.output import write_text
from samed3d.pages import SERIES_COLOURS, Table, check_installed, count, interval_text, render, svg_of

REPORT_HTML = "report.html"
SCORES_CSV, PER_LABEL_CSV, SCORES_TEX, SUMMARY_JSON = "scores.csv", "per_label.csv", "scores.tex", "summary.json"
_SHOWN_LABELS = 40
_ESCAPED = {"\\": r"\textbackslash{}", **{mark: f"\\{mark}" for mark in "&%$#_{}"}, "~": r"\textasciitilde{}"}
PICTURE_SECONDS = 120.0
PACKAGES = ("jinja2", "matplotlib")


def write_report(folder: Path, *, picture_seconds: float = PICTURE_SECONDS) -> Path:
    """Write ``report.html`` into a results folder of ``samed3d evaluate``; returns the page's path.

    No picture of a case is begun after ``picture_seconds``; 0 makes none.

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
        latency=tables.latency_figure(run),
        command=" ".join(map(str, command)) if isinstance(command, list) else command,
        settings=flattened({"revision": results.get("revision") or None}) + flattened(run.settings),
        environment=flattened(results.get("environment", {})),
        count=count,
        downloads=_downloads(_write_exports(run)),
        estimate=lambda e: f"{e.mean:.2f} {interval_text(e.low, e.high, '.2f')}".strip(),
    )
    write_text(path, page)
    return path


def _strategy(run: SavedRun, strategy: PromptStrategy) -> dict[str, Any]:
    """What the page shows of one prompt strategy."""
    everything = run.of(strategy)
    rows, about = untrained(everything), run.results.get("protocols", {}).get(strategy.protocol, {})
    dice = model_curves(rows)
    charts = [tables.curve_chart(dice, run.models, "All structures")]
    if any(not math.isnan(score(r, "nsd")) for r in rows):
        charts.append(tables.curve_chart(model_curves(rows, "nsd"), run.models, "All structures", "NSD"))
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
        small = [
            tables.curve_chart(c, run.models, f"{name} ({subjects[name]})", small=True) for name, c in curves.items()
        ]
        splits.append((title, small, tables.curve_table(curves)))
    compared = differences(rows, list(dice)) if len(dice) > 1 else []
    return {
        "name": str(strategy),
        "protocol": strategy.protocol,
        "title": about.get("title", ""),
        "bias": about.get("optimistic_bias") or about.get("flattering", ""),
        "tables": [*tables.score_tables(everything), *tables.own_scores(run, strategy)],
        "charts": charts,
        "curve_table": tables.curve_table({"all": dice}),
        "legend": [(model, run.models.index(model) % len(SERIES_COLOURS)) for model in dice],
        "bands": (len(dice) <= tables.FEW_LINES, len(dice) <= tables.FEW_SMALL_LINES),
        "splits": splits,
        "difference_chart": tables.difference_chart(compared),
        "difference_table": tables.difference_table(compared) if compared else None,
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


def _write_exports(run: SavedRun) -> dict[str, str]:
    """Write all files into the run's folder; returns their names and texts."""
    found = {
        SCORES_CSV: csv_text(_scores(run)),
        PER_LABEL_CSV: csv_text(_per_label(run)),
        SCORES_TEX: "\n".join(_latex(tables.score_tables(run.of(one))[0], str(one)) for one in run.strategies),
    }
    for strategy in run.strategies:
        curves = model_curves(untrained(run.of(strategy)))
        drawn = tables.curve_chart(curves, run.models, str(strategy), finish=lambda figure, _title: svg_of(figure))
        if drawn:
            found[f"figures/dice_{re.sub(r'[^a-z0-9-]+', '_', str(strategy).lower())}.svg"] = str(drawn)
    parts = [(model, strategy) for strategy in run.strategies for model in by_model(run.of(strategy))]
    for number, (model, strategy) in enumerate(parts, start=1):
        name = SUMMARY_JSON if number == 1 else f"summary_{number}.json"
        mine = [row for row in run.of(strategy) if row["model"] == model]
        found[name] = json.dumps(_nnunet_summary(mine, model, strategy), indent=1) + "\n"
    (run.folder / "figures").mkdir(exist_ok=True)
    for name, text in found.items():
        write_text(run.folder / name, text)
    return found


def _nnunet_summary(rows: Sequence[Row], model: str, strategy: PromptStrategy) -> dict[str, Any]:
    """Dice, IoU and the reference's voxels per class, on average and per case, after the last click.

    nnU-Net's counts of true and false voxels are not in a run's results and are left out.
    """
    last = clicks_of(rows)[-1]
    final = [row for row in rows if row["click"] == last and not math.isnan(score(row, "dice"))]

    def metrics(mine: Sequence[Row]) -> dict[str, float]:
        dices = [row["dice"] for row in mine]
        voxels = [row["voxels"] for row in mine if row.get("voxels") is not None]
        found = {"Dice": _mean(dices), "IoU": _mean([d / (2 - d) for d in dices])}
        return found | ({"n_ref": _mean(voxels)} if voxels else {})

    by_class = group_by(sorted(final, key=lambda row: row["label"]), lambda row: str(row["label"]))
    means = {label: metrics(mine) for label, mine in by_class.items()}
    cases = group_by(final, lambda row: (row["source"], row["case"]))
    keys = ("Dice", "IoU", "n_ref")
    return {
        "model": model,
        "prompts": str(strategy),
        "clicks": last,
        "foreground_mean": {key: _mean([m[key] for m in means.values() if key in m]) for key in keys},
        "mean": means,
        "metric_per_case": [
            {
                "reference_file": f"{source}/{case}",
                "metrics": {k: metrics(m) for k, m in group_by(mine, lambda row: str(row["label"])).items()},
            }
            for (source, case), mine in cases.items()
        ],
    }


def _latex(table: Table, caption: str) -> str:
    """A table in LaTeX, intervals in small print."""

    def cell(content: Any) -> str:
        text, small = (content, "") if isinstance(content, str) else content
        escaped = ["".join(_ESCAPED.get(mark, mark) for mark in part) for part in (text, small)]
        return escaped[0] + (rf" {{\scriptsize {escaped[1]}}}" if escaped[1] else "")

    lines = [" & ".join(map(cell, row)) + r" \\" for row in (table.head, *table.rows)]
    columns = "l" * table.left + "r" * (len(table.head) - table.left)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([f"% {caption}", *body, r"\end{tabular}", ""])


def summary_text(run: SavedRun) -> str:
    """Scores of a run as tables for a terminal: by model, and by label where there are several."""
    parts = []
    for strategy in run.strategies:
        everything = run.of(strategy)
        parts += [f"Dice, {strategy}", tables.score_tables(everything)[0].as_text(intervals=True)]
        if table := tables.label_table(untrained(everything)):
            parts.append(replace(table, rows=table.rows[:_SHOWN_LABELS]).as_text(intervals=True))
            if (more := len(table.rows) - _SHOWN_LABELS) > 0:
                parts.append(f"and {count(more, 'label')} more in per_label.csv")
    parts += CaseSelection([], run.results.get("left_out", {})).described()
    return "\n\n".join(parts)


def _downloads(files: dict[str, str]) -> dict[str, str]:
    """Names and texts of ``_write_exports`` as addresses that a page can hold."""
    kinds = {".csv": "text/csv", ".svg": "image/svg+xml", ".json": "application/json", ".tex": "text/plain"}
    return {
        name: f"data:{kinds[Path(name).suffix]};base64,{base64.b64encode(text.encode()).decode()}"
        for name, text in files.items()
    }


def _scores(run: SavedRun) -> list[dict[str, Any]]:
    """The means and scores of ``results.json`` as rows of one kind."""
    means = [
        line | {"group": line["value"], "score": f"dice after {line['click']}", "value": line["dice"]}
        for line in run.results.get("summary", [])
        if line.get("by") == "group"
    ]
    found = []
    for line in means + run.results.get("scores", []):
        row = {key: line[key] for key in ("model", "protocol", "policy", "prompt", "group", "score", "value")}
        low, high = line.get("interval") or (None, None)
        counts = {key: line.get(key) for key in ("subjects", "measurements")}
        found.append(row | {"low": low, "high": high} | counts)
    return found


def _per_label(run: SavedRun) -> list[dict[str, Any]]:
    found = []
    for strategy in run.strategies:
        for (model, source, label, name), curve in tables.label_curves(untrained(run.of(strategy))).items():
            about = {"model": model, **asdict(strategy), "source": source, "label": label, "name": name}
            for click, scores in curve.items():
                dice = scores["dice"]
                values = {"dice": dice.mean, "low": dice.low, "high": dice.high}
                values |= {column: scores[column].mean for column in ("nsd", "hd95_mm")}
                row = about | {"click": click} | {key: rounded(value, 5) for key, value in values.items()}
                found.append(row | {"subjects": dice.subjects, "measurements": dice.measurements})
    return found


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 5) if values else math.nan
