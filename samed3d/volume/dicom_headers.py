"""The headers of DICOM files: every slice and frame with its place in the patient, its scaling and its traits.

No pixel is decoded here. Which slices make one volume is in ``dicom_series.py``, their pixels are in ``dicom.py``.
"""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError

if TYPE_CHECKING:
    from pydicom import Dataset

LABEL_MODALITIES = ("SEG", "RTSTRUCT")
NOT_IMAGES = ("RTPLAN", "RTDOSE", "RTRECORD", "SR", "PR", "KO", "REG", "FID", "DOC", "PLAN", "RWV")
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "")
_BIG_ENDIAN, _DEFLATED = "1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"
_PIXEL_TAGS = {0x7FE00010: "", 0x7FE00008: "<f4", 0x7FE00009: "<f8"}
_ITEM, _END_OF_ITEMS = 0xFFFEE000, 0xFFFEE0DD
_RESTORE = "restore it, or take it out of the folder"

# What tells several volumes of one series apart, the most telling first: its name in lists, the keyword, and the
# functional group of a frame that can hold it.
TRAITS = (
    ("echo {}", "EchoNumbers", ""),
    ("b {}", "DiffusionBValue", "MRDiffusionSequence"),
    ("time {} of {count}", "TemporalPositionIdentifier", ""),
    ("time {} of {count}", "TemporalPositionIndex", "FrameContentSequence"),
    ("echo time {} ms", "EffectiveEchoTime", "MREchoSequence"),
    ("echo time {} ms", "EchoTime", ""),
    ("phase {} %", "NominalPercentageOfCardiacPhase", "CardiacSynchronizationSequence"),
    ("{}", "FrameType", "MRImageFrameTypeSequence"),
    ("{}", "FrameType", "CTImageFrameTypeSequence"),
    ("{}", "ImageType", ""),
    ("sequence {}", "SequenceName", ""),
    ("inversion time {} ms", "InversionTime", ""),
    ("flip angle {}", "FlipAngle", ""),
    ("{} kV", "KVP", ""),
    ("kernel {}", "ConvolutionKernel", ""),
    ("stack {}", "StackID", "FrameContentSequence"),
    ("frame time {} ms", "FrameReferenceTime", ""),
    ("trigger time {} ms", "TriggerTime", ""),
    ("acquisition {}", "AcquisitionNumber", ""),
    ("acquired at {}", "AcquisitionTime", ""),
    ("made at {}", "ContentTime", ""),
)
ORDER = ("AcquisitionNumber", "AcquisitionTime", "TriggerTime", "ContentTime", "InstanceNumber")
_WANTED = (
    *("SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID", "SeriesDescription"),
    *("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"),
    *("SpacingBetweenSlices", "Rows", "Columns", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "SamplesPerPixel", "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept"),
    "ModalityLUTSequence",
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", *ORDER),
    *(keyword for _, keyword, _ in TRAITS),
)


@dataclass(frozen=True)
class Encoding:
    """How a file stores its pixels; ``offset`` is where uncompressed little-endian values begin, -1 for other files."""

    shape: tuple[int, int, int]
    samples: int
    photometric: str
    allocated: int
    stored: int
    signed: bool
    floating: str
    offset: int

    @property
    def is_grey(self) -> bool:
        """Whether a pixel is one intensity."""
        return self.samples == 1 and self.photometric.startswith("MONOCHROME")


@dataclass(frozen=True, eq=False)
class Slice:
    """One slice: a file, or a frame of a multi-frame file.

    Attributes:
        file: The file.
        frame: Its number in the file, from 0.
        encoding: Of the file.
        origin_lps_mm: (3,) centre of the first pixel.
        axes_lps: (2, 3) unit vectors along rows and along columns.
        spacing_mm: Between columns and between rows (x, y).
        rescale: Slope and intercept.
        thickness_mm: Thickness or distance to the next slice as stated, the larger; 0 if neither is.
        traits: Values of ``TRAITS`` by name.
        order: Values of ``ORDER``, None where not stated.
    """

    file: Path
    frame: int
    encoding: Encoding
    origin_lps_mm: NDArray[np.float64]
    axes_lps: NDArray[np.float64]
    spacing_mm: tuple[float, float]
    rescale: tuple[float, float]
    thickness_mm: float
    traits: dict[str, str]
    order: tuple[float | None, ...]


@dataclass
class ImageFile:
    """One image file, with its slices unless ``fault`` says why they have no place."""

    path: Path
    series: str
    description: str
    modality: str
    frame_of_reference: str
    instance: str
    encoding: Encoding
    slices: list[Slice] = field(default_factory=list)
    fault: str = ""


def looks_like_dicom(path: Path) -> bool:
    """Whether a file carries the DICOM mark, or begins as DICOM files without it do."""
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        return False
    return head[128:] == b"DICM" or (len(head) == 132 and head[:2] in (b"\x08\0", b"\x02\0") and head[3] == 0)


