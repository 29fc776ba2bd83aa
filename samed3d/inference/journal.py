"""The append-only journal of a session: one JSON line per edit, on the disk before the edit is acknowledged.

A process may be killed at any moment: a last line that was not finished is cut off at the next opening, everything
before it counts. One session at a time may hold a journal. What the lines mean is in ``edits.py``; read ``session.py``
next.
"""

from __future__ import annotations

import json
import logging
import os
from io import FileIO
from pathlib import Path
from typing import Any

from samed3d.errors import InputError
from samed3d.inference.edits import Edit, edit_from_json, edit_to_json

logger = logging.getLogger(__name__)

VERSION = 1


class Journal:
    """An open journal file.

    Attributes:
        path: The file.
        edits: What it held when it was opened, oldest first.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        """Open a journal, or begin one.

        Args:
            path: The file; its folder must exist.
            header: ``image`` (with ``sha256``) and ``model`` (with ``name``) of the session. An existing journal must
                be of the same image and model; ``model["weights"]`` may differ with a warning, for then the same
                prompts give other masks.

        Raises:
            InputError: if the journal is damaged, in use, of another image or model, or cannot be written.
        """
        self.path = Path(path)
        try:
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise InputError(f"journal cannot be opened: {self.path} ({error.strerror})") from error
        try:
            _lock(self._file, self.path)
            self.edits = self._read(header)
        except BaseException:
            self._file.close()
            raise

    def append(self, edit: Edit) -> None:
        """Write an edit and return once it is on the disk.

        Raises:
            OSError: if the disk refuses; the edit is then not in the journal.
        """
        self._write(edit_to_json(edit))

    def close(self) -> None:
        """Let go of the file; what was appended stays."""
        self._file.close()

    def _read(self, header: dict[str, Any]) -> list[Edit]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning("the last line of %s was not finished and is left out", self.path)
            self._file.truncate(whole)
        lines = content[:whole].splitlines()
        if not lines:
            self._write({"journal": VERSION, **header})
            _sync_folder(self.path)
            return []
        bodies = []
        for number, line in enumerate(lines, start=1):
            try:
                bodies.append(json.loads(line))
            except ValueError as error:
                raise InputError(
                    f"journal is damaged in line {number}: {self.path} ({error}); move it away to begin anew"
                ) from error
        self._check(bodies[0], header)
        return [edit_from_json(body, f"{self.path}, line {number}") for number, body in enumerate(bodies[1:], start=2)]

    def _check(self, found: Any, header: dict[str, Any]) -> None:
        if not isinstance(found, dict) or found.get("journal") != VERSION:
            raise InputError(
                f"journal must be one of version {VERSION}: {self.path}; give the path of a journal or of no file"
            )
        check_same(found, header, f"journal {self.path}")

    def _write(self, body: dict[str, Any]) -> None:
        line = json.dumps(body, separators=(",", ":")).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)  # half a line would end the journal for good
            raise


def check_same(found: dict[str, Any], header: dict[str, Any], what: str) -> None:
    """Refuse prompts that were given to another image or model; warn where the model's weights changed.

    Raises:
        InputError: naming what differs.
    """
    image, model = found.get("image") or {}, found.get("model") or {}
    if image.get("sha256") != header["image"]["sha256"]:
        raise InputError(
            f"{what} belongs to another image ({image.get('source')}), got {header['image']['source']}; open it with its own"
        )
    if model.get("weights") == header["model"]["weights"]:  # the same network, whatever it is called
        return
    if model.get("name") != header["model"]["name"]:
        raise InputError(
            f"{what} was made with model {model.get('name')!r}, got {header['model']['name']!r}; open it with the same model"
        )
    logger.warning(
        "the weights of model %s are not those of %s; the same prompts may give other masks", model.get("name"), what
    )


def _lock(file: FileIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on this system: nothing keeps two sessions apart there
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f"journal is in use by another session: {path}; close that first") from error


def _sync_folder(path: Path) -> None:
    """A new file's name is on the disk once its folder is."""
    try:
        folder = os.open(path.resolve().parent, os.O_RDONLY)
    except OSError:  # not every system opens folders
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
