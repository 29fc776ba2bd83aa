"""One case from its source files to its arrays and its record in the corpus. Runs in a worker; knows nothing of other
cases.

The record (``records/SOURCE/CASE.json``) is written last: a case with a record is finished, and one without is done
again. Read ``manifest.py`` next for what becomes of the records.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cases import RawArrays, RawCase, SourceFacts
from data_prep.clean import Rules, Structure, clean_layer, compact_values, tidy_layer
from data_prep.readers import load_case
from samed3d.data.corpus import VERSION, image_path, labels_path
from samed3d.data.storage import write_array
from samed3d.errors import InputError
from samed3d.geometry import CanonicalView, IntTriple, as_triple
from samed3d.output import write_text
from samed3d.resample import resize_image, resize_labels, target_shape
from samed3d.volume.label_maps import grid_difference

_NO_MORE_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Settings:
    """How a corpus is made; every case of a corpus by the same settings.

    Attributes:
        rules: When a mask is kept.
        spacing_mm: Resample to cubic voxels of this edge, or None for the native grid.
        max_side: Coarsen volumes with more voxels than this along an axis, or None.
        storage: ``"b2nd"`` or ``"npz"``.
        repair_geometry: Mend images and labels whose grids disagree instead of refusing them.
        validation_share: Share of subjects in split "val".
    """

    rules: Rules = field(default_factory=Rules)
    spacing_mm: float | None = None
    max_side: int | None = None
    storage: str = "b2nd"
    repair_geometry: bool = False
    validation_share: float = 0.1


@dataclass(frozen=True)
class Task:
    """One case to be done; small and picklable."""

    case: RawCase
    facts: SourceFacts
    settings: Settings
    corpus: str
    fingerprint: str


@dataclass(frozen=True)
class Outcome:
    """What became of a task: ``error`` is empty for success; ``fatal`` means that no other case would fare better."""

    source: str
    case: str
    path: str
    error: str = ""
    fatal: bool = False


def record_path(folder: Path, source: str, case: str) -> Path:
    """Where the record of a case lies."""
    return folder / "records" / source / f"{case}.json"


def convert(task: Task) -> Outcome:
    """Do one case; never raises for what is wrong with its files."""
    case = task.case
    about = (case.source, case.id, case.first_path)
    record_at = record_path(Path(task.corpus), case.source, case.id)
    try:
        record_at.unlink(missing_ok=True)  # of an older state of the files
        with _collected_warnings() as notes:
            raw = _load(case, task.settings)
            store(task, raw, notes)
        return Outcome(*about)
    except InputError as error:  # of a write that failed, the cause tells whether any other would succeed
        return Outcome(*about, error=str(error), fatal=getattr(error.__cause__, "errno", None) in _NO_MORE_WRITES)
    except MemoryError:
        return Outcome(*about, error="not enough memory for this volume; use fewer --jobs")
    except Exception as error:  # one bad case must not stop the others, whatever is wrong with it
        return Outcome(*about, error=f"cannot be prepared ({type(error).__name__}: {error})")


def _load(case: RawCase, settings: Settings) -> RawArrays:
    if case.reader == "synthetic":
        from data_prep.synthetic import SyntheticReader  # imports torch, which no other worker needs

        return SyntheticReader().load(case, repair_geometry=settings.repair_geometry)
    return load_case(case, repair_geometry=settings.repair_geometry)


def store(task: Task, raw: RawArrays, notes: list[str]) -> None:
    """Clean and write the arrays of a case (which are used up), then its record.

    Raises:
        InputError: if there is no structure, or images and labels do not share one grid.
    """
    settings, case, folder = task.settings, task.case, Path(task.corpus)
    view = CanonicalView.of(raw.grid)
    shape = target_shape(view.shape_zyx, view.spacing_zyx_mm, settings.spacing_mm, settings.max_side)
    spacing = as_triple([s * n / m for s, n, m in zip(view.spacing_zyx_mm, view.shape_zyx, shape, strict=True)])
    _check_grids(raw, settings)
    layers, structures = _labels(raw, view, shape, spacing, task)
    kept = any(not s.reason for _, s in structures)
    key = f"{case.source}/{case.id}"
    images: list[dict[str, Any]] = []
    several = len(raw.images) > 1
    while kept and raw.images:
        number = len(images)
        channel, volume = raw.images.pop(0)  # freed as soon as it is written
        array = compact_image(view.to_canonical(volume.array))
        content = content_hash(array)
        array = resize_image(array, shape)
        suffix = f"_{number:04d}" if several else ""
        write_array(image_path(folder, key, suffix, settings.storage), array)
        images.append({"channel": suffix, "modality": channel, "dtype": str(array.dtype), "content_hash": content})
    if kept:
        write_array(
            labels_path(folder, key, settings.storage), np.stack(layers) if len(layers) > 1 else layers[0][None]
        )
    record = {
        "version": VERSION,
        "fingerprint": task.fingerprint,
        "case": key,
        "source": case.source,
        "subject": case.subject,
        "modality": case.modality,
        "split": case.split,
        "shape_zyx": shape,
        "spacing_zyx_mm": spacing,
        "layers": len(layers),
        "stored": kept,
        "images": images,
        "labels": [_label_entry(layer, s, float(np.prod(spacing))) for layer, s in structures],
        "notes": notes,
    }
    at = record_path(folder, case.source, case.id)
    at.parent.mkdir(parents=True, exist_ok=True)
    write_text(at, json.dumps(record, separators=(",", ":")))


def _labels(
    raw: RawArrays, view: CanonicalView, shape: IntTriple, spacing: tuple[float, float, float], task: Task
) -> tuple[list[NDArray], list[tuple[int, Structure]]]:
    """The cleaned layers in one type, and (layer, structure) of all that is in them."""
    layers, structures = [], []
    for number in range(len(raw.layers)):
        layer = raw.layers[number]
        array, names = compact_values(tidy_layer(view.to_canonical(layer.array)), dict(layer.names))
        raw.layers[number].array = np.empty(0)  # the reader's copy is not needed any more
        array = np.ascontiguousarray(resize_labels(array, shape))
        instances = task.facts.label_kind == "instance"
        seed = f"{task.case.source}/{task.case.id}/{number}"
        rules = task.settings.rules
        array, found = clean_layer(
            array, names, spacing, rules, instances=instances, source=task.case.source, seed=seed
        )
        layers.append(array)
        structures += [(number, s) for s in found]
    if not structures:
        raise InputError(f"label is empty: no structure in {task.case.first_path}; leave the case out")
    widest = np.result_type(*[a.dtype for a in layers])
    return [a.astype(widest, copy=False) for a in layers], structures


def _check_grids(raw: RawArrays, settings: Settings) -> None:
    """Images and labels must be of one shape and place; a reader repairs what may be repaired, this is the last
    look.
    """
    for layer in raw.layers:
        if layer.array.shape != raw.grid.shape_zyx:
            raise InputError(
                f"image and label must have one shape, got {raw.grid.shape_zyx} and {layer.array.shape} (zyx)"
            )
    for _, volume in raw.images:
        if volume.array.shape != raw.grid.shape_zyx:
            raise InputError(
                f"image must have the label's shape {raw.grid.shape_zyx}, got {volume.array.shape} (zyx): {volume.source}"
            )
        difference = grid_difference(raw.grid, volume.grid)
        if difference and not settings.repair_geometry:
            raise InputError(
                f"image and label must share one grid: {difference}: {volume.source}; use --repair-geometry"
            )


def compact_image(array: NDArray) -> NDArray:
    """The image as int16 or uint8 where that loses nothing (files often hold integers as float or int32), else as
    float32.
    """
    if array.dtype in (np.uint8, np.int16):
        return array
    if array.dtype.kind == "f" and not all(np.array_equal(plane, np.round(plane)) for plane in array):
        return array.astype(np.float32, copy=False)
    low, high = float(array.min()), float(array.max())
    fits = next(
        (t for t in (np.uint8, np.int16, np.int32) if np.iinfo(t).min <= low and high <= np.iinfo(t).max), np.float32
    )
    return array.astype(fits)


def content_hash(array: NDArray) -> str:
    """A hash of the voxels in canonical order, whatever integer type they are stored in."""
    digest = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
    kind = np.int16 if array.dtype.itemsize == 1 else array.dtype
    for plane in array:
        digest.update(np.ascontiguousarray(plane, dtype=kind).data)
    return digest.hexdigest()


def fingerprint(case: RawCase, settings: Settings, about: str = "") -> str:
    """Changes with the case's files (size, time), how it is listed, the settings, and ``about``, what the source says
    of itself.
    """
    parts: list[Any] = [asdict(case), asdict(settings), about]
    for text in sorted(case.paths):
        parts += [(name, size, time) for name, size, time in _stats(text)]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def input_bytes(case: RawCase) -> int:
    """Size of the case's files on disk."""
    return sum(size for text in case.paths for _, size, _ in _stats(text))


