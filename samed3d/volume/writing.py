"""Writing masks and volumes: the image's own grid bit for bit, all or nothing.

ITK's NIfTI writer reports no error on a full disk, and its NIfTI and NRRD headers lose the last bits of an oblique
grid. Those two are therefore written here; MetaImage is exact and safe as ITK writes it.
"""

from __future__ import annotations

import gzip
import itertools
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.volume.itk import NIFTI_SUFFIXES, SUFFIXES, itk_reason, silenced, suffix_of

if TYPE_CHECKING:
    import SimpleITK as sitk

# Masks are mostly zeros and small at any level; floats hardly shrink at all. A low level keeps saving quick.
_COMPRESSION = 3


def check_output(path: str | Path, *, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Refuse an output path that could not be written, before any work is done.

    Raises:
        InputError: if the suffix is not one of ``suffixes``, or the folder is missing or not writable.
    """
    path = Path(path)
    if not path.name.lower().endswith(tuple(suffixes)):
        raise InputError(f"output name must end in one of {' '.join(suffixes)}, got {path.name!r}")
    if path.is_dir():
        raise InputError(f"output must be a file, got a folder: {path}")
    folder = path.parent
    if not folder.is_dir():
        raise InputError(f"output folder does not exist: {folder}; create it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"output folder is not writable: {folder} ({error.strerror})") from error


def write_mask(path: str | Path, array: NDArray, grid: Grid) -> None:
    """Write a mask or an integer label map; see ``write_volume``. Stored as uint8, or uint16 where an id exceeds
    255.
    """
    if array.dtype.kind not in "biu":
        raise ValueError(f"a mask must be of bool or integer type, got {array.dtype}")
    wide = array.dtype != np.bool_ and array.size and int(array.max()) > 255
    write_volume(path, array.astype(np.uint16 if wide else np.uint8, copy=False), grid)


def write_volume(path: str | Path, array: NDArray, grid: Grid) -> None:
    """Write a (D, H, W) array on a grid; the suffix decides the format. A failed write leaves no file and harms no
    older one.

    A file in the format of the image that the grid was read from gives back the same size, spacing, origin and
    direction, bit for bit. So does ``.mha`` for any grid; NIfTI stores single precision, so a grid from another format
    is rounded there (about 1e-7).

    Raises:
        InputError: if the output cannot be written; the message gives the reason.
        ValueError: if the array's shape is not the grid's.
    """
    path = Path(path)
    if array.shape != grid.shape_zyx:
        raise ValueError(f"array must have the grid's shape {grid.shape_zyx}, got {array.shape}")
    check_output(path)
    array = np.ascontiguousarray(array, dtype=_stored_type(array.dtype))
    suffix = suffix_of(path)
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=".samed3d-", dir=path.parent))
        target = folder / path.name
        if suffix in NIFTI_SUFFIXES:
            _write_nifti(target, array, grid, compress=suffix == ".nii.gz")
        elif suffix == ".nrrd":
            _write_nrrd(target, array, grid)
        else:
            _write_metaimage(target, array, grid)
        # The voxels of .mhd lie in a second file: it moves first, so that the header never names a file that is not
        # there.
        for made in sorted(folder.iterdir(), key=lambda f: f.name == path.name):
            os.replace(made, path.parent / made.name)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else itk_reason(error)
        raise InputError(f"cannot write {path}: {reason}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _write_nifti(path: Path, array: NDArray, grid: Grid, *, compress: bool) -> None:
    import SimpleITK as sitk

    if max(array.shape) > 32767:
        raise InputError(
            f"cannot write {path.name}: NIfTI holds at most 32767 voxels along an axis, got {max(array.shape)}; use .nrrd"
        )
    # ITK makes the header of a one-voxel image of the same geometry; the shape and the exact matrix are then set.
    small = path.with_name("header.nii")
    with silenced([]):
        sitk.WriteImage(_itk_image(np.zeros((1, 1, 1), array.dtype), grid), str(small))
    header = bytearray(small.read_bytes()[:352])
    small.unlink()
    struct.pack_into("=8h", header, 40, 3, *grid.size_ijk, 1, 1, 1, 1)
    direction = np.array(grid.direction_lps).reshape(3, 3)
    matrix = np.empty((3, 4))
    for axis in range(3):
        matrix[:, axis] = _single_axis(direction[:, axis], grid.spacing_xyz_mm[axis])
    matrix[:, 3] = grid.origin_lps_mm
    matrix[:2] *= -1.0  # LPS to RAS
    struct.pack_into("=12f", header, 280, *matrix.ravel())
    with path.open("wb") as file:
        if not compress:
            file.write(header)
            array.tofile(file)
        else:
            with gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as stream:
                stream.write(header)
                stream.write(array.data)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an error, and vanishes
    otherwise.

    Raises:
        InputError: if the file system refuses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def nrrd_header(kind: np.dtype, grid: Grid, layers: int = 1) -> list[str]:
    """The lines of an NRRD header with gzip-compressed voxels.

    Args:
        kind: Of the voxels.
        grid: Where they are.
        layers: Values per voxel; more than one become a first (fastest) axis.
    """
    kinds = {
        "u1": "uint8",
        "i1": "int8",
        "u2": "uint16",
        "i2": "int16",
        "u4": "uint32",
        "i4": "int32",
        "u8": "uint64",
        "i8": "int64",
    }
    kinds |= {"f4": "float"}
    direction = np.array(grid.direction_lps).reshape(3, 3)
    vectors = [_double_axis(direction[:, axis], grid.spacing_xyz_mm[axis]) for axis in range(3)]
    first = layers > 1
    return [
        "NRRD0004",
        f"type: {kinds[kind.str[1:]]}",
        f"dimension: {3 + first}",
        "space: left-posterior-superior",
        f"sizes: {f'{layers} ' * first}{' '.join(map(str, grid.size_ijk))}",
        f"space directions: {'none ' * first}{' '.join(_vector(v) for v in vectors)}",
        f"kinds: {'list ' * first}domain domain domain",
        f"endian: {'little' if np.little_endian else 'big'}",
        "encoding: gzip",
        f"space origin: {_vector(grid.origin_lps_mm)}",
    ]


def _write_nrrd(path: Path, array: NDArray, grid: Grid) -> None:
    with path.open("wb") as file:
        file.write(("\n".join(nrrd_header(array.dtype, grid)) + "\n\n").encode())
        with gzip.GzipFile("", "wb", _COMPRESSION, file, mtime=0) as stream:
            stream.write(array.data)


def _write_metaimage(path: Path, array: NDArray, grid: Grid) -> None:
    import SimpleITK as sitk

    with silenced([]):
        sitk.WriteImage(_itk_image(array, grid), str(path), useCompression=True, compressionLevel=_COMPRESSION)


def _single_axis(direction: NDArray, spacing: float) -> NDArray:
    """The single-precision axis vector that ITK turns back into exactly ``direction`` (a reader divides it by its
    length).

    A direction that was read from a NIfTI file came from such a vector, of a length within rounding of the spacing: try
    the values of its largest component around there. Falls back to the nearest vector for directions that no such
    vector gives.
    """
    largest = int(np.argmax(np.abs(direction)))
    guess = np.float32(direction[largest] * spacing).view(np.int32)
    for offset in sorted(range(-64, 65), key=abs):
        component = float(np.int32(guess + offset).view(np.float32))
        axis = (direction * (component / direction[largest])).astype(np.float32).astype(np.float64)
        if np.array_equal(axis / np.linalg.norm(axis), direction):
            return axis
    return direction * spacing


def _double_axis(direction: NDArray, spacing: float) -> NDArray:
    """As ``_single_axis`` for NRRD: the double-precision vector of exactly that length and direction, in the last bits
    around it.
    """
    guess = (direction * spacing).view(np.int64)
    steps = sorted(itertools.product(range(-2, 3), repeat=3), key=lambda step: sum(map(abs, step)))
    for step in steps:
        axis = (guess + np.array(step)).view(np.float64)
        length = np.sqrt(axis[0] * axis[0] + axis[1] * axis[1] + axis[2] * axis[2])
        if length == spacing and np.array_equal(axis * (1.0 / length), direction):
            return axis
    return direction * spacing


def _itk_image(array: NDArray, grid: Grid) -> sitk.Image:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(array)
    image.SetSpacing(grid.spacing_xyz_mm)
    image.SetOrigin(grid.origin_lps_mm)
    image.SetDirection(grid.direction_lps)
    return image


def _stored_type(dtype: np.dtype) -> np.dtype:
    if dtype == np.bool_:
        return np.dtype(np.uint8)
    return np.dtype(np.float32) if dtype.kind == "f" else dtype.newbyteorder("=")


def _vector(values: Sequence[float] | NDArray) -> str:
    return "(" + ",".join(f"{v:.17g}" for v in values) + ")"
