"""Reading DICOM-SEG and RTSTRUCT as masks on the grid of the image series they belong to, placed by position.

``scan_dicom`` lists the DICOM files of a folder with what their headers say about which belong together.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid, Region, bounding_region
from samed3d.volume.contours import PLANE_TOLERANCE, fill_contours
from samed3d.volume.dicom_headers import LABEL_MODALITIES, NOT_IMAGES, looks_like_dicom
from samed3d.volume.label_maps import resample_labels

if TYPE_CHECKING:
    from pydicom import Dataset

logger = logging.getLogger(__name__)

_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")


@dataclass(frozen=True)
class DicomFile:
    """The attributes of one DICOM file by which files belong together.

    Attributes:
        path: The file.
        modality: "CT", "MR", ..., "SEG" or "RTSTRUCT".
        patient: Patient ID, possibly empty.
        series: Series instance UID.
        frame_of_reference: UID of its coordinate system, possibly empty.
        refers_to: For SEG and RTSTRUCT, the image series it says it was drawn on, possibly none.
    """

    path: Path
    modality: str
    patient: str
    series: str
    frame_of_reference: str
    refers_to: tuple[str, ...]


def scan_dicom(folder: Path) -> tuple[list[DicomFile], list[tuple[Path, str]]]:
    """Headers of all images, SEGs and RTSTRUCTs below a folder, sorted by path; and files that should be DICOM but
    cannot be read.
    """
    found: list[DicomFile] = []
    bad: list[tuple[Path, str]] = []
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(root, name)
            if name.startswith(".") or name.upper() == "DICOMDIR":
                continue
            if not looks_like_dicom(path):
                if path.suffix.lower() == ".dcm":
                    bad.append((path, "not a DICOM file although its name ends in .dcm"))
                continue
            try:
                header = _header(path)
            except Exception as error:  # a damaged header makes the parser raise almost anything
                bad.append((path, f"DICOM header is damaged ({type(error).__name__}: {error})"))
                continue
            if header is not None:
                found.append(header)
    return found, bad


def _header(path: Path) -> DicomFile | None:
    """None for what is neither image nor label (plans, doses, reports)."""
    from pydicom import dcmread

    wanted = ["Modality", "PatientID", "SeriesInstanceUID", "FrameOfReferenceUID", "Rows"]
    references = ["ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"]
    data = dcmread(path, stop_before_pixels=True, specific_tags=wanted)
    modality = str(data.get("Modality", ""))
    if modality in NOT_IMAGES or (modality != "RTSTRUCT" and "Rows" not in data):
        return None
    refers_to: list[str] = []
    frame = str(data.get("FrameOfReferenceUID", ""))
    if modality in LABEL_MODALITIES:
        data = dcmread(path, stop_before_pixels=True, specific_tags=wanted + references)
        refers_to += [str(item.SeriesInstanceUID) for item in data.get("ReferencedSeriesSequence", ())]
        for reference in data.get("ReferencedFrameOfReferenceSequence", ()):
            frame = frame or str(reference.get("FrameOfReferenceUID", ""))
            for study in reference.get("RTReferencedStudySequence", ()):
                refers_to += [str(item.SeriesInstanceUID) for item in study.get("RTReferencedSeriesSequence", ())]
    patient, series = str(data.get("PatientID", "")).strip(), str(data.get("SeriesInstanceUID", ""))
    return DicomFile(path, modality, patient, series, frame, tuple(dict.fromkeys(refers_to)))


def read_dicom_labels(path: Path, grid: Grid) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Each structure of a DICOM-SEG or RTSTRUCT file as a mask on an image's grid, one at a time; empty structures are
    left out.

    Args:
        path: The file.
        grid: Grid of the image it belongs to.

    Yields:
        (name, (D, H, W) mask); masks of one file may overlap.

    Raises:
        InputError: if the file is damaged, or lies outside the image.
    """
    from pydicom import dcmread

    try:
        data = dcmread(path)
        modality = str(data.Modality)
    except Exception as error:  # a damaged file makes the parser raise almost anything
        raise InputError(f"DICOM label cannot be read: {path} ({type(error).__name__}: {error})") from error
    if modality not in LABEL_MODALITIES:
        raise InputError(f"DICOM label must be SEG or RTSTRUCT, got {modality}: {path}")
    masks = _contoured(data, grid) if modality == "RTSTRUCT" else _segmented(data, grid)
    try:
        for name, mask in masks:
            if mask.any():
                yield name, mask
            else:
                logger.info("structure %r of %s holds no voxel of the image", name, path)
    except InputError as error:
        raise InputError(f"{error}: {path}") from error
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"DICOM label is damaged or incomplete: {path} ({type(error).__name__}: {error})") from error