def _stats(text: str) -> Iterator[tuple[str, int, int]]:
    """(path, bytes, time) of a file or of the files in a folder; nothing for a text that is no path."""
    try:
        about = os.stat(text)
        if os.path.isdir(text):
            for entry in sorted(os.scandir(text), key=lambda e: e.name):
                inside = entry.stat()
                yield entry.path, inside.st_size, inside.st_mtime_ns
        else:
            yield text, about.st_size, about.st_mtime_ns
    except (OSError, ValueError):
        return


def _label_entry(layer: int, s: Structure, voxel_mm3: float) -> dict[str, Any]:
    return {
        "layer": layer,
        "value": s.value,
        "name": s.name,
        "category": s.category.name,
        "anatomy": s.category.group,
        "side": s.category.side,
        "voxels": s.voxels,
        "mm3": round(s.voxels * voxel_mm3, 3),
        "start_zyx": s.region.start_zyx,
        "stop_zyx": s.region.stop_zyx,
        "components": s.components,
        "reason": s.reason,
        "points": s.points,
    }


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """What the readers warn of while they load: it belongs into the record, and on a worker nobody sees it."""
    notes: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            notes.append(record.getMessage())

    collector = Collector(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("samed3d", "data_prep")]
    for logger in loggers:
        logger.addHandler(collector)
    try:
        yield notes
    finally:
        for logger in loggers:
            logger.removeHandler(collector)
