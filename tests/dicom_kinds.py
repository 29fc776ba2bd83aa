"""Small DICOM image series, right and wrong: every kind is ``stack`` or ``enhanced`` with one thing changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID

from tests.dicom_trees import CT_IMAGE, _file, uid

ENHANCED = UID("1.2.840.10008.5.1.4.1.1.4.1")
SPACING = (0.8, 0.7, 2.0)
ORIGIN = np.array([-20.0, -15.0, 10.0])
SHAPE = (8, 10, 12)


def image(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> np.ndarray:
    """(D, H, W) int16 values of a CT."""
    return np.random.default_rng(seed).integers(-900, 900, shape).astype(np.int16)


def set_pixels(data: Dataset, array: np.ndarray, slope: float | None = 1, intercept: float | None = 0) -> None:
    """Store values of any integer type, with their scaling."""
    data.Rows, data.Columns = array.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * array.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(array.dtype.kind == "i")
    if slope is not None:
        data.RescaleSlope, data.RescaleIntercept = slope, intercept
    data.PixelData = array.tobytes()


def stack(
    folder: Path,
    array: np.ndarray | None = None,
    *,
    positions: Sequence[float] | None = None,
    shear: tuple[float, float] = (0.0, 0.0),
    axes: Sequence[float] = (1, 0, 0, 0, 1, 0),
    origin: np.ndarray = ORIGIN,
    series: str = "s",
    prefix: str = "im",
    change: Callable[[Any, int], None] | None = None,
) -> Path:
    """Write single-slice files.

    Args:
        folder: Where to.
        array: (D, H, W); ``image()`` by default.
        positions: Of the slices along the normal, mm.
        shear: How far each slice is shifted in plane (x, y) against the one before, mm.
        axes: ImageOrientationPatient.
        origin: Of the first slice.
        series: Gives the series UID.
        prefix: Of the file names.
        change: Called with each data set and its number before it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    array = image() if array is None else array
    row, column = np.reshape(axes, (2, 3)).astype(float)
    normal = np.cross(row, column)
    places = np.arange(len(array)) * SPACING[2] if positions is None else positions
    for k, plane in enumerate(array):
        path = folder / f"{prefix}{k:03d}.dcm"
        data = _file(path, CT_IMAGE, "CT", "P1", uid(series))
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = uid(str(path), prefix)
        data.FrameOfReferenceUID, data.SeriesDescription = uid("frame"), "Thorax"
        data.ImageType, data.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], k + 1
        place = origin + normal * places[k] + k * (shear[0] * row + shear[1] * column)
        data.ImagePositionPatient = [f"{v:.6f}" for v in place]
        data.ImageOrientationPatient = [f"{v:.8f}" for v in axes]
        data.PixelSpacing, data.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        set_pixels(data, plane)
        if change:
            change(data, k)
        data.save_as(path, enforce_file_format=True)
    return folder


def enhanced(
    path: Path,
    array: np.ndarray,
    order: Sequence[int],
    *,
    slopes: Sequence[float] | None = None,
    change: Callable[[Any, Any, int], None] | None = None,
) -> Path:
    """Write a multi-frame file.

    Args:
        path: The file.
        array: (D, H, W) stored values.
        order: Which slice each frame is.
        slopes: Of each slice; by default the file states a slope of 1 for all.
        change: Called with the data set, the functional groups of each frame and its number.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = _file(path, ENHANCED, "MR", "P1", uid("s"))
    data.FrameOfReferenceUID, data.NumberOfFrames = uid("frame"), len(order)
    shared, measures, plane = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
    plane.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    data.SharedFunctionalGroupsSequence, frames = [shared], []
    for number, k in enumerate(order):
        own, content, position, scaling = Dataset(), Dataset(), Dataset(), Dataset()
        content.StackID = "1"
        position.ImagePositionPatient = (ORIGIN + [0, 0, SPACING[2] * k]).tolist()
        scaling.RescaleSlope, scaling.RescaleIntercept, scaling.RescaleType = (
            1 if slopes is None else slopes[k],
            0,
            "US",
        )
        own.FrameContentSequence, own.PlanePositionSequence = [content], [position]
        own.PixelValueTransformationSequence = [scaling]
        if change:
            change(data, own, number)
        frames.append(own)
    data.PerFrameFunctionalGroupsSequence = frames
    set_pixels(data, np.stack([array[k] for k in order]), None)
    data.save_as(path, enforce_file_format=True)
    return path


def setting(**values: Any) -> Callable[[Any, int], None]:
    """A ``change`` that sets attributes of every slice; a function is given the slice's number, None deletes."""

    def change(data: Any, k: int) -> None:
        for keyword, value in values.items():
            found = value(k) if callable(value) else value
            if found is not None:
                setattr(data, keyword, found)
            elif keyword in data:
                delattr(data, keyword)

    return change