def read_image_file(path: Path) -> ImageFile | None:
    """The header of a DICOM image; None for any other file (a report, a segmentation, a text).

    Raises:
        InputError: if it is empty or cut, or its header is damaged.
    """
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return None
    if not looks_like_dicom(path):
        with path.open("rb") as file:
            head = file.read(132)
        is_cut = len(head) < 132 and not any(head[:128])  # a DICOM file begins with 128 zeros
        if path.suffix.lower() in (".dcm", ".ima") or (is_cut and re.fullmatch(r"(\.\d*)?", path.suffix)):
            what = "empty" if not head else "cut" if is_cut else "damaged"
            raise InputError(f"DICOM file is {what}: {path}; {_RESTORE}")
        return None
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _image_file(path, file)
    except InputError as error:
        raise InputError(f"{error}: {path}; {_RESTORE}") from error
    except Exception as error:  # a damaged header makes the parser raise almost anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"DICOM header is damaged: {path} ({reason}); {_RESTORE}") from error


def _image_file(path: Path, file: IO[bytes]) -> ImageFile | None:
    from pydicom import dcmread
    from pydicom.uid import UID

    if _DEFLATED in file.read(1024):  # it would be unpacked as a whole before anything is known of it
        raise InputError("deflated DICOM cannot be read, save it uncompressed")
    file.seek(0)
    data = dcmread(file, stop_before_pixels=True, specific_tags=list(_WANTED), force=True)
    at, modality = file.tell(), _text(data, "Modality")
    kind = UID(_text(data, "SOPClassUID") or _text(data.file_meta, "MediaStorageSOPClassUID"))
    if not kind and "Rows" not in data:
        raise InputError("DICOM file is cut before it says what it is (0008,0016)")
    is_image = "Rows" in data or "Image Storage" in kind.name
    if modality in (*LABEL_MODALITIES, *NOT_IMAGES) or not is_image:
        return None
    encoding = _encoding(data, file, at, path.stat().st_size)
    series, description = _text(data, "SeriesInstanceUID"), " ".join(_text(data, "SeriesDescription").split())
    uids = _text(data, "FrameOfReferenceUID"), _text(data, "SOPInstanceUID")
    found = ImageFile(path, series, description, modality, *uids, encoding)
    try:
        found.slices = list(_slices(data, path, encoding, modality))
    except InputError as error:
        found.fault = str(error)
    return found


def _encoding(data: Dataset, file: IO[bytes], at: int, length: int) -> Encoding:
    """How the pixels are stored; a file that ends before they do is refused."""
    syntax = _text(data.file_meta, "TransferSyntaxUID")
    if missing := [keyword for keyword in ("Rows", "Columns", "BitsAllocated") if not data.get(keyword)]:
        raise InputError(f"{' and '.join(missing)} missing from a DICOM image")
    if data.get("ModalityLUTSequence"):
        raise InputError("DICOM values behind a ModalityLUTSequence (0028,3000) cannot be read, save them rescaled")
    frames, rows, columns = (int(data.get(key) or 1) for key in ("NumberOfFrames", "Rows", "Columns"))
    samples, allocated = int(data.get("SamplesPerPixel") or 1), int(data.BitsAllocated)
    stored = int(data.get("BitsStored") or allocated)
    file.seek(at)
    head = file.read(12)
    group, element = struct.unpack(">HH" if syntax == _BIG_ENDIAN else "<HH", head[:4].ljust(4, b"\0"))
    floating = _PIXEL_TAGS.get(group << 16 | element)
    if floating is None or len(head) < 12:
        raise InputError("DICOM file is cut or holds no pixels (7FE0,0010 is missing)")
    if not floating and (allocated not in (8, 16, 32) or int(data.get("HighBit") or stored - 1) != stored - 1):
        raise InputError(f"DICOM pixels of {allocated} bits, {stored} of them used, cannot be read")
    begin, need = at + (8 if data.is_implicit_VR else 12), rows * columns * frames * samples * allocated // 8
    if syntax not in (*_NATIVE, _BIG_ENDIAN):
        _check_items(file, begin, length)
    elif length - begin < need:
        raise InputError(f"DICOM file is cut, it holds {length - begin} of {need} bytes of pixels")
    photometric, signed = (
        _text(data, "PhotometricInterpretation") or "MONOCHROME2",
        bool(data.get("PixelRepresentation")),
    )
    offset = begin if syntax in _NATIVE else -1
    return Encoding((frames, rows, columns), samples, photometric, allocated, stored, signed, floating, offset)


def _check_items(file: IO[bytes], at: int, length: int) -> None:
    """Walk over the items of compressed pixels to their end mark."""
    while True:
        file.seek(at)
        group, element, size = struct.unpack("<HHI", file.read(8).ljust(8, b"\0"))
        if group << 16 | element == _END_OF_ITEMS:
            return
        at += 8 + size
        if group << 16 | element != _ITEM or at > length:
            raise InputError("DICOM file is cut, its compressed pixels have no end")