def _contoured(data: Dataset, grid: Grid) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    names = {
        int(roi.ROINumber): str(roi.get("ROIName", "") or f"ROI {roi.ROINumber}")
        for roi in data.StructureSetROISequence
    }
    for roi in data.get("ROIContourSequence", ()):
        name = names.get(int(roi.ReferencedROINumber), f"ROI {roi.ReferencedROINumber}")
        contours = roi.get("ContourSequence", ())
        kinds = [str(contour.get("ContourGeometricType") or _CLOSED[0]) for contour in contours]
        closed = [
            np.asarray(contour.get("ContourData") or [], dtype=np.float64).reshape(-1, 3)
            for contour, kind in zip(contours, kinds, strict=True)
            if kind in _CLOSED
        ]
        left_out = Counter(f"of type {kind}" for kind in kinds if kind not in _CLOSED)
        yield name, fill_contours(closed, grid, name, exclusive_or=_CLOSED[1] in kinds, left_out=left_out)


def _segmented(data: Dataset, grid: Grid) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    import highdicom as hd

    positions = len(data.PerFrameFunctionalGroupsSequence)
    frames = int(data.get("NumberOfFrames", 1))
    if positions != frames:
        raise ValueError(f"it states {positions} positions for {frames} frames")
    found = hd.seg.Segmentation.from_dataset(data, copy=False)
    names = {int(s.SegmentNumber): str(s.get("SegmentLabel", "")) for s in data.SegmentSequence}
    kind = str(data.get("SegmentationType", "BINARY"))
    combined = None
    if kind == "LABELMAP":
        names = {n: name for n, name in names.items() if n != 0 and name.lower() != "background"}
        combined = found.get_volume(combine_segments=True)
    elif kind == "FRACTIONAL":
        logger.warning("fractional segmentation: voxels of at least one half are taken")
    for number, name in sorted(names.items()):
        volume = combined or found.get_volume(segment_numbers=[number])
        mask = volume.array == number if combined else volume.array[..., 0] >= 0.5
        yield name or f"segment {number}", _placed(mask, volume.affine, grid)


def _placed(mask: NDArray[np.bool_], affine_lps: NDArray, grid: Grid) -> NDArray[np.bool_]:
    """A mask on the image's grid by position, nearest voxel.

    Args:
        mask: (D, H, W).
        affine_lps: From its (slice, row, column) indices to patient coordinates, mm.
        grid: The image's grid.

    Raises:
        InputError: if all of it lies outside the image, or between its slices.
    """
    placed = np.zeros(grid.shape_zyx, dtype=bool)
    filled = bounding_region(mask)
    if filled.is_empty:
        return placed
    own = Grid.from_affine_ras(mask.shape, np.diag([-1, -1, 1, 1]) @ affine_lps[:, [2, 1, 0, 3]])
    ends = zip(filled.start_zyx[::-1], filled.stop_zyx[::-1], strict=True)
    corners = np.array([(*corner, 1) for corner in itertools.product(*((a, b - 1) for a, b in ends))])
    to_grid = np.linalg.inv(grid.affine_lps) @ own.affine_lps
    ijk = (corners @ to_grid.T)[:, 2::-1]
    low, high = np.floor(ijk.min(axis=0)).astype(int), np.ceil(ijk.max(axis=0)).astype(int) + 1
    under = Region(tuple(low.tolist()), tuple(high.tolist())).clip(grid.shape_zyx)
    if not under.is_empty:
        part = resample_labels(mask[filled.slices].astype(np.uint8), own.part(filled), grid.part(under))
        placed[under.slices] = part.astype(bool)
    if not placed.any():
        raise InputError("segmentation lies outside the image; it was drawn on another series")
    planes = [(i, j, k, 1) for i, j, *_ in corners for k in range(filled.start_zyx[0], filled.stop_zyx[0])]
    along = (np.array(planes) @ to_grid.T)[:, int(np.abs(to_grid[:3, 2]).argmax())]
    if (off := float(np.abs(along - np.rint(along)).max())) > PLANE_TOLERANCE:
        raise InputError(
            f"segmentation must lie on the slices of the image, it is {off:.2f} slices away; it was drawn on another "
            "series, or needs to be resampled"
        )
    if (ijk < -0.5).any() or (ijk >= np.array(grid.shape_zyx) - 0.5).any():
        logger.warning("part of a segmentation lies outside its image and is cut off")
    return placed
