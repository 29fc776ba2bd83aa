"""Reading image files: the header is judged before the voxels, and what ITK lets pass (cut NIfTI files, zero spacing)
is refused here; and the limits on files from untrusted users.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid, IntTriple
from samed3d.volume.itk import NIFTI_SUFFIXES, SUFFIXES, array_of, grid_of, itk_reason, open_header, silenced, suffix_of

if TYPE_CHECKING:
    import SimpleITK as sitk

logger = logging.getLogger(__name__)

# Cosine between two voxel axes up to which a skewed NIfTI matrix counts as rounding (half a degree) and is made
# orthogonal.
_SKEW_TOLERANCE = 0.01
_LONGEST_TEXT_HEADER = 64 * 1024
_BLOCK = 3 << 20
_LEAST_OFFSET = 352  # of NIfTI's voxels: header and extension flag
_WIDEST_VOXEL = 16  # bytes of a complex double


@dataclass(frozen=True)
class ReadLimits:
    """How large an image from an untrusted user may be.

    Attributes:
        voxels: Of all volumes and channels of the file together.
        files: In a DICOM folder.
    """

    voxels: int = 2**29
    files: int = 10_000


def read_file(path: Path, channel: int | None) -> tuple[NDArray, Grid]:
    """The voxels (D, H, W) of one channel of an image file, and their grid.

    ITK reads a cut NIfTI file without complaint, turns NaN into 0 and needs twice the memory; the voxels of NIfTI files
    are therefore read here.
    """
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise InputError(f"image must be a folder of DICOM slices or end in one of {' '.join(SUFFIXES)}, got {path}")
    if suffix in NIFTI_SUFFIXES:
        return _read_nifti(path, channel)
    image = execute(path, channel)
    return array_of(image), grid_of(image)


def _read_nifti(path: Path, channel: int | None) -> tuple[NDArray, Grid]:
    header = _NiftiHeader.read(path)
    try:
        reader = open_header(path)
    except InputError as error:
        if "orthonormal" not in str(error):
            header.array(path, 0, "channels")  # a damaged stream has a better message
            raise
        reader = _open_skewed_nifti(path, header)
    size, channels = list(reader.GetSize()), reader.GetNumberOfComponents()
    check_dimensions([*size, channels] if len(size) == 4 and channels > 1 else size, reader.GetSpacing(), path)
    return header.array(path, channel, "volumes (4D)" if len(size) == 4 else "channels"), grid_of(reader)


def execute(path: Path, channel: int | None) -> sitk.Image:
    """Read one 3D channel with ITK.

    Raises:
        InputError: as ``read_volume``.
    """
    reader = open_header(path)
    size = list(reader.GetSize())
    check_dimensions(size, reader.GetSpacing(), path)
    if len(size) == 4:
        reader.SetExtractSize([*size[:3], 0])
        reader.SetExtractIndex([0, 0, 0, _picked_channel(channel, size[3], "volumes (4D)", path)])
    said: list[str] = []
    try:
        with silenced(said):
            image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"image is truncated or damaged: {path} ({itk_reason(error, said)})") from error
    return one_channel(image, channel if len(size) == 3 else None, path)


def one_channel(image: sitk.Image, channel: int | None, path: Path) -> sitk.Image:
    """The picked channel of an RGB or vector image; an image of one channel as it is."""
    import SimpleITK as sitk

    if "complex" in image.GetPixelIDTypeAsString():
        return image
    channels = image.GetNumberOfComponentsPerPixel()
    picked = _picked_channel(channel, channels, "channels", path)
    return image if channels == 1 else sitk.VectorIndexSelectionCast(image, picked)


def _picked_channel(channel: int | None, count: int, what: str, path: Path) -> int:
    if channel is None and count > 1:
        raise InputError(
            f"image has {count} {what}, one is needed: pick one with --channel N (0 to {count - 1}): {path}"
        )
    if count == 1 and channel not in (None, 0):
        raise InputError(f"--channel must be 0 for an image of one channel, got {channel}: {path}")
    if not 0 <= (channel or 0) < count:
        raise InputError(f"--channel must be 0 to {count - 1}, got {channel}: {path}")
    return channel or 0


def check_dimensions(size: Sequence[int], spacing: Sequence[float], path: str | Path) -> None:
    """Refuse what is not a stack of slices (a fourth axis is left to ``execute``) or has no voxel size."""
    shown = " x ".join(map(str, size[:3]))
    if len(size) not in (3, 4):
        raise InputError(f"image must be 3D, got {len(size)}D ({shown}): {path}")
    if 1 in size[:3]:
        raise InputError(f"image must be 3D, got a single slice ({shown}): {path}; give the whole stack")
    _check_spacing(spacing, path)


def _check_spacing(spacing: Sequence[float], path: str | Path) -> None:
    if not all(0 < s < math.inf for s in spacing[:3]):
        shown = " x ".join(f"{s:g}" for s in spacing[:3])
        raise InputError(f"spacing must be > 0 on each axis, got {shown} mm: {path}; correct the header")


def checked_array(array: NDArray, path: str | Path) -> NDArray:
    """The voxels, float64 as float32; refused if they are complex, not finite or all equal."""
    if array.dtype.kind == "c":
        raise InputError(f"image holds complex numbers: {path}; save its magnitude first")
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise _not_finite(array.size - int(np.count_nonzero(np.isfinite(array))), array.size, path)
    if low == high:
        raise InputError(f"image is constant, every voxel is {low:g}: {path}; there is nothing to segment")
    return array


def _not_finite(bad: int, count: int, path: str | Path) -> InputError:
    return InputError(
        f"image holds {bad} NaN or infinite voxels of {count}: {path}; replace them with the background value"
    )


_NIFTI_TYPES = {
    **{2: "u1", 4: "i2", 8: "i4", 16: "f4", 32: "c8", 64: "f8", 128: "u1", 256: "i1", 512: "u2", 768: "u4"},
    **{1024: "i8", 1280: "u8", 1792: "c16", 2304: "u1"},
}
_NIFTI_COLOURS = {128: 3, 2304: 4}


@dataclass(frozen=True)
class _NiftiHeader:
    """Where a NIfTI-1 file keeps its voxels, and how.

    Attributes:
        offset: Bytes before the first voxel.
        shape_zyx: Of one 3D volume.
        volumes: 3D volumes that follow one another (time points or channels).
        colours: Values per voxel, side by side.
        kind: Type of a value.
        scaling: Slope and intercept; None for values that are stored as they are.
        axes: 3x3 columns of the sform matrix.
    """

    offset: int
    shape_zyx: IntTriple
    volumes: int
    colours: int
    kind: np.dtype
    scaling: tuple[float, float] | None
    axes: NDArray[np.float64]

    @property
    def volume_bytes(self) -> int:
        """Of one 3D volume."""
        return math.prod(self.shape_zyx) * self.colours * self.kind.itemsize

    @property
    def length(self) -> int:
        """Bytes of the whole file."""
        return self.offset + self.volume_bytes * self.volumes

    def array(self, path: Path, channel: int | None, what: str) -> NDArray:
        """One channel or volume (D, H, W), scaled, as float32 where the file's values are scaled or doubles.

        The file is read to its end: all bytes must be there and, in a .gz, the checksum must agree.
        """
        picked = _picked_channel(channel, self.volumes * self.colours, what, path)
        first, colour = (picked, 0) if self.colours == 1 else (0, picked)
        single = self.scaling is not None or self.kind.str[1:] == "f8"
        done, width = 0, self.colours * self.kind.itemsize
        try:
            array = np.empty(math.prod(self.shape_zyx), np.float32 if single else self.kind.newbyteorder("="))
            with _opened(path) as stream, np.errstate(over="ignore"):
                for _ in _blocks(stream, self.offset + first * self.volume_bytes):
                    pass
                for block in _blocks(stream, self.volume_bytes):
                    values = np.frombuffer(block, self.kind, len(block) // width * self.colours)[colour :: self.colours]
                    if self.scaling is not None:
                        values = values * np.float64(self.scaling[0]) + self.scaling[1]
                    array[done : done + len(values)] = values
                    done += len(values)
                for _ in _blocks(stream, sys.maxsize):
                    pass
                found = stream.tell()
        except (OSError, EOFError, zlib.error, MemoryError) as error:
            raise InputError(f"image is truncated or damaged: {path} ({error})") from error
        if found < self.length:
            raise InputError(f"image is truncated or damaged: {path} ({found} of {self.length} bytes)")
        return array.reshape(self.shape_zyx)

    @classmethod
    def read(cls, path: Path, shown: str | Path = "") -> _NiftiHeader:
        """Read a header and refuse a spacing that ITK would replace by 1 mm; ``shown`` as in ``open_header``."""
        shown = shown or path
        try:
            with _opened(path) as stream:
                header = stream.read(348)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"image is truncated or damaged: {shown} ({error})") from error
        if header[:4] in (struct.pack("<i", 540), struct.pack(">i", 540)):
            raise InputError(f"NIfTI-2 cannot be read: {shown}; save it as NIfTI-1 or .nrrd")
        order = next((o for o in "<>" if len(header) == 348 and struct.unpack_from(f"{o}i", header)[0] == 348), "")
        if not order or header[344:346] != b"n+":
            raise InputError(f"not an image, or its header is damaged: {shown}")
        dim = struct.unpack_from(f"{order}8h", header, 40)
        if dim[0] >= 3:
            _check_spacing(struct.unpack_from(f"{order}8f", header, 76)[1:4], shown)
        sizes = [max(1, n) if axis <= dim[0] else 1 for axis, n in enumerate(dim[1:], start=1)]
        kind = struct.unpack_from(f"{order}h", header, 70)[0]
        if kind not in _NIFTI_TYPES:
            raise InputError(f"NIfTI voxels of type {kind} cannot be read: {shown}; save them as integers or float32")
        offset, slope, intercept = struct.unpack_from(f"{order}3f", header, 108)
        scaled = math.isfinite(slope) and math.isfinite(intercept) and slope != 0 and (slope, intercept) != (1, 0)
        return cls(
            offset=int(offset) if _LEAST_OFFSET <= offset < 2**31 else _LEAST_OFFSET,
            shape_zyx=(sizes[2], sizes[1], sizes[0]),
            volumes=math.prod(sizes[3:]),
            colours=_NIFTI_COLOURS.get(kind, 1),
            kind=np.dtype(order + _NIFTI_TYPES[kind]),
            scaling=(slope, intercept) if scaled else None,
            axes=np.array(struct.unpack_from(f"{order}12f", header, 280)).reshape(3, 4)[:, :3],
        )


def _blocks(stream: IO[bytes], count: int) -> Iterator[bytes]:
    """The next bytes of a stream, at most ``count``, in blocks that hold whole voxels of any type."""
    while count > 0 and (block := stream.read(min(count, _BLOCK))):
        yield block
        count -= len(block)


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if suffix_of(path) == ".nii.gz" else path.open("rb")


def _open_skewed_nifti(path: Path, header: _NiftiHeader) -> sitk.ImageFileReader:
    """``open_header`` of a NIfTI file with axes that are skewed by rounding only; a real shear is refused."""
    axes = header.axes / np.maximum(np.linalg.norm(header.axes, axis=0), 1e-30)
    skew = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if skew > _SKEW_TOLERANCE:
        degrees = math.degrees(math.asin(min(1.0, skew)))
        raise InputError(
            f"voxel axes must be perpendicular, got {degrees:.1f} degrees of shear: {path}; resample to an orthogonal "
            "grid"
        )
    logger.warning("voxel axes of %s are not quite perpendicular; taking the nearest orthogonal axes", path)
    name = "ITK_NIFTI_SFORM_PERMISSIVE"  # the only switch that ITK has for this
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return open_header(path)
    finally:
        os.environ.pop(name)
        os.environ |= {name: before} if before is not None else {}


def check_untrusted(path: Path, limits: ReadLimits) -> None:
    """Judge an image file or DICOM folder from an untrusted user by its headers, before it is read.

    Refused are headers without an end, headers that name another file of the machine, and small files that unpack to
    terabytes; nothing is unpacked into memory.

    Raises:
        InputError: if it cannot be an image, its header is too long or names another file, or it holds more than
            ``limits`` allow.
    """
    if path.is_dir():
        _check_folder(path, limits)
        return
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise InputError(f"image must end in one of {' '.join(SUFFIXES)}, got {path.name!r}")
    if suffix not in NIFTI_SUFFIXES:
        _check_text_header(path)
    _check_voxels(_declared(path), limits, path.name)
    if suffix == ".nii.gz":
        _check_gzip(path, limits)


def _check_text_header(path: Path) -> None:
    """NRRD and MetaImage: text that ends soon and keeps its voxels in the same file."""
    with path.open("rb") as file:
        head = file.read(_LONGEST_TEXT_HEADER)
    if path.name.lower().endswith(".nrrd"):
        end, elsewhere = re.search(rb"\r?\n\r?\n", head), rb"(?mi)^\s*data ?file\s*:"
    else:
        end = re.search(rb"(?m)^\s*ElementDataFile\s*=[^\n]*\n?", head)
        elsewhere = rb"(?mi)^\s*ElementDataFile\s*=(?!\s*LOCAL\s*$)"
    if end is None:
        raise InputError(
            f"the header must end within {_LONGEST_TEXT_HEADER} bytes, got a longer one or none: {path.name}"
        )
    if re.search(elsewhere, head[: end.end()]):
        raise InputError(
            f"the voxels must be in the same file as the header, got a header that names another file: {path.name}"
        )


def _check_gzip(path: Path, limits: ReadLimits) -> None:
    """Unpack block by block, keeping nothing; what the header declares bounds what may follow."""
    declared = _NiftiHeader.read(path, path.name).length
    most, found = min(limits.voxels * _WIDEST_VOXEL, declared + _BLOCK), 0
    try:
        with gzip.open(path, "rb") as stream:
            while found <= most and (block := stream.read(_BLOCK)):
                found += len(block)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"image is truncated or damaged: {path.name} ({error})") from error
    if found > most:
        raise InputError(
            f"the file must unpack to what its header declares (at most {most} bytes), got more: {path.name}"
        )


def _check_folder(path: Path, limits: ReadLimits) -> None:
    files = [entry for entry in path.iterdir() if entry.is_file()]
    if len(files) > limits.files:
        raise InputError(f"a DICOM folder must hold at most {limits.files} files, got {len(files)}")
    total = 0
    for file in files:
        try:
            total += math.prod(_declared(file))
        except InputError:
            continue  # reading refuses a bad folder with its reason, and ignores files that are no slices
        _check_voxels((total,), limits, path.name)


def _declared(path: Path) -> tuple[int, ...]:
    """Voxels along each axis, and channels, as the header states them."""
    reader = open_header(path, path.name)
    return (*reader.GetSize(), reader.GetNumberOfComponents())


def _check_voxels(sizes: tuple[int, ...], limits: ReadLimits, name: str) -> None:
    if math.prod(sizes) > limits.voxels:
        shown = " x ".join(map(str, sizes))
        raise InputError(
            f"an image must have at most {limits.voxels} voxels here, got {shown}: {name}; crop it, or open it on the "
            "machine"
        )
