"""Masks as files: which format a path means, and the objects of a scene as named segments.

Label maps (NIfTI, NRRD, MetaImage) are on the image's own grid; ``.seg.nrrd``, DICOM-SEG and RTSTRUCT also carry names
and colours, and objects may overlap in them. The writing itself is in ``volume/``. Used by ``results.py`` and the
command line.
"""

from __future__ import annotations

from pathlib import Path

from samed3d.errors import InputError
from samed3d.inference.scene import Scene
from samed3d.output import check_output
from samed3d.prompts import PackedMask
from samed3d.volume import Volume
from samed3d.volume.dicom_writing import source_slices, write_dicom_seg, write_rtstruct
from samed3d.volume.writing import Segment, write_seg_nrrd

FORMATS = {
    "nifti": (".nii.gz", ".nii"),
    "nrrd": (".nrrd",),
    "mha": (".mha", ".mhd"),
    "seg.nrrd": (".seg.nrrd",),
    "dicom-seg": (".dcm",),
    "rtstruct": (".dcm",),
}
"""Suffixes by format; the first format whose suffix fits is meant where none is named."""
LABEL_MAP_FORMATS = ("nifti", "nrrd", "mha")


def checked_format(path: str | Path, format: str | None = None) -> str:
    """The format that a path is to be written in.

    Raises:
        InputError: for an unknown format, a suffix that is not the format's, or a folder that cannot be written to.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    check_output(
        path, suffixes=FORMATS[format] if format else sorted({s for suffixes in FORMATS.values() for s in suffixes})
    )
    name = Path(path).name.lower()
    fitting = [kind for kind, suffixes in FORMATS.items() if name.endswith(suffixes)]
    return format or max(
        fitting, key=lambda kind: (max(len(s) for s in FORMATS[kind] if name.endswith(s)), kind == "dicom-seg")
    )


def segments_of(scene: Scene, volume: Volume) -> list[Segment]:
    """The objects as segments on the image's own grid, by id; those without a voxel are left out."""
    found = []
    for _, track in sorted(scene.tracks.items()):
        if track.step is None or track.step.mask.region.is_empty:
            continue
        part = volume.view.to_stored(track.step.mask.inside())
        region = volume.view.region_to_stored(track.step.mask.region)
        found.append(
            Segment(track.id, track.name, track.colour, PackedMask.of_part(part, region, volume.grid.shape_zyx))
        )
    return found


def export_segments(path: Path, kind: str, segments: list[Segment], volume: Volume, series: str | int | None) -> None:
    """Write named segments.

    Args:
        path: The file.
        kind: ``seg.nrrd``, ``dicom-seg`` or ``rtstruct``.
        segments: At least one.
        volume: The image; for DICOM its ``source`` is the folder of the series.
        series: Which series of that folder was read.

    Raises:
        InputError: as ``write_seg_nrrd``, ``source_slices`` and ``write_dicom_seg``.
    """
    if kind == "seg.nrrd":
        write_seg_nrrd(path, segments, volume.grid)
        return
    slices = source_slices(volume.source, series, volume.grid)
    if kind == "dicom-seg":
        write_dicom_seg(path, segments, slices)
    else:
        write_rtstruct(path, segments, slices, volume.grid)
