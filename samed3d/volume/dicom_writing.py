"""Segments as DICOM: a SEG or an RTSTRUCT that refers, slice by slice, to the image series they were drawn on.

The frames and contours carry the positions of the series' own files, so any reader puts them back on the same voxels.
Reading both is in
``dicom_labels.py``; the outline of a mask is found in ``contours.py``. Needs pydicom, and highdicom for SEG:
``samed3d[dicom]``.
"""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.output import replacing
from samed3d.volume.contours import trace_contours
from samed3d.volume.dicom import slice_files
from samed3d.volume.writing import Segment

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription
    from pydicom import Dataset

_RTSTRUCT_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
# A slice's file and the image's grid must put its first pixel at one place, to this share of the smallest voxel edge.
_SAME_PLACE = 0.05
_PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
_STUDY = (
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyDescription",
)


def source_slices(folder: str | Path, series: str | int | None, grid: Grid) -> list[Dataset]:
    """The headers of the series that an image was read from, slice 0 first.

    Args:
        folder: Of the DICOM files.
        series: As given to ``read_volume``.
        grid: Of the image that was read.

    Raises:
        InputError: if the image is no DICOM series, a multi-frame file, or lies elsewhere than the grid says.
    """
    folder = Path(folder)
    if importlib.util.find_spec("pydicom") is None:
        raise InputError("writing DICOM needs pydicom and highdicom: pip install 'samed3d[dicom]'")
    if not folder.is_dir():
        raise InputError(
            f"DICOM can be written for an image that was read from a DICOM folder only, got {folder}; write .nii.gz or .seg.nrrd"
        )
    from pydicom import dcmread

    slices: list[Dataset] = [dcmread(file, stop_before_pixels=True) for file in slice_files(folder, series)]
    if len(slices) != grid.shape_zyx[0]:
        raise InputError(
            f"DICOM can be written for a series of single slices only, got {len(slices)} files for {grid.shape_zyx[0]} slices"
        )
    axes = np.array(grid.direction_lps).reshape(3, 3) * np.array(grid.spacing_xyz_mm)
    for k, header in enumerate(slices):
        expected = np.array(grid.origin_lps_mm) + axes[:, 2] * k
        off = float(np.linalg.norm(np.asarray(header.ImagePositionPatient, dtype=float) - expected))
        if off > _SAME_PLACE * min(grid.spacing_xyz_mm):
            raise InputError(
                f"DICOM slices must be evenly spaced, slice {k} of {folder} lies {off:.3g} mm from its place; write .nii.gz"
            )
    return slices


def write_dicom_seg(path: str | Path, segments: Sequence[Segment], slices: Sequence[Dataset]) -> None:
    """Write a binary DICOM-SEG; slices without any segment are left out, segments may overlap.

    Args:
        path: The file.
        segments: At least one that holds a voxel.
        slices: ``source_slices`` of the image.

    Raises:
        InputError: if no segment holds a voxel, highdicom is missing, or the file cannot be written.
    """
    kept = _holding_voxels(segments)
    if importlib.util.find_spec("highdicom") is None:
        raise InputError("writing DICOM-SEG needs highdicom: pip install 'samed3d[dicom]'")
    import highdicom as hd
    from pydicom.uid import generate_uid

    from samed3d import __version__

    first = min(s.mask.region.start_zyx[0] for s in kept)
    last = max(s.mask.region.stop_zyx[0] for s in kept)
    pixels = np.zeros((last - first, *kept[0].mask.shape_zyx[1:], len(kept)), dtype=np.uint8)
    for number, segment in enumerate(kept):
        z, y, x = segment.mask.region.slices
        pixels[z.start - first : z.stop - first, y, x, number] = segment.mask.inside()
    made = hd.seg.Segmentation(
        source_images=list(slices[first:last]),
        pixel_array=pixels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=[_described(number, segment) for number, segment in enumerate(kept, start=1)],
        series_instance_uid=generate_uid(),
        series_number=_new_series_number(slices),
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="samed3d",
        manufacturer_model_name="samed3d",
        software_versions=__version__,
        device_serial_number="0",
        series_description="Segmentation",
        omit_empty_frames=True,
    )
    with replacing(path) as partial:
        made.save_as(partial)


def _described(number: int, segment: Segment) -> SegmentDescription:
    import highdicom as hd
    from pydicom.sr.codedict import codes

    from samed3d import __version__

    algorithm = hd.AlgorithmIdentificationSequence(
        name="samed3d", family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=segment.name[:64] or f"segment {number}",
        segmented_property_category=codes.SCT.AnatomicalStructure,
        segmented_property_type=codes.SCT.AnatomicalStructure,  # nobody told which
        algorithm_type=hd.seg.SegmentAlgorithmTypeValues.SEMIAUTOMATIC,
        algorithm_identification=algorithm,
        display_color=hd.color.CIELabColor.from_rgb(*segment.rgb),
    )


