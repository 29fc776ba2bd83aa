"""What all of this package needs around ITK: the suffixes, its messages kept off the terminal, its exceptions made
readable.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
    """The telling line of an ITK exception, without its source file and addresses; what the library printed goes
    first.
    """
    lines = [
        line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception thrown")
    ]
    line = next((text for text in [*said, *reversed(lines)]), type(error).__name__)
    return line.split("ERROR: ")[-1].strip()


def suffix_of(path: Path) -> str:
    """The suffix of an image path in lower case, ``.nii.gz`` as one."""
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s)), path.suffix.lower())


def grow_region(array: NDArray, seeds_zyx: Sequence[tuple[int, int, int]], multiplier: float) -> NDArray[np.uint8]:
    """ITK's confidence-connected region growing: voxels connected to the seeds and within ``multiplier`` deviations of
    their mean.

    Args:
        array: (D, H, W) intensities.
        seeds_zyx: Voxels inside the structure.
        multiplier: Width of the accepted interval in standard deviations.

    Returns:
        (D, H, W) uint8, 0 or 1.
    """
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array.astype(np.float32, copy=False))
    seeds = [(int(x), int(y), int(z)) for z, y, x in seeds_zyx]
    grown = sitk.ConfidenceConnected(
        image, seeds, numberOfIterations=2, multiplier=multiplier, initialNeighborhoodRadius=2, replaceValue=1
    )
    return sitk.GetArrayFromImage(grown).astype(np.uint8)
