"""Segment the images of a list one after the other; the whole list is checked first, and a stopped run is resumed.

The list is a CSV with the columns ``COLUMNS``, separated by commas, semicolons or tabs: ``prompts`` is a prompt file;
``point``, ``negative_point`` and ``box`` may hold several positions separated by semicolons. Paths are relative to the
list.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samed3d.errors import InputError, check_keys
from samed3d.inference.session import Session
from samed3d.inference.session_store import weights_hash
from samed3d.models.base import PromptableModel
from samed3d.output import check_input, check_output, check_results_folder, write_json
from samed3d.prompts import ObjectPrompts, load_prompts, parse_prompts, prompt_to_json
from samed3d.volume import SUFFIXES
from samed3d.volume.writing import MASK_FORMATS

logger = logging.getLogger(__name__)

COLUMNS = ("image", "prompts", "point", "negative_point", "box", "output", "channel", "series", "modality", "untilt")
DONE = "done.jsonl"
REPORT = "report.json"


@dataclass(frozen=True)
class Job:
    """One line of the list: its number, what is read, what is written, and how ``Session.open`` reads the image."""

    line: int
    image: Path
    objects: tuple[ObjectPrompts, ...]
    output: Path
    options: dict[str, Any]


def read_jobs(path: Path, folder: Path, format: str | None = None, space: str = "ijk") -> list[Job]:
    """The jobs of a CSV list; outputs go to ``folder``, positions in the columns are in ``space``.

    ``format`` is one of ``volume.writing.MASK_FORMATS``; None writes ``.nii.gz`` unless an ``output`` is named.

    Raises:
        InputError: if the list or a line of it cannot be used, or two lines write the same file; the message names the
            line.
    """
    (_, header), *rows = _read_rows(path)
    jobs: list[Job] = []
    lines: dict[Path, int] = {}
    for line, row in rows:
        try:
            if len(row) > len(header):
                found = f"a line must have at most {len(header)} fields, got {len(row)}"
                raise InputError(f"{found}; put quotes around commas and semicolons that separate no fields")
            cells = dict.fromkeys(COLUMNS, "") | dict(zip(header, row, strict=False))
            job = _job(cells, line, path.parent, folder, format, space)
            other = lines.setdefault(job.output.resolve(), line)
            if other != line:
                raise InputError(f"output must differ from line {other}'s, got {job.output} again; name an output")
        except InputError as error:
            raise InputError(f"{path}, line {line}: {error}") from error
        jobs.append(job)
    images = {job.image.resolve() for job in jobs}
    for job in jobs:
        if job.output.resolve() in images:
            raise InputError(f"{path}, line {job.line}: output must not be an image of the list, got {job.output}")
    return jobs


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """The header and the lines of a list, each with its number; empty lines and empty fields at an end are left out."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            text = file.read()
        separator = max(",;\t", key=text.lstrip().partition("\n")[0].count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"batch list cannot be read: {path} ({error})") from error
    for _, row in rows:
        while row and not row[-1]:
            row.pop()
    rows = [(line, row) for line, row in rows if row]
    if len(rows) < 2:
        raise InputError(f"batch list must have a header and a line per image, got none: {path}")
    header = rows[0][1]
    check_keys(header, COLUMNS, f"batch list {path}", "column")
    if twice := [name for name in header if header.count(name) > 1]:
        raise InputError(f"batch list {path}: column {twice[0]!r} is there twice")
    if "image" not in header:
        raise InputError(f"batch list must have a column 'image', got {', '.join(header)}: {path}")
    return rows