def write_rtstruct(path: str | Path, segments: Sequence[Segment], slices: Sequence[Dataset], grid: Grid) -> None:
    """Write an RTSTRUCT with one ROI per segment; a hole is an outline inside another (even-odd), as radiotherapy
    programs read it.

    Args:
        path: The file.
        segments: At least one that holds a voxel.
        slices: ``source_slices`` of the image.
        grid: Of the image.

    Raises:
        InputError: if no segment holds a voxel, or the file cannot be written.
    """
    kept = _holding_voxels(segments)
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence as Items

    data = _structure_set(slices)
    data.StructureSetROISequence, data.ROIContourSequence, data.RTROIObservationsSequence = Items(), Items(), Items()
    for number, segment in enumerate(kept, start=1):
        roi, drawn, seen = Dataset(), Dataset(), Dataset()
        roi.ROINumber, roi.ReferencedFrameOfReferenceUID = number, slices[0].FrameOfReferenceUID
        roi.ROIName, roi.ROIGenerationAlgorithm = segment.name[:64] or f"segment {number}", "SEMIAUTOMATIC"
        drawn.ROIDisplayColor, drawn.ReferencedROINumber = list(segment.rgb), number
        drawn.ContourSequence = Items(_contours(segment, slices, grid))
        seen.ObservationNumber, seen.ReferencedROINumber, seen.RTROIInterpretedType, seen.ROIInterpreter = (
            number,
            number,
            "",
            "",
        )
        data.StructureSetROISequence.append(roi)
        data.ROIContourSequence.append(drawn)
        data.RTROIObservationsSequence.append(seen)
    with replacing(path) as partial:
        data.save_as(partial, enforce_file_format=True)


def _structure_set(slices: Sequence[Dataset]) -> Dataset:
    """An RTSTRUCT without structures for a series."""
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.sequence import Sequence as Items
    from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

    from samed3d import __version__

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(_RTSTRUCT_CLASS), generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = _RTSTRUCT_CLASS, meta.MediaStorageSOPInstanceUID, "RTSTRUCT"
    first = slices[0]
    for keyword in (*_PATIENT, *_STUDY):
        setattr(data, keyword, first.get(keyword, ""))
    if "SpecificCharacterSet" in first:
        data.SpecificCharacterSet = first.SpecificCharacterSet
    else:
        data.SpecificCharacterSet = "ISO_IR 192"
    data.SeriesInstanceUID, data.SeriesNumber, data.InstanceNumber = generate_uid(), _new_series_number(slices), 1
    data.Manufacturer, data.ManufacturerModelName, data.SoftwareVersions, data.OperatorsName = (
        "samed3d",
        "samed3d",
        __version__,
        "",
    )
    now = datetime.datetime.now()
    data.StructureSetLabel, data.StructureSetDate, data.StructureSetTime = (
        "Segmentation",
        f"{now:%Y%m%d}",
        f"{now:%H%M%S}",
    )
    data.FrameOfReferenceUID = first.FrameOfReferenceUID
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID, series.ContourImageSequence = (
        first.SeriesInstanceUID,
        Items([_reference(s) for s in slices]),
    )
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY_CLASS, first.StudyInstanceUID
    study.RTReferencedSeriesSequence = Items([series])
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = first.FrameOfReferenceUID, Items([study])
    data.ReferencedFrameOfReferenceSequence = Items([frame])
    return data


def _contours(segment: Segment, slices: Sequence[Dataset], grid: Grid) -> list[Dataset]:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence as Items

    axes = np.array(grid.direction_lps).reshape(3, 3) * np.array(grid.spacing_xyz_mm)
    low = segment.mask.region.start_zyx
    found = []
    for offset, plane in enumerate(segment.mask.inside()):
        for outline in trace_contours(plane):
            ijk = np.column_stack([outline + [low[2], low[1]], np.full(len(outline), low[0] + offset)])
            contour = Dataset()
            contour.ContourImageSequence = Items([_reference(slices[low[0] + offset])])
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(outline)
            contour.ContourData = [f"{v:.5f}" for v in (np.array(grid.origin_lps_mm) + ijk @ axes.T).ravel()]
            found.append(contour)
    return found


def _reference(header: Dataset) -> Dataset:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    return item


def _new_series_number(slices: Sequence[Dataset]) -> int:
    """A number that no series beside the image is likely to have."""
    return int(slices[0].get("SeriesNumber") or 0) + 1000


def _holding_voxels(segments: Sequence[Segment]) -> list[Segment]:
    kept = [s for s in segments if not s.mask.region.is_empty]
    if not kept:
        raise InputError("segmentation must hold a voxel, got empty masks only; add a prompt first")
    return kept
