"""Writing segments as DICOM: a SEG or an RTSTRUCT that refers, slice by slice, to the image series of its image.

The frames and contours carry the positions of the series' own files, so any reader puts them back on the same voxels.
"""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.output import replacing
from samed3d.volume.contours import trace_contours
from samed3d.volume.dicom import slice_files
from samed3d.volume.writing import Segment

if TYPE_CHECKING:
    from pydicom import Dataset

_RTSTRUCT_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
# A slice's file and the image's grid must put its first pixel at one place, to this share of the smallest voxel edge.
_SAME_PLACE = 0.05
_PATIENT_AND_STUDY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "AccessionNumber"),
    *("ReferringPhysicianName", "StudyDescription"),
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
            f"DICOM can be written for an image that was read from a DICOM folder only, got {folder}; write .nii.gz or "
            ".seg.nrrd"
        )
    from pydicom import dcmread

    slices: list[Dataset] = [dcmread(file, stop_before_pixels=True) for file in slice_files(folder, series)]
    if len(slices) != grid.shape_zyx[0]:
        raise InputError(
            f"DICOM can be written for a series of single slices only, got {len(slices)} files for "
            f"{grid.shape_zyx[0]} slices"
        )
    for k, header in enumerate(slices):
        expected = (grid.affine_lps @ [0, 0, k, 1])[:3]
        off = float(np.linalg.norm(np.asarray(header.ImagePositionPatient, dtype=float) - expected))
        if off > _SAME_PLACE * min(grid.spacing_xyz_mm):
            raise InputError(
                f"DICOM slices must be evenly spaced, slice {k} of {folder} lies {off:.3g} mm from its place; "
                "write .nii.gz"
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
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    from samed3d import __version__

    first = min(s.mask.region.start_zyx[0] for s in kept)
    last = max(s.mask.region.stop_zyx[0] for s in kept)
    pixels = np.zeros((last - first, *kept[0].mask.shape_zyx[1:], len(kept)), dtype=np.uint8)
    for number, segment in enumerate(kept):
        z, y, x = segment.mask.region.slices
        pixels[z.start - first : z.stop - first, y, x, number] = segment.mask.inside()
    algorithm = hd.AlgorithmIdentificationSequence(
        name="samed3d", family=codes.DCM.ArtificialIntelligence, version=__version__
    )
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=segment.name[:64] or f"segment {number}",
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.AnatomicalStructure,  # nobody stated which
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.SEMIAUTOMATIC,
            algorithm_identification=algorithm,
            display_color=hd.color.CIELabColor.from_rgb(*segment.rgb),
        )
        for number, segment in enumerate(kept, start=1)
    ]
    made = hd.seg.Segmentation(
        source_images=list(slices[first:last]),
        pixel_array=pixels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
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
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(_RTSTRUCT_CLASS), generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", _structure_set(slices), file_meta=meta, preamble=b"\0" * 128)
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    for number, segment in enumerate(kept, start=1):
        roi = _item(
            ROINumber=number,
            ROIName=segment.name[:64] or f"segment {number}",
            ROIGenerationAlgorithm="SEMIAUTOMATIC",
            ReferencedFrameOfReferenceUID=slices[0].FrameOfReferenceUID,
        )
        contours = _contours(segment, slices, grid)
        drawn = _item(ReferencedROINumber=number, ROIDisplayColor=list(segment.rgb), ContourSequence=contours)
        seen = _item(ObservationNumber=number, ReferencedROINumber=number, RTROIInterpretedType="", ROIInterpreter="")
        data.StructureSetROISequence.append(roi)
        data.ROIContourSequence.append(drawn)
        data.RTROIObservationsSequence.append(seen)
    with replacing(path) as partial:
        data.save_as(partial, enforce_file_format=True)


def _structure_set(slices: Sequence[Dataset]) -> Dataset:
    """An RTSTRUCT without structures for a series."""
    from pydicom.uid import generate_uid

    from samed3d import __version__

    first, now = slices[0], datetime.datetime.now()
    series = _item(
        SeriesInstanceUID=first.SeriesInstanceUID, ContourImageSequence=[_reference(header) for header in slices]
    )
    study = _item(
        ReferencedSOPClassUID=_STUDY_CLASS,
        ReferencedSOPInstanceUID=first.StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    frame = _item(FrameOfReferenceUID=first.FrameOfReferenceUID, RTReferencedStudySequence=[study])
    elements: dict[str, Any] = {keyword: first.get(keyword, "") for keyword in _PATIENT_AND_STUDY}
    elements |= {
        "SOPClassUID": _RTSTRUCT_CLASS,
        "SpecificCharacterSet": first.get("SpecificCharacterSet", "ISO_IR 192"),
        "Modality": "RTSTRUCT",
        "SeriesInstanceUID": generate_uid(),
        "SeriesNumber": _new_series_number(slices),
        "InstanceNumber": 1,
        "Manufacturer": "samed3d",
        "ManufacturerModelName": "samed3d",
        "SoftwareVersions": __version__,
        "OperatorsName": "",
        "StructureSetLabel": "Segmentation",
        "StructureSetDate": f"{now:%Y%m%d}",
        "StructureSetTime": f"{now:%H%M%S}",
        "FrameOfReferenceUID": first.FrameOfReferenceUID,
        "ReferencedFrameOfReferenceSequence": [frame],
        "StructureSetROISequence": [],
        "ROIContourSequence": [],
        "RTROIObservationsSequence": [],
    }
    return _item(**elements)


def _contours(segment: Segment, slices: Sequence[Dataset], grid: Grid) -> list[Dataset]:
    to_lps_mm = grid.affine_lps
    low = segment.mask.region.start_zyx
    found = []
    for k, plane in enumerate(segment.mask.inside(), start=low[0]):
        for outline in trace_contours(plane):
            ijk = np.column_stack([outline + [low[2], low[1]], np.full(len(outline), k)])
            corners_lps_mm = ijk @ to_lps_mm[:3, :3].T + to_lps_mm[:3, 3]
            contour = _item(
                ContourImageSequence=[_reference(slices[k])],
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=len(outline),
                ContourData=[f"{v:.5f}" for v in corners_lps_mm.ravel()],
            )
            found.append(contour)
    return found


def _item(**elements: Any) -> Dataset:
    """A DICOM data set with these elements, by keyword."""
    from pydicom.dataset import Dataset

    item = Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return item


def _reference(header: Dataset) -> Dataset:
    return _item(ReferencedSOPClassUID=header.SOPClassUID, ReferencedSOPInstanceUID=header.SOPInstanceUID)


def _new_series_number(slices: Sequence[Dataset]) -> int:
    """A number that no series beside the image is likely to have."""
    return int(slices[0].get("SeriesNumber") or 0) + 1000


def _holding_voxels(segments: Sequence[Segment]) -> list[Segment]:
    kept = [s for s in segments if not s.mask.region.is_empty]
    if not kept:
        raise InputError("segmentation must hold a voxel, got empty masks only; add a prompt first")
    return kept
