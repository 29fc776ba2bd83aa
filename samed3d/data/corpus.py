"""A prepared corpus: one JSON of what is in it, one compressed file per case. Numpy only.

Every image is stored once, in canonical axes (z, y, x of RAS+), with all its labels as one integer map. ``data_prep/`` writes corpora,
``data/sampling.py`` draws training crops from them. Read that next.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import IntTriple, Region, Triple

VERSION = 1


@dataclass(frozen=True)
class LabelRecord:
    """One structure of one case: its value in the label map, name, size and the tight box around it."""

    value: int
    name: str
    voxels: int
    region: Region


@dataclass(frozen=True)
class CaseRecord:
    """One row of a corpus.

    Attributes:
        id: Unique in the corpus; also the file's name.
        source: Dataset it comes from.
        subject: Person or animal; cases of one subject never stand on both sides of a split.
        has_image: False for a label map that serves only to generate images.
    """

    id: str
    source: str
    subject: str
    modality: str
    shape_zyx: IntTriple
    spacing_zyx_mm: Triple
    has_image: bool
    labels: list[LabelRecord] = field(default_factory=list)


class Corpus:
    """Reads a corpus folder; arrays are loaded on first use and kept."""

    def __init__(self, folder: Path | str) -> None:
        """Open ``folder``.

        Raises:
            InputError: if it holds no corpus, or one of a newer version.
        """
        self.folder = Path(folder)
        try:
            body = json.loads((self.folder / "corpus.json").read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"no corpus at {self.folder}: corpus.json is missing or broken; make one with samed3d prepare") from error
        if body.get("version") != VERSION:
            raise InputError(f"corpus version must be {VERSION}, got {body.get('version')}: {self.folder}")
        self.sources: dict[str, dict] = body["sources"]
        self.cases = [_case_from_json(entry) for entry in body["cases"]]
        self._arrays: dict[str, tuple[NDArray | None, NDArray]] = {}

    def arrays(self, case: CaseRecord) -> tuple[NDArray | None, NDArray]:
        """The case's image (or None) and label map, canonical (D, H, W)."""
        if case.id not in self._arrays:
            with np.load(self.folder / "cases" / f"{case.id}.npz") as stored:
                self._arrays[case.id] = (stored["image"] if case.has_image else None, stored["labels"])
        return self._arrays[case.id]


def write_case(folder: Path, case: CaseRecord, image: NDArray | None, labels: NDArray) -> None:
    """Store a case's arrays, compressed; the file appears whole or not at all."""
    target = folder / "cases" / f"{case.id}.npz"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".part.npz")
    arrays = {"labels": labels} if image is None else {"labels": labels, "image": image}
    np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, target)


def write_index(folder: Path, cases: list[CaseRecord], sources: dict[str, dict]) -> None:
    """Write ``corpus.json`` last: a folder without it is not a corpus yet."""
    body = {"version": VERSION, "sources": sources, "cases": [asdict(case) for case in cases]}
    temporary = folder / "corpus.json.part"
    temporary.write_text(json.dumps(body, indent=1))
    os.replace(temporary, folder / "corpus.json")


def in_validation(subject: str, share: float, seed: int = 0) -> bool:
    """Whether a subject belongs to validation: a hash decides, so that the split never depends on what else is in a corpus."""
    digest = hashlib.sha256(f"{seed}:{subject}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def _case_from_json(entry: dict) -> CaseRecord:
    labels = [
        LabelRecord(
            item["value"], item["name"], item["voxels"], Region(tuple(item["region"]["start_zyx"]), tuple(item["region"]["stop_zyx"]))
        )
        for item in entry["labels"]
    ]
    shape, spacing = tuple(entry["shape_zyx"]), tuple(entry["spacing_zyx_mm"])
    return CaseRecord(entry["id"], entry["source"], entry["subject"], entry["modality"], shape, spacing, entry["has_image"], labels)
