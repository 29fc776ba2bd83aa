"""Writing masks, volumes and named segments: the image's own grid bit for bit, a whole file or none.

ITK's NIfTI writer reports no error on a full disk and keeps one of the two matrices of a header, and its NRRD headers
lose the last bits of an oblique grid. All formats are therefore written here (NIfTI headers in ``nifti.py``). Named
segments are one ``.seg.nrrd``, laid out as 3D Slicer's segmentations are: names, colours, and layers where segments
overlap. DICOM is in ``dicom_writing.py``.
"""

from __future__ import annotations

import gzip
import itertools
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid, IntTriple, Region
from samed3d.output import check_output, replacing, write_bytes
from samed3d.prompts import PackedMask
from samed3d.volume.itk import NIFTI_SUFFIXES, SUFFIXES, suffix_of
from samed3d.volume.nifti import mask_header

MASK_FORMATS = {
    "nifti": (".nii.gz", ".nii"),
    "nrrd": (".nrrd",),
    "mha": (".mha", ".mhd"),
    "seg.nrrd": (".seg.nrrd",),
    "dicom-seg": (".dcm",),
    "rtstruct": (".dcm",),
}
"""Suffixes of the formats in which masks can be written, the usual one first."""
MASK_FORMAT_NAMES = {
    "nifti": "NIfTI label map",
    "nrrd": "NRRD label map",
    "mha": "MetaImage label map",
    "seg.nrrd": "3D Slicer segmentation",
    "dicom-seg": "DICOM-SEG",
    "rtstruct": "DICOM RTSTRUCT",
}
"""The same formats, as a user interface names them."""
# Masks are mostly zeros and small at any level; floats hardly shrink at all. A low level keeps saving quick.
_COMPRESSION = 3
# The names of voxel types in NRRD and MetaImage.
_TYPES = {
    "u1": ("uint8", "MET_UCHAR"),
    "i1": ("int8", "MET_CHAR"),
    "u2": ("uint16", "MET_USHORT"),
    "i2": ("int16", "MET_SHORT"),
    "u4": ("uint32", "MET_UINT"),
    "i4": ("int32", "MET_INT"),
    "u8": ("uint64", "MET_ULONG_LONG"),
    "i8": ("int64", "MET_LONG_LONG"),
    "f4": ("float", "MET_FLOAT"),
}


@dataclass(frozen=True)
class Segment:
    """One structure to write.

    Attributes:
        id: Its number, which is its voxels' value in a label map.
        name: What it is.
        colour: ``#rrggbb``.
        mask: On the image's own grid, in the file's own order.
        code: What it is for DICOM, SCHEME:VALUE:MEANING; empty to go by the name.
    """

    id: int
    name: str
    colour: str
    mask: PackedMask
    code: str = ""

    @property
    def rgb(self) -> tuple[int, int, int]:
        """The colour, 0 to 255 each."""
        return (int(self.colour[1:3], 16), int(self.colour[3:5], 16), int(self.colour[5:7], 16))


@dataclass(frozen=True)
class _Planes:
    """An array to write, plane by plane, so that no second one of the volume's size is made.

    Attributes:
        array: (d, h, w), in any order and of any type.
        dtype: To write it as.
        shape: Of the volume.
        start: Of the array in it; the volume is zero around the array.
    """

    array: NDArray
    dtype: np.dtype
    shape: IntTriple
    start: IntTriple = (0, 0, 0)

    def __iter__(self) -> Iterator[NDArray]:
        rows, columns = (slice(a, a + n) for a, n in zip(self.start[1:], self.array.shape[1:], strict=True))
        for number in range(-self.start[0], self.shape[0] - self.start[0]):
            plane = np.zeros(self.shape[1:], self.dtype)
            if 0 <= number < len(self.array):
                plane[rows, columns] = self.array[number]
            yield plane


def write_mask(path: str | Path, array: NDArray, grid: Grid, region: Region | None = None) -> None:
    """Write a mask or an integer label map, as uint8, or as uint16 where an id exceeds 255; see ``write_volume``.

    ``region`` is where the array lies, if it is only a part of the grid; all other voxels are 0.
    """
    if array.dtype.kind not in "biu":
        raise ValueError(f"a mask must be of bool or integer type, got {array.dtype}")
    wide = array.dtype != np.bool_ and array.size and int(array.max()) > 255
    kind = np.dtype(np.uint16 if wide else np.uint8)
    _write(path, array, kind, grid, None if region is None else region.start_zyx)


