"""A prepared corpus: a JSON file about it, CSV tables of what is in it, and one chunked array per image and label map.

``data_prep/`` writes corpora, ``sampling.py`` draws training crops from them. Every image is stored once, in canonical
axes (z, y, x of RAS+); its labels are one integer map, with a further layer only where structures overlap. ``.b2nd``
arrays are read chunk by chunk and need blosc2; ``.npz`` arrays are read whole and need numpy alone.

::

    README.md       the data set card: licences, attribution, checksums
    corpus.json     version, settings, sources with licence and attribution, counts
    cases.csv       one row per image
    labels.csv      one row per structure, kept or dropped with the reason
    points.npy      voxels inside each structure, in the order of labels.csv
    problems.csv    inputs that could not be used and warnings about the others, with the reason
    arrays/SOURCE/CASE...    .b2nd or .npz            records/SOURCE/CASE.json   what the tables are made of
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError, check_choice
from samed3d.geometry import IntTriple, Region, Triple, as_triple
from samed3d.output import replacing

VERSION = 2
STORAGES = ("b2nd", "npz")
CHUNK, BLOCK = 64, 32
GROUP_SEPARATOR = "|"
POINTS = 32
"""Stored voxels per structure: a crop can be placed on one without reading the label map."""
CASE_COLUMNS = (
    "id case source subject split_group split modality channel depth height width spacing_z_mm spacing_y_mm "
    "spacing_x_mm dtype has_image stored layers kept dropped licence licence_flag content_hash duplicate_of image_hash"
).split()
LABEL_COLUMNS = (
    "case source subject split modality layer value name category anatomy side voxels mm3 z0 y0 x0 z1 y1 x1 "
    "components kept reason licence"
).split()
_HELD_BYTES = 1 << 30
HASH_GRID = 24
"""Voxels along each axis that ``image_hash`` looks at."""
HASH_QUANTILES = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class LabelRecord:
    """One structure of one case: its value in a layer of the label map, its name in the source, its normalised name
    (``category``), its tight box, and (n, 3) voxel positions inside it, zyx.
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
    """One image of a corpus with its structures, or a label map without image."""

    id: str  # unique in the corpus
    source: str
    subject: str  # patient, animal or specimen; a split never separates the cases of one subject
    modality: str
    shape_zyx: IntTriple
    spacing_zyx_mm: Triple
    has_image: bool  # False for a label map that serves only to generate images
    labels: list[LabelRecord] = field(default_factory=list)  # the structures that were kept
    case: str = ""  # SOURCE/CASE; images of several channels share it, and with it one label map
    channel: str = ""  # which image of the case, as its file is called
    split: str = "train"  # or "val" or "test"
    split_group: str = ""  # the subjects that are held out together, joined by ``GROUP_SEPARATOR``
    image_hash: str = ""  # of the image before it was resampled; "" in older corpora


class StoredArray:
    """An opened array (blosc2 or numpy), or one layer of it, that is read by slicing: integers and slices of step 1."""

    def __init__(self, array: Any, layer: int | None = None) -> None:
        self.array, self._layer = array, layer
        self.shape: tuple[int, ...] = tuple(array.shape)[0 if layer is None else 1 :]
        self.dtype: np.dtype = array.dtype

    def __getitem__(self, index: Any) -> NDArray:
        """The voxels under ``index``, read now."""
        if self._layer is not None:
            index = (self._layer, *(index if isinstance(index, tuple) else (index,)))
        return np.asarray(self.array[index])


class Table:
    """A table in columns of text, as arrays of Python strings: quick to make, and most columns are never used."""

    def __init__(self, columns: dict[str, NDArray[np.object_]]) -> None:
        self.columns = columns

    @classmethod
    def read(cls, path: Path) -> Table:
        """Read a CSV file with a header row.

        Raises:
            InputError: if it is missing or broken.
        """
        try:
            with path.open(newline="", encoding="utf-8") as file:
                columns = list(zip(*csv.reader(file), strict=True))  # refuses rows of different lengths
            if not columns:
                raise ValueError("no header")
        except (OSError, ValueError) as error:
            raise InputError(f"table is missing or broken: {path} ({error}); run the prepare command again") from error
        return cls({column[0]: np.array(column[1:], dtype=object) for column in columns})

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, column: str) -> NDArray[np.object_]:
        return self.columns[column]

    def numbers(self, column: str) -> NDArray[np.float64]:
        """One column as numbers; empty cells are NaN."""
        text = self.columns[column]
        return np.where(text == "", "nan", text).astype(np.float64)

    def where(self, **wanted: str | Sequence[str]) -> Table:
        """The rows whose columns have the wanted value, or one of the wanted values."""
        chosen = np.ones(len(self), bool)
        for column, value in wanted.items():
            chosen &= np.isin(self.columns[column], [value] if isinstance(value, str) else list(value))
        return Table({name: values[chosen] for name, values in self.columns.items()})