def _slices(data: Dataset, path: Path, encoding: Encoding, modality: str) -> Iterator[Slice]:
    """The slices of a file in the order of its frames; refused with the attribute that is missing or wrong."""
    frames = encoding.shape[0]
    groups: Sequence[Any] = data.get("PerFrameFunctionalGroupsSequence") or [{}]
    shared: Any = next(iter(data.get("SharedFunctionalGroupsSequence") or []), {})
    if len(groups) != frames:
        what = f"{modality or 'DICOM'} file of {frames} frames"
        raise InputError(f"{what} states no place in space (0020,0032) for each; frames in time are no volume: {path}")
    for number in range(frames):
        frame = _Frame(path, data, (groups[number], shared))
        axes = np.reshape(frame.numbers("ImageOrientationPatient", 6, "PlaneOrientationSequence"), (2, 3))
        norms = np.linalg.norm(axes, axis=1)
        if np.abs(norms - 1).max() > 0.01 or abs(axes[0] @ axes[1]) > 0.01:
            raise frame.fault("ImageOrientationPatient", "be two perpendicular unit vectors")
        row = axes[0] / norms[0]
        column = axes[1] - (axes[1] @ row) * row
        between_rows, between_columns = frame.numbers("PixelSpacing", 2, "PixelMeasuresSequence")
        if min(between_rows, between_columns) <= 0:
            raise frame.fault("PixelSpacing", "be > 0")
        scaling = "PixelValueTransformationSequence"
        slope, intercept = (frame.numbers(f"Rescale{k}", 1, scaling, d)[0] for k, d in (("Slope", 1), ("Intercept", 0)))
        if slope == 0:
            raise frame.fault("RescaleSlope", "differ from 0")
        stated = [frame.number(key, "PixelMeasuresSequence") for key in ("SliceThickness", "SpacingBetweenSlices")]
        yield Slice(
            path,
            number,
            encoding,
            np.array(frame.numbers("ImagePositionPatient", 3, "PlanePositionSequence")),
            np.stack([row, column / np.linalg.norm(column)]),
            (between_columns, between_rows),
            (slope, intercept),
            max(abs(value or 0.0) for value in stated),
            {name: text for name, keyword, group in reversed(TRAITS) if (text := frame.text(keyword, group))},
            tuple(frame.number(key, "") for key in ORDER),
        )


@dataclass(frozen=True)
class _Frame:
    """A frame: its attributes are in its own functional groups, in the shared ones, or in the file itself."""

    path: Path
    data: Dataset
    groups: tuple[Any, Any]

    def text(self, keyword: str, group: str) -> str:
        for own in self.groups if group else ():
            item: Any = next(iter(own.get(group) or []), {})
            if keyword in item:
                return _text(item, keyword)
        return _text(self.data, keyword)

    def numbers(self, keyword: str, count: int, group: str, default: float | None = None) -> tuple[float, ...]:
        text = self.text(keyword, group)
        if not text and default is not None:
            return (default,)
        try:
            values = tuple(float(part) for part in text.split("\\"))
        except ValueError:
            values = ()
        if len(values) != count or not np.isfinite(values).all():
            raise self.fault(keyword, "be one number" if count == 1 else f"be {count} numbers", text)
        return values

    def number(self, keyword: str, group: str) -> float | None:
        """A number that only helps to tell slices apart; None where it is missing or wrong."""
        try:
            return self.numbers(keyword, 1, group)[0]
        except InputError:
            return None

    def fault(self, keyword: str, rule: str, text: str | None = None) -> InputError:
        from pydicom.datadict import tag_for_keyword

        tag = tag_for_keyword(keyword) or 0
        got = f"must {rule}" + (f", got {text!r}" if text else "") if text != "" else "is missing or empty"
        return InputError(f"{keyword} ({tag >> 16:04X},{tag & 0xFFFF:04X}) {got}: {self.path}")


def _text(data: Dataset, keyword: str) -> str:
    """An attribute as text, values parted by backslashes, bad bytes replaced; empty if it is missing."""
    try:
        value = data.get(keyword)
        if keyword == "SeriesDescription" and value and "SpecificCharacterSet" not in data:
            value = str(value).encode("latin-1").decode("utf-8")
    except UnicodeError:
        value = str(value).encode("ascii", "replace").decode()
    except Exception:  # a wrong value makes the parser raise almost anything
        raw = getattr(data.get_item(keyword), "value", b"")
        value = raw.decode("ascii", "replace") if isinstance(raw, bytes) else raw
    if value is None or isinstance(value, str):
        return (value or "").strip(" \0")
    return "\\".join(map(str, value)) if isinstance(value, Sequence) else str(value)
