"""A tiny DICOM tree: an image series per folder, RTSTRUCT by hand with pydicom, DICOM-SEG by highdicom (not by the code
under test)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from tests.conftest import rotation_matrix

CT_IMAGE = UID("1.2.840.10008.5.1.4.1.1.2")
RTSTRUCT = UID("1.2.840.10008.5.1.4.1.1.481.3")


def uid(*entropy: str) -> str:
    return generate_uid(entropy_srcs=list(entropy))


def _file(path: Path, sop_class: UID, modality: str, patient: str, series: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = uid(str(path))
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = sop_class, meta.MediaStorageSOPInstanceUID
    data.PatientID, data.PatientName, data.PatientBirthDate, data.PatientSex = patient, "", "", ""
    data.Modality, data.SeriesInstanceUID, data.StudyInstanceUID = modality, series, uid(patient, "study")
    data.StudyDate, data.StudyTime, data.StudyID, data.AccessionNumber, data.ReferringPhysicianName = (
        "20200101",
        "101010",
        "1",
        "",
        "",
    )
    data.SeriesNumber, data.InstanceNumber, data.Manufacturer = 1, 1, "none"
    return data


def image_series(
    folder: Path,
    array: np.ndarray,
    *,
    patient: str = "P1",
    name: str = "a",
    spacing: tuple[float, float, float] = (0.8, 0.7, 2.5),
) -> str:
    """Write (D, H, W) int16 as a CT series of oblique slices, named so that file order is not slice order; returns its
    UID.

    Args:
        spacing: Of columns, rows and slices (x, y, z), mm.
    """
    folder.mkdir(parents=True, exist_ok=True)
    series, frame = uid(patient, name), uid(patient, "frame", name)
    direction = rotation_matrix((10.0, -20.0, 35.0))
    origin = np.array([-101.3, 57.7, 1.1])
    for k, plane in enumerate(array):
        path = folder / f"{(k * 7) % 10:02d}_{k}.dcm"
        data = _file(path, CT_IMAGE, "CT", patient, series)
        data.FrameOfReferenceUID, data.PositionReferenceIndicator = frame, ""
        data.ImageType, data.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], k + 1
        data.ImagePositionPatient = [f"{v:.8f}" for v in origin + direction[:, 2] * spacing[2] * k]
        data.ImageOrientationPatient = [f"{v:.10f}" for v in (*direction[:, 0], *direction[:, 1])]
        data.PixelSpacing, data.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        data.Rows, data.Columns = plane.shape
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
        data.RescaleIntercept, data.RescaleSlope, data.KVP, data.AcquisitionNumber = 0, 1, None, 1
        data.PixelData = plane.astype("<i2").tobytes()
        data.save_as(path, enforce_file_format=True)
    return series


def slices_of(folder: Path) -> list[Dataset]:
    return sorted((pydicom.dcmread(p) for p in folder.glob("*.dcm")), key=lambda d: int(d.InstanceNumber))


def structure_set(
    path: Path, series_folder: Path, contours_ijk: dict[str, list[np.ndarray]], *, refers_to: str | None = ""
) -> Path:
    """Write an RTSTRUCT.

    Args:
        path: Where to.
        series_folder: The image series that positions refer to.
        contours_ijk: Name to polygons (N, 3) in voxel indices of that series.
        refers_to: Series UID that it names; "" for that of ``series_folder``, None to name none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    slices = slices_of(series_folder)
    first, patient = slices[0], str(slices[0].PatientID)
    data = _file(path, RTSTRUCT, "RTSTRUCT", patient, uid(str(path), "series"))
    data.StructureSetLabel, data.StructureSetDate, data.StructureSetTime = "plan", "20200101", "101010"
    frame = Dataset()
    frame.FrameOfReferenceUID = first.FrameOfReferenceUID
    if refers_to is not None:
        series, study = Dataset(), Dataset()
        series.SeriesInstanceUID = refers_to or first.SeriesInstanceUID
        series.ContourImageSequence = Sequence()
        study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = "1.2.840.10008.3.1.2.3.1", first.StudyInstanceUID
        study.RTReferencedSeriesSequence = Sequence([series])
        frame.RTReferencedStudySequence = Sequence([study])
    data.ReferencedFrameOfReferenceSequence = Sequence([frame])
    cosines = np.array(first.ImageOrientationPatient, float)
    rows, columns = (float(v) for v in first.PixelSpacing)
    origin = np.array(first.ImagePositionPatient, float)
    step = np.array(slices[1].ImagePositionPatient, float) - origin
    matrix = np.stack([cosines[:3] * columns, cosines[3:] * rows, step], axis=1)
    data.StructureSetROISequence, data.ROIContourSequence, data.RTROIObservationsSequence = (
        Sequence(),
        Sequence(),
        Sequence(),
    )
    for number, (name, polygons) in enumerate(contours_ijk.items(), start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ROIGenerationAlgorithm = number, name, "MANUAL"
        roi.ReferencedFrameOfReferenceUID = first.FrameOfReferenceUID
        drawn.ReferencedROINumber, drawn.ContourSequence = number, Sequence()
        for polygon in polygons:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(polygon)
            contour.ContourData = [f"{v:.6f}" for v in (origin + np.asarray(polygon, float) @ matrix.T).ravel()]
            drawn.ContourSequence.append(contour)
        data.StructureSetROISequence.append(roi)
        data.ROIContourSequence.append(drawn)
    data.save_as(path, enforce_file_format=True)
    return path


def segmentation(path: Path, series_folder: Path, masks: dict[str, np.ndarray], *, kind: str = "BINARY") -> Path:
    """Write a DICOM-SEG of (D, H, W) masks on a series with highdicom; empty frames are left out, as scanners and
    viewers do."""
    import highdicom as hd
    from highdicom.seg import Segmentation, SegmentDescription
    from pydicom.sr.codedict import codes

    path.parent.mkdir(parents=True, exist_ok=True)
    described = [
        SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=codes.SCT.Liver,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(masks, start=1)
    ]
    if kind == "LABELMAP":
        pixels = np.zeros(next(iter(masks.values())).shape, np.uint8)
        for number, mask in enumerate(masks.values(), start=1):
            pixels[mask] = number
    else:
        pixels = np.stack([m.astype(np.float32 if kind == "FRACTIONAL" else np.uint8) for m in masks.values()], axis=-1)
    made = Segmentation(
        source_images=slices_of(series_folder),
        pixel_array=pixels,
        segmentation_type=kind,
        segment_descriptions=described,
        series_instance_uid=uid(str(path), "series"),
        series_number=9,
        sop_instance_uid=uid(str(path)),
        instance_number=1,
        manufacturer="none",
        manufacturer_model_name="none",
        software_versions="0",
        device_serial_number="0",
        omit_empty_frames=True,
    )
    made.save_as(path)
    return path
