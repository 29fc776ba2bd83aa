"""Reading image files: the header is judged before the voxels, and what ITK lets pass (cut NIfTI files, zero spacing)
is refused here.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.volume.itk import NIFTI_SUFFIXES, SUFFIXES, itk_reason, silenced, suffix_of

if TYPE_CHECKING:
    import SimpleITK as sitk

logger = logging.getLogger(__name__)

# Cosine between two voxel axes up to which a skewed NIfTI matrix counts as rounding (half a degree) and is made
# orthogonal.
_SKEW_TOLERANCE = 0.01


def read_file(path: Path, channel: int | None) -> sitk.Image:
    """The 3D, one-channel image of a file."""
    import SimpleITK as sitk

    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise InputError(f"image must be a folder of DICOM slices or end in one of {' '.join(SUFFIXES)}, got {path}")
    if suffix not in NIFTI_SUFFIXES:
        return execute(sitk.ImageFileReader(), path, channel)
    # ITK reads a cut NIfTI file without complaint and turns NaN into 0. Checking the stream beside the reading costs
    # little on two cores.
    layout = _nifti_layout(path)
    with ThreadPoolExecutor(1) as pool:
        checked = pool.submit(_check_nifti_stream, path, layout)
        try:
            image = execute(sitk.ImageFileReader(), path, channel)
        except InputError as error:
            checked.result()
            if "orthonormal" not in str(error):
                raise
            image = _read_skewed_nifti(path, channel)
        bad = int(checked.result()[channel or 0])
    if bad:
        raise _not_finite(bad, image.GetNumberOfPixels(), path)
    return image


def execute(reader: sitk.ImageFileReader, path: Path, channel: int | None) -> sitk.Image:
    """Read with an ITK reader, judging the header before the voxels.

    Raises:
        InputError: as ``read_volume``.
    """
    reader.SetFileName(str(path))
    said: list[str] = []
    try:
        with silenced(said):
            reader.ReadImageInformation()
    except RuntimeError as error:
        if "Unable to determine ImageIO" in str(error):
            raise InputError(f"not an image, or its header is damaged: {path}") from error
        raise InputError(f"image cannot be read: {path} ({itk_reason(error, said)})") from error
    size, channels = list(reader.GetSize()), reader.GetNumberOfComponents()
    check_dimensions(size, reader.GetSpacing(), path)
    if len(size) == 4:
        picked = _picked_channel(channel, size[3], "volumes (4D)", path)
        reader.SetExtractSize([*size[:3], 0])
        reader.SetExtractIndex([0, 0, 0, picked])
    elif channels == 1 and channel not in (None, 0):
        raise InputError(f"--channel must be 0 for an image of one channel, got {channel}: {path}")
    try:
        with silenced(said):
            image = reader.Execute()
    except RuntimeError as error:
        raise InputError(f"image is truncated or damaged: {path} ({itk_reason(error, said)})") from error
    return one_channel(image, channel if len(size) == 3 else None, path)


def one_channel(image: sitk.Image, channel: int | None, path: Path) -> sitk.Image:
    """The picked channel of an RGB or vector image; an image of one channel as it is."""
    import SimpleITK as sitk

    channels = image.GetNumberOfComponentsPerPixel()
    if channels == 1 or "complex" in image.GetPixelIDTypeAsString():
        return image
    return sitk.VectorIndexSelectionCast(image, _picked_channel(channel, channels, "channels", path))


def _picked_channel(channel: int | None, count: int, what: str, path: Path) -> int:
    if channel is None and count > 1:
        raise InputError(
            f"image has {count} {what}, one is needed: pick one with --channel N (0 to {count - 1}): {path}"
        )
    if not 0 <= (channel or 0) < count:
        raise InputError(f"--channel must be 0 to {count - 1}, got {channel}: {path}")
    return channel or 0


def check_dimensions(size: Sequence[int], spacing: Sequence[float], path: Path | str) -> None:
    """Refuse what is not a stack of slices (a fourth axis is left to ``execute``) or has no voxel size."""
    if len(size) not in (3, 4):
        raise InputError(f"image must be 3D, got {len(size)}D ({' x '.join(map(str, size))}): {path}")
    if 1 in size[:3]:
        raise InputError(
            f"image must be 3D, got a single slice ({' x '.join(map(str, size[:3]))}): {path}; give the whole stack"
        )
    if not all(0 < s < math.inf for s in spacing[:3]):
        raise InputError(f"spacing must be > 0 on each axis, got {_shown(spacing[:3])} mm: {path}; correct the header")


def checked_array(array: NDArray, path: Path | str) -> NDArray:
    """The voxels, float64 as float32; refused if they are complex, not finite or all equal."""
    if array.dtype.kind == "c":
        raise InputError(f"image holds complex numbers: {path}; save its magnitude first")
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        raise _not_finite(bad, array.size, path)
    if low == high:
        raise InputError(f"image is constant, every voxel is {low:g}: {path}; there is nothing to segment")
    return array


def _not_finite(bad: int, count: int, path: Path | str) -> InputError:
    return InputError(
        f"image holds {bad} NaN or infinite voxels of {count}: {path}; replace them with the background value"
    )


@dataclass(frozen=True)
class _NiftiLayout:
    """Where a NIfTI-1 file keeps its voxels.

    Attributes:
        offset: Bytes before the first voxel.
        voxels: Voxels of one 3D volume.
        volumes: 3D volumes that follow one another (time points or channels).
        bits: Bits per voxel.
        floating: numpy type of floating-point voxels, else "".
    """

    offset: int
    voxels: int
    volumes: int
    bits: int
    floating: str

    @property
    def length(self) -> int:
        """Bytes of the whole file."""
        return self.offset + self.voxels * self.volumes * self.bits // 8


def _nifti_layout(path: Path) -> _NiftiLayout:
    """Read a NIfTI-1 header and refuse a spacing that ITK would quietly replace by 1 mm."""
    try:
        with _opened(path) as stream:
            header = stream.read(348)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"image is truncated or damaged: {path} ({error})") from error
    order = next((o for o in "<>" if len(header) == 348 and struct.unpack_from(f"{o}i", header)[0] == 348), "")
    if header[:4] in (struct.pack("<i", 540), struct.pack(">i", 540)):
        raise InputError(f"NIfTI-2 cannot be read: {path}; save it as NIfTI-1 or .nrrd")
    if not order or header[344:346] != b"n+":
        raise InputError(f"not an image, or its header is damaged: {path}")
    dim = struct.unpack_from(f"{order}8h", header, 40)
    spacing = struct.unpack_from(f"{order}8f", header, 76)[1:4]
    if dim[0] >= 3 and not all(0 < s < math.inf for s in spacing):
        raise InputError(f"spacing must be > 0 on each axis, got {_shown(spacing)} mm: {path}; correct the header")
    sizes = [max(1, n) if axis <= dim[0] else 1 for axis, n in enumerate(dim[1:], start=1)]
    kind, bits = struct.unpack_from(f"{order}2h", header, 70)
    offset = int(struct.unpack_from(f"{order}f", header, 108)[0])
    floating = {16: f"{order}f4", 64: f"{order}f8"}.get(kind, "")
    return _NiftiLayout(offset, math.prod(sizes[:3]), math.prod(sizes[3:]), bits, floating)


def _check_nifti_stream(path: Path, layout: _NiftiLayout) -> NDArray[np.int64]:
    """Read a NIfTI file to its end: all bytes must be there and, in a .gz, the checksum must agree.

    Returns:
        For each volume of the file, how many of its voxels are NaN or infinite.
    """
    bad, found = np.zeros(layout.volumes, np.int64), 0
    try:
        with _opened(path) as stream:
            found += len(stream.read(layout.offset))
            while block := stream.read(1 << 20):
                if layout.floating:
                    values = np.frombuffer(block, layout.floating, count=len(block) * 8 // layout.bits)
                    where = np.flatnonzero(~np.isfinite(values)) + (found - layout.offset) * 8 // layout.bits
                    bad += np.bincount(where // layout.voxels, minlength=layout.volumes)[: layout.volumes]
                found += len(block)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"image is truncated or damaged: {path} ({error})") from error
    if found < layout.length:
        raise InputError(f"image is truncated or damaged: {path} ({found} of {layout.length} bytes)")
    return bad


def _opened(path: Path) -> Any:
    return gzip.open(path, "rb") if suffix_of(path) == ".nii.gz" else path.open("rb")


def _read_skewed_nifti(path: Path, channel: int | None) -> sitk.Image:
    """Read a NIfTI file whose matrix is not orthogonal, as long as it is by rounding only; a real shear is refused."""
    import SimpleITK as sitk

    with _opened(path) as stream:
        header = stream.read(348)
    order = "<" if struct.unpack_from("<i", header)[0] == 348 else ">"
    axes = np.array(struct.unpack_from(f"{order}12f", header, 280)).reshape(3, 4)[:, :3]
    axes = axes / np.maximum(np.linalg.norm(axes, axis=0), 1e-30)
    skew = float(np.abs(axes.T @ axes - np.eye(3)).max())
    if skew > _SKEW_TOLERANCE:
        degrees = math.degrees(math.asin(min(1.0, skew)))
        raise InputError(
            f"voxel axes must be perpendicular, got {degrees:.1f} degrees of shear: {path}; resample to an orthogonal grid"
        )
    logger.warning("voxel axes of %s are not quite perpendicular; taking the nearest orthogonal axes", path)
    before = os.environ.get("ITK_NIFTI_SFORM_PERMISSIVE")
    os.environ["ITK_NIFTI_SFORM_PERMISSIVE"] = "1"  # the only switch that ITK has for this
    try:
        return execute(sitk.ImageFileReader(), path, channel)
    finally:
        if before is None:
            del os.environ["ITK_NIFTI_SFORM_PERMISSIVE"]
        else:
            os.environ["ITK_NIFTI_SFORM_PERMISSIVE"] = before


def _shown(values: Sequence[float]) -> str:
    return " x ".join(f"{v:g}" for v in values)
