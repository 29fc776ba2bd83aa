"""What reading with ITK needs: suffixes, its messages kept off the terminal, its exceptions made readable, headers."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid

if TYPE_CHECKING:
    import SimpleITK as sitk

logger = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
NIFTI_SUFFIXES = (".nii.gz", ".nii")

# There is one stderr: two threads that replaced it at once would put back each other's.
_STDERR = threading.RLock()


@contextmanager
def silenced(said: list[str]) -> Iterator[None]:
    """Keep what ITK's libraries print on stderr off the terminal; its lines are added to ``said`` and logged for
    debugging.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.GlobalWarningDisplayOff()
    with _STDERR, tempfile.TemporaryFile() as caught:
        saved = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            lines = caught.read().decode(errors="replace").splitlines()
            said += [line.strip() for line in lines if line.strip()]
            for line in lines:
                logger.debug("ITK: %s", line)


def itk_reason(error: BaseException, said: Sequence[str] = ()) -> str:
    """The one informative line of an ITK exception, without source file and addresses; what the library printed goes
    first.
    """
    lines = [
        line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception thrown")
    ]
    told = [line for line in lines if "ERROR: " in line and not line.endswith(":")]
    line = next((text for text in [*said, *told, *reversed(lines)]), type(error).__name__)
    return re.sub(r"\w+\(0x[0-9a-f]+\): ", "", line.split("ERROR: ")[-1]).strip()


def suffix_of(path: Path) -> str:
    """The suffix of an image path in lower case, ``.nii.gz`` as one."""
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s)), path.suffix.lower())


def open_header(path: Path, shown: str | Path = "") -> sitk.ImageFileReader:
    """An ITK reader that has read the header of an image file, and no voxel.

    Args:
        path: The file.
        shown: How messages name it; the path by default.

    Raises:
        InputError: if it is not an image, or its header is damaged.
    """
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    said: list[str] = []
    try:
        with silenced(said):
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(
            f"not an image, or its header is damaged: {shown or path} ({itk_reason(error, said)})"
        ) from error
    return reader


def array_of(image: sitk.Image) -> NDArray:
    """The voxels of an ITK image, (D, H, W), without a copy; the array keeps the image."""
    import SimpleITK as sitk

    memory = sitk.GetArrayViewFromImage(image).__array_interface__
    owner = SimpleNamespace(__array_interface__=memory | {"data": (memory["data"][0], False)}, image=image)
    return np.asarray(owner)


def grid_of(image: sitk.Image) -> Grid:
    """The grid of an ITK image, bit for bit."""
    return Grid(
        shape_zyx=(image.GetDepth(), image.GetHeight(), image.GetWidth()),
        spacing_xyz_mm=image.GetSpacing(),
        origin_lps_mm=image.GetOrigin(),
        direction_lps=image.GetDirection(),
    )
