"""A run's results as files for other programs: CSV and LaTeX tables, SVG figures, nnU-Net's ``summary.json``.

=================  =====================================================================================================
file               content
=================  =====================================================================================================
scores.csv         one row per model, prompt strategy, side of the training and score, with its interval over subjects
per_label.csv      one row per model, prompt strategy, source, label and click: Dice with its interval, NSD, HD95
scores.tex         Dice after each click as a LaTeX table (package booktabs)
figures/*.svg      the click curves of Dice, one per prompt strategy
summary.json       Dice and IoU per class and case after the last click, laid out as nnU-Net's; of further models and
                   prompt strategies in ``summary_2.json``, ...
=================  =====================================================================================================
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from samed3d.evaluation.cases import CaseSelection
from samed3d.evaluation.results import PromptStrategy, Row, SavedRun, by_model, clicks_of, group_by, score, untrained
from samed3d.evaluation.statistics import Estimate, estimate, model_curves
from samed3d.evaluation.tables import click_head, curve_chart, estimate_cell, score_tables, some_clicks
from samed3d.output import write_text
from samed3d.pages import Cell, Table, count, svg_of

SCORES_CSV, PER_LABEL_CSV, SCORES_TEX, SUMMARY_JSON = "scores.csv", "per_label.csv", "scores.tex", "summary.json"
_SHOWN_LABELS = 40
_ESCAPED = {"\\": r"\textbackslash{}", **{mark: f"\\{mark}" for mark in "&%$#_{}"}, "~": r"\textasciitilde{}"}


def write_exports(run: SavedRun) -> dict[str, str]:
    """Write all files into the run's folder; returns their names and texts."""
    found = {
        SCORES_CSV: _csv(list(_scores(run))),
        PER_LABEL_CSV: _csv(list(_per_label(run))),
        SCORES_TEX: "\n".join(latex(score_tables(run.of(one))[0], str(one)) for one in run.strategies),
    }
    for strategy in run.strategies:
        curves = model_curves(untrained(run.of(strategy)))
        drawn = curve_chart(curves, run.models, str(strategy), finish=lambda figure, _title: svg_of(figure))
        if drawn:
            found[f"figures/dice_{re.sub(r'[^a-z0-9-]+', '_', str(strategy).lower())}.svg"] = str(drawn)
    parts = [(model, strategy) for strategy in run.strategies for model in by_model(run.of(strategy))]
    for number, (model, strategy) in enumerate(parts, start=1):
        name = SUMMARY_JSON if number == 1 else f"summary_{number}.json"
        mine = [row for row in run.of(strategy) if row["model"] == model]
        found[name] = json.dumps(nnunet_summary(mine, model, strategy), indent=1) + "\n"
    (run.folder / "figures").mkdir(exist_ok=True)
    for name, text in found.items():
        write_text(run.folder / name, text)
    return found


def nnunet_summary(rows: Sequence[Row], model: str, strategy: PromptStrategy) -> dict[str, Any]:
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


def latex(table: Table, caption: str) -> str:
    """A table in LaTeX, intervals in small print."""

    def cell(content: Any) -> str:
        text, small = (content, "") if isinstance(content, str) else content
        escaped = ["".join(_ESCAPED.get(mark, mark) for mark in part) for part in (text, small)]
        return escaped[0] + (rf" {{\scriptsize {escaped[1]}}}" if escaped[1] else "")

    lines = [" & ".join(map(cell, row)) + r" \\" for row in (table.head, *table.rows)]
    columns = "l" * table.left + "r" * (len(table.head) - table.left)
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([f"% {caption}", *body, r"\end{tabular}", ""])


