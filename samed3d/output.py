"""Writing files whole or not at all, and locks that keep two processes from writing to the same place.

Every file that the package writes goes through ``replacing``: it is filled under a temporary name in the same folder,
flushed to the disk and renamed, so that an error, a full disk or a killed process leaves the earlier file as it was.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import IO, Any

from samed3d.errors import InputError

TEMPORARY_PREFIX = ".part-"
"""Begins the name of every temporary file, so that what a killed process left can be recognised and deleted."""


_LONGEST_NAME = 255
"""Bytes of one part of a path in most file systems."""
_ON_WINDOWS = os.name == "nt"


def check_input(path: str | Path, what: str, *, folder: bool = True) -> None:
    """Refuse an input that nothing can be read from; ``what`` names it in the message.

    Raises:
        InputError: if it is missing, the system refuses its name (too long, a circle of links), or it is a pipe, a
            device or, unless ``folder``, a folder.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{what} must be a path, got {type(path).__name__}")
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a name with a null byte
        raise InputError(f"{what} does not exist: {path}") from error
    except OSError as error:
        raise InputError(f"cannot read {what} {path}: {error.strerror}") from error
    if not stat.S_ISREG(mode) and not (folder and stat.S_ISDIR(mode)):
        got = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
        raise InputError(f"{what} must be a file{' or a folder' * folder}, got {got}: {path}")


def check_output(path: str | Path, *, suffixes: Sequence[str] = (), makes_folder: bool = False) -> None:
    """Refuse an output path that could not or must not be written, before any work is done.

    Args:
        path: The file.
        suffixes: One of which its name must have, if any are given.
        makes_folder: Whether its folder will be made where it is missing.

    Raises:
        InputError: if the suffix is not one of ``suffixes``, the path is a folder, a device or a write-protected file,
            its name is one that no file can have, or its folder is missing or not writable.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"output must be a path, got {type(path).__name__}")
    path = Path(path)
    if suffixes and not path.name.lower().endswith(tuple(suffixes)):
        raise InputError(f"output name must end in one of {' '.join(suffixes)}, got {path.name!r}")
    _check_replaceable(path)
    if makes_folder:
        return
    folder = _real(path).parent
    if not folder.is_dir():
        raise InputError(f"output folder does not exist: {folder}; create it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"output folder is not writable: {folder} ({error.strerror})") from error


def _check_replaceable(path: Path) -> None:
    """Refuse what a file must not be put in place of, and a name that the file system does not take."""
    if "\0" in str(path) or (_ON_WINDOWS and PureWindowsPath(path).is_reserved()):
        raise InputError(f"cannot write {str(path)!r}: no file can have this name; choose another")
    try:
        partial = _partial(path)
        if max(len(os.fsencode(part)) for part in partial.parts) > _LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        partial.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    if _real(path).is_symlink():
        raise InputError(f"output must be a file, got a link to itself: {path}")
    if path.is_dir():
        raise InputError(f"output must be a file, got a folder: {path}")
    if path.exists() and not path.is_file():
        raise InputError(f"output must be a file, got a device or pipe: {path}")
    if path.exists() and not path.stat().st_mode & 0o222:
        raise InputError(f"output is write-protected: {path}; choose another name")


def check_spares(path: str | Path, source: str | Path) -> None:
    """Refuse an output that would replace the image it is made from.

    Args:
        path: The output.
        source: The image file, or the folder of its DICOM slices.

    Raises:
        InputError: if the output is that file, or an existing DICOM file in that folder.
    """
    target, origin = _real(path), _real(source)
    if not target.exists() or not origin.exists():
        return
    if target.is_dir():
        return  # which ``check_output`` refuses
    is_slice = origin.is_dir() and origin in target.parents and target.read_bytes()[128:132] == b"DICM"
    if target.samefile(origin) or is_slice:
        raise InputError(f"output must not replace the image it is made from, got {path}; choose another name")


def check_results_folder(folder: Path, names: Sequence[str], ours: Callable[[Path], bool]) -> None:
    """Refuse a folder that holds files under the names of a run's results and that no such run wrote.

    Args:
        folder: The output folder, which may be missing.
        names: Files and folders that the run will write.
        ours: Whether a file of the folder shows that such a run wrote it; may raise if it is damaged.

    Raises:
        InputError: naming the file that would be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output must be a folder, got a file: {folder}")
    there = [folder / name for name in names if (folder / name).exists()]
    for path in there:
        try:
            if ours(path):
                return
        except (OSError, ValueError, AttributeError, TypeError, KeyError):
            continue
    if there:
        raise InputError(
            f"output folder holds a {there[0].name} that was not written by this command: {there[0]}; choose another"
        )


def check_distinct(paths: dict[str, Path | None]) -> None:
    """Refuse two options that name the same file; keys are the options' names.

    Raises:
        InputError: naming both options.
    """
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        other = seen.setdefault(_real(path), name) if path is not None else name
        if other != name:
            raise InputError(f"{other} and {name} must be different files, got {path} for both")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path that replaces ``path`` when the block ends without an error and is deleted otherwise.

    The temporary name ends like ``path``, so that a library that chooses a format by suffix chooses the same one. A
    symbolic link stays a link: the file that it names is replaced.

    Raises:
        InputError: if the file system refuses.
    """
    target = _real(path)
    _check_replaceable(target)
    partial = _partial(target)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, partial)
        os.replace(partial, target)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """A new temporary name beside a file."""
    return path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex[:12]}-{path.name}")


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """As ``replacing`` for a folder that does not exist yet or is empty.

    Raises:
        InputError: if the file system refuses, or the folder holds something.
    """
    target = _real(path)
    try:
        partial = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=target.parent))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        os.replace(partial, target)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file through ``replacing``."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text through ``replacing``."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, body: Any) -> None:
    """Write a JSON file through ``replacing``."""
    write_text(path, json.dumps(body, indent=1) + "\n")


def lock(file: IO[Any]) -> bool:
    """Take an exclusive lock on an open file without waiting; it ends with the file or the process.

    Returns:
        False if another process holds it. On a file system without locks, True.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        return _lock_on_windows(file)
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_on_windows(file: IO[Any]) -> bool:
    try:
        import msvcrt
    except ModuleNotFoundError:
        return True
    position = file.tell()
    file.seek(2**31 - 2)  # a byte beyond the content: a lock on the content would stop readers
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return False
    finally:
        file.seek(position)
    return True


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the one lock of a folder, which is made where it does not exist and removed if nothing was written to it.

    Raises:
        InputError: if another process holds it.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:  # "a" keeps what another program may have put there
        if not lock(file):
            raise InputError(f"another run is writing to {folder}; wait for it")
        try:
            yield
        finally:
            if made and folder.exists() and [p.name for p in folder.iterdir()] == [".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()


def _real(path: str | Path) -> Path:
    """``Path.resolve`` that does not raise for links that lead to themselves."""
    return Path(os.path.realpath(path))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
