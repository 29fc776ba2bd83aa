"""Reading image files: the header is judged before the voxels, and what ITK lets pass (zero spacing, shears) is refused
here; and the limits on files from untrusted users. NIfTI is read by ``nifti.py``.
"""

from __future__ import annotations

import gzip
import logging
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.output import check_input
from samed3d.volume.dicom_headers import looks_like_dicom, read_image_file
from samed3d.volume.itk import NIFTI_SUFFIXES, SUFFIXES, array_of, grid_of, itk_reason, open_header, silenced, suffix_of
from samed3d.volume.nifti import NiftiHeader, is_packed

if TYPE_CHECKING:
    import SimpleITK as sitk

logger = logging.getLogger(__name__)

_LONGEST_TEXT_HEADER = 64 * 1024
_BLOCK = 1 << 20
FILL_VALUE = 1e30
"""No intensity has this magnitude in any unit; files mark voxels without a value by such numbers (-3.4e38, 9.97e36)."""
SPIKE_REACH, SPIKE_SHARE = 1e6, 1e-4
"""At most this share of the voxels, further from all others than this many times their range, are no intensities."""
_META_GEOMETRY = ("elementspacing", "elementsize", "offset", "position", "origin", "transformmatrix", "rotation")
_UNIT_FIELDS = ("space units", "units", "distanceunits")
_PLAIN_UNITS = {"mm", "millimeter", "millimeters", "millimetre", "millimetres", "s", "ms", "sec", "???"}
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


def read_file(path: Path, channel: int | None) -> tuple[NDArray, Grid, tuple[str, ...]]:
    """The (D, H, W) voxels and the grid of a file of one channel, or of its picked one, and notes on its header."""
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise InputError(f"image must be a folder of DICOM slices or end in one of {' '.join(SUFFIXES)}, got {path}")
    if suffix not in NIFTI_SUFFIXES:
        stated = _check_text_geometry(path)
        image = execute(path, channel)
        grid, notes = _placed(grid_of(image), path)
        return array_of(image), grid, stated + notes
    header = NiftiHeader.read(path)
    check_dimensions(header.size, header.spacing_xyz, path)
    what, count = ("channels", header.channels) if header.channels > 1 else ("volumes (4D)", header.volumes)
    picked = _picked_channel(channel, count, what, path)
    return header.voxels(path, picked), *header.placed()


