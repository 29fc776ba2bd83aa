"""Volumes: read NIfTI, NRRD, MetaImage and DICOM folders into an array with its grid, and write masks on that same
grid.

Every way in which an image can be unfit is one ``InputError`` here, so that nothing behind this package has to doubt
its input. SimpleITK is imported inside the functions that need it. Not here: resampling and normalising, which touch
only a crop (``crops.py``). Read
``geometry.py`` before this file, ``volume/files.py`` for what is checked, ``crops.py`` next.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import CanonicalView, Grid
from samed3d.volume.dicom import read_dicom
from samed3d.volume.files import checked_array, read_file
from samed3d.volume.itk import SUFFIXES, grow_region
from samed3d.volume.writing import write_mask, write_volume

__all__ = ["SUFFIXES", "Volume", "grow_region", "read_volume", "write_mask", "write_volume"]

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Volume:
    """One image with its place in space.

    Attributes:
        array: (D, H, W) intensities in the file's own type after its scaling (float64 becomes float32); finite, not
            constant.
        grid: Shape, spacing, origin and direction as the file states them.
        source: Where it came from, for messages and reports.
    """

    array: NDArray
    grid: Grid
    source: str

    @cached_property
    def view(self) -> CanonicalView:
        """How to see ``array`` in canonical axis order."""
        return CanonicalView.of(self.grid)


def read_volume(path: str | Path, *, channel: int | None = None, series: str | int | None = None) -> Volume:
    """Read an image file, or one series of a DICOM folder.

    Args:
        path: ``.nii .nii.gz .nrrd .mha .mhd`` or a folder of DICOM slices.
        channel: Which channel (0-based) of an RGB or vector image, or which volume of a 4D image.
        series: Which series of a DICOM folder: its UID, or its number in the list that the error message gives.

    Raises:
        InputError: if the image is missing, damaged, not 3D, has several channels or series and none was picked, holds
            NaN or infinite voxels, is constant, or has a spacing that is not positive.
    """
    path = Path(path)
    logger.info("reading %s", path)
    if path.is_dir():
        image = read_dicom(path, series, channel)
    elif not path.exists():
        raise InputError(f"image does not exist: {path}")
    elif series is not None:
        raise InputError(f"--series picks from a DICOM folder, got a file: {path}")
    else:
        image = read_file(path, channel)
    grid = Grid(
        shape_zyx=(image.GetDepth(), image.GetHeight(), image.GetWidth()),
        spacing_xyz_mm=image.GetSpacing(),
        origin_lps_mm=image.GetOrigin(),
        direction_lps=image.GetDirection(),
    )
    volume = Volume(checked_array(image, path), grid, str(path))
    logger.info("read %s: %s voxels (i, j, k), %s", path.name, grid.size_ijk, volume.array.dtype)
    return volume
