"""What a session keeps on the disk: the journal, session files, and the report of what was done.

Both files hold ``image`` (its path and hash), ``model`` and the edits, from which masks, undo and redo follow.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samed3d import __version__
from samed3d.errors import InputError, check_keys
from samed3d.inference import history
from samed3d.inference.history import Edit, SessionObject
from samed3d.models.base import PromptableModel
from samed3d.output import lock, write_json
from samed3d.prompts import Mask, prompt_from_json, prompt_to_json
from samed3d.volume import Volume

logger = logging.getLogger(__name__)

VERSION = 1
"""Of both files."""
_LONGEST_HEADER = 1 << 20

_EDITS: dict[str, type[Edit]] = {
    "add": history.AddPrompt,
    "look": history.Predict,
    "move": history.MovePrompt,
    "remove": history.RemovePrompt,
    "object": history.EditObject,
    "drop": history.RemoveObject,
    "rule": history.SetRule,
    "undo": history.Undo,
    "redo": history.Redo,
}
"""Edits by the name that files give them."""
_IMAGE_KEYS = ("source", "channel", "series", "modality", "untilt", "sha256", "size_ijk", "spacing_mm")
_KEYS = {"object_id": "object", "prompt_id": "id", "predict": "look"}
"""Fields that have another name in files."""


def edit_to_json(edit: Edit) -> dict[str, Any]:
    """An edit as journals and session files hold it; fields with their default value are left out."""
    body: dict[str, Any] = {"do": next(kind for kind, cls in _EDITS.items() if type(edit) is cls)}
    for entry in dataclasses.fields(edit):
        value = getattr(edit, entry.name)
        if entry.name == "prompt" and value is not None:
            value = {"space": value.space, **prompt_to_json(value)}
        if value != entry.default:
            body[_KEYS.get(entry.name, entry.name)] = value
    return body


def edit_from_json(body: Any, where: str) -> Edit:
    """The inverse of ``edit_to_json``.

    Raises:
        InputError: if it is not an edit.
    """
    if not isinstance(body, dict) or body.get("do") not in _EDITS:
        raise InputError(f"{where}: not an edit of a session: {str(body)[:80]!r}")
    kind = _EDITS[body["do"]]
    keys = {entry.name: _KEYS.get(entry.name, entry.name) for entry in dataclasses.fields(kind)}
    check_keys(body, ("do", *keys.values()), f"{where}: an edit {body['do']!r}")
    given = {name: body[key] for name, key in keys.items() if key in body}
    required = [entry.name for entry in dataclasses.fields(kind) if entry.default is dataclasses.MISSING]
    if missing := [keys[name] for name in required if name not in given]:
        raise InputError(f"{where}: an edit {body['do']!r} needs {', '.join(missing)}")
    if "prompt" in given:
        given["prompt"] = prompt_from_json(given["prompt"], where=where)
    try:
        return kind(**given)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _check_head(body: dict[str, Any], own: tuple[str, ...], where: str) -> None:
    """Refuse unknown keys of a journal's first line or of a session file; ``own`` are those beside ``identity``'s."""
    check_keys(body, ("image", "model", *own), where)
    for part, known in (("image", _IMAGE_KEYS), ("model", ("name", "weights"))):
        check_keys(body[part] if isinstance(body.get(part), dict) else (), known, f"{where}: {part}")


class Journal:
    """An append-only file with one JSON line per edit, which is on the disk before the edit is acknowledged.

    A process may be killed at any moment: an unfinished last line is cut off at the next opening, everything before it
    counts. One session at a time may hold a journal.

    Attributes:
        path: The file.
        edits: What it held when it was opened, oldest first.
    """

    def __init__(self, path: str | Path, header: dict[str, Any]) -> None:
        """Open a journal, or begin one.

        Args:
            path: The file; its folder must exist.
            header: Of ``identity``; see ``check_same`` for an existing journal.

        Raises:
            InputError: if the journal is damaged, in use, of another image or model, or cannot be written.
        """
        self.path = Path(path)
        try:
            _check_is_journal(self.path, header)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise InputError(f"journal cannot be opened: {self.path} ({error.strerror})") from error
        try:
            if not lock(self._file):
                raise InputError(f"journal is in use by another session: {self.path}; close that first")
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
        """Close the file and give up its lock."""
        self._file.close()

    def _read(self, header: dict[str, Any]) -> list[Edit]:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if not whole:
            self._file.truncate(0)
            self._write({"journal": VERSION, **header})
            self._sync_folder()
            return []
        bodies = []
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                bodies.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                found = f"journal is damaged in line {number}: {self.path} ({error})"
                raise InputError(f"{found}; move it away to begin anew") from error
        _check_head(bodies[0], ("journal",), f"journal {self.path}")
        check_same(bodies[0], header, f"journal {self.path}")
        edits = [edit_from_json(body, f"{self.path}, line {n}") for n, body in enumerate(bodies[1:], start=2)]
        if whole < len(content):
            logger.warning("the last line of %s was not finished and is left out", self.path)
            self._file.truncate(whole)
        return edits

    def _write(self, body: dict[str, Any]) -> None:
        line = _line_of(body)
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)  # the journal could not be read any more after half a line
            raise

    def _sync_folder(self) -> None:
        """Put a new file's name on the disk, which holds it once the folder is synced."""
        try:
            folder = os.open(self.path.resolve().parent, os.O_RDONLY)
        except OSError:  # some systems cannot open folders
            return
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _check_is_journal(path: Path, header: dict[str, Any]) -> None:
    """Refuse an existing file that does not begin as a journal does, before it is opened for writing.

    A file without a whole line is a journal only if it is empty or holds the beginning of this session's first line,
    as a process leaves it that was killed while it began the journal.
    """
    if not path.exists():
        return
    refusal = InputError(f"journal must be one of version {VERSION}: {path}; give the path of a journal or of no file")
    if not path.is_file():
        raise refusal
    with path.open("rb") as file:
        line = file.readline(_LONGEST_HEADER)
    if line.endswith(b"\n"):
        try:
            body = json.loads(line)
        except ValueError:
            raise refusal from None
        if not isinstance(body, dict) or body.get("journal") != VERSION:
            raise refusal
    elif not _line_of({"journal": VERSION, **header}).startswith(line):
        raise refusal


