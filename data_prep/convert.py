"""From the source files of one case to its arrays and its record in the corpus; and doing so for many cases at once.

The record (``records/SOURCE/CASE.json``) is written last: a case with a record is finished, one without is done again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.cases import Problem, RawArrays, RawCase, SourceFacts
from data_prep.clean import Rules, Structure, clean_layer, compact_layer
from data_prep.readers import load_case
from samed3d.data.corpus import VERSION, image_hash, image_path, labels_path, write_array
from samed3d.errors import InputError
from samed3d.geometry import CanonicalView, IntTriple, Triple, as_triple
from samed3d.output import write_text
from samed3d.resample import resize_image, resize_labels, target_shape

_NO_MORE_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_CONNECT_SECONDS = "20s"


@dataclass(frozen=True)
class Settings:
    """How a corpus is made; every case of a corpus by the same settings."""

    rules: Rules = field(default_factory=Rules)
    spacing_mm: float | None = None  # edge of cubic voxels to resample to; None keeps the native grid
    max_side: int | None = None  # volumes with more voxels along an axis are coarsened
    storage: str = "b2nd"  # or "npz"
    repair_geometry: bool = False  # of images and labels whose grids disagree, instead of refusing them
    validation_share: float = 0.1  # of subjects, in split "val"


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
    """What became of a task: ``error`` is empty for success; ``fatal`` says that all further cases would fail too."""

    source: str
    problem: Problem | None = None
    fatal: bool = False


def record_path(folder: Path, source: str, case: str) -> Path:
    """Where the record of a case lies."""
    return folder / "records" / source / f"{case}.json"


def fingerprint(case: RawCase, settings: Settings, about: str = "") -> str:
    """A hash of how the case is listed, the size and time of its files, the settings, and ``about``, the text of the
    files that describe the source.
    """
    parts = [asdict(case), asdict(settings), about, *(entry for path in sorted(case.paths) for entry in _stats(path))]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def input_bytes(case: RawCase) -> int:
    """Size of the case's files on disk."""
    return sum(size for path in case.paths for _, size, _ in _stats(path))


def _stats(text: str) -> Iterator[tuple[str, int, int]]:
    """(path, bytes, time) of a file or of the files in a folder; nothing for a text that is no path."""
    try:
        entries = sorted(os.scandir(text), key=lambda e: e.name) if os.path.isdir(text) else [Path(text)]
        for entry in entries:
            about = entry.stat()
            yield str(getattr(entry, "path", entry)), about.st_size, about.st_mtime_ns
    except (OSError, ValueError):
        return


def run_tasks(tasks: list[Task], jobs: int, cluster: str | None = None) -> Iterator[Outcome]:
    """Do tasks one after the other (1 job), in processes of this machine, or on a Dask cluster; outcomes in any order.

    ``cluster`` is the address of a Dask scheduler, whose workers see the same files under the same paths.

    Raises:
        InputError: if the cluster cannot be reached, or a worker process was killed.
    """
    if cluster:
        yield from _on_cluster(tasks, cluster)
    elif jobs == 1 or len(tasks) < 2:
        yield from map(convert, tasks)
    else:
        yield from _in_processes(tasks, jobs)


def _in_processes(tasks: list[Task], jobs: int) -> Iterator[Outcome]:
    try:
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import TerminatedWorkerError
    except ModuleNotFoundError as error:
        raise InputError(
            "more than one process needs joblib: pip install 'samed3d[corpus]', or give --jobs 1"
        ) from error
    # One case at a time to each process: a case takes seconds, and the progress bar moves with every one.
    pool: Any = Parallel(
        n_jobs=jobs, backend="loky", return_as="generator_unordered", batch_size=1, pre_dispatch="2*n_jobs"
    )
    try:
        yield from pool(delayed(convert)(task) for task in tasks)
    except TerminatedWorkerError as error:
        raise InputError(
            f"a worker process was killed, most likely for want of memory ({jobs} at once); give fewer --jobs. "
            "Finished cases are kept"
        ) from error


