"""Writing segments as DICOM: a SEG or an RTSTRUCT that refers, slice by slice, to the image series of its image.

The frames and contours carry the positions of the series' own files, so any reader puts them back on the same voxels.
Both files are in UTF-8 whatever the source is in, and a SEG is written frame by frame: highdicom would need all
segments as one array.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.output import replacing
from samed3d.volume.contours import trace_contours
from samed3d.volume.dicom_codes import Code, Coding, coding_of
from samed3d.volume.dicom_source import LONGEST, LOSSY, SourceSeries, cleaned, item_of, new_file
from samed3d.volume.writing import Segment

if TYPE_CHECKING:
    from pydicom import Dataset

_SEG_CLASS = "1.2.840.10008.5.1.4.1.1.66.4"
_RTSTRUCT_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"
_LONGEST_TEXT = 1024  # characters of a description (value representation ST)
_MOST_BYTES = 2**32 - 2  # of the pixels of an uncompressed file
_DIMENSIONS = (
    ("ReferencedSegmentNumber", "SegmentIdentificationSequence", "Segment Number"),
    ("ImagePositionPatient", "PlanePositionSequence", "Image Position"),
)


def write_dicom_seg(path: str | Path, segments: Sequence[Segment], source: SourceSeries) -> None:
    """Write a binary DICOM-SEG; slices without any segment are left out, segments may overlap.

    Args:
        path: The file.
        segments: At least one that holds a voxel.
        source: ``source_series`` of the image.

    Raises:
        InputError: if no segment holds a voxel, there are too many frames for one file, or it cannot be written.
    """
    kept = _holding_voxels(segments)
    filled = [[k for k, plane in _planes(segment) if plane.any()] for segment in kept]
    count, pixels = sum(map(len, filled)), int(np.prod(source.grid.shape_zyx[1:]))
    size = (count * pixels + 15) // 16 * 2
    if size > _MOST_BYTES:
        raise InputError(f"a DICOM-SEG holds at most {_MOST_BYTES} bytes of pixels, got {size}; write .seg.nrrd")
    data = new_file(_SEG_CLASS, "SEG", source)
    data.update(_segmentation_elements(kept, source, count))
    places = sorted({k for planes in filled for k in planes})
    with replacing(path) as partial:
        data.save_as(partial, enforce_file_format=True)
        with partial.open("ab") as file:
            frames = ((n, k) for n, planes in enumerate(filled, start=1) for k in planes)
            items = (_encoded(_frame(n, k, places.index(k) + 1, source)) for n, k in frames)
            file.writelines(_sequence("PerFrameFunctionalGroupsSequence", items))
            file.write(struct.pack("<HH2s2xI", 0x7FE0, 0x0010, b"OB", size))
            _write_bits(file, (plane for segment in kept for _, plane in _planes(segment) if plane.any()), size)


def _planes(segment: Segment) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """(slice, (H, W) mask) of each slice that the box of a segment reaches, one at a time."""
    _, height, width = segment.mask.shape_zyx
    z, y, x = segment.mask.region.slices
    plane = np.zeros((height, width), dtype=bool)
    for k, part in enumerate(segment.mask.planes(), start=z.start):
        plane[y, x] = part
        yield k, plane


def _write_bits(file: IO[bytes], planes: Iterator[NDArray[np.bool_]], size: int) -> None:
    """Frames as packed bits that follow one another without padding; zeros up to ``size`` bytes at the end."""
    rest, written = np.zeros(0, dtype=bool), 0
    for plane in planes:
        bits = np.concatenate([rest, plane.ravel()])
        whole = len(bits) // 8 * 8
        written += file.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        rest = bits[whole:]
    file.write(np.packbits(rest, bitorder="little").tobytes().ljust(size - written, b"\0"))


def _encoded(elements: Dataset) -> bytes:
    """Elements as they stand in a file of explicit little endian."""
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    out = DicomBytesIO()
    out.is_little_endian, out.is_implicit_VR = True, False
    write_dataset(out, elements, parent_encoding="utf8")
    return out.getvalue()


def _sequence(keyword: str, items: Iterable[bytes]) -> Iterator[bytes]:
    """The bytes of a sequence of encoded items, one item at a time."""
    from pydicom.tag import Tag

    yield struct.pack("<HH2s2xI", Tag(keyword).group, Tag(keyword).element, b"SQ", 0xFFFFFFFF)
    for item in items:
        yield struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item
    yield struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def _segmentation_elements(segments: Sequence[Segment], source: SourceSeries, frames: int) -> Dataset:
    """What a SEG holds beside patient, study, equipment, the frames' positions and the pixels."""
    import highdicom as hd
    from pydicom.tag import Tag
    from pydicom.uid import generate_uid

    from samed3d import __version__

    grid, organisation = source.grid, item_of(DimensionOrganizationUID=generate_uid())
    algorithm = item_of(AlgorithmName="samed3d", AlgorithmVersion=__version__)
    algorithm.AlgorithmFamilyCodeSequence = [_code(Code("DCM", "123110", "Artificial Intelligence"))]
    described = [
        item_of(
            SegmentNumber=number,
            SegmentLabel=label,
            SegmentAlgorithmType="SEMIAUTOMATIC",
            SegmentAlgorithmName="samed3d",
            SegmentationAlgorithmIdentificationSequence=[algorithm],
            RecommendedDisplayCIELabValue=list(hd.color.CIELabColor.from_rgb(*segment.rgb).value),
            SegmentedPropertyCategoryCodeSequence=[_code(coding.category)],
            SegmentedPropertyTypeCodeSequence=[_code(coding.kind, coding.side)],
            **({"AnatomicRegionSequence": [_code(coding.site)]} if coding.site else {}),
            **({"SegmentDescription": cleaned(segment.name, _LONGEST_TEXT)} if segment.name != label else {}),
        )
        for number, (segment, label, coding) in enumerate(_described(segments), start=1)
    ]
    spacing = _decimals(grid.spacing_xyz_mm)
    measures = item_of(PixelSpacing=spacing[1::-1], SliceThickness=spacing[2], SpacingBetweenSlices=spacing[2])
    axes = _decimals(np.array(grid.direction_lps).reshape(3, 3).T[:2].ravel())
    shared = item_of(PixelMeasuresSequence=[measures], PlaneOrientationSequence=[item_of(ImageOrientationPatient=axes)])
    dimensions = [
        item_of(
            DimensionOrganizationUID=organisation.DimensionOrganizationUID,
            DimensionIndexPointer=Tag(index),
            FunctionalGroupPointer=Tag(group),
            DimensionDescriptionLabel=label,
        )
        for index, group, label in _DIMENSIONS
    ]
    files = {str(r.ReferencedSOPInstanceUID): r.ReferencedSOPClassUID for r in source.references}
    listed = [item_of(ReferencedSOPClassUID=kind, ReferencedSOPInstanceUID=uid) for uid, kind in files.items()]
    series = item_of(SeriesInstanceUID=source.header.SeriesInstanceUID, ReferencedInstanceSequence=listed)
    return item_of(
        **{"ImageType": ["DERIVED", "PRIMARY"], "ContentLabel": "SEGMENTATION", "SegmentationType": "BINARY"},
        **{"ContentDescription": "", "ContentCreatorName": "", "PhotometricInterpretation": "MONOCHROME2"},
        **{"NumberOfFrames": frames, "Rows": grid.shape_zyx[1], "Columns": grid.shape_zyx[2], "SamplesPerPixel": 1},
        **{"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0, "PixelRepresentation": 0},
        **{"LossyImageCompression": "00"} | {key: source.header[key].value for key in LOSSY if key in source.header},
        SegmentSequence=described,
        ReferencedSeriesSequence=[series],
        DimensionOrganizationSequence=[organisation],
        DimensionIndexSequence=dimensions,
        SharedFunctionalGroupsSequence=[shared],
    )


def _frame(number: int, k: int, place: int, source: SourceSeries) -> Dataset:
    """The functional groups of the frame that holds slice ``k`` of a segment."""
    image = item_of(
        **{element.keyword: element.value for element in source.references[k]},
        SpatialLocationsPreserved="YES",
        PurposeOfReferenceCodeSequence=[_code(Code("DCM", "121322", "Source image for image processing operation"))],
    )
    derivation = item_of(
        SourceImageSequence=[image], DerivationCodeSequence=[_code(Code("DCM", "113076", "Segmentation"))]
    )
    return item_of(
        FrameContentSequence=[item_of(DimensionIndexValues=[number, place])],
        PlanePositionSequence=[item_of(ImagePositionPatient=_decimals(source.positions[k]))],
        SegmentIdentificationSequence=[item_of(ReferencedSegmentNumber=number)],
        DerivationImageSequence=[derivation],
    )


def write_rtstruct(path: str | Path, segments: Sequence[Segment], source: SourceSeries) -> None:
    """Write an RTSTRUCT with one ROI per segment; a hole is an outline inside another, as radiotherapy programs read
    it.

    Args:
        path: The file.
        segments: At least one that holds a voxel.
        source: ``source_series`` of the image.

    Raises:
        InputError: if no segment holds a voxel, or the file cannot be written.
    """
    kept = _holding_voxels(segments)
    data = new_file(_RTSTRUCT_CLASS, "RTSTRUCT", source)
    study = item_of(
        ReferencedSOPClassUID=_STUDY_CLASS,
        ReferencedSOPInstanceUID=source.uid("StudyInstanceUID"),
        RTReferencedSeriesSequence=[
            item_of(SeriesInstanceUID=source.header.SeriesInstanceUID, ContourImageSequence=source.references)
        ],
    )
    frame = source.uid("FrameOfReferenceUID")
    described = list(enumerate(_described(kept), start=1))
    rois = [
        item_of(
            ROINumber=number,
            ROIName=label,
            ReferencedFrameOfReferenceUID=frame,
            ROIGenerationAlgorithm="SEMIAUTOMATIC",
            **({"ROIDescription": cleaned(segment.name, _LONGEST_TEXT)} if segment.name != label else {}),
        )
        for number, (segment, label, _) in described
    ]
    observed = [
        item_of(
            ObservationNumber=number,
            ReferencedROINumber=number,
            RTROIIdentificationCodeSequence=[_code(coding.kind, coding.side)],
            SegmentedPropertyCategoryCodeSequence=[_code(coding.category)],
            RTROIInterpretedType=coding.interpreted,
            ROIInterpreter="",
        )
        for number, (_, _, coding) in described
    ]
    elements = item_of(
        **{"StructureSetLabel": "Segmentation", "OperatorsName": ""},
        **{"StructureSetDate": data.ContentDate, "StructureSetTime": data.ContentTime},
        ReferencedFrameOfReferenceSequence=[item_of(FrameOfReferenceUID=frame, RTReferencedStudySequence=[study])],
        StructureSetROISequence=rois,
    )
    data.update(elements)
    del data.ContentDate, data.ContentTime
    with replacing(path) as partial:
        data.save_as(partial, enforce_file_format=True)
        with partial.open("ab") as file:
            drawn = (_drawn(number, segment, source) for number, (segment, _, _) in described)
            file.writelines(_sequence("ROIContourSequence", drawn))
            file.write(_encoded(item_of(RTROIObservationsSequence=observed)))


def _drawn(number: int, segment: Segment, source: SourceSeries) -> bytes:
    """The item of the contour sequence that holds the outlines of a segment."""
    contours = b"".join(_sequence("ContourSequence", map(_encoded, _contours(segment, source))))
    colour = _encoded(item_of(ROIDisplayColor=list(segment.rgb)))
    return colour + contours + _encoded(item_of(ReferencedROINumber=number))


def _contours(segment: Segment, source: SourceSeries) -> Iterator[Dataset]:
    to_lps_mm = source.grid.affine_lps
    for k, plane in _planes(segment):
        for outline in trace_contours(plane):
            corners_lps_mm = outline @ to_lps_mm[:3, :2].T + source.positions[k]
            yield item_of(
                ContourImageSequence=[source.references[k]],
                ContourGeometricType="CLOSED_PLANAR",
                NumberOfContourPoints=len(outline),
                ContourData=[f"{v:.5f}" for v in corners_lps_mm.ravel()],
            )


def _described(segments: Sequence[Segment]) -> list[tuple[Segment, str, Coding]]:
    """Segments with their names as DICOM holds them, each once (equal ones get a number), and their codes."""
    labels: list[str] = []
    for number, segment in enumerate(segments, start=1):
        name = cleaned(segment.name, LONGEST) or f"segment {number}"
        endings = itertools.chain([""], (f" ({n})" for n in itertools.count(2)))
        cut = (name[: LONGEST - len(ending)].rstrip() + ending for ending in endings)
        labels.append(next(label for label in cut if label not in labels))
    return [(s, label, coding_of(s.name, s.code)) for s, label in zip(segments, labels, strict=True)]


def _code(code: Code, modifier: Code | None = None) -> Dataset:
    more = {"SegmentedPropertyTypeModifierCodeSequence": [_code(modifier)]} if modifier else {}
    value = {"CodeValue" if len(code.value) <= 16 else "LongCodeValue": code.value}
    return item_of(**value, CodingSchemeDesignator=code.scheme, CodeMeaning=code.meaning, **more)


def _decimals(values: Sequence[float] | NDArray) -> list[str]:
    """Numbers as decimal strings of at most 16 characters, as precise as these allow."""
    from pydicom.valuerep import format_number_as_ds

    return [format_number_as_ds(float(v)) for v in values]


def _holding_voxels(segments: Sequence[Segment]) -> list[Segment]:
    kept = [s for s in segments if not s.mask.region.is_empty]
    if not kept:
        raise InputError("segmentation must hold a voxel, got empty masks only; add a prompt first")
    return kept
