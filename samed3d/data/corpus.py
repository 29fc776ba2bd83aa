"""Reading a prepared corpus: each image once, in canonical axes (z, y, x of RAS+), and its labels as integer maps.

::

    corpus.json            version, settings, sources with licence and attribution, counts
    cases.csv              one row per image
    labels.csv             one row per structure, kept or dropped with the reason
    points.npy             voxels inside each structure, in the order of labels.csv
    problems.csv           inputs that could not be used, with the reason
    arrays/SOURCE/CASE...  .b2nd or .npz, one per image and per label map (layers of structures that overlap)
    records/SOURCE/...     one JSON per case, from which the tables are made
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from samed3d.data.storage import LayerOf, StoredArray, open_array
from samed3d.errors import InputError
from samed3d.geometry import IntTriple, Region, Triple

VERSION = 2
GROUP_SEPARATOR = "|"
POINTS = 32
"""Voxels remembered per structure: a crop can be placed on one without reading the label map."""

CASE_COLUMNS = (
    "id case source subject split_group split modality channel depth height width spacing_z_mm spacing_y_mm "
    "spacing_x_mm dtype has_image stored layers kept dropped licence licence_flag content_hash duplicate_of"
).split()
LABEL_COLUMNS = (
    "case source subject split modality layer value name category anatomy side voxels mm3 z0 y0 x0 z1 y1 x1 components "
    "kept reason licence"
).split()
_HELD_BYTES = 1 << 30


@dataclass(frozen=True)
class LabelRecord:
    """One structure of one case.

    Attributes:
        value: Its value in the label map.
        name: As the source calls it.
        voxels: How many it has.
        region: The tight box around it.
        layer: Which layer of the label map holds it.
        category: Its normalised name.
        points: (n, 3) voxel positions inside it, zyx.
    """

    value: int
    name: str
    voxels: int
    region: Region
    layer: int = 0
    category: str = ""
    points: NDArray | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class CaseRecord:
    """One image of a corpus with its structures, or a label map without image.

    Attributes:
        id: Unique in the corpus.
        source: Dataset it comes from.
        subject: Person or animal; a split never separates the cases of one subject.
        modality: Of the image.
        shape_zyx: Of the image and its label map.
        spacing_zyx_mm: Voxel edges.
        has_image: False for a label map that serves only to generate images.
        labels: The structures that were kept.
        case: ``SOURCE/CASE``; images of several channels share it, and with it one label map.
        channel: Which image of the case, as its file is called.
        split: ``"train"``, ``"val"`` or ``"test"``.
        split_group: The subject and all that share an image with it, joined by ``GROUP_SEPARATOR``: held out together.
    """

    id: str
    source: str
    subject: str
    modality: str
    shape_zyx: IntTriple
    spacing_zyx_mm: Triple
    has_image: bool
    labels: list[LabelRecord] = field(default_factory=list)
    case: str = ""
    channel: str = ""
    split: str = "train"
    split_group: str = ""


class Table:
    """A manifest table in columns of text, which are quick to read; most columns are never used as numbers."""

    def __init__(self, columns: dict[str, NDArray[np.object_]]) -> None:
        """From columns of one length."""
        self.columns = columns

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read a CSV file with a header row.

        Raises:
            InputError: if it is missing or broken.
        """
        try:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))
            columns = list(zip(*rows, strict=True))  # refuses rows of different lengths
            if not columns:
                raise ValueError("no header")
        except (OSError, ValueError) as error:
            raise InputError(f"table is missing or broken: {path} ({error}); run the prepare command again") from error
        return cls({column[0]: np.array(column[1:], dtype=object) for column in columns})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, column: str) -> NDArray[np.object_]:
        """One column."""
        return self.columns[column]

    def numbers(self, column: str) -> NDArray[np.float64]:
        """One column as numbers; empty cells are NaN."""
        text = self.columns[column]
        return np.where(text == "", "nan", text).astype(np.float64)

    def where(self, **wanted: str | Sequence[str]) -> Table:
        """The rows whose columns have the wanted value, or one of the wanted values."""
        chosen = np.ones(len(self), bool)
        for column, value in wanted.items():
            wanted_values = [value] if isinstance(value, str) else value
            chosen &= np.logical_or.reduce([self.columns[column] == one for one in wanted_values])
        return Table({name: values[chosen] for name, values in self.columns.items()})