def _line_of(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def identity(volume: Volume, options: dict[str, Any], model: PromptableModel, model_name: str) -> dict[str, Any]:
    """Which image and model prompts belong to: the image's path, options and hash, the model's name and hash."""
    grid = volume.grid
    image = {
        "source": volume.source,
        **options,
        "sha256": image_hash(volume),
        "size_ijk": list(grid.size_ijk),
        "spacing_mm": list(grid.spacing_xyz_mm),
        "modality": volume.modality,
    }
    return {"image": image, "model": {"name": model_name, "weights": weights_hash(model)}}


def image_hash(volume: Volume) -> str:
    """SHA-256 of the voxels and their grid: the same for the same image, wherever and however it is stored on disk."""
    found = hashlib.sha256(repr((volume.grid, volume.array.dtype.str[1:])).encode())
    for plane in volume.array:
        found.update(np.ascontiguousarray(plane).data)
    return found.hexdigest()


def weights_hash(model: PromptableModel) -> str:
    """The first 16 digits of the SHA-256 of a model's parameters."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        if value.dim():
            found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        else:
            found.update(str(value.item()).encode())
    return found.hexdigest()[:16]


def check_same(found: dict[str, Any], header: dict[str, Any], what: str) -> None:
    """Refuse prompts that were given for another image or model; warn if only weights or modality differ.

    Raises:
        InputError: naming what differs.
    """
    image, model = found.get("image") or {}, found.get("model") or {}
    here, name = header["image"], header["model"]["name"]
    if image.get("sha256") != here["sha256"]:
        differs = f"{what} belongs to another image ({image.get('source')}), got {here['source']}"
        raise InputError(f"{differs}; open it with its own")
    if image.get("modality", here["modality"]) != here["modality"]:
        logger.warning("%s was opened with another modality; the same prompts may give other masks", what)
    if model.get("weights") == header["model"]["weights"]:  # the same network, whatever it is called
        return
    if model.get("name") != name:
        differs = f"{what} was made with model {model.get('name')!r}, got {name!r}"
        raise InputError(f"{differs}; open it with the same model")
    logger.warning("the weights of model %s are not those of %s; the same prompts may give other masks", name, what)


def save_session(path: Path, header: dict[str, Any], objects: list[SessionObject], edits: list[Edit]) -> None:
    """Write a session file: the header of ``identity``, the objects for other readers, and the edits.

    Raises:
        InputError: if it cannot be written.
    """
    table = [
        {
            **{key: getattr(o, key) for key in ("id", "name", "code", "colour", "visible", "locked")},
            "prompts": [{"id": number, "space": p.space, **prompt_to_json(p)} for number, p in o.numbered.items()],
        }
        for o in objects
    ]
    edits_json = [edit_to_json(edit) for edit in edits]
    write_json(path, {"session": VERSION, **header, "objects": table, "edits": edits_json})


def read_session(path: Path) -> tuple[dict[str, Any], list[Edit]]:
    """The header and the edits of a session file.

    Raises:
        InputError: if it is missing, is not JSON, or not a session.
    """
    try:
        body = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"session cannot be read: {path} ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"session is not JSON: {path} ({error})") from error
    if not isinstance(body, dict) or body.get("session") != VERSION:
        raise InputError(f'session file must be an object with "session": {VERSION}: {path}')
    _check_head(body, ("session", "objects", "edits"), f"session {path}")
    parts = (("image", "source"), ("model", "name"))
    named = all(isinstance(body.get(key), dict) and part in body[key] for key, part in parts)
    if not named or not isinstance(body.get("edits"), list):
        raise InputError(f"session file must name its image and model and list its edits: {path}")
    edits = [edit_from_json(edit, f"{path}, edit {number}") for number, edit in enumerate(body["edits"], start=1)]
    return {"image": body["image"], "model": body["model"]}, edits


def find_image(header: dict[str, Any], session_file: Path) -> Path:
    """The image of a session file: at its recorded path, or under its name beside the file.

    Raises:
        InputError: if it is at neither place.
    """
    recorded = Path(str(header["image"]["source"]))
    for place in (recorded, session_file.parent / recorded.name):
        if place.exists():
            return place
    raise InputError(f"image of the session is not there any more: {recorded}; give its place as image=")


def describe(
    volume: Volume,
    notes: list[str],
    device: torch.device,
    model_name: str,
    objects: list[SessionObject],
    seconds: dict[int, list[float]],
) -> dict[str, Any]:
    """The report of a session, ready for JSON: versions, device, model, image, and per object prompts and size.

    ``seconds`` holds the time of every step of each object by the object's id.
    """
    grid = volume.grid
    table = []
    for o in objects:
        prompts = [
            {"type": "mask", "voxels": 0 if isinstance(p.mask, str) else int(p.mask.inside().sum())}
            if isinstance(p, Mask)
            else {"type": type(p).__name__.lower(), **dataclasses.asdict(p)}
            for p in o.prompts
        ]
        size = {"voxels": o.voxels, "mm3": o.voxels * float(np.prod(grid.spacing_xyz_mm))}
        took = [round(s, 4) for s in seconds[o.id]]
        table.append({"id": o.id, "name": o.name, **size, "prompts": prompts, "seconds": took})
    return {
        "versions": {"samed3d": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "device": str(device),
        "model": model_name,
        "image": {"source": volume.source, "size_ijk": grid.size_ijk, "spacing_mm": grid.spacing_xyz_mm},
        "notes": notes,
        "objects": table,
    }
