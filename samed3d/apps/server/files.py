"""Files from clients and for clients: paths inside the allowed folders, uploads, and exported results.

An upload is one image, or a zip of a DICOM folder. It is written to disk as it arrives and checked before it is read.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse

from samed3d.apps.server.service import ServerOptions
from samed3d.errors import InputError
from samed3d.volume import write_volume
from samed3d.volume.files import ReadLimits, check_untrusted
from samed3d.volume.writing import MASK_FORMATS

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha")
"""Formats that are one file. MetaImage's .mhd keeps its voxels in a second one."""
UPLOADED = "upload"
"""Folder of a session's upload, so that its name can be that of a file of the server."""
EXAMPLE_SEED = 0
_BLOCK = 1 << 20
_MOST_UNPACKED = 4
"""A zip may unpack to this many times the largest upload."""


def confined(path: str, options: ServerOptions) -> Path:
    """Resolve and check the path of an image, which must lie in an allowed folder; so must links inside a folder.

    Raises:
        HTTPException: 403 if it lies elsewhere, whether or not it exists there; 404 if there is no such file.
        InputError: if the image is larger than the limits, or not an image.
    """
    if not options.roots:
        raise HTTPException(
            403, "no folder is open to clients; start the server with --root FOLDER, or upload the file"
        )
    if "\0" in path or len(path) > 4096 or path != path.encode(errors="ignore").decode():
        rule = "without zero bytes and broken characters, of at most 4096 characters"
        raise HTTPException(400, f"path must be a file name {rule}, got another")
    real_roots = [root.resolve() for root in options.roots]

    def is_allowed(real: Path | None) -> bool:
        return real is not None and any(real.is_relative_to(root) for root in real_roots)

    # An absolute path replaces the root that it is joined to.
    inside = [real for root in real_roots if is_allowed(real := _resolved(root / path)) and real is not None]
    if not inside:
        raise HTTPException(403, f"path must lie in a folder that the server was started with (--root), got {path}")
    real = next((candidate for candidate in inside if os.path.exists(candidate)), None)
    if real is None:
        raise HTTPException(404, f"there is no such file in the allowed folders: {path}")
    if real.is_dir() and not all(is_allowed(_resolved(entry)) for entry in real.iterdir() if entry.is_symlink()):
        raise HTTPException(403, f"a link in this folder points out of the allowed folders: {path}")
    check_untrusted(real, options.images)
    return real


def safe_name(name: str) -> str:
    """The last part of a client's file name, in characters that are safe in any file system.

    Raises:
        HTTPException: 415 unless it ends like an image or a zip.
    """
    last = re.split(r"[\\/]", name)[-1]
    cleaned = re.sub(r"[^\w.+-]", "_", last, flags=re.ASCII).lstrip(".")[-120:].lower()
    if not cleaned.endswith((*IMAGE_SUFFIXES, ".zip")):
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise HTTPException(
            415, f"the file name must end in one of {suffixes} or .zip (of a DICOM folder), got {last[:100]!r}"
        )
    return cleaned


async def receive(stream: AsyncIterator[bytes], target: Path) -> None:
    """Write a body to a file as it arrives; the caller removes the file if that fails.

    Raises:
        HTTPException: 400 for an empty body, 413 (from the guard) for one that is too long.
    """
    with target.open("wb") as file:
        async for block in stream:
            file.write(block)
        if not file.tell():
            raise HTTPException(400, "the request has no body; send the file's bytes")


def accept(file: Path, options: ServerOptions) -> Path:
    """Check a received image, or a zip, which is replaced by a folder with its files; the path for ``read_volume``.

    Raises:
        InputError: if the file is refused; the caller removes its folder.
    """
    if file.name.endswith(".zip"):
        file = _unzipped(file, options.images, _MOST_UNPACKED * options.largest_upload)
    check_untrusted(file, options.images)
    return file


def _unzipped(file: Path, limits: ReadLimits, largest_bytes: int) -> Path:
    """Unpack a zip into one flat folder: of a name inside a zip only the harmless characters of its last part are
    kept, for messages and because DICOM files are told from others by their suffix. Hidden files are left out.
    """
    folder = file.with_suffix("")
    folder.mkdir()
    try:
        with zipfile.ZipFile(file) as archive:
            names = {m: re.split(r"[\\/]", m.filename)[-1] for m in archive.infolist() if not m.is_dir()}
            members = [m for m, name in names.items() if not name.startswith(".")]
            if len(members) > limits.files:
                raise InputError(f"a zip must hold at most {limits.files} files, got {len(members)}")
            left = largest_bytes
            for number, member in enumerate(members):
                name = re.sub(r"[^\w.-]", "_", names[member], flags=re.ASCII)[-60:]
                left -= _extract(archive, member, folder / f"{number:05d}_{name}", left)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError) as error:
        raise InputError(f"the zip is damaged or of a kind that cannot be read: {error}") from error
    file.unlink()
    return folder


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, left: int) -> int:
    """Unpack one member block by block; the size that it declares may be false."""
    written = 0
    with archive.open(member) as source, target.open("wb") as out:
        while block := source.read(_BLOCK):
            written += len(block)
            if written > left:
                raise InputError("the zip unpacks to more bytes than are allowed; send a smaller series")
            out.write(block)
    return written


def _resolved(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that no file can have
        return None


def suffix_of(format: str) -> str:
    """The suffix of an export format.

    Raises:
        HTTPException: 400 for an unknown format.
    """
    if format not in MASK_FORMATS:
        raise HTTPException(400, f"format must be one of {', '.join(MASK_FORMATS)}, got {format[:40]!r}")
    return MASK_FORMATS[format][0]


@contextmanager
def exporting(folder: Path) -> Iterator[Path]:
    """A new folder inside ``folder``, which is deleted if the block fails; otherwise by ``exported``."""
    made = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        yield made
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def exported(file: Path, name: str) -> FileResponse:
    """An answer with a file of ``exporting``, whose folder is deleted when the file is sent."""
    deletion = BackgroundTask(shutil.rmtree, file.parent, ignore_errors=True)
    return FileResponse(file, media_type="application/octet-stream", filename=name, background=deletion)


def write_example(folder: Path) -> Path:
    """Write the generated body of ``samed3d demo`` as an image file."""
    from samed3d.data.phantom import anatomical_phantom

    array, _, grid, _ = anatomical_phantom(np.random.default_rng(EXAMPLE_SEED))
    write_volume(folder / "example.nii", array, grid)
    return folder / "example.nii"
