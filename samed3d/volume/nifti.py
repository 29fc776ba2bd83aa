"""NIfTI-1 and NIfTI-2: what a header says, where it places the image, its voxels, and the header of a mask on its grid.

Libraries keep one of the two matrices of a header and lose units and codes. A mask must have all of them, so headers
are read and written here, field by field.
"""

from __future__ import annotations

import gzip
import itertools
import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import GRID_TOLERANCE, Grid, as_triple, corners_apart_mm, is_sheared, shear_degrees

_BLOCK = 3 << 20
_GZIP_RATIO = 1032  # deflate packs no tighter

# Name: (type in NIfTI-1, offset, type in NIfTI-2, offset).
_FIELDS: dict[str, tuple[Any, int, Any, int]] = {
    "sizeof_hdr": ("i4", 0, "i4", 0),
    "dim": ("8i2", 40, "8i8", 16),
    "datatype": ("i2", 70, "i2", 12),
    "bitpix": ("i2", 72, "i2", 14),
    "pixdim": ("8f4", 76, "8f8", 104),
    "vox_offset": ("f4", 108, "i8", 168),
    "scl_slope": ("f4", 112, "f8", 176),
    "scl_inter": ("f4", 116, "f8", 184),
    "xyzt_units": ("u1", 123, "i4", 500),
    "qform_code": ("i2", 252, "i4", 344),
    "sform_code": ("i2", 254, "i4", 348),
    "quatern": ("3f4", 256, "3f8", 352),
    "qoffset": ("3f4", 268, "3f8", 376),
    "srow": ("(3,4)f4", 280, "(3,4)f8", 400),
    "magic": ("S4", 344, "S8", 4),
}
_GEOMETRY = ("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern", "qoffset", "srow")


def _layout(version: int) -> np.dtype:
    columns = [spec[2 * version - 2 : 2 * version] for spec in _FIELDS.values()]
    names, size = list(_FIELDS), (348, 540)[version - 1]
    formats, offsets = [kind for kind, _ in columns], [offset for _, offset in columns]
    return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size})


_LAYOUTS = {348: (_layout(1), b"n+1"), 540: (_layout(2), b"n+2\0\r\n\x1a\n")}
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_CODES = {kind: code for code, kind in _TYPES.items()}
# Type and channels of a voxel. Complex numbers are read to be refused as such.
_VOXELS = {code: (kind, 1) for code, kind in _TYPES.items()} | dict(
    [(128, ("u1", 3)), (2304, ("u1", 4)), (32, ("c8", 1)), (1792, ("c16", 1))]
)
_MM = {1: 1000.0, 3: 0.001}  # of a metre and a micron; a millimetre and an unknown unit count as 1
_SIZE_TOLERANCE = 1e-3  # relative, between the voxel sizes of a matrix and those of pixdim: beyond it, a note
_ROUNDING = 1e-5  # the same: up to it, those of pixdim are taken, which lack the rounding of the matrix
_QUATERNION_TOLERANCE = 1e-3  # of its squared length above 1
_QUATERNION_ROUNDING = 4e-7  # of the same in single precision: half a turn has a first component of 0, not of 6e-4
_UNIT_AXES = "holds no voxel sizes (its axes have length 1)"


