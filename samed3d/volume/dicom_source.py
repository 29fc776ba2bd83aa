"""What a SEG or RTSTRUCT takes from the image series that it was drawn on: place and file of each slice, and who the
patient is. All text is written in UTF-8, whatever character set the source is in.
"""

from __future__ import annotations

import datetime
import importlib.util
import re
import unicodedata
import warnings
from collections.abc import MutableSequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.volume.dicom_headers import looks_like_dicom
from samed3d.volume.dicom_series import Layout, pick_stack

if TYPE_CHECKING:
    from pydicom import Dataset, FileDataset

# A slice's file and the image's grid must put its first pixel at one place, to this share of the smallest voxel edge.
_SAME_PLACE = 0.05
LONGEST = 64  # characters of a name (value representation LO) and of a component of a person's name
# Attributes that are copied from the source, and what a value of them must look like to be copied.
_DATE, _TIME, _TEXT = r"\d{8}", r"\d{2,6}(\.\d{1,6})?", r"(?s:.*)"
_PATIENT_AND_STUDY = {
    **dict.fromkeys(("PatientID", "PatientName", "AccessionNumber", "StudyID"), _TEXT),
    **dict.fromkeys(("ReferringPhysicianName", "StudyDescription"), _TEXT),
    **{"PatientBirthDate": _DATE, "PatientSex": "[MFO]", "StudyDate": _DATE, "StudyTime": _TIME},
}
_SHORT = ("AccessionNumber", "StudyID")  # at most 16 characters
_PERSONS = ("PatientName", "ReferringPhysicianName")
LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
_GEOMETRY = ("ImagePositionPatient", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_IDENTITY = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID")
_OTHERS = ("StudyInstanceUID", "FrameOfReferenceUID", "SeriesNumber", "PositionReferenceIndicator")


@dataclass(frozen=True)
class SourceSeries:
    """What a SEG or RTSTRUCT says about the image series that it was drawn on.

    Attributes:
        header: Of its first file.
        grid: Of the image.
        positions: (D, 3) ``ImagePositionPatient`` of each slice of the image, slice 0 first.
        references: For each slice the file (and the frame of a multi-frame file) that holds it, as sequence items.
    """

    header: Dataset
    grid: Grid
    positions: NDArray[np.float64]
    references: list[Dataset]

    def uid(self, keyword: str) -> str:
        """A UID of the series; where the source lacks it, one that is the same for every file made for the series."""
        from pydicom.uid import generate_uid

        series = str(self.header.SeriesInstanceUID)
        return str(self.header.get(keyword) or generate_uid(entropy_srcs=[keyword, series]))


def source_series(
    source: str | Path, series: str | int | None, grid: Grid, layout: Layout | None = None
) -> SourceSeries:
    """The series that an image was read from.

    Args:
        source: Folder of the DICOM files, or a multi-frame file.
        series: As given to ``read_volume``.
        grid: Of the image that was read.
        layout: Of the image that was read; says which file and frame each slice is, also of a resampled image.

    Raises:
        InputError: if the image is no DICOM series, lacks an attribute by which it can be referred to, or lies
            elsewhere than the grid says.
    """
    source = Path(source)
    if importlib.util.find_spec("pydicom") is None or importlib.util.find_spec("highdicom") is None:
        raise InputError("writing DICOM needs pydicom and highdicom: pip install 'samed3d[dicom]'")
    if not source.is_dir() and not looks_like_dicom(source):
        raise InputError(
            f"DICOM can be written for an image that was read from a DICOM folder only, got {source}; write .nii.gz or "
            ".seg.nrrd"
        )
    headers = []
    by_frame: dict[tuple[Path, int], tuple[list[float], Dataset]] = {}
    slices = pick_stack(source, series).slices if layout is None else layout.slices
    for file in sorted({one.file for one in slices}):
        try:
            header, found = _header_and_places(file)
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"DICOM file cannot be read any more: {file} ({error.strerror})") from error
        except Exception as error:  # a damaged header makes the parser raise almost anything
            raise InputError(f"DICOM header is damaged: {file} ({type(error).__name__}: {error})") from error
        headers.append(header)
        by_frame |= {(file, number): place for number, place in enumerate(found)}
    places = [by_frame[one.file, one.frame] for one in slices]
    if layout is not None:
        grid = replace(grid, shape_zyx=(len(places), *layout.slices[0].encoding.shape[1:]))
        return SourceSeries(headers[0], grid, np.array([p for p, _ in places]), [item for _, item in places])
    positions = np.array([position for position, _ in places])
    depth = np.arange(grid.shape_zyx[0])[:, None]
    expected = grid.affine_lps[:3, 3] + depth * grid.affine_lps[:3, 2]
    chosen = [int(np.argmin(np.square(positions - place).sum(axis=1))) for place in expected]
    off = np.linalg.norm(positions[chosen] - expected, axis=1)
    if off.max() > _SAME_PLACE * min(grid.spacing_xyz_mm):
        k = int(off.argmax())
        raise InputError(
            f"DICOM can be written for a series with a slice at each place of the image only; the nearest to slice {k} "
            f"lies {off[k]:.3g} mm away in {source}; write .nii.gz or .seg.nrrd"
        )
    return SourceSeries(headers[0], grid, positions[chosen], [places[n][1] for n in chosen])


