"""Volumes: read NIfTI, NRRD, MetaImage and DICOM folders into an array with its grid, and write masks on that grid.

An image that cannot be used is refused here with an ``InputError``, so that all other code can rely on its input.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from samed3d.errors import InputError
from samed3d.geometry import RAS_DIRECTION, CanonicalView, Grid, as_triple
from samed3d.output import check_input
from samed3d.volume.dicom import read_dicom
from samed3d.volume.dicom_headers import looks_like_dicom
from samed3d.volume.dicom_series import Layout
from samed3d.volume.files import check_dimensions, checked_array, read_file
from samed3d.volume.itk import SUFFIXES, suffix_of
from samed3d.volume.writing import write_mask, write_volume

__all__ = ["SUFFIXES", "Volume", "read_volume", "write_mask", "write_volume"]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Volume:
    """One image and its grid.

    Attributes:
        array: (D, H, W) intensities in the file's own type after its scaling (float64 becomes float32); finite, not
            constant.
        grid: Shape, spacing, origin and direction as the file states them.
        source: Where it came from, for messages and reports.
        modality: As the DICOM tag, a data set or the user states it (``"CT"``, ``"MR"``, ...); empty if nobody does.
        notes: What the user must know of how the file was read, one sentence each.
        layout: Where the slices of a DICOM series lie on the grid; SEG and RTSTRUCT refer to them.
    """

    array: NDArray
    grid: Grid
    source: str
    modality: str = ""
    notes: tuple[str, ...] = ()
    layout: Layout | None = field(default=None, repr=False)

    @classmethod
    def from_array(
        cls,
        array: NDArray,
        *,
        spacing_mm: float | Sequence[float] | None = None,
        affine_ras: ArrayLike | None = None,
        modality: str = "",
        source: str = "array",
    ) -> Volume:
        """A volume from a NumPy array.

        Args:
            array: (D, H, W) = z, y, x intensities; finite, not constant. Not copied unless its type must change.
            spacing_mm: Voxel edge along i, j, k (x first), or one number for all three; by default 1. The axes run to
                the right, anterior and superior.
            affine_ras: Instead of ``spacing_mm``, the 4x4 matrix from i, j, k to RAS mm, as NIfTI has it.
            modality: See ``Volume``.
            source: See ``Volume``.

        Raises:
            InputError: if array, spacing or affine cannot be used, or both spacing and affine are given.
        """
        if spacing_mm is not None and affine_ras is not None:
            raise InputError("give spacing_mm or affine_ras, not both")
        try:
            array = np.asarray(array)
            spacing = [1.0] if spacing_mm is None else np.atleast_1d(spacing_mm).astype(np.float64).tolist()
        except (TypeError, ValueError) as error:  # such as lists of different lengths
            raise InputError(f"array and spacing_mm must be numbers, got {type(array).__name__}: {error}") from error
        if array.ndim != 3 or array.dtype.kind not in "biuf" or not array.size:
            raise InputError(f"array must be numbers (D, H, W), got {array.dtype} of shape {array.shape}")
        if array.dtype.kind == "b" or array.dtype == np.float16:
            array = array.astype(np.uint8 if array.dtype.kind == "b" else np.float32)
        shape = (array.shape[0], array.shape[1], array.shape[2])
        if affine_ras is not None:
            grid = Grid.from_affine_ras(shape, affine_ras)
        else:
            if len(spacing) not in (1, 3):
                raise InputError(f"spacing_mm must be one number or three, got {spacing_mm}")
            grid = Grid(shape, as_triple(spacing * (3 // len(spacing))), direction_lps=RAS_DIRECTION)
        check_dimensions(grid.size_ijk, grid.spacing_xyz_mm, source)
        array, notes = checked_array(array, source)
        return cls(array, grid, source, modality, notes)

    @cached_property
    def view(self) -> CanonicalView:
        """How to see ``array`` in canonical axis order."""
        return CanonicalView.of(self.grid)


def read_volume(
    path: str | Path,
    *,
    channel: int | None = None,
    series: str | int | None = None,
    modality: str | None = None,
    untilt: bool = False,
) -> Volume:
    """Read an image file, or one series of a DICOM folder.

    Args:
        path: ``.nii .nii.gz .nrrd .mha .mhd``, a folder of DICOM slices, or a multi-frame DICOM file.
        channel: Which channel (0-based) of an RGB or vector image, or which volume of a 4D image.
        series: Which series of a DICOM folder: its UID, or its number in the list that the error message gives.
        modality: What the image is, such as ``"CT"`` or ``"MR"``; None takes a DICOM series' own tag and leaves the
            modality of a file unstated.
        untilt: Resample DICOM slices that are tilted or unevenly spaced by their positions, instead of refusing them.

    Raises:
        InputError: if the image is missing, damaged, not 3D, has several channels or series and none was picked, holds
            NaN or infinite voxels, is constant, or has a spacing that is not positive.
    """
    check_input(path, "image")
    path = Path(path)
    logger.info("reading %s", path)
    tag, layout = "", None
    if path.is_dir() or (suffix_of(path) not in SUFFIXES and looks_like_dicom(path)):
        array, tag, layout = read_dicom(path, series, channel, untilt)
        grid, notes = layout.grid, layout.notes
    elif series is not None:
        raise InputError(f"--series picks from a DICOM folder, got a file: {path}")
    else:
        array, grid, notes = read_file(path, channel)
    array, found = checked_array(array, path)
    notes += found
    volume = Volume(array, grid, str(path), tag if modality is None else modality, notes, layout)
    for note in notes:
        logger.warning("%s: %s", path, note)
    logger.info("read %s: %s voxels (i, j, k), %s", path.name, volume.grid.size_ijk, array.dtype)
    return volume
