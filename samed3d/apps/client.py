"""A session on a server, from Python: the same calls as ``Session``, without torch.

    from samed3d.apps.client import Client
    client = Client("http://127.0.0.1:1527")
    with client.open("ct.nii.gz") as s:  # uploads it; client.open_path("ct.nii.gz") opens one that the server can see
        s.add(Point((120, 88, 40)))
        s.mask_of(1)
        s.export("mask.nii.gz")

The masks are kept here and patched with what each call changed. One thread at a time per client. What travels is in
``protocol.py``.
"""

from __future__ import annotations

import gzip
import io
import os
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samed3d.apps.connection import Connection, RemoteError
from samed3d.apps.protocol import update_from_json
from samed3d.errors import InputError
from samed3d.geometry import IntTriple, Region
from samed3d.prompts import Mask, Point, Prompt, prompt_to_json

__all__ = ["Client", "RemoteError", "RemoteObject", "RemoteSession", "RemoteUpdate"]

_NIFTI_HEADER = 352


@dataclass
class RemoteUpdate:
    """What one call changed, as ``MaskUpdate``: box (stored zyx), mask inside it, seconds on the server, object,
    prompt.
    """

    region: Region
    mask: NDArray[np.uint8]
    seconds: float
    object_id: int
    prompt_id: int

    @property
    def changed(self) -> bool:
        """Whether any voxel changed."""
        return not self.region.is_empty


@dataclass
class RemoteObject:
    """An object as the server shows it; ``prompts`` are JSON objects with their ``id``."""

    id: int
    name: str
    colour: str
    visible: bool
    locked: bool
    voxels: int
    prompts: list[dict[str, Any]] = field(default_factory=list)


class Client(Connection):
    """A connection to ``samed3d serve``; the arguments are those of ``Connection``."""

    def open(
        self, image: str | Path, model: str | None = None, channel: int | None = None, series: str | None = None
    ) -> RemoteSession:
        """Upload an image file (or a zip of a DICOM folder) and open it.

        Raises:
            RemoteError: if the server refuses it.
            InputError: if there is no such file.
        """
        path = Path(image)
        if not path.is_file():
            raise InputError(
                f"image must be a file to upload, got {path}; a folder of the server is opened with open_path"
            )
        query = urllib.parse.urlencode(_given(name=path.name, model=model, channel=channel, series=series))
        with path.open("rb") as file:
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(path.stat().st_size)}
            return RemoteSession(self, self.send("POST", f"/api/sessions/upload?{query}", file, headers))

    def open_path(
        self, path: str, model: str | None = None, channel: int | None = None, series: str | None = None
    ) -> RemoteSession:
        """Open an image that lies in one of the server's folders."""
        return RemoteSession(
            self, self.call("POST", "/api/sessions", _given(path=path, model=model, channel=channel, series=series))
        )

    def open_example(self, model: str | None = None) -> RemoteSession:
        """Open the server's example."""
        return RemoteSession(self, self.call("POST", "/api/sessions", _given(example=True, model=model)))

    def resume(self, session_id: str) -> RemoteSession:
        """Go on with a session, of this process or an earlier one."""
        return RemoteSession(self, self.call("GET", f"/api/sessions/{urllib.parse.quote(session_id)}"))

    def sessions(self) -> list[dict[str, Any]]:
        """The server's sessions, the newest first."""
        return self.call("GET", "/api/sessions")

    def about(self) -> dict[str, Any]:
        """Models, formats and folders of the server."""
        return self.call("GET", "/api/about")


