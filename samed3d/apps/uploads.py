"""Bodies that become files: streamed to disk, judged there, removed when they are refused. One image file, or a zip of
a DICOM folder.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

from samed3d.apps.protocol import ApiError
from samed3d.errors import InputError
from samed3d.volume.untrusted import ReadLimits, check_untrusted

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha")
"""Formats of one file. MetaImage's .mhd keeps its voxels in a second one."""
_BLOCK = 1 << 20


def safe_name(name: str) -> str:
    """The last part of a file name that a client gave, without anything that a file system could take for more.

    Raises:
        ApiError: 415 unless it ends as an image or a zip.
    """
    last = re.split(r"[\\/]", name)[-1]
    cleaned = re.sub(r"[^\w.+-]", "_", last, flags=re.ASCII).lstrip(".")[-120:].lower()
    if not cleaned.endswith((*IMAGE_SUFFIXES, ".zip")):
        raise ApiError(
            415,
            f"the file name must end in one of {' '.join(IMAGE_SUFFIXES)} or .zip (of a DICOM folder), got {last[:100]!r}",
        )
    return cleaned


async def receive(stream: AsyncIterator[bytes], target: Path) -> int:
    """Write a body to a file as it arrives.

    Returns:
        Its bytes.

    Raises:
        ApiError: 400 for an empty one, 413 (from the guard) for too long a one; no file is left then.
    """
    written = 0
    partial = target.with_name(f".{target.name}.part")
    try:
        with partial.open("wb") as file:
            async for block in stream:
                file.write(block)
                written += len(block)
        if not written:
            raise ApiError(400, "the request has no body; send the file's bytes")
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return written


def accept(file: Path, limits: ReadLimits, largest_bytes: int) -> Path:
    """Judge a received file.

    Args:
        file: An image, or a zip, which is replaced by the folder of what it holds.
        limits: Of the image.
        largest_bytes: That a zip may unpack to.

    Returns:
        What ``read_volume`` takes.

    Raises:
        InputError: if it is refused.
    """
    image = _unzipped(file, limits, largest_bytes) if file.name.endswith(".zip") else file
    check_untrusted(image, limits)
    return image


def _unzipped(file: Path, limits: ReadLimits, largest_bytes: int) -> Path:
    """The files of a zip in one flat folder, under names of ours: a name inside a zip is never a path."""
    folder = file.with_suffix("")
    folder.mkdir()
    try:
        with zipfile.ZipFile(file) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            if len(members) > limits.files:
                raise InputError(f"a zip must hold at most {limits.files} files, got {len(members)}")
            left = largest_bytes
            for number, member in enumerate(members):
                left -= _extract(archive, member, folder / f"{number:05d}.dcm", left)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise InputError(f"the zip is damaged or of a kind that cannot be read: {error}") from error
    except InputError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    file.unlink()
    return folder


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, left: int) -> int:
    """Unpack one member block by block; what it declares as its size is not believed."""
    written = 0
    with archive.open(member) as source, target.open("wb") as out:
        while block := source.read(_BLOCK):
            written += len(block)
            if written > left:
                raise InputError("the zip unpacks to more bytes than are allowed; send a smaller series")
            out.write(block)
    return written
