"""Result rows and saved runs: ``cases.csv``, ``results.json`` and ``prompts.jsonl``.

``docs/measure.md`` states what every column and key means.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from bisect import bisect
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from samed3d.data.exposure import NOT_UNSEEN
from samed3d.errors import InputError
from samed3d.output import write_text

Row = dict[str, Any]

KEY = tuple(
    "model protocol group source case subject modality label name voxels volume_ml seed policy prompt click".split()
)
MEASURED = tuple(
    "dice nsd nsd_subvoxel hd95_mm volume_error obeyed positive added_voxels seconds encode_seconds peak_mib".split(),
)
FIELDS = KEY + MEASURED
CURVE_KEY = tuple(key for key in KEY if key != "click")
"""The columns that are the same at every click of a click curve."""
PROMPT_KEY = tuple("model protocol policy prompt source case label seed".split())
"""The columns that rows share with their line of ``prompts.jsonl``."""
WHOLE_NUMBERS = frozenset("label voxels seed click obeyed positive added_voxels".split())
TEXT = frozenset("model protocol group source case subject modality name policy prompt".split())
MISSING_COLUMNS: dict[str, Any] = {
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
"""Values of the columns that an older or foreign ``cases.csv`` lacks."""
CASES_CSV, RESULTS_JSON, PROMPTS_JSONL = "cases.csv", "results.json", "prompts.jsonl"

_SIZES = (("volume_ml", (0.1, 1.0, 10.0, 100.0), "ml"), ("voxels", (1e3, 1e4, 1e5, 1e6), "voxels"))
_Item = TypeVar("_Item")
_Name = TypeVar("_Name", bound=Hashable)


@dataclass(frozen=True)
class PromptStrategy:
    """How simulated prompts are chosen, as in the columns; scores under two strategies are not comparable."""

    protocol: str
    policy: str = "own"
    prompt: str = "click"

    def __str__(self) -> str:
        policy = "" if self.policy in ("", "own", "none") else f"{self.policy} clicks"
        first = "" if self.prompt in ("", "click", "none") else f"a {self.prompt} first"
        return ", ".join(part for part in (self.protocol, policy, first) if part)


@dataclass(frozen=True)
class SavedRun:
    """One results folder: ``results.json``, empty where there is none, and ``cases.csv``, every key column filled."""

    folder: Path
    results: dict[str, Any]
    rows: list[Row]

    @cached_property
    def _by_strategy(self) -> dict[PromptStrategy, list[Row]]:
        return group_by(self.rows, strategy_of)

    @property
    def strategies(self) -> list[PromptStrategy]:
        """The prompt strategies of this run, in the order of the rows."""
        return list(self._by_strategy)

    @cached_property
    def models(self) -> list[str]:
        """The models, in the order of the rows."""
        return list(dict.fromkeys(row["model"] for row in self.rows))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run."""
        return dict(self.results.get("settings", {}))

    def of(self, strategy: PromptStrategy) -> list[Row]:
        """The rows of one prompt strategy."""
        return self._by_strategy.get(strategy, [])

    def prompt_lines(self) -> list[dict[str, Any]]:
        """The lines of ``prompts.jsonl``; none where it was not written."""
        path = self.folder / PROMPTS_JSONL
        return read_lines(path) if path.is_file() else []