def _check_text_geometry(path: Path) -> tuple[str, ...]:
    """Refuse what ITK passes over in the geometry of an NRRD or MetaImage header; notes on what the header lacks."""
    try:
        with path.open("rb") as file:
            head = file.read(_LONGEST_TEXT_HEADER).decode(errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    lines = re.split(r"\r?\n\r?\n|ElementDataFile", head)[0].splitlines()
    found = (re.match(r"\s*([\w ]+?)\s*[:=](?!=)(.*)", line) for line in lines)
    fields = {match[1].lower(): match[2].strip() for match in found if match}
    kinds = [*fields.get("kinds", "").lower().split(), *[""] * 4]
    for key in ("spacings", "space directions", "space origin", *_META_GEOMETRY):
        axes = re.findall(r"\([^)]*\)|\S+", fields.get(key, ""))
        spatial = [axis for n, axis in enumerate(axes) if len(axes) != 4 or kinds[n] in ("domain", "space")]
        if wrong := [axis for axis in spatial if re.search("nan|inf|none", axis, re.IGNORECASE)]:
            raise InputError(f"{key} must be numbers, got {' '.join(wrong)}: {path}; correct the header")
    units = {u.lower() for key in _UNIT_FIELDS for u in re.findall(r'[^\s"]+', fields.get(key, ""))} - _PLAIN_UNITS
    if units:
        raise InputError(f"lengths must be in mm, got {' '.join(sorted(units))}: {path}; convert the header to mm")
    if not {"spacings", "space directions", "axis mins", "elementspacing", "elementsize"} & set(fields):
        return ("the header states no voxel sizes; 1 mm is assumed",)
    anatomical = r"(left|right)-(anterior|posterior)-superior|[lr][ap]st?$"
    if path.name.lower().endswith(".nrrd") and not re.match(anatomical, fields.get("space", "").lower()):
        return ("the header states no orientation; left and right are assumed",)
    return ()


def _placed(grid: Grid, path: Path) -> tuple[Grid, tuple[str, ...]]:
    """A grid as ITK states it; where the axes of its matrix have other lengths than 1, they count as voxel sizes."""
    plain = Grid.from_affine_ras(grid.shape_zyx, grid.affine_ras, str(path))
    if np.allclose(plain.spacing_xyz_mm, grid.spacing_xyz_mm, rtol=1e-4, atol=0):
        return grid, ()
    shown = (" x ".join(f"{v:.4g}" for v in g.spacing_xyz_mm) for g in (grid, plain))
    return plain, ("voxel sizes are scaled by the header's matrix: {} mm stated, {} mm in all".format(*shown),)


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
    if failed := [line for line in said if "fail" in line.lower()]:  # MetaIO goes on with voxels that it did not read
        raise InputError(f"image is truncated or damaged: {path} ({failed[0]})")
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


def checked_array(array: NDArray, path: str | Path) -> tuple[NDArray, tuple[str, ...]]:
    """The voxels, float64 as float32, and notes on them; refused if they are complex, not finite or all equal."""
    if array.dtype.kind == "c":
        raise InputError(f"image holds complex numbers: {path}; save its magnitude first")
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise _not_finite(array.size - int(np.count_nonzero(np.isfinite(array))), array.size, path)
    far = _meaningless(array, float(low), float(high)) if array.dtype.kind == "f" else None
    notes: tuple[str, ...] = ()
    if far is not None and far.any() and not far.all():
        lowest = array.min(where=~far, initial=np.inf)
        value = array[far][0]
        count = np.count_nonzero(far)
        notes = (f"{count} voxels are no intensities (such as {value:.3g}) and are set to the lowest of the others",)
        array = np.where(far, lowest, array)
        low, high = array.min(), array.max()
    if low == high:
        raise InputError(f"image is constant, every voxel is {low:g}: {path}; there is nothing to segment")
    return array, notes


def _meaningless(array: NDArray, lowest: float, highest: float) -> NDArray[np.bool_] | None:
    """Where a floating-point image holds fill values or a few spikes, as the constants say; None if nowhere.

    One of them would set the scale of all statistics and leave nothing of the image.
    """
    thinned = array[tuple(slice(None, None, -(-n // 100)) for n in array.shape)].astype(np.float64)
    thinned = thinned[np.abs(thinned) < FILL_VALUE]
    low, high = np.percentile(thinned, (1, 99)) if thinned.size else (0.0, 0.0)
    reach = SPIKE_REACH * (high - low) or np.inf
    least, most = max(low - reach, -FILL_VALUE), min(high + reach, FILL_VALUE)
    if least < lowest and highest < most:
        return None
    far, fill = (
        np.stack([(plane <= a) | (plane >= b) for plane in array])
        for a, b in ((least, most), (-FILL_VALUE, FILL_VALUE))
    )
    return far if np.count_nonzero(far) - np.count_nonzero(fill) <= SPIKE_SHARE * array.size else fill


def _not_finite(bad: int, count: int, path: str | Path) -> InputError:
    return InputError(
        f"image holds {bad} NaN or infinite voxels of {count}: {path}; replace them with the background value"
    )


def count_volumes(path: str | Path) -> int:
    """How many 3D volumes an image file holds: more than one for a 4D image; judged by the header alone.

    Raises:
        InputError: if the file is not an image.
    """
    return math.prod(_declared(Path(path), str(path))[0][3:])


def check_untrusted(path: Path, limits: ReadLimits) -> None:
    """Judge an image file or DICOM folder from an untrusted user by its headers, before it is read.

    Refused are headers without an end, headers that name another file of the machine, and small files that unpack to
    terabytes; nothing is unpacked into memory.

    Raises:
        InputError: if it cannot be an image, its header is too long or names another file, or it holds more than
            ``limits`` allow.
    """
    check_input(path, "image")
    suffix = suffix_of(path)
    if path.is_dir() or (suffix not in SUFFIXES and looks_like_dicom(path)):
        _check_dicom(path, limits)
        return
    if suffix not in SUFFIXES:
        raise InputError(f"image must end in one of {' '.join(SUFFIXES)}, got {path.name!r}")
    if suffix not in NIFTI_SUFFIXES:
        _check_text_header(path)
    size, channels = _declared(path, path.name)
    _check_voxels((*size, channels), limits, path.name)
    if suffix in NIFTI_SUFFIXES and is_packed(path):
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
    declared = NiftiHeader.read(path, path.name).length
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


def _check_dicom(path: Path, limits: ReadLimits) -> None:
    """A folder of DICOM files, or one file."""
    files = [entry for entry in path.iterdir() if entry.is_file()] if path.is_dir() else [path]
    if len(files) > limits.files:
        raise InputError(f"a DICOM folder must hold at most {limits.files} files, got {len(files)}")
    total = 0
    for file in files:
        try:
            found = read_image_file(file)
        except InputError:
            continue  # reading refuses a bad folder with its reason
        if found is not None:
            total += math.prod(found.encoding.shape) * found.encoding.samples
        _check_voxels((total,), limits, path.name)


def _declared(path: Path, shown: str) -> tuple[tuple[int, ...], int]:
    """Voxels along each axis, and channels, as the header states them."""
    if suffix_of(path) in NIFTI_SUFFIXES:
        header = NiftiHeader.read(path, shown)
        return header.size, header.channels
    reader = open_header(path, shown)
    return reader.GetSize(), reader.GetNumberOfComponents()


def _check_voxels(sizes: tuple[int, ...], limits: ReadLimits, name: str) -> None:
    if math.prod(sizes) > limits.voxels:
        shown = " x ".join(map(str, sizes))
        raise InputError(
            f"an image must have at most {limits.voxels} voxels here, got {shown}: {name}; crop it, or open it on the "
            "machine"
        )
