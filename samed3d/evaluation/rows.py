"""What a run of ``samed3d evaluate`` leaves behind: the columns of ``cases.csv``, the parts of ``results.json``, the
lines of
``prompts.jsonl``. The one place that a reader of results must know; whoever writes them is ``run.py``.

``cases.csv``: one row per model, protocol, case, structure, seed, policy, first prompt and click.

==================
======================================================================================================== column
meaning ==================
======================================================================================================== model
as given to ``--model``; ``NAME (random weights)`` for an architecture without trained weights protocol            a
name of ``protocols.PROTOCOLS`` group               ``unseen subject``, ``held-out source`` or ``trained on``, by the
first checkpoint's own split source              dataset
case                image, unique within its source
subject             person or animal; intervals are over subjects
modality            as the dataset states it
label, name         value in the label map, and what the dataset calls it
voxels, volume_ml   size of the structure
seed                repetition
policy              where clicks fall: ``uniform centre ritm noisy`` or the protocol's own rule
prompt              what came first: ``click``, ``box`` or ``scribble``
click               how many clicks were given; 0 is a box or scribble before any click
dice                on the whole native grid, or where the protocol scores (its page says where)
nsd                 surface Dice over surface voxels at the run's tolerance in mm
nsd_subvoxel        surface Dice over surface elements weighted by area, same tolerance
hd95_mm             the image diagonal where one mask is missing
volume_error        (predicted - true) / true volume, signed
obeyed              1 where the newest click's voxel has that click's sign, empty without a click
positive            1 for a click on the object, 0 for one off it, empty without a click
added_voxels        voxels that the newest prompt added to the mask minus those it took away
seconds             from giving the prompt to having the mask
encode_seconds      the part of ``seconds`` spent in the image encoder, empty where there is none
peak_mib            peak memory of the process (of the GPU where one is used) during the prompt
==================
========================================================================================================

An empty cell means "does not apply" or "not measured". A perfect mask gets no further click: its row repeats with
``seconds`` 0.

``results.json``: ``settings`` (what was asked; ``settings.hash`` names the configuration), ``environment``,
``command``, ``revision``,
``summary`` (one entry per model, protocol, policy, prompt, ``by`` + ``value`` and click: ``dice``, ``interval``,
``nsd``,
``nsd_subvoxel``, ``hd95_mm``, ``obeyed``, ``median_seconds``, ``subjects``, ``measurements``) and ``scores`` (one entry
per model, protocol, policy, prompt, ``group`` and ``score``: ``value``, ``interval``, ``subjects``, ``measurements``;
scores are ``area``, ``clicks to 0.9``, ``failures at 0.9``, ``monotone`` and a protocol's own such as ``DSC_AUC``). An
interval is null where there is one subject.

``prompts.jsonl``: one line per model, protocol, case, structure, seed, policy and first prompt, so that any mask can be
made again:
``model protocol source case label seed policy prompt image labels_file turns``; ``turns`` is a list of ``{"click": n,
"prompts": [...]}`` whose prompts are those of our JSON, in ijk of the image.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

KEY = tuple(
    "model protocol group source case subject modality label name voxels volume_ml seed policy prompt click".split()
)
MEASURED = tuple(
    "dice nsd nsd_subvoxel hd95_mm volume_error obeyed positive added_voxels seconds encode_seconds peak_mib".split(),
)
FIELDS = KEY + MEASURED
WHOLE_NUMBERS = frozenset("label voxels seed click obeyed positive added_voxels".split())
TEXT = frozenset("model protocol group source case subject modality name policy prompt".split())

CASES_CSV, RESULTS_JSON, PROMPTS_JSONL = "cases.csv", "results.json", "prompts.jsonl"


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write ``cases.csv`` whole or not at all; None becomes an empty cell."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_rows(path: Path) -> list[Row]:
    """Rows of a ``cases.csv`` with numbers as numbers and empty cells as None; columns that it does not have are left
    out.
    """
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a ``prompts.jsonl``."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def curve_key(row: Row) -> tuple[Any, ...]:
    """What a click curve belongs to: everything of ``KEY`` that does not change from click to click."""
    return tuple(row.get(key) for key in KEY if key != "click")


def curves(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows by curve, each sorted by click, in the order of their first row."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(curve_key(row), []).append(row)
    return [sorted(curve, key=lambda row: row["click"]) for curve in found.values()]


def _value(key: str, text: str) -> Any:
    if key in TEXT:
        return text
    if text == "":
        return None
    return int(float(text)) if key in WHOLE_NUMBERS else float(text)