def write_volume(path: str | Path, array: NDArray, grid: Grid) -> None:
    """Write a (D, H, W) array on a grid; the suffix decides the format.

    A file in the format of the image that the grid was read from gives back the same size, spacing, origin and
    direction, bit for bit: from NIfTI to NIfTI qform, sform, both codes, ``pixdim`` and units. So does ``.mha`` for any
    grid; NIfTI stores single precision, so a grid from another format is rounded there (about 1e-7). A failed write
    leaves no file and does not change an older one.

    Raises:
        InputError: if the output cannot be written; the message gives the reason.
        ValueError: if the array's shape is not the grid's.
    """
    kinds: dict[str, np.dtype[Any]] = {"b": np.dtype(np.uint8), "f": np.dtype(np.float32)}
    _write(path, array, kinds.get(array.dtype.kind, array.dtype.newbyteorder("=")), grid)


def _write(path: str | Path, array: NDArray, kind: np.dtype, grid: Grid, start: IntTriple | None = None) -> None:
    path = Path(path)
    if start is None and array.shape != grid.shape_zyx:
        raise ValueError(f"array must have the grid's shape {grid.shape_zyx}, got {array.shape}")
    check_output(path, suffixes=SUFFIXES)
    planes, suffix = _Planes(array, kind, grid.shape_zyx, start or (0, 0, 0)), suffix_of(path)
    with replacing(path) as partial:
        if suffix in NIFTI_SUFFIXES:
            _write_nifti(partial, planes, grid, compress=suffix == ".nii.gz")
        elif suffix == ".nrrd":
            _write_nrrd(partial, _nrrd_header(kind, grid), planes)
        else:
            _write_metaimage(partial, planes, grid, path.resolve() if suffix == ".mhd" else None)


def write_seg_nrrd(path: str | Path, segments: Sequence[Segment], grid: Grid) -> None:
    """Write segments for 3D Slicer; overlapping ones go to layers of their own.

    Args:
        path: Ends in ``.seg.nrrd``.
        segments: At least one; their ids become label values.
        grid: The image's.

    Raises:
        InputError: if there is none, or the file cannot be written.
    """
    if not segments:
        raise InputError("segmentation must hold a segment, got none; add a prompt first")
    layers = _layers(segments)
    kind = np.dtype(np.uint8 if max(s.id for s in segments) < 256 else np.uint16)
    labels = np.zeros((*grid.shape_zyx, max(layers) + 1), dtype=kind)  # the layer is NRRD's first axis, numpy's last
    lines = _nrrd_header(kind, grid, labels.shape[-1])
    for number, (segment, layer) in enumerate(zip(segments, layers, strict=True)):
        labels[segment.mask.region.slices][..., layer][segment.mask.inside()] = segment.id
        lines += _segment_fields(number, segment, layer)
    lines += [
        "Segmentation_MasterRepresentation:=Binary labelmap",
        "Segmentation_SourceRepresentation:=Binary labelmap",
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset:=0 0 0",
    ]
    with replacing(path) as partial:
        _write_nrrd(partial, lines, labels)


def _layers(segments: Sequence[Segment]) -> list[int]:
    """For each segment the first layer on which nothing overlaps it."""
    layers: list[int] = []
    for segment in segments:
        before = zip(layers, segments, strict=False)
        taken = {layer for layer, other in before if (segment.mask.inside() & other.mask.on(segment.mask.region)).any()}
        layers.append(next(n for n in itertools.count() if n not in taken))
    return layers


def _segment_fields(number: int, segment: Segment, layer: int) -> list[str]:
    region = segment.mask.region
    ends = [(0, 0)] * 3 if region.is_empty else zip(region.start_zyx[::-1], region.stop_zyx[::-1], strict=True)
    extent = [v for start, stop in ends for v in (start, stop - 1)]
    fields = {
        "ID": f"Segment_{segment.id}",
        "Name": segment.name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", " "),  # NRRD's own escapes
        "NameAutoGenerated": 0,
        "Color": " ".join(f"{v / 255:.6g}" for v in segment.rgb),
        "ColorAutoGenerated": 0,
        "LabelValue": segment.id,
        "Layer": layer,
        "Extent": " ".join(map(str, extent)),
        "Tags": "Segmentation.Status:inprogress|",
    }
    return [f"Segment{number}_{key}:={value}" for key, value in fields.items()]