class Corpus:
    """Reads a corpus folder: tables when they are first used, arrays slice by slice."""

    def __init__(self, folder: Path | str) -> None:
        """Open ``folder``.

        Raises:
            InputError: if it holds no corpus, or one of another version.
        """
        self.folder = Path(folder)
        try:
            self.about: dict[str, Any] = json.loads((self.folder / "corpus.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            what = f"no corpus at {self.folder}: corpus.json is missing or broken"
            raise InputError(f"{what}; make one with samed3d prepare") from error
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
        columns = self.case_table.where(stored="1").columns
        rows = (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))
        return [
            CaseRecord(
                **{name: row[name] for name in "id source subject modality case channel split split_group".split()},
                shape_zyx=(int(row["depth"]), int(row["height"]), int(row["width"])),
                spacing_zyx_mm=as_triple([float(row[f"spacing_{axis}_mm"]) for axis in "zyx"]),
                has_image=row["has_image"] == "1",
                labels=labels.get(row["case"], []),
                image_hash=row.get("image_hash", ""),
            )
            for row in rows
        ]

    def image(self, case: CaseRecord) -> NDArray:
        """The case's image, canonical (D, H, W); slicing it reads only the chunks under the slice."""
        return cast(NDArray, self._opened(image_path(self.folder, case.case, case.channel, self.storage)))

    def labels(self, case: CaseRecord, layer: int = 0) -> NDArray:
        """A layer of the case's label map, canonical (D, H, W); read by slices as ``image``."""
        return cast(NDArray, StoredArray(self._opened(labels_path(self.folder, case.case, self.storage)).array, layer))

    def _opened(self, path: Path) -> StoredArray:
        def held_bytes(array: Any) -> int:
            return array.nbytes if isinstance(array, np.ndarray) else 4096

        if path not in self._open:
            self._open[path] = open_array(path)
            while len(self._open) > 1 and sum(held_bytes(a.array) for a in self._open.values()) > _HELD_BYTES:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]

    def _kept_labels(self) -> dict[str, list[LabelRecord]]:
        table = self.label_table
        rows = np.flatnonzero(table["kept"] == "1")
        names = "value voxels layer z0 y0 x0 z1 y1 x1".split()
        numbers = [table.numbers(name)[rows].astype(np.int64).tolist() for name in names]
        texts = [table[name][rows].tolist() for name in ("case", "name", "category")]
        points = np.asarray(self.points)  # still mapped, but quicker to take rows of
        by_case: dict[str, list[LabelRecord]] = {}
        for row, case, name, category, value, voxels, layer, *box in zip(rows.tolist(), *texts, *numbers, strict=True):
            region = Region((box[0], box[1], box[2]), (box[3], box[4], box[5]))
            record = LabelRecord(value, name, voxels, region, layer, category, points[row])
            by_case.setdefault(case, []).append(record)
        return by_case


def image_path(folder: Path, case: str, channel: str, storage: str) -> Path:
    """The file of one image of ``SOURCE/CASE``."""
    return folder / "arrays" / f"{case}.image{channel}.{storage}"


def labels_path(folder: Path, case: str, storage: str) -> Path:
    """The file of the label map of ``SOURCE/CASE``."""
    return folder / "arrays" / f"{case}.labels.{storage}"