def _on_cluster(tasks: list[Task], address: str) -> Iterator[Outcome]:
    try:
        from distributed import Client, as_completed
    except ModuleNotFoundError as error:
        raise InputError("--cluster needs Dask: pip install 'samed3d[cluster]'") from error
    try:
        client = Client(address, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(
            f"--cluster cannot be reached: {address} ({error}); start one with dask scheduler and dask worker"
        ) from error
    with client:
        waiting = {client.submit(convert, task, pure=False, retries=1): task.case for task in tasks}
        for future in as_completed(list(waiting)):
            case, failure = waiting.pop(future), future.exception()
            failed = Outcome(case.source, Problem(case.id, f"cluster worker failed: {failure}"))
            yield failed if failure else future.result()
            future.release()


def convert(task: Task) -> Outcome:
    """Do one case; what is wrong with its files is in the outcome, and nothing is raised."""
    case, notes, fatal = task.case, _Notes(), False
    loggers = [logging.getLogger(name) for name in ("samed3d", "data_prep")]
    for logger in loggers:
        logger.addHandler(notes)
    try:
        record_path(Path(task.corpus), case.source, case.id).unlink(missing_ok=True)  # of an older state of the files
        repair = task.settings.repair_geometry
        if case.reader == "synthetic":
            from data_prep.synthetic import SyntheticReader  # imports torch, which no other worker needs

            raw = SyntheticReader().load(case, repair_geometry=repair)
        else:
            raw = load_case(case, repair_geometry=repair)
        store(task, raw, notes.lines)
        return Outcome(case.source)
    except InputError as error:
        reason = str(error)
        fatal = getattr(error.__cause__, "errno", None) in _NO_MORE_WRITES
    except MemoryError:
        reason = "not enough memory for this volume; use fewer --jobs"
    except Exception as error:  # one bad case must not stop the others, whatever is wrong with it
        reason = f"cannot be prepared ({type(error).__name__}: {error})"
    finally:
        for logger in loggers:
            logger.removeHandler(notes)
    return Outcome(case.source, Problem(case.first_path, reason), fatal)


class _Notes(logging.Handler):
    """Collects warnings of the readers for the record: nobody sees the log of a worker."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def store(task: Task, raw: RawArrays, notes: list[str]) -> None:
    """Clean and write the arrays of a case (which are used up), then its record.

    Raises:
        InputError: if there is no structure.
    """
    settings, case, folder = task.settings, task.case, Path(task.corpus)
    view = CanonicalView.of(raw.grid)
    shape = target_shape(view.shape_zyx, view.spacing_zyx_mm, settings.spacing_mm, settings.max_side)
    spacing = as_triple([s * n / m for s, n, m in zip(view.spacing_zyx_mm, view.shape_zyx, shape, strict=True)])
    layers, structures = _clean(raw, view, shape, spacing, task)
    notes += _same_voxels(layers, structures)
    key, several = f"{case.source}/{case.id}", len(raw.images) > 1
    kept = any(not s.reason for _, s in structures)
    images: list[dict[str, str]] = []
    while kept and raw.images:
        suffix = f"_{len(images):04d}" if several else ""
        channel, volume = raw.images.pop(0)  # freed as soon as it is written
        array = compact_image(view.to_canonical(volume.array))
        known = {"content_hash": content_hash(array), "image_hash": image_hash(array)}
        array = resize_image(array, shape)
        write_array(image_path(folder, key, suffix, settings.storage), array)
        images.append({"channel": suffix, "modality": channel, "dtype": str(array.dtype), **known})
    if kept:
        write_array(labels_path(folder, key, settings.storage), layers)
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
        "labels": [{"layer": layer, **vars(s)} for layer, s in structures],
        "path": case.first_path,
        "notes": notes,
    }
    at = record_path(folder, case.source, case.id)
    at.parent.mkdir(parents=True, exist_ok=True)
    write_text(at, json.dumps(record, separators=(",", ":")))


def _clean(
    raw: RawArrays, view: CanonicalView, shape: IntTriple, spacing: Triple, task: Task
) -> tuple[NDArray, list[tuple[int, Structure]]]:
    """The cleaned layers as one (layers, D, H, W) array, and (layer, structure) of all that is in them."""
    layers, structures = [], []
    for number, layer in enumerate(raw.layers):
        array, names = compact_layer(view.to_canonical(layer.array), layer.names)
        layer.array = np.empty(0)  # the reader's copy is not needed any more
        array, found = clean_layer(
            np.ascontiguousarray(resize_labels(array, shape)),
            names,
            spacing,
            task.settings.rules,
            instances=task.facts.label_kind == "instance",
            source=task.case.source,
            seed=f"{task.case.source}/{task.case.id}/{number}",
        )
        layers.append(array)
        structures += [(number, s) for s in found]
    if not structures:
        raise InputError(f"label is empty: no structure in {task.case.first_path}; leave the case out")
    return np.stack(layers) if len(layers) > 1 else layers[0][None], structures


def _same_voxels(layers: NDArray, structures: list[tuple[int, Structure]]) -> list[str]:
    """A note on every structure that is exactly an earlier one, which lies in another layer."""
    notes = []
    for at, (layer, one) in enumerate(structures):
        for other_layer, other in structures[at + 1 :]:
            alike = layer != other_layer and one.voxels > 0 and one.voxels == other.voxels
            alike = alike and (one.start_zyx, one.stop_zyx) == (other.start_zyx, other.stop_zyx)
            if alike and np.array_equal(layers[layer] == one.value, layers[other_layer] == other.value):
                notes.append(f"structures {one.name!r} and {other.name!r} are exactly the same voxels; check both")
    return notes


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