@dataclass(frozen=True)
class NiftiHeader:
    """The header of a NIfTI file whose voxels follow in the same file.

    Attributes:
        raw: Its bytes.
        fields: The same, by name.
        dtype: Of the voxels as stored, in the file's byte order.
        channels: Numbers per voxel: 3 or 4 for colours.
        size: Voxels along i, j, k and the number of volumes, as many as the header has.
        shown: How messages name the file.
    """

    raw: bytes
    fields: np.void
    dtype: np.dtype
    channels: int
    size: tuple[int, ...]
    shown: str

    @classmethod
    def read(cls, path: Path, shown: str | Path = "") -> NiftiHeader:
        """The header of a file.

        Raises:
            InputError: if it is none, or cannot be right.
        """
        try:
            with opened(path) as stream:
                return cls.parse(stream.read(540), str(shown or path))
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(shown or path, error) from error

    @classmethod
    def parse(cls, head: bytes, shown: str = "") -> NiftiHeader:
        """The header at the start of ``head``; raises as ``read``."""
        for (length, (layout, magic)), order in itertools.product(_LAYOUTS.items(), "<>"):
            if len(head) < length:
                continue
            fields = np.frombuffer(head, layout.newbyteorder(order), 1)[0]
            if fields["sizeof_hdr"] == length and fields["magic"] == magic and 1 <= fields["dim"][0] <= 7:
                break
        else:
            raise InputError(f"not an image, or its header is damaged: {shown}")
        size = [int(n) for n in fields["dim"][1 : fields["dim"][0] + 1]]
        if min(size[:3]) < 1 or not math.isfinite(fields["vox_offset"]):
            wrong = f"dim {' '.join(map(str, size))}, vox_offset {fields['vox_offset']:g}"
            raise InputError(f"not an image, or its header is damaged: {shown} ({wrong})")
        kind, channels = _VOXELS.get(int(fields["datatype"]), ("", 0))
        if not kind:
            code = fields["datatype"]
            raise InputError(f"NIfTI voxels of type {code} cannot be read: {shown}; save them as integers or float32")
        size = size[:3] + [n for n in size[3:] if n > 1]
        return cls(head[:length], fields, np.dtype(order + kind), channels, tuple(size), shown)

    @property
    def volumes(self) -> int:
        """3D volumes that follow one another (time points or the components of vectors)."""
        return math.prod(self.size[3:])

    @property
    def volume_bytes(self) -> int:
        """Bytes of one of them."""
        return math.prod(self.size[:3]) * self.channels * self.dtype.itemsize

    @property
    def offset(self) -> int:
        """Bytes before the first voxel: at least header and extension flag."""
        return max(len(self.raw) + 4, int(self.fields["vox_offset"]))

    @property
    def length(self) -> int:
        """Bytes of the whole file."""
        return self.offset + self.volumes * self.volume_bytes

    @property
    def spacing_xyz(self) -> list[float]:
        """Voxel edges as ``pixdim`` states them, in the file's unit."""
        return [float(v) for v in self.fields["pixdim"][1:4]]

    def voxels(self, path: Path, picked: int) -> NDArray:
        """The (D, H, W) voxels of one volume or channel, scaled; float32 where they are scaled or doubles.

        The file is read to its end: all bytes must be there and, in a .gz, the checksum must agree. ITK reads a cut
        file without complaint, turns NaN into 0 and needs twice the memory.

        Raises:
            InputError: if the file is damaged, or its scale is not a number.
        """
        size = path.stat().st_size
        if self.length > size * (_GZIP_RATIO if is_packed(path) else 1):
            raise _damaged(path, f"{size} of {self.length} bytes")
        number, channel = (picked, 0) if self.channels == 1 else (0, picked)
        scale = self._scale()
        kind = np.dtype(np.float32) if scale or self.dtype.str[1:] == "f8" else self.dtype.newbyteorder("=")
        done, width = 0, self.channels * self.dtype.itemsize
        try:
            array = np.empty(math.prod(self.size[:3]), kind)
            with opened(path) as stream, np.errstate(over="ignore"):
                for _ in _blocks(stream, self.offset + number * self.volume_bytes):
                    pass
                for block in _blocks(stream, self.volume_bytes):
                    values = np.frombuffer(block, self.dtype, len(block) // width * self.channels)
                    values = values[channel :: self.channels]
                    if scale:
                        values = values * np.float64(scale[0]) + scale[1]
                    array[done : done + len(values)] = values
                    done += len(values)
                for _ in _blocks(stream, sys.maxsize):
                    pass
                found = stream.tell()
        except (OSError, EOFError, zlib.error, MemoryError) as error:
            raise _damaged(path, error) from error
        if found < self.length:
            raise _damaged(path, f"{found} of {self.length} bytes")
        return array.reshape(self.size[2::-1])

    def _scale(self) -> tuple[float, float] | None:
        """Slope and intercept of the voxels; a slope of 0 or NaN means that there is none."""
        slope, intercept = float(self.fields["scl_slope"]), float(self.fields["scl_inter"])
        if not math.isfinite(slope) or slope == 0 or (slope, intercept) == (1, 0) or self.channels > 1:
            return None
        if not math.isfinite(intercept):
            raise InputError(f"scl_inter must be a number, got {intercept}: {self.shown}; correct the header")
        return slope, intercept

    def placed(self) -> tuple[Grid, tuple[str, ...]]:
        """The grid of the image, and notes on what was decided.

        The sform counts if its code is above 0, else the qform if its code is above 0, else the voxel sizes alone. A
        matrix that cannot be used leaves its place to the other one.

        Raises:
            InputError: if no matrix with a code can be used.
        """
        sizes, notes, shown = np.array(self.spacing_xyz), [], self.shown
        given = {"sform": self._sform(), "qform": self._qform()}
        given = {name: matrix for name, matrix in given.items() if self.fields[f"{name}_code"] > 0}
        faults = {name: _fault(matrix, sizes) for name, matrix in given.items()}
        usable = [matrix for name, matrix in given.items() if not faults[name]]
        if not given:
            matrix = np.diag([-sizes[0], -sizes[1], sizes[2], 1.0])
            notes.append("the header states no orientation (both codes are 0); left and right are assumed")
        elif usable:
            matrix = usable[0]
            if faults.get("sform"):
                notes.append(f"the sform {faults['sform']}; the qform places the image")
        elif faults.get("sform") == _UNIT_AXES:
            matrix = given["sform"] @ np.diag([*sizes, 1.0])
            notes.append(f"the sform {_UNIT_AXES}; the voxel sizes are those of pixdim")
        else:
            name, matrix = next(iter(given.items()))
            shown = f"{name} of {shown}"  # refused below
        unit = _MM.get(int(self.fields["xyzt_units"]) & 7, 1.0)
        lengths = np.linalg.norm(matrix[:3, :3], axis=0)
        if not np.allclose(lengths, sizes, rtol=_SIZE_TOLERANCE, atol=0):
            two = (" x ".join(f"{v * unit:.4g}" for v in values) for values in (lengths, sizes))
            notes.append("voxel sizes are {} mm by the sform, which is used, and {} mm by pixdim".format(*two))
        elif len(usable) == 2:
            apart = corners_apart_mm(usable[0], usable[1], self.size[:3])
            if apart > GRID_TOLERANCE * sizes.min():
                notes.append(f"sform and qform place the image up to {apart * unit:.3g} mm apart; the sform is used")
        if not np.allclose(lengths, sizes, rtol=_ROUNDING, atol=0):
            sizes = lengths
        mm = matrix * np.array([unit, unit, unit, 1.0])[:, None]
        grid = Grid.from_affine_ras((self.size[2], self.size[1], self.size[0]), mm, shown)
        return replace(grid, spacing_xyz_mm=as_triple(sizes * unit), nifti_header=self.raw), tuple(notes)

    def _sform(self) -> NDArray[np.float64]:
        return np.vstack([self.fields["srow"].astype(np.float64), [0, 0, 0, 1]])

    def _qform(self) -> NDArray[np.float64]:
        """The 4x4 matrix of the quaternion, offsets and voxel sizes; NaN where no rotation has such a quaternion."""
        b, c, d = self.fields["quatern"].astype(np.float64)
        norm = b * b + c * c + d * d
        matrix = np.full((4, 4), np.nan)
        if not norm <= 1.0 + _QUATERNION_TOLERANCE:
            return matrix
        a = math.sqrt(1.0 - norm) if norm < 1.0 - _QUATERNION_ROUNDING else 0.0
        b, c, d = np.array([b, c, d]) / (1.0 if a else math.sqrt(norm))
        matrix[:3, :3] = [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
        matrix[:3, :3] *= [*self.spacing_xyz[:2], self.spacing_xyz[2] * (-1 if self.fields["pixdim"][0] < 0 else 1)]
        matrix[:3, 3], matrix[3] = self.fields["qoffset"], [0, 0, 0, 1]
        return matrix


def _fault(matrix: NDArray[np.float64], sizes: NDArray[np.float64]) -> str:
    """Why a matrix cannot place an image with voxels of ``sizes``; empty if it can."""
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    if not np.isfinite(matrix).all():
        return "holds numbers that are not finite, or no rotation"
    if not (lengths > 0).all():
        return "has an axis without length"
    if is_sheared(matrix):
        return f"is sheared by {shear_degrees(matrix):.1f} degrees"
    close = [np.allclose(lengths, wanted, rtol=_SIZE_TOLERANCE, atol=0) for wanted in (1.0, sizes)]
    return _UNIT_AXES if close == [True, False] else ""


def mask_header(kind: np.dtype, grid: Grid) -> bytes:
    """The header of one volume of ``kind`` on a grid: both matrices, codes, voxel sizes and units as in the NIfTI file
    that the grid was read from, else both matrices from the grid, in mm, with code 1 (scanner).
    """
    given = NiftiHeader.parse(grid.nifti_header) if grid.nifti_header else None
    length = len(grid.nifti_header) or 348
    layout, magic = _LAYOUTS[length]
    header = np.zeros((), layout)
    if given:
        for name in _GEOMETRY:
            header[name] = given.fields[name]
    else:
        from scipy.spatial.transform import Rotation

        affine = grid.affine_ras
        rotation = affine[:3, :3] / grid.spacing_xyz_mm
        handed = 1.0 if np.linalg.det(rotation) > 0 else -1.0
        header["pixdim"][:4] = [handed, *grid.spacing_xyz_mm]
        header["quatern"] = Rotation.from_matrix(rotation * [1, 1, handed]).as_quat(canonical=True)[:3]
        header["qoffset"], header["srow"] = affine[:3, 3], affine[:3]
        header["qform_code"] = header["sform_code"] = 1
        header["xyzt_units"] = 2
    header["sizeof_hdr"], header["magic"], header["vox_offset"] = length, magic, length + 4
    header["dim"] = [3, *grid.size_ijk, 1, 1, 1, 1]
    header["datatype"], header["bitpix"] = _CODES[kind.str[1:]], 8 * kind.itemsize
    header["scl_slope"] = 1.0
    return header.tobytes() + bytes(4)


def opened(path: Path) -> IO[bytes]:
    """A NIfTI file as a stream of unpacked bytes."""
    return cast(IO[bytes], gzip.open(path, "rb")) if is_packed(path) else path.open("rb")


def is_packed(path: Path) -> bool:
    """Whether a file is gzip, whatever its name says."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _blocks(stream: IO[bytes], count: int) -> Iterator[bytes]:
    """The next bytes of a stream, at most ``count``, in blocks that hold whole voxels of any type."""
    while count > 0 and (block := stream.read(min(count, _BLOCK))):
        yield block
        count -= len(block)


def _damaged(shown: str | Path, why: object) -> InputError:
    return InputError(f"image is truncated or damaged: {shown} ({why})")