def in_validation(subject: str, share: float, seed: int = 0) -> bool:
    """Whether a subject belongs to validation, by a hash: what else a corpus holds does not change the split."""
    digest = hashlib.sha256(f"{seed}:{subject}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def image_hash(array: NDArray) -> str:
    """Shape and hash of an image, the same after every rewriting that keeps its voxels.

    It looks at ``HASH_GRID`` voxels along each axis, spread evenly, and only at which of them lie above the quantiles
    of all: a change of number type, of scale and offset, of compression or format does not matter. Of the 48 ways to
    flip and permute the axes the smallest is taken, so that the orientation of the storage does not matter either. A
    resampled, cropped or smoothed image is another image. The (D, H, W) array is read slice by slice.

    Returns:
        ``AxBxC:HASH`` with the sorted edges; "" for an image without contrast, which has no identity.
    """
    steps = [_symmetric_steps(n) for n in array.shape]
    planes = {z: np.asarray(array[int(z)])[np.ix_(steps[1], steps[2])] for z in sorted(set(steps[0].tolist()))}
    sampled = np.stack([planes[z] for z in steps[0].tolist()])
    ordered = np.sort(sampled, axis=None)
    cuts = ordered[[int(q * (len(ordered) - 1)) for q in HASH_QUANTILES]]
    if ordered[0] == ordered[-1]:
        return ""
    levels = np.searchsorted(cuts, sampled, side="left").astype(np.uint8)
    levels[sampled > cuts[-1]] = len(HASH_QUANTILES) + 1
    turned = (
        levels.transpose(order)[tuple(slice(None, None, sign) for sign in signs)].tobytes()
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1, -1), repeat=3)
        if tuple(array.shape[axis] for axis in order) == tuple(sorted(array.shape))
    )
    return f"{shape_text(array.shape)}:{hashlib.sha256(min(turned)).hexdigest()[:16]}"


def shape_text(shape: Sequence[int]) -> str:
    """Edges in ascending order, as an image's hash begins."""
    return "x".join(map(str, sorted(int(n) for n in shape)))


def _symmetric_steps(size: int) -> NDArray[np.int64]:
    """``HASH_GRID`` indices, evenly spread, the same when the axis is reversed."""
    half = ((np.arange(HASH_GRID // 2) + 0.5) * size / HASH_GRID).astype(np.int64)
    return np.concatenate([half, size - 1 - half[::-1]])


def check_storage(storage: str) -> None:
    """Refuse, before any work is done, a storage in which no array can be written here.

    Raises:
        InputError: if it is not one of ``STORAGES``, or needs a package that is missing.
    """
    check_choice("--storage", storage, STORAGES)
    if storage == "b2nd":
        _blosc2()


def open_array(path: Path) -> StoredArray:
    """Open an array; ``.npz`` is read whole.

    Raises:
        InputError: if blosc2 is needed and missing, or the file is missing or damaged.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path) as stored:
                return StoredArray(stored["array"])
        blosc2 = _blosc2()
        return StoredArray(blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1)))
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib, numpy and blosc2 raise many types for a damaged file
        reason = f"{path} ({type(error).__name__}: {error})"
        raise InputError(f"array is missing or damaged: {reason}; delete its record and prepare again") from error


def write_array(path: Path, array: NDArray) -> None:
    """Write an array of any strides; the suffix (``.b2nd``, ``.npz``) is the storage."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        if path.suffix == ".npz":
            np.savez_compressed(partial, array=array)
        else:
            _write_b2nd(partial, array)


def _write_b2nd(path: Path, array: NDArray) -> None:
    blosc2, size = _blosc2(), array.dtype.itemsize
    spatial, lead = array.shape[-3:], (1,) * (array.ndim - 3)
    chunks = lead + tuple(min(CHUNK, n) for n in spatial)
    blocks = lead + tuple(min(BLOCK, n) for n in chunks[-3:])
    # Sorting bytes by their place helps numbers of several bytes; on bytes it would only cost time.
    filters = [blosc2.Filter.SHUFFLE if size > 1 else blosc2.Filter.NOFILTER]
    settings = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, filters=filters, typesize=size, nthreads=1)
    place = {"chunks": chunks, "blocks": blocks, "urlpath": str(path), "mode": "w"}
    stored = blosc2.empty(array.shape, dtype=array.dtype, cparams=settings, **place)
    for layer in np.ndindex(array.shape[:-3]):
        for z in range(0, spatial[0], CHUNK):  # one row of chunks at a time: the whole array is never copied
            index = (*(slice(i, i + 1) for i in layer), slice(z, min(z + CHUNK, spatial[0])))
            stored[index] = np.ascontiguousarray(array[index])


def _blosc2() -> Any:
    try:
        import blosc2
    except ModuleNotFoundError as error:
        raise InputError("a .b2nd corpus needs blosc2: pip install blosc2, or prepare with --storage npz") from error
    return blosc2