class Corpus:
    """Reads a corpus folder. Tables are read when asked for; arrays are opened on first use and read by slices."""

    def __init__(self, folder: Path | str) -> None:
        """Open ``folder``.

        Raises:
            InputError: if it holds no corpus, or one of another version.
        """
        self.folder = Path(folder)
        try:
            self.about: dict[str, Any] = json.loads((self.folder / "corpus.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"no corpus at {self.folder}: corpus.json is missing or broken; make one with samed3d prepare"
            ) from error
        version = self.about.get("version")
        if version != VERSION:
            newer = isinstance(version, int) and version > VERSION
            remedy = "update samed3d" if newer else "prepare it again into another folder"
            raise InputError(f"corpus version must be {VERSION}, got {version}: {self.folder}; {remedy}")
        self.sources: dict[str, dict[str, Any]] = self.about["sources"]
        self.storage: str = self.about["settings"]["storage"]
        self._open: OrderedDict[Path, StoredArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without opened arrays, for worker processes."""
        return {**self.__dict__, "_open": OrderedDict()}

    @cached_property
    def case_table(self) -> Table:
        """``cases.csv``: one row per image."""
        return Table.read(self.folder / "cases.csv")

    @cached_property
    def label_table(self) -> Table:
        """``labels.csv``: one row per structure, dropped ones included."""
        return Table.read(self.folder / "labels.csv")

    @cached_property
    def points(self) -> NDArray[np.uint16]:
        """(rows of ``labels.csv``, POINTS, 3) voxel positions inside each structure, zyx; mapped, not loaded."""
        return np.load(self.folder / "points.npy", mmap_mode="r")

    @cached_property
    def cases(self) -> list[CaseRecord]:
        """Every stored image with the structures that were kept."""
        labels = self._kept_labels()
        columns = self.case_table.columns
        stored = (
            dict(zip(columns, row, strict=True)) for row in zip(*(c.tolist() for c in columns.values()), strict=True)
        )
        return [_case_from_row(row, labels.get(row["case"], [])) for row in stored if row["stored"] == "1"]

    def image(self, case: CaseRecord) -> NDArray:
        """The case's image, canonical (D, H, W); slicing it reads only the chunks under the slice."""
        return cast(NDArray, self._opened(image_path(self.folder, case.case, case.channel, self.storage)))

    def labels(self, case: CaseRecord, layer: int = 0) -> NDArray:
        """A layer of the case's label map, canonical (D, H, W); read by slices as ``image``."""
        return cast(NDArray, LayerOf(self._opened(labels_path(self.folder, case.case, self.storage)), layer))

    def _opened(self, path: Path) -> StoredArray:
        if path not in self._open:
            self._open[path] = open_array(path)
            while len(self._open) > 1 and sum(a.held_bytes for a in self._open.values()) > _HELD_BYTES:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]

    def _kept_labels(self) -> dict[str, list[LabelRecord]]:
        table = self.label_table
        rows = np.flatnonzero(table["kept"] == "1")
        numbers = [
            table.numbers(c)[rows].astype(np.int64).tolist() for c in "value voxels layer z0 y0 x0 z1 y1 x1".split()
        ]
        texts = [table[c][rows].tolist() for c in ("case", "name", "category")]
        points = np.asarray(self.points)  # still mapped, but quicker to take rows of
        by_case: dict[str, list[LabelRecord]] = {}
        for row, case, name, category, value, voxels, layer, z0, y0, x0, z1, y1, x1 in zip(
            rows.tolist(), *texts, *numbers, strict=True
        ):
            record = LabelRecord(value, name, voxels, Region((z0, y0, x0), (z1, y1, x1)), layer, category, points[row])
            by_case.setdefault(case, []).append(record)
        return by_case


def image_path(folder: Path, case: str, channel: str, storage: str) -> Path:
    """Where one image of ``SOURCE/CASE`` lies."""
    return folder / "arrays" / f"{case}.image{channel}.{storage}"


def labels_path(folder: Path, case: str, storage: str) -> Path:
    """Where the label map of ``SOURCE/CASE`` lies."""
    return folder / "arrays" / f"{case}.labels.{storage}"


def in_validation(subject: str, share: float, seed: int = 0) -> bool:
    """Whether a subject belongs to validation: a hash decides, so that the split never depends on what else is in a
    corpus.
    """
    digest = hashlib.sha256(f"{seed}:{subject}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def _case_from_row(row: dict[str, str], labels: list[LabelRecord]) -> CaseRecord:
    return CaseRecord(
        id=row["id"],
        source=row["source"],
        subject=row["subject"],
        modality=row["modality"],
        shape_zyx=(int(row["depth"]), int(row["height"]), int(row["width"])),
        spacing_zyx_mm=(float(row["spacing_z_mm"]), float(row["spacing_y_mm"]), float(row["spacing_x_mm"])),
        has_image=row["has_image"] == "1",
        labels=labels,
        case=row["case"],
        channel=row["channel"],
        split=row["split"],
        split_group=row["split_group"],
    )
