"""The masks of all objects as one label map or as named segments, and the file formats of both.

Label maps (NIfTI, NRRD, MetaImage) are on the image's own grid. ``.seg.nrrd``, DICOM-SEG and RTSTRUCT also hold names
and colours, and their objects may overlap. The writers themselves are in ``volume/``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError, check_choice
from samed3d.geometry import EMPTY_REGION, CanonicalView, Region
from samed3d.inference.history import ObjectState, SessionState
from samed3d.inference.predictor import Canvas
from samed3d.masks import Cleaning
from samed3d.output import check_output
from samed3d.prompts import Mask, PackedMask
from samed3d.volume import Volume
from samed3d.volume.dicom_source import source_series
from samed3d.volume.dicom_writing import write_dicom_seg, write_rtstruct
from samed3d.volume.writing import MASK_FORMATS, Segment, write_seg_nrrd

LABEL_MAP_FORMATS = ("nifti", "nrrd", "mha")


def checked_format(path: str | Path, format: str | None = None) -> str:
    """The format of an output: the given one, or the one of the longest suffix that fits.

    Raises:
        InputError: for an unknown format, a suffix that is not the format's, or a folder that cannot be written to.
    """
    if format is not None:
        check_choice("format", format, MASK_FORMATS)
    known = sorted({suffix for suffixes in MASK_FORMATS.values() for suffix in suffixes})
    check_output(path, suffixes=MASK_FORMATS[format] if format else known)
    name = Path(path).name.lower()
    fitting = [kind for kind, suffixes in MASK_FORMATS.items() if name.endswith(suffixes)]
    return format or max(
        fitting, key=lambda kind: (max(len(s) for s in MASK_FORMATS[kind] if name.endswith(s)), kind == "dicom-seg")
    )


def segments_of(state: SessionState, volume: Volume) -> list[Segment]:
    """The objects as segments on the image's own grid, by id; those without a voxel are left out."""
    found = []
    for _, entry in sorted(state.objects.items()):
        if entry.step is None or entry.step.mask.region.is_empty:
            continue
        part = volume.view.to_stored(entry.step.mask.inside())
        region = volume.view.region_to_stored(entry.step.mask.region)
        mask = PackedMask.of_part(part, region, volume.grid.shape_zyx)
        found.append(Segment(entry.id, entry.name, entry.colour, mask, entry.code))
    return found


def notes_of(state: SessionState, volume: Volume) -> list[str]:
    """What reading the image decided, and a note on every object whose mask is exactly that of an earlier one."""
    notes, first = list(volume.notes), dict[PackedMask, ObjectState]()
    for _, entry in sorted(state.objects.items()):
        if entry.step is not None and not entry.step.mask.region.is_empty:
            other = first.setdefault(entry.step.mask, entry)
            if other is not entry:
                pair = f"{other.id} ({other.name}) and {entry.id} ({entry.name})"
                notes.append(f"objects {pair} are exactly the same voxels; in a label map only one of them is kept")
    return notes


def cleaned_mask(entry: ObjectState, volume: Volume, cleaning: Cleaning) -> Mask:
    """An object's mask after cleaning, on the image's own grid.

    Raises:
        InputError: if the object has no voxel, or none would be left.
    """
    region = EMPTY_REGION if entry.step is None else entry.step.mask.region
    if entry.step is None or region.is_empty:
        raise InputError(f"object {entry.id} has no voxel to clean; add a prompt first")
    view = volume.view
    region = region.expand(cleaning.margin(view.spacing_zyx_mm)).clip(view.shape_zyx)
    cleaned = cleaning.apply(entry.step.mask.on(region), view.spacing_zyx_mm)
    if not cleaned.any():
        raise InputError(f"cleaning would leave nothing of object {entry.id}; use smaller values")
    return Mask(PackedMask.of_part(view.to_stored(cleaned), view.region_to_stored(region), volume.grid.shape_zyx))


def export_segments(path: Path, kind: str, segments: list[Segment], volume: Volume, series: str | int | None) -> None:
    """Write named segments, at least one, as ``seg.nrrd``, ``dicom-seg`` or ``rtstruct``.

    For DICOM the volume's ``source`` is the folder of the series, and ``series`` says which of it was read.

    Raises:
        InputError: as ``write_seg_nrrd``, ``source_series`` and ``write_dicom_seg``.
    """
    if kind == "seg.nrrd":
        write_seg_nrrd(path, segments, volume.grid)
        return
    write = write_dicom_seg if kind == "dicom-seg" else write_rtstruct
    if volume.layout is not None and volume.layout.resampled:
        whole, on_slices = Region((0, 0, 0), volume.grid.shape_zyx), volume.layout.on_slices
        segments = [replace(s, mask=PackedMask.of(on_slices(s.mask.on(whole)))) for s in segments]
    write(path, segments, source_series(volume.source, series, volume.grid, volume.layout))


def label_map(
    state: SessionState, view: CanonicalView, canvas_of: Callable[[ObjectState], Canvas]
) -> tuple[NDArray[np.unsignedinteger], Region]:
    """All objects as one map of their ids, and the region of the stored array that it covers.

    Where objects overlap a locked one wins over others, then the more certain one (the higher logit, of ``canvas_of``,
    which is called only there), then the lower id.
    """
    highest = max(state.objects, default=0)
    regions = (entry.step.mask.region for entry in state.objects.values() if entry.step is not None)
    whole = functools.reduce(Region.union, regions, EMPTY_REGION)
    labels = np.zeros(whole.shape_zyx, dtype=np.uint8 if highest < 256 else np.uint16 if highest < 65536 else np.uint32)
    painted: dict[int, ObjectState] = {}
    for entry in sorted(state.objects.values(), key=lambda e: (not e.locked, e.id)):
        if entry.step is None or entry.step.mask.region.is_empty:
            continue
        for region in entry.step.mask.region.slabs():
            mask, part = entry.step.mask.on(region), labels[region.slices_in(whole)]
            overlap = mask & (part != 0)
            part[mask & ~overlap] = entry.id
            if not entry.locked:
                overlap &= ~np.isin(part, [number for number, other in painted.items() if other.locked])
            holders = part[overlap]
            own = canvas_of(entry).on_region(region).numpy()[overlap] if len(holders) else np.zeros(0)
            for number in np.unique(holders):
                held = part[overlap] == number
                other = canvas_of(painted[int(number)]).on_region(region).numpy()[overlap]
                holders[np.flatnonzero(held)[own[held] > other[held]]] = entry.id
            part[overlap] = holders
        painted[entry.id] = entry
    return view.to_stored(labels), view.region_to_stored(whole)