class RemoteSession:
    """A session on a server.

    Attributes:
        id: By which ``Client.resume`` finds it again.
        size_ijk: Of the image.
        spacing_mm: Of the image, along i, j, k.
        affine_ras: 4x4 matrix from ijk to RAS millimetres.
    """

    def __init__(self, client: Client, state: dict[str, Any]) -> None:
        """Use ``Client.open`` and its like."""
        self._client, self._state = client, state
        self.id: str = state["id"]
        i, j, k = state["size_ijk"]
        self.size_ijk: IntTriple = (i, j, k)
        self.spacing_mm = tuple(state["spacing_mm"])
        self.affine_ras = np.array(state["affine_ras"])
        self._masks: dict[int, NDArray[np.uint8]] = {}
        for entry in client.call("GET", f"{self._path}/masks")["updates"]:
            self._write(*update_from_json(entry, self.size_ijk))

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def add(self, prompt: Prompt, object_id: int = 1, name: str | None = None) -> RemoteUpdate:
        """As ``Session.add``; a mask must be given as an array."""
        return self._edit("POST", "/prompts", _given(prompt=_to_json(prompt), object_id=object_id, name=name))

    def move(self, prompt_id: int, to: Prompt) -> RemoteUpdate:
        """Replace a prompt."""
        return self._edit("PUT", f"/prompts/{prompt_id}", {"prompt": _to_json(to)})

    def remove(self, prompt_id: int) -> RemoteUpdate:
        """Take a prompt out."""
        return self._edit("DELETE", f"/prompts/{prompt_id}")

    def undo(self) -> RemoteUpdate:
        """Take back the last edit."""
        return self._edit("POST", "/undo", {})

    def redo(self) -> RemoteUpdate:
        """Do again what was undone last."""
        return self._edit("POST", "/redo", {})

    def new_object(self, name: str | None = None) -> int:
        """Make an object without prompts; it becomes the current one."""
        self._edit("POST", "/objects", _given(name=name))
        return self.current

    def edit_object(self, object_id: int, **changes: Any) -> None:
        """Change ``name``, ``colour``, ``visible`` or ``locked``."""
        self._edit("PATCH", f"/objects/{object_id}", _given(**changes))

    def remove_object(self, object_id: int) -> RemoteUpdate:
        """Take an object out with all its prompts."""
        return self._edit("DELETE", f"/objects/{object_id}")

    def objects(self) -> list[RemoteObject]:
        """The objects as after the last call."""
        return [RemoteObject(**entry) for entry in self._state["objects"]]

    @property
    def current(self) -> int:
        """The object that was prompted or made last; 0 before any."""
        return self._state["current"]

    @property
    def can_undo(self) -> bool:
        """Whether there is an edit to take back."""
        return self._state["can_undo"]

    @property
    def can_redo(self) -> bool:
        """Whether there is an edit to do again."""
        return self._state["can_redo"]

    @property
    def revision(self) -> int:
        """Grows with every change of the session, by whomever."""
        return self._state["revision"]

    def refresh(self) -> None:
        """Read the session again, after a 409: somebody else changed it."""
        self._state = self._client.call("GET", self._path)
        self._masks.clear()
        for entry in self._client.call("GET", f"{self._path}/masks")["updates"]:
            self._write(*update_from_json(entry, self.size_ijk))

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        """An object's mask, uint8 (D, H, W) on the image's own grid; a copy."""
        if object_id not in self._masks and not any(o["id"] == object_id for o in self._state["objects"]):
            raise InputError(f"object {object_id} has no mask yet: add a prompt first")
        return self._mask(object_id).copy()

    def probability(self, object_id: int | None = None) -> NDArray[np.float32]:
        """An object's probability in steps of 1/255, float32 (D, H, W)."""
        buffer = io.BytesIO()
        self._client.fetch(f"{self._path}/objects/{object_id or self.current}/probability.nii.gz", buffer)
        raw = gzip.decompress(buffer.getvalue())
        return (np.frombuffer(raw, np.uint8, offset=_NIFTI_HEADER).reshape(self._shape) / np.float32(255.0)).astype(
            np.float32
        )

    def suggest_click(self, object_id: int | None = None) -> Point:
        """A click where the model is least certain."""
        query = "" if object_id is None else f"?object_id={object_id}"
        body = self._client.call("GET", f"{self._path}/suggest{query}")
        return Point(tuple(body["at"]), body["positive"], body["space"])

    def export(self, path: str | Path, format: str = "nifti") -> None:
        """Write the result to a file here, whole or not at all."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with partial.open("wb") as file:
                self._client.fetch(f"{self._path}/export?{urllib.parse.urlencode({'format': format})}", file)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def delete(self) -> None:
        """Delete the session on the server, with its prompts."""
        self._client.call("DELETE", self._path)

    def close(self) -> None:
        """Let go of the masks held here. The session stays on the server, and sleeps there when it is not used."""
        self._masks.clear()

    @property
    def _path(self) -> str:
        return f"/api/sessions/{self.id}"

    @property
    def _shape(self) -> IntTriple:
        return self.size_ijk[::-1]

    def _edit(self, method: str, path: str, body: dict[str, Any] | None = None) -> RemoteUpdate:
        # What is held here is of this revision: an edit on top of somebody else's is refused, and refresh() shows
        # theirs.
        if body is None:
            path += f"?revision={self.revision}"
        else:
            body = {**body, "revision": self.revision}
        answer = self._client.call(method, self._path + path, body)
        self._state = answer["session"]
        known = {entry["id"] for entry in self._state["objects"]}
        for gone in set(self._masks) - known:
            del self._masks[gone]
        update = RemoteUpdate(
            Region((0, 0, 0), (0, 0, 0)),
            np.zeros((0, 0, 0), np.uint8),
            answer["seconds"],
            self.current,
            answer["prompt_id"] or 0,
        )
        for entry in answer["updates"]:
            update.object_id, update.region, update.mask = update_from_json(entry, self.size_ijk)
            if update.object_id in known:
                self._write(update.object_id, update.region, update.mask)
        return update

    def _write(self, object_id: int, region: Region, mask: NDArray[np.uint8]) -> None:
        self._mask(object_id)[region.slices] = mask

    def _mask(self, object_id: int) -> NDArray[np.uint8]:
        return self._masks.setdefault(object_id, np.zeros(self._shape, np.uint8))


def _to_json(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, Mask) and isinstance(prompt.mask, str):
        raise InputError(f"a mask for a server must be an array, got the path {prompt.mask}; read it first")
    return {"space": prompt.space, **prompt_to_json(prompt)}


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
