"""Session files, and what a session says of itself: image, model, objects, timings.

A session file is JSON: ``image`` (where it lies and its hash), ``model``, ``objects`` (the prompts as in a prompt file,
with the table) and
``edits`` (what undo and redo need; masks follow from it). Not here: the journal (``journal.py``), masks as files
(``mask_files.py``). Used by ``session.py``; read that next.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from samed3d.errors import InputError
from samed3d.inference.edits import Edit, edit_from_json, edit_to_json
from samed3d.inference.journal import check_same
from samed3d.inference.scene import SessionObject
from samed3d.models.base import PromptableModel
from samed3d.prompts import Mask, Prompt, prompt_to_json
from samed3d.volume import Volume

VERSION = 1


class Described(Protocol):
    """What this file reads of a session."""

    volume: Volume
    model_name: str
    device: torch.device

    @property
    def image(self) -> dict[str, Any]:
        """Where the image was read from."""

    @property
    def network(self) -> PromptableModel:
        """The model."""

    def objects(self) -> list[SessionObject]:
        """The objects."""


def identity(session: Described) -> dict[str, Any]:
    """What prompts belong to: the image's place and hash, the model's name and the hash of its weights."""
    grid = session.volume.grid
    image = {
        **session.image,
        "sha256": image_hash(session.volume),
        "size_ijk": list(grid.size_ijk),
        "spacing_mm": list(grid.spacing_xyz_mm),
    }
    return {"image": image, "model": {"name": session.model_name, "weights": weights_hash(session.network)}}


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
        found.update(
            value.detach().cpu().contiguous().view(torch.uint8).numpy().data
            if value.dim()
            else str(value.item()).encode()
        )
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class SavedSession:
    """What a session file holds.

    Attributes:
        header: ``image`` and ``model`` as of ``identity``.
        edits: Oldest first.
        path: The file.
    """

    header: dict[str, Any]
    edits: list[Edit]
    path: Path

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.header["model"]["name"])

    @property
    def channel(self) -> int | None:
        """Channel that was picked."""
        return self.header["image"].get("channel")

    @property
    def series(self) -> str | int | None:
        """Series that was picked."""
        return self.header["image"].get("series")

    def image_path(self, beside: Path) -> Path:
        """Where the image lies: as recorded, or under its name beside the session file.

        Raises:
            InputError: if it is at neither place.
        """
        recorded = Path(str(self.header["image"]["source"]))
        places = [recorded, beside.parent / recorded.name]
        found = next((place for place in places if place.exists()), None)
        if found is None:
            raise InputError(f"image of the session is not there any more: {recorded}; give its place as image=")
        return found

    def check(self, header: dict[str, Any]) -> None:
        """Refuse another image or model."""
        check_same(self.header, header, f"session {self.path}")


def save_session(path: Path, session: Described, edits: list[Edit]) -> None:
    """Write a session file, whole or not at all.

    Raises:
        InputError: if it cannot be written.
    """
    objects = [
        {
            "id": o.id,
            "name": o.name,
            "colour": o.colour,
            "visible": o.visible,
            "locked": o.locked,
            "prompts": [{"id": number, "space": p.space, **prompt_to_json(p)} for number, p in o.numbered.items()],
        }
        for o in session.objects()
    ]
    body = {
        "session": VERSION,
        **identity(session),
        "objects": objects,
        "edits": [edit_to_json(edit) for edit in edits],
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(body, indent=1) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"session cannot be written to {path}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_session(path: Path) -> SavedSession:
    """Read a session file.

    Raises:
        InputError: if it is missing, is not JSON, or not a session.
    """
    try:
        body = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"session cannot be read: {path} ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"session is not JSON: {path} ({error})") from error
    if not isinstance(body, dict) or body.get("session") != VERSION:
        raise InputError(f'session file must be an object with "session": {VERSION}: {path}')
    parts = {"image": "source", "model": "name"}
    if any(
        not isinstance(body.get(key), dict) or part not in body[key] for key, part in parts.items()
    ) or not isinstance(body.get("edits"), list):
        raise InputError(f"session file must name its image and model and list its edits: {path}")
    edits = [edit_from_json(edit, f"{path}, edit {number}") for number, edit in enumerate(body["edits"], start=1)]
    return SavedSession({"image": body["image"], "model": body["model"]}, edits, path)


def check_colour(colour: str | None) -> str | None:
    """A colour as ``#rrggbb``, in lower case.

    Raises:
        InputError: for anything else.
    """
    if colour is not None and not (isinstance(colour, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", colour)):
        raise InputError(f"colour must be of the form #rrggbb, got {colour!r}")
    return colour.lower() if colour is not None else None


def describe(session: Described, seconds: dict[int, list[float]]) -> dict[str, Any]:
    """What was done, ready for JSON: versions, device, model, prompts, timings, voxels and volume per object."""
    from samed3d import __version__

    grid = session.volume.grid
    voxel_mm3 = float(np.prod(grid.spacing_xyz_mm))
    objects = [
        {
            "id": o.id,
            "name": o.name,
            "voxels": o.voxels,
            "mm3": o.voxels * voxel_mm3,
            "prompts": [_said(p) for p in o.prompts],
            "seconds": [round(s, 4) for s in seconds[o.id]],
        }
        for o in session.objects()
    ]
    versions = {"samed3d": __version__, "torch": torch.__version__, "python": platform.python_version()}
    image = {"source": session.volume.source, "size_ijk": grid.size_ijk, "spacing_mm": grid.spacing_xyz_mm}
    return {
        "versions": versions,
        "device": str(session.device),
        "model": session.model_name,
        "image": image,
        "objects": objects,
    }


def _said(prompt: Prompt) -> dict[str, Any]:
    """A prompt in a report; of a mask only that it was given."""
    if isinstance(prompt, Mask):
        return {"type": "mask", "voxels": 0 if isinstance(prompt.mask, str) else int(prompt.mask.inside().sum())}
    return {"type": type(prompt).__name__.lower(), **asdict(prompt)}
