"""The tables of a corpus, made of the records of its cases: same records, same tables, byte for byte.

Here, where all cases are seen together, splits are drawn by subject and images that two sources share are found.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cases import Problem
from samed3d.data.corpus import CASE_COLUMNS, GROUP_SEPARATOR, LABEL_COLUMNS, POINTS, VERSION, Table, in_validation
from samed3d.errors import InputError
from samed3d.output import replacing, write_text

PROBLEM_COLUMNS = ("source", "kind", "path", "reason")
Record = dict[str, Any]


def write_manifest(folder: Path, settings: dict[str, Any], problems: list[tuple[str, Problem]]) -> dict[str, Any]:
    """Write the tables and, last, ``corpus.json``: a folder without it is not a corpus yet. Returns its counts.

    ``problems`` are (source, problem) of every input that could not be used.
    """
    records = [_read(path) for path in sorted(folder.glob("records/*/*.json")) if path.name != "source.json"]
    sources = {path.parent.name: _read(path) for path in sorted(folder.glob("records/*/source.json"))}
    groups, splits = draw_splits(records, settings["validation_share"])
    twins: dict[str, str] = {}  # image id to the id of the first image with the same voxels, for all but the first
    for members in _by_hash(records).values():
        ids = sorted(_image_id(r, image["channel"]) for r, image in members)
        twins.update(dict.fromkeys(ids[1:], ids[0]))
    cases: list[Record] = []
    labels: list[Record] = []
    points = []
    for r in records:
        facts = sources.get(r["source"], {})
        shared = {key: r[key] for key in ("case", "source", "subject")}
        shared |= {"split": splits[r["case"]], "licence": facts.get("licence", "")}
        modality = r["modality"] or facts.get("modality", "")
        cases += _case_rows(r, facts, shared | {"split_group": groups[r["subject"]]}, twins)
        for entry in r["labels"]:
            start, stop = (zip(("z", "y", "x"), entry[end], strict=True) for end in ("start_zyx", "stop_zyx"))
            corners = {f"{axis}0": n for axis, n in start} | {f"{axis}1": n for axis, n in stop}
            labels.append({**shared, **entry, **corners, "modality": modality, "kept": int(not entry["reason"])})
            points.append(entry["points"])
    _write_table(folder / "cases.csv", CASE_COLUMNS, cases)
    _write_table(folder / "labels.csv", LABEL_COLUMNS, labels)
    warnings = [
        (r["source"], Problem(r.get("path", r["case"]), note, "warning")) for r in records for note in r["notes"]
    ]
    rows = [{"source": s, **asdict(p)} for s, p in sorted(problems + warnings, key=str)]
    _write_table(folder / "problems.csv", PROBLEM_COLUMNS, rows)
    with replacing(folder / "points.npy") as partial:
        np.save(partial, np.array(points, dtype=np.uint16).reshape(-1, POINTS, 3))
    counts = {
        "cases": len(records),
        "images": sum(row["has_image"] for row in cases),
        "masks": sum(row["kept"] for row in labels),
        "masks_dropped": sum(not row["kept"] for row in labels),
        "subjects": len({(r["source"], r["subject"]) for r in records}),
        "duplicate_images": len(twins),
        "problems": len(problems),
        "warnings": len(warnings),
    }
    write_text(folder / "README.md", _card(folder, cases, labels, sources))
    body = {"version": VERSION, "settings": settings, "counts": counts, "sources": sources}
    write_text(folder / "corpus.json", json.dumps(body, indent=1, ensure_ascii=False) + "\n")
    return counts


def read_problems(folder: Path) -> list[tuple[str, Problem]]:
    """(source, problem) pairs of the inputs that an earlier run refused; none where there was none."""
    try:
        table = Table.read(folder / "problems.csv").where(kind="refused")
    except (InputError, KeyError):  # none, or of an older version
        return []
    columns = (table[c].tolist() for c in ("source", "path", "reason"))
    return [(source, Problem(path, reason)) for source, path, reason in zip(*columns, strict=True)]


def draw_splits(records: list[Record], validation_share: float) -> tuple[dict[str, str], dict[str, str]]:
    """Assign every case to training, validation or test.

    A subject is on one side with all its cases, in whatever source; so are subjects that share an image. A split that
    the source prescribes as "test" holds for all cases of the subject in that source, and for copies of its images
    elsewhere.

    Returns:
        Subject to split group (the subjects held out with it, joined), and case to split: a group is held out where any
        of it is.
    """
    hashes = _by_hash(records)
    members = {r["subject"]: {r["subject"]} for r in records}
    for pairs in hashes.values():
        joined = set[str]().union(*(members[r["subject"]] for r, _ in pairs))
        members.update(dict.fromkeys(joined, joined))
    groups = {name: GROUP_SEPARATOR.join(sorted(joined)) for name, joined in members.items()}
    tested = {(r["source"], r["subject"]) for r in records if r["split"] == "test"}
    shared = {h for h, pairs in hashes.items() if any((r["source"], r["subject"]) in tested for r, _ in pairs)}
    tested |= {(r["source"], r["subject"]) for h in shared for r, _ in hashes[h]}
    splits = {}
    for r in records:
        held = any(in_validation(name, validation_share) for name in members[r["subject"]])
        splits[r["case"]] = "test" if (r["source"], r["subject"]) in tested else "val" if held else "train"
    return groups, splits


def _card(folder: Path, cases: list[Record], labels: list[Record], sources: dict[str, Any]) -> str:
    """The data set card, in the form that Hugging Face reads: contents, licences, attribution, checksums."""
    licences = sorted({facts["licence"] or "not stated" for facts in sources.values()})
    single = licences[0].lower() if len(licences) == 1 and not set(licences[0]) & set(" (;") else "other"
    head = {"license": single, "task_categories": ["image-segmentation"], "tags": ["medical", "3d"]}
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in head.items()),
        "---",
        "",
        f"# {', '.join(sorted(sources)[:3])}{', ...' * (len(sources) > 3)}",
        "",
    ]
    kept = [row for row in labels if row["kept"]]
    images = sum(row["has_image"] for row in cases)
    lines += [
        f"{len(sources)} sources, {len(cases)} volumes ({images} with an image), {len(kept)} masks, prepared by",
        "`samed3d prepare` (axes z, y, x of RAS+). `cases.csv` lists the images, `labels.csv` the structures.",
        "",
        "A copy must meet the licence of every source in it. A source marked `unclear` or `nc` is not free to use.",
        "",
        "| source | volumes | subjects | masks | train / val / test | modality | licence | flag | attribution |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, facts in sorted(sources.items()):
        own = [row for row in cases if row["source"] == name]
        sides = " / ".join(str(sum(row["split"] == side for row in own)) for side in ("train", "val", "test"))
        numbers = (len(own), len({row["subject"] for row in own}), sum(row["source"] == name for row in kept), sides)
        words = (facts["modality"], facts["licence"] or "not stated", facts["licence_flag"], facts["attribution"])
        lines.append(
            "| " + " | ".join(str(v).replace("|", "/").replace("\n", " ") for v in (name, *numbers, *words)) + " |"
        )
    lines += ["", "SHA-256 of the tables; `cases.csv` holds a hash of each image's voxels:", "", "```"]
    for name in ("cases.csv", "labels.csv", "points.npy", "problems.csv"):
        lines.append(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}")
    return "\n".join([*lines, "```", ""])


def _by_hash(records: list[Record]) -> dict[str, list[tuple[Record, dict[str, Any]]]]:
    """Content hash to the (record, image) pairs that have it."""
    found = defaultdict(list)
    for r in records:
        for image in r["images"]:
            found[image["content_hash"]].append((r, image))
    return found


def _image_id(record: Record, channel: str) -> str:
    return record["case"].replace("/", ".", 1) + channel


def _case_rows(r: Record, facts: dict[str, Any], shared: Record, twins: dict[str, str]) -> Iterable[Record]:
    kept = sum(not entry["reason"] for entry in r["labels"])
    for image in r["images"] or [{}]:
        channel = image.get("channel", "")
        own = image.get("modality", "")
        name = _image_id(r, channel)
        yield {
            **shared,
            "id": name,
            "modality": (own if channel else r["modality"] or own) or facts.get("modality", ""),
            "channel": channel,
            **dict(zip(("depth", "height", "width"), r["shape_zyx"], strict=True)),
            **{f"spacing_{axis}_mm": f"{s:.6g}" for axis, s in zip("zyx", r["spacing_zyx_mm"], strict=True)},
            "dtype": image.get("dtype", ""),
            "has_image": int(bool(image)),
            "stored": int(r["stored"]),
            "layers": r["layers"],
            "kept": kept,
            "dropped": len(r["labels"]) - kept,
            "licence_flag": facts.get("licence_flag", ""),
            "content_hash": image.get("content_hash", ""),
            "duplicate_of": twins.get(name, ""),
            "image_hash": image.get("image_hash", ""),
        }


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _write_table(path: Path, columns: Sequence[str], rows: list[Record]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