def csv_text(rows: Sequence[Row], fields: Sequence[str] = (), end: str = "\n") -> str:
    """A table as CSV, by default with the columns of its first row; None becomes an empty cell."""
    text = io.StringIO()
    if fields or rows:
        writer = csv.DictWriter(text, fields or list(rows[0]), lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write ``cases.csv``."""
    write_text(path, csv_text(rows, FIELDS, "\r\n"))


def read_rows(path: Path) -> list[Row]:
    """Rows of a ``cases.csv``: numbers as numbers, empty cells as None, no key for a column that the file lacks."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(key: str, text: str) -> Any:
    if key in TEXT:
        return text
    if text == "":
        return None
    return int(float(text)) if key in WHOLE_NUMBERS else float(text)


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a ``prompts.jsonl``."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


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
        for key, value in MISSING_COLUMNS.items():
            row.setdefault(key, value)
        row.setdefault("subject", row["case"])
        row["modality"] = row["modality"] or MISSING_COLUMNS["modality"]
    about = folder / RESULTS_JSON
    try:
        results = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    except ValueError as error:
        raise InputError(f"{about} is not JSON: {error}") from error
    return SavedRun(folder, results, rows)


def group_by(items: Iterable[_Item], key: Callable[[_Item], _Name]) -> dict[_Name, list[_Item]]:
    """Items by a key, in the order of their first one."""
    found: dict[_Name, list[_Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def grouped(
    rows: Iterable[Row], name_of: Callable[[Row], str], order: Callable[[str], Any] | None = None
) -> dict[str, list[Row]]:
    """Rows by a name, the names in order."""
    found = group_by(rows, name_of)
    return {name: found[name] for name in sorted(found, key=order or str.lower)}


def by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by model, in the order of the rows."""
    return group_by(rows, lambda row: str(row["model"]))


def curves(rows: Iterable[Row]) -> list[list[Row]]:
    """The click curves: rows that differ in the click alone, sorted by click, in the order of their first row."""
    grouped = group_by(rows, lambda row: tuple(row.get(key) for key in CURVE_KEY))
    return [sorted(curve, key=lambda row: row["click"]) for curve in grouped.values()]


def untrained(rows: Sequence[Row]) -> list[Row]:
    """Rows of subjects that the model was not trained on; all rows where there are only others."""
    return [row for row in rows if row["group"] not in NOT_UNSEEN] or list(rows)


def strategy_of(row: Row) -> PromptStrategy:
    """The prompt strategy of a row."""
    return PromptStrategy(row["protocol"], row["policy"], row["prompt"])


def subject_key(row: Row) -> Hashable:
    """A subject's identity: two data sets may use one name for different people."""
    return (row["source"], row["subject"])


def structure_key(row: Row) -> Hashable:
    """Structure, seed and prompt strategy of a row: the same for every model, and in other runs on the same data."""
    return tuple(row[key] for key in PROMPT_KEY if key != "model")


def prompt_key(entry: dict[str, Any]) -> tuple[Any, ...]:
    """The key by which a row finds its line of ``prompts.jsonl``."""
    return tuple(entry.get(key) for key in PROMPT_KEY)


def score(row: Row, metric: str) -> float:
    """A row's number, nan where the cell is empty or the column is missing."""
    value = row.get(metric)
    return math.nan if value is None else float(value)


def rounded(value: float | None, digits: int) -> float | None:
    """A number for a file; None, an empty cell, where there is none."""
    return None if value is None or not math.isfinite(value) else round(value, digits)


def clicks_of(rows: Iterable[Row]) -> list[int]:
    """All click numbers, ascending."""
    return sorted({int(row["click"]) for row in rows})


def modality_class(row: Row) -> str:
    """A data set's modality without its details: ``"CT (portal venous phase)"`` is CT."""
    return re.split(r"[(,;:/]", str(row["modality"]))[0].strip() or MISSING_COLUMNS["modality"]


def size_class(row: Row) -> str:
    """The size of a structure as a range in powers of ten of ml, or of voxels where its volume is unknown."""
    for column, limits, unit in _SIZES:
        if (value := row.get(column)) is not None:
            names = [f"{limit:,.0f}" if limit >= 1 else f"{limit:g}" for limit in limits]
            ranges = [f"under {names[0]}", *(f"{low} to {high}" for low, high in pairwise(names)), names[-1]]
            above = bisect(limits, value)
            return f"{ranges[above]} {unit}{' and more' if above == len(limits) else ''}"
    return "size not stated"


def size_order(name: str) -> tuple[bool, float]:
    """Sorts the names of ``size_class`` from small to large."""
    numbers = re.findall(r"[\d.]+", name.replace(",", ""))
    return (not numbers, -1.0 if name.startswith("under") else float(numbers[0]) if numbers else 0.0)