def label_estimates(rows: Sequence[Row]) -> dict[tuple[str, str, int, str, int], dict[str, Estimate]]:
    """(model, source, label, its name, click) to the estimates of ``dice``, ``nsd`` and ``hd95_mm``."""
    keys = ("model", "source", "label", "name", "click")
    groups = group_by(rows, lambda row: tuple(row[key] for key in keys))
    return {
        (model, source, label, name, click): {c: estimate(groups[key], c) for c in ("dice", "nsd", "hd95_mm")}
        for key in sorted(groups, key=lambda key: (*map(str, key[:2]), *key[2:]))
        for model, source, label, name, click in [key]
    }


def label_table(rows: Sequence[Row]) -> Table | None:
    """Dice by label after the first and the last click; None where there is one label only."""
    found = label_estimates(rows)
    clicks = some_clicks(rows, 2)
    lines: dict[tuple[str, ...], list[Cell]] = {}
    for (model, source, label, name, click), columns in found.items():
        if click in clicks:
            cells = lines.setdefault((source, name or f"label {label}", model), [str(columns["dice"].subjects)])
            cells.append(estimate_cell(columns["dice"], 3))
    head = ["data set", "label", "model", "subjects", *map(click_head, clicks)]
    table = Table(head, [[*who, *cells] for who, cells in lines.items()], left=3)
    return table if len({who[:2] for who in lines}) > 1 else None


def summary_text(run: SavedRun) -> str:
    """Scores of a run as tables for a terminal: by model, and by label where there are several."""
    parts = []
    for strategy in run.strategies:
        everything = run.of(strategy)
        parts += [f"Dice, {strategy}", score_tables(everything)[0].as_text(intervals=True)]
        if table := label_table(untrained(everything)):
            short = Table(table.head, table.rows[:_SHOWN_LABELS], left=table.left)
            parts.append(short.as_text(intervals=True))
            if (more := len(table.rows) - _SHOWN_LABELS) > 0:
                parts.append(f"and {count(more, 'label')} more in per_label.csv")
    parts += CaseSelection([], run.results.get("left_out", {})).described()
    return "\n\n".join(parts)


def downloads(files: dict[str, str]) -> dict[str, str]:
    """Names and texts of ``write_exports`` as addresses that a page can hold."""
    kinds = {".csv": "text/csv", ".svg": "image/svg+xml", ".json": "application/json", ".tex": "text/plain"}
    return {
        name: f"data:{kinds[Path(name).suffix]};base64,{base64.b64encode(text.encode()).decode()}"
        for name, text in files.items()
    }


def _scores(run: SavedRun) -> Sequence[dict[str, Any]]:
    keys = ("model", "protocol", "policy", "prompt")
    curves = [
        {key: line[key] for key in keys}
        | {"group": line["value"], "score": f"dice after {line['click']}"}
        | {"value": line["dice"], **_ends(line)}
        for line in run.results.get("summary", [])
        if line.get("by") == "group"
    ]
    others = [
        {key: line[key] for key in (*keys, "group", "score", "value")} | _ends(line)
        for line in run.results.get("scores", [])
    ]
    return curves + others


def _ends(line: dict[str, Any]) -> dict[str, Any]:
    low, high = line.get("interval") or (None, None)
    return {"low": low, "high": high, "subjects": line.get("subjects"), "measurements": line.get("measurements")}


def _per_label(run: SavedRun) -> list[dict[str, Any]]:
    found = []
    for strategy in run.strategies:
        about = {"protocol": strategy.protocol, "policy": strategy.policy, "prompt": strategy.prompt}
        for (model, source, label, name, click), columns in label_estimates(untrained(run.of(strategy))).items():
            dice = columns["dice"]
            row = {"model": model, **about, "source": source, "label": label, "name": name, "click": click}
            row |= {"dice": _cell(dice.mean), "low": _cell(dice.low), "high": _cell(dice.high)}
            row |= {column: _cell(columns[column].mean) for column in ("nsd", "hd95_mm")}
            found.append(row | {"subjects": dice.subjects, "measurements": dice.measurements})
    return found


def _cell(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 5)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 5) if values else math.nan


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