def _header_and_places(file: Path) -> tuple[Dataset, list[tuple[list[float], Dataset]]]:
    """What is needed of a file's header, and of each of its slices the position and the reference."""
    from pydicom import dcmread

    wanted = [*_PATIENT_AND_STUDY, *_GEOMETRY, *_IDENTITY, *_OTHERS, *LOSSY]
    header: Dataset = dcmread(file, stop_before_pixels=True, specific_tags=wanted)
    frames = header.get("PerFrameFunctionalGroupsSequence")
    missing = [keyword for keyword in _IDENTITY if not header.get(keyword)]
    found = []
    for number, frame in enumerate(frames or [header], start=1):
        groups = [frame, *header.get("SharedFunctionalGroupsSequence", ())] if frames else []
        planes = [plane for group in groups for plane in group.get("PlanePositionSequence", ())]
        position = next((plane.ImagePositionPatient for plane in planes or [header] if _has_position(plane)), None)
        if position is None:
            missing.append("ImagePositionPatient")
            break
        which = {"ReferencedFrameNumber": number} if frames else {}
        reference = item_of(
            ReferencedSOPClassUID=header.get("SOPClassUID"),
            ReferencedSOPInstanceUID=header.get("SOPInstanceUID"),
            **which,
        )
        found.append(([float(v) for v in position], reference))
    if missing:
        raise InputError(
            f"DICOM can be written for slices with {', '.join(missing)} only, which {file} lacks; write .nii.gz or "
            ".seg.nrrd"
        )
    if frames:
        del header.PerFrameFunctionalGroupsSequence
    return header, found


def _has_position(item: Dataset) -> bool:
    return len(item.get("ImagePositionPatient") or ()) == 3


def new_file(sop_class: str, modality: str, source: SourceSeries) -> FileDataset:
    """A file with all that a SEG and an RTSTRUCT say about patient, study, series, equipment and frame of reference.

    What the source lacks of patient and study, or states in a form that the standard forbids, is empty.
    """
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

    from samed3d import __version__

    meta, now = FileMetaDataset(), datetime.datetime.now()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(sop_class), generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    copied = {}
    for keyword, pattern in _PATIENT_AND_STUDY.items():
        with warnings.catch_warnings(action="ignore"):  # of the encoding; the text is then the best guess
            value = source.header.get(keyword)
        text = cleaned(value, 16 if keyword in _SHORT else 3 * LONGEST if keyword in _PERSONS else LONGEST)
        if keyword in _PERSONS:  # alphabetic, ideographic and phonetic
            text = "=".join(part[:LONGEST] for part in text.split("=")[:3])
        copied[keyword] = text if re.fullmatch(pattern, text) else ""
    try:
        number = int(source.header.get("SeriesNumber") or 0)
    except (TypeError, ValueError):
        number = 0
    elements = item_of(
        SpecificCharacterSet="ISO_IR 192",
        SOPClassUID=sop_class,
        SOPInstanceUID=meta.MediaStorageSOPInstanceUID,
        Modality=modality,
        **copied,
        StudyInstanceUID=source.uid("StudyInstanceUID"),
        SeriesInstanceUID=generate_uid(),
        SeriesNumber=abs(number) % 1_000_000 + 1000,  # that no series beside the image is likely to have
        SeriesDescription="Segmentation",
        InstanceNumber=1,
        ContentDate=f"{now:%Y%m%d}",
        ContentTime=f"{now:%H%M%S}",
        Manufacturer="samed3d",
        ManufacturerModelName="samed3d",
        DeviceSerialNumber="0",
        SoftwareVersions=__version__,
        FrameOfReferenceUID=source.uid("FrameOfReferenceUID"),
        PositionReferenceIndicator=cleaned(source.header.get("PositionReferenceIndicator"), LONGEST),
    )
    return FileDataset("", elements, file_meta=meta, preamble=b"\0" * 128)


def cleaned(value: Any, longest: int) -> str:
    """A text as DICOM holds it: no backslash (which separates values), no control characters, no lone surrogates."""
    text = "/".join(map(str, value)) if isinstance(value, MutableSequence) else "" if value is None else str(value)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\\", "/")
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in text).strip()[:longest].rstrip()


def item_of(**elements: Any) -> Dataset:
    """A DICOM data set with these elements, by keyword; UIDs of the source are taken as they are."""
    from pydicom import config
    from pydicom.datadict import dictionary_VR
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset
    from pydicom.tag import Tag

    item = Dataset()
    for keyword, value in elements.items():
        tag = Tag(keyword)
        item.add(DataElement(tag, dictionary_VR(tag), value, validation_mode=config.IGNORE))
    return item
