"""A saved run as a reader sees it: the folder's rows, what was asked, and the ways in which it was clicked.

Columns that an older or foreign ``cases.csv`` lacks are filled with what they mean when nobody says otherwise, so that
a reader need not ask. Read ``rows.py`` for what the columns are, ``report.py`` and ``compare.py`` for what is made of
them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from samed3d.errors import InputError
from samed3d.evaluation.rows import CASES_CSV, PROMPTS_JSONL, RESULTS_JSON, Row, curves, read_lines, read_rows

DEFAULTS: dict[str, Any] = {
    "model": "model",
    "protocol": "samed3d",
    "group": "all",
    "source": "data",
    "modality": "not stated",
    "label": 1,
    "name": "",
    "seed": 0,
    "policy": "",
    "prompt": "click",
}
_SIZES_ML = (0.1, 1.0, 10.0, 100.0)
_SIZES_VOXELS = (1e3, 1e4, 1e5, 1e6)


@dataclass(frozen=True)
class Way:
    """One way of being clicked; scores of two ways are not comparable.

    Attributes:
        protocol: As in ``cases.csv``.
        policy: Where clicks fall; ``own`` is the protocol's only rule.
        prompt: What came first.
    """

    protocol: str
    policy: str
    prompt: str

    def __str__(self) -> str:
        first = {"click": "", "": ""}.get(self.prompt, f"a {self.prompt} first")
        policy = "" if self.policy in ("", "own") else f"{self.policy} clicks"
        return ", ".join(part for part in (self.protocol, policy, first) if part)


@dataclass(frozen=True)
class SavedRun:
    """One results folder.

    Attributes:
        folder: Where it lies.
        results: ``results.json``, empty where there is none.
        rows: ``cases.csv``, every key column filled.
    """

    folder: Path
    results: dict[str, Any]
    rows: list[Row]

    @cached_property
    def _by_way(self) -> dict[Way, list[Row]]:
        found: dict[Way, list[Row]] = {}
        for row in self.rows:
            found.setdefault(way_of(row), []).append(row)
        return found

    @property
    def ways(self) -> list[Way]:
        """The ways in which this run was clicked, in the order of the rows."""
        return list(self._by_way)

    @cached_property
    def models(self) -> list[str]:
        """The models, in the order of the rows."""
        return list(dict.fromkeys(row["model"] for row in self.rows))

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked."""
        return dict(self.results.get("settings", {}))

    def of(self, way: Way) -> list[Row]:
        """The rows of one way."""
        return self._by_way.get(way, [])

    def turns(self) -> list[dict[str, Any]]:
        """The lines of ``prompts.jsonl``; none where it was not written."""
        path = self.folder / PROMPTS_JSONL
        return read_lines(path) if path.is_file() else []


def read_run(folder: Path) -> SavedRun:
    """Read a results folder.

    Raises:
        InputError: if it holds no ``cases.csv``, one without rows or scores, or a ``results.json`` that is not JSON.
    """
    path = folder / CASES_CSV
    if not path.is_file():
        raise InputError(
            f"a results folder must hold {CASES_CSV}, which samed3d evaluate writes when it is done, got {folder}"
        )
    try:
        rows = read_rows(path)
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is not a table of results: {error}") from error
    if not rows or not {"case", "click", "dice"} <= set(rows[0]):
        raise InputError(f"{path} must have rows with the columns case, click and dice, got {len(rows)} rows")
    for row in rows:
        for key, value in DEFAULTS.items():
            row.setdefault(key, value)
        row.setdefault("subject", row["case"])
        row["modality"] = row["modality"] or DEFAULTS["modality"]
    about = folder / RESULTS_JSON
    try:
        results = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    except ValueError as error:
        raise InputError(f"{about} is not JSON: {error}") from error
    return SavedRun(folder, results, rows)


def way_of(row: Row) -> Way:
    """How a row was clicked."""
    return Way(row["protocol"], row["policy"], row["prompt"])


def subject_key(row: Row) -> Hashable:
    """Who was measured; two datasets may use one name for different people."""
    return (row["source"], row["subject"])


def structure_key(row: Row) -> Hashable:
    """What was clicked and with which seed, whoever answered: the same for every model of a run, and for other runs on
    the same data.
    """
    return (row["protocol"], row["policy"], row["prompt"], row["source"], row["case"], row["label"], row["seed"])


def score(row: Row, metric: str) -> float:
    """A row's number, nan where the cell is empty or the column is not there."""
    value = row.get(metric)
    return math.nan if value is None else float(value)


def clicks_of(rows: Sequence[Row]) -> list[int]:
    """All click numbers, ascending."""
    return sorted({int(row["click"]) for row in rows})


def curves_of(rows: Sequence[Row], metric: str) -> list[tuple[Row, list[int], list[float]]]:
    """Each curve's first row, clicks and scores."""
    return [(c[0], [int(r["click"]) for r in c], [score(r, metric) for r in c]) for c in curves(rows)]


def modality_class(row: Row) -> str:
    """A dataset's own words for the modality, shortened to what is the same for several: ``"CT (portal venous phase)"``
    is CT.
    """
    text = re.split(r"[(,;:/]", str(row["modality"]))[0].strip()
    return text or DEFAULTS["modality"]


def size_class(row: Row) -> str:
    """How large a structure is, in powers of ten of ml, or of voxels where no volume is known."""
    for column, limits, unit in (("volume_ml", _SIZES_ML, "ml"), ("voxels", _SIZES_VOXELS, "voxels")):
        value = row.get(column)
        if value is not None:
            above = [limit for limit in limits if value >= limit]
            below = [limit for limit in limits if value < limit]
            low, high = _plain(above[-1]) if above else "", _plain(below[0]) if below else ""
            return (
                f"under {high} {unit}" if not low else f"{low} to {high} {unit}" if high else f"{low} {unit} and more"
            )
    return "size not stated"


def size_order(name: str) -> tuple[bool, float]:
    """Sorts the names of ``size_class`` from small to large."""
    numbers = re.findall(r"[\d.]+", name.replace(",", ""))
    return (not numbers, -1.0 if name.startswith("under") else float(numbers[0]) if numbers else 0.0)


def _plain(limit: float) -> str:
    """1000000 as 1,000,000 and 0.1 as 0.1."""
    return f"{limit:,.0f}" if limit >= 1 else f"{limit:g}"
