"""DICOM-SEG and RTSTRUCT as masks on the grid of the image series they belong to.

A segmentation may be stored in any slice order, without its empty slices, and with overlapping segments; everything is
placed by the position that each frame states. ``scan_dicom`` tells which files of a folder belong together from their
headers alone. Reading the image itself is in ``volume/dicom.py``, filling contours in ``volume/contours.py``.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid, as_triple
from samed3d.volume.contours import fill_contours
from samed3d.volume.itk import silenced
from samed3d.volume.label_maps import resample_labels

if TYPE_CHECKING:
    from pydicom import Dataset

logger = logging.getLogger(__name__)

LABEL_MODALITIES = ("SEG", "RTSTRUCT")
_NOT_IMAGES = ("RTPLAN", "RTDOSE", "RTRECORD", "SR", "PR", "KO", "REG", "FID", "DOC", "PLAN", "RWV")
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
# A frame lies on the image's own voxels if its corners are this close to them (in voxels); otherwise it is resampled.
_ON_LATTICE = 0.25


@dataclass(frozen=True)
class DicomFile:
    """What the header of one DICOM file says about where it belongs.

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


def looks_like_dicom(path: Path) -> bool:
    """Whether a file carries the DICOM mark."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


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
    if modality in _NOT_IMAGES or (modality != "RTSTRUCT" and "Rows" not in data):
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


def series_identifier(folder: Path, uid: str) -> str:
    """What ``read_volume(folder, series=...)`` calls the image series with this UID.

    ITK lengthens a UID where a folder's series differ in size or orientation.

    Raises:
        InputError: if the series is not in the folder, or its slices do not form one stack.
    """
    import SimpleITK as sitk
    from pydicom import dcmread

    matching = []
    with silenced([]):
        for identifier in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder)):
            if identifier.startswith(uid):
                first = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), identifier)[0]
                if (
                    str(dcmread(first, stop_before_pixels=True, specific_tags=["SeriesInstanceUID"]).SeriesInstanceUID)
                    == uid
                ):
                    matching.append(identifier)
    if not matching:
        raise InputError(f"DICOM series {uid} cannot be read as a stack of images: {folder}")
    if len(matching) > 1:
        raise InputError(
            f"DICOM series {uid} holds {len(matching)} stacks of different size or orientation: {folder}; keep one of them"
        )
    return matching[0]


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
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise InputError(f"DICOM label is damaged or incomplete: {path} ({type(error).__name__}: {error})") from error


def _contoured(data: Dataset, grid: Grid) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    names = {
        int(roi.ROINumber): str(roi.get("ROIName", "") or f"ROI {roi.ROINumber}")
        for roi in data.StructureSetROISequence
    }
    for roi in data.get("ROIContourSequence", ()):
        name = names.get(int(roi.ReferencedROINumber), f"ROI {roi.ReferencedROINumber}")
        contours = [
            np.asarray(contour.ContourData, dtype=np.float64).reshape(-1, 3)
            for contour in roi.get("ContourSequence", ())
            if contour.get("ContourGeometricType", "CLOSED_PLANAR") in _CLOSED
        ]
        yield name, fill_contours([c for c in contours if len(c) >= 3], grid, name)


@dataclass(frozen=True)
class _Frame:
    """Where one frame of a SEG lies: LPS position of its first pixel, step per column and per row, mm; and what it
    shows.
    """

    number: int
    segment: int
    origin: NDArray
    column_step: NDArray
    row_step: NDArray
    spacing_between: float


def _segmented(data: Dataset, grid: Grid) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    names = {
        int(s.SegmentNumber): str(s.get("SegmentLabel", "") or f"segment {s.SegmentNumber}")
        for s in data.SegmentSequence
    }
    frames = _frames(data)
    kind = str(data.get("SegmentationType", "BINARY"))
    if kind == "LABELMAP":
        labels = _placed(data, frames, grid, np.uint16, 0)
        for number, name in names.items():
            if not (number == 0 or name.lower() == "background"):
                yield name, labels == number
        return
    threshold = 1
    if kind == "FRACTIONAL":
        threshold = (int(data.get("MaximumFractionalValue", 255)) + 1) // 2
        logger.warning("fractional segmentation: voxels of at least one half are taken")
    by_segment: dict[int, list[_Frame]] = defaultdict(list)
    for frame in frames:
        by_segment[frame.segment].append(frame)
    for number in sorted(by_segment):
        yield names.get(number, f"segment {number}"), _placed(data, by_segment[number], grid, np.bool_, threshold)


def _frames(data: Dataset) -> list[_Frame]:
    shared = data.SharedFunctionalGroupsSequence[0] if data.get("SharedFunctionalGroupsSequence") else {}
    found = []
    for number, own in enumerate(data.PerFrameFunctionalGroupsSequence):

        def group(keyword: str, own: Dataset = own) -> Dataset:
            return (own if keyword in own else shared)[keyword][0]

        measures = group("PixelMeasuresSequence")
        cosines = np.asarray(group("PlaneOrientationSequence").ImageOrientationPatient, dtype=np.float64)
        between_rows, between_columns = (float(v) for v in measures.PixelSpacing)
        has_segment = "SegmentIdentificationSequence" in own or "SegmentIdentificationSequence" in shared
        found.append(
            _Frame(
                number=number,
                segment=int(group("SegmentIdentificationSequence").ReferencedSegmentNumber) if has_segment else 0,
                origin=np.asarray(group("PlanePositionSequence").ImagePositionPatient, dtype=np.float64),
                column_step=cosines[:3] * between_columns,
                row_step=cosines[3:] * between_rows,
                spacing_between=float(measures.get("SpacingBetweenSlices", 0) or 0),
            )
        )
    return found


def _placed(data: Dataset, frames: list[_Frame], grid: Grid, kind: type, threshold: int) -> NDArray:
    """The frames as one (D, H, W) array on the image's grid: by index where the lattices coincide, else the nearest
    voxel.

    Args:
        data: The segmentation.
        frames: Which of its frames.
        grid: The image's grid.
        kind: Type of the result; ``np.bool_`` marks pixels of at least ``threshold``, others keep their value.
        threshold: See ``kind``.
    """
    to_ijk = np.linalg.inv(grid.affine_lps)
    rows, columns = int(data.Rows), int(data.Columns)
    placed: NDArray = np.zeros(grid.shape_zyx, dtype=kind)
    planes = _planes(data, [frame.number for frame in frames])
    elsewhere: list[tuple[_Frame, NDArray]] = []
    cut = 0
    for frame, pixels in zip(frames, planes, strict=True):
        values = (pixels >= threshold) if kind is np.bool_ else pixels
        start = to_ijk[:3, :3] @ frame.origin + to_ijk[:3, 3]
        steps = to_ijk[:3, :3] @ np.stack([frame.column_step, frame.row_step], axis=1)
        whole_start, whole_steps = np.rint(start), np.rint(steps)
        off = np.abs(start - whole_start) + np.abs(steps - whole_steps) @ np.array([columns - 1, rows - 1])
        if off.max() > _ON_LATTICE or np.linalg.matrix_rank(whole_steps) < 2:
            elsewhere.append((frame, values))
            continue
        at_row, at_column = np.nonzero(values)
        index = (whole_start[:, None] + whole_steps @ np.stack([at_column, at_row])).astype(np.intp)
        inside = ((index >= 0) & (index < np.array(grid.size_ijk)[:, None])).all(axis=0)
        cut += int(inside.size - inside.sum())
        i, j, k = index[:, inside]
        placed[k, j, i] = values[at_row[inside], at_column[inside]]
    if elsewhere:
        stack, stack_grid = _stacked(elsewhere, kind)
        resampled: NDArray = resample_labels(stack, stack_grid, grid).astype(kind)
        np.copyto(placed, resampled, where=resampled != 0)
        cut += int(stack.any() and not resampled.any())
    if cut and not placed.any():
        raise InputError("segmentation lies outside the image; it was drawn on another series")
    if cut:
        logger.warning("%d voxels of a segmentation lie outside its image and are cut off", cut)
    return placed


def _planes(data: Dataset, numbers: list[int]) -> Iterator[NDArray]:
    """The pixels of some frames, (rows, columns) each, one at a time."""
    from pydicom.pixels import iter_pixels

    if data.BitsAllocated != 1 or data.file_meta.TransferSyntaxUID.is_compressed:
        yield from iter_pixels(data, indices=numbers, raw=True)
        return
    # Frames of packed bits follow one another without padding, so one may begin inside a byte.
    stored = np.frombuffer(data.PixelData, dtype=np.uint8)
    rows, columns = int(data.Rows), int(data.Columns)
    for number in numbers:
        first = number * rows * columns
        bits = np.unpackbits(stored[first // 8 : -(-(first + rows * columns) // 8)], bitorder="little")
        yield bits[first % 8 :][: rows * columns].reshape(rows, columns)


def _stacked(planes: list[tuple[_Frame, NDArray]], kind: type) -> tuple[NDArray, Grid]:
    """Frames of a lattice of their own as a volume with its grid.

    Raises:
        InputError: if they are not parallel, or not evenly spaced.
    """
    first = planes[0][0]
    normal = np.cross(first.column_step, first.row_step)
    normal /= np.linalg.norm(normal)
    along = np.array([float(frame.origin @ normal) for frame, _ in planes])
    gaps = np.diff(np.unique(along.round(4)))
    between = first.spacing_between or (float(gaps.min()) if gaps.size else 1.0)
    slots = (along - along.min()) / between
    parallel = all(
        np.allclose([f.column_step, f.row_step], [first.column_step, first.row_step], atol=1e-4) for f, _ in planes
    )
    if not parallel or np.abs(slots - np.rint(slots)).max() > 0.1:
        raise InputError(
            "frames of the segmentation are not evenly spaced and are not on the image's voxels; resample it first"
        )
    lowest = planes[int(along.argmin())][0]
    stored = np.uint8 if kind is np.bool_ else kind
    stack = np.zeros((int(np.rint(slots.max())) + 1, *planes[0][1].shape), dtype=stored)
    for (_, values), slot in zip(planes, slots, strict=True):
        stack[int(np.rint(slot))] = values
    width, height = float(np.linalg.norm(first.column_step)), float(np.linalg.norm(first.row_step))
    direction = np.stack([first.column_step / width, first.row_step / height, normal], axis=1)
    spacing = as_triple([width, height, between])
    return stack, Grid(stack.shape, spacing, as_triple(lowest.origin), tuple(float(v) for v in direction.ravel()))
