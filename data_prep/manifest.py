"""The tables of a corpus, made of the records of its cases: same records, same tables, byte for byte.

Here, where all cases are seen together, splits are drawn by subject and images that two sources share are found. Read
``samed3d/data/corpus.py`` for what the tables hold.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cases import Problem
from samed3d.data.corpus import CASE_COLUMNS, GROUP_SEPARATOR, LABEL_COLUMNS, POINTS, VERSION, Table, in_validation
from samed3d.errors import InputError
from samed3d.output import replacing, write_text

PROBLEM_COLUMNS = ("source", "path", "reason")
Record = dict[str, Any]


def write_manifest(folder: Path, settings: dict[str, Any], problems: list[tuple[str, Problem]]) -> dict[str, Any]:
    """Write the tables and, last, ``corpus.json``: a folder without it is not a corpus yet.

    Args:
        folder: The corpus, with its records.
        settings: What it was made with.
        problems: (source, problem) of every input that could not be used.

    Returns:
        The counts, as in ``corpus.json``.
    """
    records = read_records(folder)
    sources = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("records/*/source.json"))
    }
    groups, splits = draw_splits(records, settings["validation_share"])
    twins = duplicates(records)
    cases = [row for r in records for row in _case_rows(r, groups, splits, twins, sources)]
    labels = [(row, entry["points"]) for r in records for row, entry in _label_rows(r, splits, sources)]
    _write_table(folder / "cases.csv", CASE_COLUMNS, cases)
    _write_table(folder / "labels.csv", LABEL_COLUMNS, [row for row, _ in labels])
    _write_table(
        folder / "problems.csv",
        PROBLEM_COLUMNS,
        [{"source": s, "path": p.path, "reason": p.reason} for s, p in sorted(problems, key=str)],
    )
    points = np.array([p for _, p in labels], dtype=np.uint16).reshape(-1, POINTS, 3)
    with replacing(folder / "points.npy") as partial:
        np.save(partial, points)
    counts = {
        "cases": len(records),
        "images": sum(row["has_image"] for row in cases),
        "masks": sum(row["kept"] for row, _ in labels),
        "masks_dropped": sum(not row["kept"] for row, _ in labels),
        "subjects": len({(r["source"], r["subject"]) for r in records}),
        "duplicate_images": len(twins),
        "problems": len(problems),
    }
    body = {"version": VERSION, "settings": settings, "counts": counts, "sources": sources}
    write_text(folder / "corpus.json", json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    return counts


def read_records(folder: Path) -> list[Record]:
    """Every finished case, by name."""
    paths = sorted(p for p in folder.glob("records/*/*.json") if p.name not in ("source.json",))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def read_problems(folder: Path) -> list[tuple[str, Problem]]:
    """(source, problem) pairs of an earlier run; none where there was none."""
    try:
        table = Table.read(folder / "problems.csv")
    except InputError:
        return []
    columns = (table[c].tolist() for c in PROBLEM_COLUMNS)
    return [(source, Problem(path, reason)) for source, path, reason in zip(*columns, strict=True)]


def draw_splits(records: list[Record], validation_share: float) -> tuple[dict[str, str], dict[str, str]]:
    """Who stands on which side.

    A subject is on one side with all its cases, in whatever source; so are subjects that share an image. A split that
    the source prescribes as "test" holds for all cases of the subject in that source, and for copies of its images
    elsewhere.

    Returns:
        Subject to split group (the subjects held out with it, joined), and case to split: a group is held out where any
        of it is.
    """
    hashes = _by_hash(records)
    parent: dict[str, str] = {r["subject"]: r["subject"] for r in records}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for pairs in hashes.values():
        names = sorted({root(r["subject"]) for r, _ in pairs})
        for other in names[1:]:
            parent[other] = names[0]
    members = defaultdict(list)
    for name in sorted(parent):
        members[root(name)].append(name)
    groups = {name: GROUP_SEPARATOR.join(members[root(name)]) for name in parent}
    tested = {(r["source"], r["subject"]) for r in records if r["split"] == "test"}
    shared = {h for h, pairs in hashes.items() if any((r["source"], r["subject"]) in tested for r, _ in pairs)}
    tested |= {(r["source"], r["subject"]) for h in shared for r, _ in hashes[h]}
    splits = {}
    for r in records:
        held = any(in_validation(name, validation_share) for name in members[root(r["subject"])])
        splits[r["case"]] = "test" if (r["source"], r["subject"]) in tested else "val" if held else "train"
    return groups, splits


def duplicates(records: list[Record]) -> dict[str, str]:
    """Image id to the id of the first image with the same voxels, for every image that is not the first."""
    twins = {}
    for members in _by_hash(records).values():
        ids = sorted(_image_id(r, image["channel"]) for r, image in members)
        twins.update(dict.fromkeys(ids[1:], ids[0]))
    return twins


def _by_hash(records: list[Record]) -> dict[str, list[tuple[Record, dict[str, Any]]]]:
    """Content hash to the (record, image) pairs that have it."""
    found = defaultdict(list)
    for r in records:
        for image in r["images"]:
            found[image["content_hash"]].append((r, image))
    return found


def _image_id(record: Record, channel: str) -> str:
    return record["case"].replace("/", ".", 1) + channel


def _case_rows(
    r: Record, groups: dict[str, str], splits: dict[str, str], twins: dict[str, str], sources: dict[str, dict[str, Any]]
) -> Iterable[Record]:
    facts = sources.get(r["source"], {})
    shape, spacing = r["shape_zyx"], r["spacing_zyx_mm"]
    kept = sum(not entry["reason"] for entry in r["labels"])
    for image in r["images"] or [None]:
        channel = image["channel"] if image else ""
        name = _image_id(r, channel)
        modality = image["modality"] if channel else r["modality"] or (image["modality"] if image else "")
        yield {
            "id": name,
            "case": r["case"],
            "source": r["source"],
            "subject": r["subject"],
            "split_group": groups[r["subject"]],
            "split": splits[r["case"]],
            "modality": modality or facts.get("modality", ""),
            "channel": channel,
            **dict(zip(("depth", "height", "width"), shape, strict=True)),
            **{f"spacing_{axis}_mm": f"{s:.6g}" for axis, s in zip("zyx", spacing, strict=True)},
            "dtype": image["dtype"] if image else "",
            "has_image": int(image is not None),
            "stored": int(r["stored"]),
            "layers": r["layers"],
            "kept": kept,
            "dropped": len(r["labels"]) - kept,
            "licence": facts.get("licence", ""),
            "licence_flag": facts.get("licence_flag", ""),
            "content_hash": image["content_hash"] if image else "",
            "duplicate_of": twins.get(name, ""),
        }


def _label_rows(
    r: Record, splits: dict[str, str], sources: dict[str, dict[str, Any]]
) -> Iterable[tuple[Record, Record]]:
    facts = sources.get(r["source"], {})
    for entry in r["labels"]:
        row = {
            "case": r["case"],
            "source": r["source"],
            "subject": r["subject"],
            "split": splits[r["case"]],
            "modality": r["modality"] or facts.get("modality", ""),
            **{
                name: entry[name]
                for name in (
                    "layer",
                    "value",
                    "name",
                    "category",
                    "anatomy",
                    "side",
                    "voxels",
                    "mm3",
                    "components",
                    "reason",
                )
            },
            **dict(zip(("z0", "y0", "x0"), entry["start_zyx"], strict=True)),
            **dict(zip(("z1", "y1", "x1"), entry["stop_zyx"], strict=True)),
            "kept": int(not entry["reason"]),
            "licence": facts.get("licence", ""),
        }
        yield row, entry


def _write_table(path: Path, columns: Sequence[str], rows: list[Record]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
