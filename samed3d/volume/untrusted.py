"""What an image must satisfy before it is read for somebody else: one bounded header, one file, a bounded number of
voxels and bytes.

The readers of this package refuse what is wrong with an image; here is refused what is wrong with a sender: a header
that never ends, a header that names another file of the machine, a few kilobytes that unpack to terabytes. Nothing is
unpacked into memory. Read
``volume/files.py`` for reading itself.
"""

from __future__ import annotations

import gzip
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from samed3d.errors import InputError
from samed3d.volume.itk import NIFTI_SUFFIXES, SUFFIXES, itk_reason, silenced, suffix_of

_LONGEST_TEXT_HEADER = 64 * 1024
_BLOCK = 1 << 20
_BYTES_PER_VOXEL = 16
"""Nothing that is read has wider voxels (complex double)."""


@dataclass(frozen=True)
class ReadLimits:
    """How large an image from somebody else may be.

    Attributes:
        voxels: Of all volumes and channels of the file together.
        files: In a DICOM folder.
    """

    voxels: int = 2**29
    files: int = 10_000


def check_untrusted(path: Path, limits: ReadLimits) -> None:
    """Judge an image file or DICOM folder by its headers, before it is read.

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
        end = re.search(rb"\r?\n\r?\n", head)
        elsewhere = re.compile(rb"(?mi)^\s*data ?file\s*:")
    else:
        end = re.search(rb"(?m)^\s*ElementDataFile\s*=[^\n]*\n?", head)
        elsewhere = re.compile(rb"(?mi)^\s*ElementDataFile\s*=(?!\s*LOCAL\s*$)")
    if end is None:
        raise InputError(
            f"the header must end within {_LONGEST_TEXT_HEADER} bytes, got a longer one or none: {path.name}"
        )
    if elsewhere.search(head[: end.end()]):
        raise InputError(
            f"the voxels must be in the same file as the header, got a header that names another file: {path.name}"
        )


def _check_gzip(path: Path, limits: ReadLimits) -> None:
    """Unpack block by block, keeping nothing."""
    most, found = limits.voxels * _BYTES_PER_VOXEL, 0
    try:
        with gzip.open(path, "rb") as stream:
            header = stream.read(352)
            found = len(header)
            if len(header) >= 348:  # what the header declares bounds what may follow; the rest would only cost time
                most = min(most, _nifti_bytes(header) + _BLOCK)
            while found <= most and (block := stream.read(_BLOCK)):
                found += len(block)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"image is truncated or damaged: {path.name} ({error})") from error
    if found > most:
        raise InputError(
            f"the file must unpack to what its header declares (at most {most} bytes), got more: {path.name}"
        )


def _nifti_bytes(header: bytes) -> int:
    order = "little" if int.from_bytes(header[:4], "little") == 348 else "big"
    dims = [int.from_bytes(header[40 + 2 * n : 42 + 2 * n], order, signed=True) for n in range(8)]  # type: ignore[arg-type]
    bits = int.from_bytes(header[72:74], order, signed=True)  # type: ignore[arg-type]
    return 352 + math.prod(max(1, n) for n in dims[1:]) * max(8, bits) // 8


def _check_folder(path: Path, limits: ReadLimits) -> None:
    files = [entry for entry in path.iterdir() if entry.is_file()]
    if len(files) > limits.files:
        raise InputError(f"a DICOM folder must hold at most {limits.files} files, got {len(files)}")
    total = 0
    for file in files:
        try:
            total += math.prod(_declared(file))
        except InputError:
            continue  # the reader says what is wrong with a folder, and passes over what is no slice
        _check_voxels((total,), limits, path.name)


def _declared(path: Path) -> tuple[int, ...]:
    """Voxels along each axis, and channels, as the header states them."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    said: list[str] = []
    try:
        with silenced(said):
            reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"not an image, or its header is damaged: {path.name} ({itk_reason(error, said)})") from error
    return (*reader.GetSize(), reader.GetNumberOfComponents())


def _check_voxels(sizes: tuple[int, ...], limits: ReadLimits, name: str) -> None:
    if math.prod(sizes) > limits.voxels:
        shown = " x ".join(map(str, sizes))
        raise InputError(
            f"an image must have at most {limits.voxels} voxels here, got {shown}: {name}; crop it, or open it on the machine"
        )