def _write_nifti(path: Path, array: _Planes, grid: Grid, *, compress: bool) -> None:
    if max(array.shape) > 32767 and not grid.nifti_header:
        raise InputError(
            f"cannot write {path.name}: NIfTI holds at most 32767 voxels along an axis, got {max(array.shape)}; "
            "use .nrrd"
        )
    header = mask_header(array.dtype, grid)
    with path.open("wb") as file:
        if compress:
            _write_gzip(file, header, array)
        else:
            file.write(header)
            for plane in array:
                file.write(plane.data)


def _nrrd_header(kind: np.dtype, grid: Grid, layers: int = 1) -> list[str]:
    """The lines of an NRRD header with gzip-compressed voxels; several layers become a first (fastest) axis."""
    direction = np.array(grid.direction_lps).reshape(3, 3)
    vectors = [_double_axis(direction[:, axis], grid.spacing_xyz_mm[axis]) for axis in range(3)]
    first = layers > 1
    return [
        "NRRD0004",
        f"type: {_TYPES[kind.str[1:]][0]}",
        f"dimension: {3 + first}",
        "space: left-posterior-superior",
        f"sizes: {f'{layers} ' * first}{' '.join(map(str, grid.size_ijk))}",
        f"space directions: {'none ' * first}{' '.join(_vector(v) for v in vectors)}",
        f"kinds: {'list ' * first}domain domain domain",
        f"endian: {sys.byteorder}",
        "encoding: gzip",
        f"space origin: {_vector(grid.origin_lps_mm)}",
    ]


def _write_nrrd(path: Path, lines: list[str], array: _Planes | NDArray) -> None:
    with path.open("wb") as file:
        file.write(("\n".join(lines) + "\n\n").encode())
        _write_gzip(file, b"", array)


def _write_gzip(file: IO[bytes], header: bytes, array: _Planes | NDArray) -> None:
    with gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as stream:
        stream.write(header)
        for plane in array:
            stream.write(plane.data)


def _write_metaimage(path: Path, array: _Planes, grid: Grid, header_only_at: Path | None) -> None:
    """Write ``.mha``; or, for an ``.mhd`` that will be at ``header_only_at``, its header here and its voxels beside
    that place.
    """
    packer = zlib.compressobj(_COMPRESSION)
    voxels = b"".join([*(packer.compress(plane.data) for plane in array), packer.flush()])
    by_axis = np.array(grid.direction_lps).reshape(3, 3).T
    fields = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": sys.byteorder == "big",
        "CompressedData": True,
        "CompressedDataSize": len(voxels),
        "TransformMatrix": _numbers(by_axis.ravel()),
        "Offset": _numbers(grid.origin_lps_mm),
        "CenterOfRotation": "0 0 0",
        "ElementSpacing": _numbers(grid.spacing_xyz_mm),
        "DimSize": " ".join(map(str, grid.size_ijk)),
        "ElementType": _TYPES[array.dtype.str[1:]][1],
        "ElementDataFile": header_only_at.with_suffix(".zraw").name if header_only_at else "LOCAL",
    }
    header = "".join(f"{key} = {value}\n" for key, value in fields.items()).encode()
    if header_only_at is None:
        path.write_bytes(header + voxels)
        return
    beside = header_only_at.with_suffix(".zraw")
    if beside.exists() and not (header_only_at.exists() and beside.name.encode() in header_only_at.read_bytes()):
        raise InputError(f"cannot write {header_only_at.name}: its voxels would replace {beside}; choose another name")
    write_bytes(beside, voxels)  # first: no header names a file that is not there
    path.write_bytes(header)


def _double_axis(direction: NDArray, spacing: float) -> NDArray:
    """The NRRD axis vector that a reader turns back into exactly this spacing and direction, in its last bits."""
    guess = (direction * spacing).view(np.int64)
    steps = sorted(itertools.product(range(-2, 3), repeat=3), key=lambda step: sum(map(abs, step)))
    for step in steps:
        axis = (guess + np.array(step)).view(np.float64)
        length = np.sqrt(axis[0] * axis[0] + axis[1] * axis[1] + axis[2] * axis[2])
        if length == spacing and np.array_equal(axis * (1.0 / length), direction):
            return axis
    return direction * spacing


def _numbers(values: Sequence[float] | NDArray) -> str:
    return " ".join(f"{v:.17g}" for v in values)


def _vector(values: Sequence[float] | NDArray) -> str:
    return f"({_numbers(values).replace(' ', ',')})"