def _job(cells: dict[str, str], line: int, beside: Path, folder: Path, format: str | None, space: str) -> Job:
    image = beside / cells["image"]
    if not cells["image"]:
        raise InputError("image does not exist: (empty)")
    check_input(image, "image")
    name = image.resolve().name
    stem = next((name[: -len(s)] for s in SUFFIXES if name.lower().endswith(s)), name)
    output = folder / (cells["output"] or stem + (MASK_FORMATS[format][0] if format else SUFFIXES[0]))
    suffixes = MASK_FORMATS[format] if format else {suffix for ends in MASK_FORMATS.values() for suffix in ends}
    check_output(output, suffixes=sorted(suffixes), makes_folder=True)
    if ".." in Path(cells["output"]).parts or Path(cells["output"]).is_absolute():
        raise InputError(f"output must be a name inside the output folder, got {cells['output']!r}")
    if cells["channel"] and not cells["channel"].isdigit():
        raise InputError(f"channel must be a whole number, got {cells['channel']!r}")
    texts = {key: [text for text in cells[key].split(";") if text] for key in ("point", "negative_point", "box")}
    if not cells["prompts"]:
        objects = [ObjectPrompts(prompts=parse_prompts(texts, space))]
    elif any(texts.values()):
        raise InputError("a line has prompts in a file or in columns, got both")
    else:
        objects = load_prompts(beside / cells["prompts"])
    for entry in objects:
        entry.check_positive()
    options: dict[str, Any] = {key: cells[key] or None for key in ("channel", "series", "modality")}
    options["channel"] = int(cells["channel"]) if cells["channel"] else None
    if cells["untilt"].lower() not in ("", "no", "yes"):
        raise InputError(f"untilt must be yes or no, got {cells['untilt']!r}")
    options["untilt"] = cells["untilt"].lower() == "yes"
    return Job(line, image, tuple(objects), output, options)


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    model: PromptableModel,
    model_name: str,
    device: str = "auto",
    format: str | None = None,
    told: Callable[[Job, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Segment every image and write ``report.json`` beside the masks; what an earlier run finished alike is kept.

    ``done.jsonl`` in the folder, which is made if missing, lists what is finished. ``told`` is called after each job
    with its row of the report.

    Returns:
        The report: counts and a row per job, with ``status`` done, kept (from an earlier run) or failed (with
        ``error``).
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output must be a folder that can be made, got {folder} ({error.strerror})") from error
    check_output(folder / REPORT)
    check_results_folder(folder, (DONE, REPORT), _is_ours)
    finished = _finished(folder / DONE)
    weights, rows = weights_hash(model), []
    for job in jobs:
        key = _key(job, model_name, weights, format)
        if job.output.exists() and key in finished:
            row = {**finished[key], "status": "kept"}
        else:
            row = _segment(job, model, model_name, device, format)
            if row["status"] == "done":
                with (folder / DONE).open("a") as file:
                    file.write(json.dumps({"key": key, **row}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        rows.append(row)
        logger.info("%s: %s %s", job.image.name, row["status"], row.get("error", ""))
        if told is not None:
            told(job, row)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("done", "kept", "failed")}
    report = {"model": model_name, **counts, "images": rows}
    write_json(folder / REPORT, report)
    return report


def _segment(job: Job, model: PromptableModel, model_name: str, device: str, format: str | None) -> dict[str, Any]:
    """Segment one image; what the user can correct is reported and does not stop the other images."""
    began = time.perf_counter()
    row: dict[str, Any] = {"line": job.line, "image": str(job.image), "output": str(job.output)}
    try:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        with Session.open(job.image, model, device, model_name=model_name, **job.options) as session:
            session.add_all(job.objects)
            session.export(job.output, format)
            report = session.report()
    except (InputError, OSError) as error:
        return {**row, "status": "failed", "error": " ".join(str(error).split())}
    found = [{key: o[key] for key in ("id", "name", "voxels", "mm3")} for o in report["objects"]]
    row |= {"notes": report["notes"]} if report["notes"] else {}
    return {**row, "status": "done", "objects": found, "seconds": round(time.perf_counter() - began, 3)}


def _key(job: Job, model_name: str, weights: str, format: str | None) -> str:
    """A hash of what a mask depends on: the image's files, the prompts, the model, the format and the output's name."""
    files = sorted(p for p in job.image.rglob("*") if p.is_file()) if job.image.is_dir() else [job.image]
    image = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    prompts = [(o.id, o.name, [{"space": p.space, **prompt_to_json(p)} for p in o.prompts]) for o in job.objects]
    parts = (image, prompts, job.options, str(job.output.resolve()), model_name, weights, format)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _finished(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of earlier runs by key; an unfinished last line is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row.pop("key")] = row
    return found


def _is_ours(path: Path) -> bool:
    """Whether a ``done.jsonl`` or ``report.json`` was written by a batch; an empty one may have been."""
    text = path.read_text()
    body = json.loads(text if path.name == REPORT else text.partition("\n")[0] or '{"key": ""}')
    return ("images" if path.name == REPORT else "key") in body
