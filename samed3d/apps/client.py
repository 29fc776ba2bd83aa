"""A session on a server, from Python: the same calls as ``Session``, without torch.

    from samed3d.apps.client import Client
    client = Client("http://127.0.0.1:1527")
    with client.open("ct.nii.gz") as s:  # uploads it; client.open_path("ct.nii.gz") opens a file of the server
        s.add(Point((120, 88, 40)))
        s.mask_of(1)
        s.export("mask.nii.gz")

The client keeps the masks and updates them with what each call changed. Use a client from one thread at a time.
"""

from __future__ import annotations

import gzip
import os
import ssl
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict, Unpack

import httpx
import numpy as np
from numpy.typing import NDArray

from samed3d.errors import InputError
from samed3d.geometry import EMPTY_REGION, Grid, IntTriple, Region
from samed3d.masks import Cleaning
from samed3d.output import replacing
from samed3d.prompts import Mask, MaskUpdate, PackedMask, Point, Prompt, prompt_from_json, prompt_to_json

IDLE_SECONDS = 2.0
"""An unused connection is closed after this time. Servers close theirs after about five seconds, and an edit that is
sent at that moment could not be repeated."""
_NIFTI_HEADER = 352


class RemoteError(RuntimeError):
    """An answer other than success, or none.

    Attributes:
        status: HTTP status; 409 when another client changed the session, 401 for a wrong token, 503 when the server is
            full, 0 when it does not answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


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
    code: str = ""

    @property
    def numbered(self) -> dict[int, Prompt]:
        """The prompts by their numbers, without masks, whose bits the server does not list."""
        return {int(body["id"]): prompt_from_json(body) for body in self.prompts if body["type"] != "mask"}


class ImageOptions(TypedDict, total=False):
    """How the server opens an image: with which of its models, and as ``read_volume``."""

    model: str | None
    channel: int | None
    series: str | None
    modality: str | None
    untilt: bool


class Client:
    """A connection to ``samed3d serve``.

    Args:
        url: ``http://host:port`` or ``https://...``.
        token: Where the server requires one; ``SAMED3D_TOKEN`` by default.
        timeout: Seconds to wait for an answer.

    Raises:
        InputError: if the URL is not one.
    """

    def __init__(self, url: str = "http://127.0.0.1:1527", token: str | None = None, timeout: float = 120.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"url must be http://HOST:PORT, got {url!r}")
        token = os.environ.get("SAMED3D_TOKEN", "") if token is None else token
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=timeout,
            limits=httpx.Limits(keepalive_expiry=IDLE_SECONDS),
            verify=ssl.create_default_context(),
            trust_env=False,
        )

    def close(self) -> None:
        """Close the connection; sessions stay on the server."""
        self._http.close()

    def open(self, image: str | Path, **options: Unpack[ImageOptions]) -> RemoteSession:
        """Upload an image file (or a zip of a DICOM folder) and open it.

        Raises:
            RemoteError: if the server refuses it.
            InputError: if there is no such file.
        """
        path = Path(image)
        if not path.is_file():
            remedy = "a folder of the server is opened with open_path"
            raise InputError(f"image must be a file to upload, got {path}; {remedy}")
        with path.open("rb") as file:
            query = _given(name=path.name, **options)
            return RemoteSession(self, self.call("POST", "/api/sessions/upload", params=query, content=file))

    def open_path(self, path: str, **options: Unpack[ImageOptions]) -> RemoteSession:
        """Open an image that lies in one of the server's folders."""
        return RemoteSession(self, self.call("POST", "/api/sessions", json=_given(path=path, **options)))

    def open_example(self, **options: Unpack[ImageOptions]) -> RemoteSession:
        """Open the server's example."""
        return RemoteSession(self, self.call("POST", "/api/sessions", json=_given(example=True, **options)))

    def resume(self, session_id: str) -> RemoteSession:
        """Open a session that the server keeps."""
        return RemoteSession(self, self.call("GET", f"/api/sessions/{urllib.parse.quote(session_id, safe='')}"))

    def sessions(self) -> list[dict[str, Any]]:
        """The server's sessions, the newest first."""
        return self.call("GET", "/api/sessions")

    def about(self) -> dict[str, Any]:
        """Models, formats and folders of the server."""
        return self.call("GET", "/api/about")

    def call(self, method: str, path: str, **request: Any) -> Any:
        """A request with a JSON answer; ``request`` goes to ``httpx.Client.request``.

        Raises:
            RemoteError: for an answer other than success, or none.
        """
        with self.answer(method, path, **request) as answer:
            content = answer.read()
            return answer.json() if content else None

    @contextmanager
    def answer(self, method: str, path: str, **request: Any) -> Iterator[httpx.Response]:
        """The answer to a request, to be read inside the block; raises as ``call``."""
        sent = self._http.build_request(method, path, **request)
        try:
            try:
                answer = self._http.send(sent, stream=True)
            except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
                # The server may have closed a kept connection. Only a request that changes nothing is repeated.
                if method != "GET":
                    raise
                answer = self._http.send(sent, stream=True)
            try:
                if answer.is_error:
                    raise RemoteError(answer.status_code, _detail(answer))
                yield answer
            finally:
                answer.close()
        except httpx.HTTPError as error:
            place = f"{sent.url.host}:{sent.url.port or sent.url.scheme}"
            raise RemoteError(0, f"the server at {place} does not answer ({error})") from error


class RemoteSession:
    """A session on a server.

    Attributes:
        id: ``Client.resume`` finds the session by it.
        size_ijk: Of the image.
        notes: What the user must know of how the server read the image.
        grid: Of the image.
    """

    def __init__(self, client: Client, state: dict[str, Any]) -> None:
        """Use ``Client.open``, ``open_path``, ``open_example`` or ``resume``."""
        self._client, self._state = client, state
        self.id: str = state["id"]
        i, j, k = state["size_ijk"]
        self.size_ijk: IntTriple = (i, j, k)
        self.notes: tuple[str, ...] = tuple(state.get("notes", ()))
        self.grid = Grid.from_affine_ras((k, j, i), state["affine_ras"])
        self._masks: dict[int, NDArray[np.uint8]] = {}
        self._read_masks()

    def __enter__(self) -> RemoteSession:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def add(self, prompt: Prompt, object_id: int = 1, name: str | None = None) -> MaskUpdate:
        """As ``Session.add``; a mask must be given as an array."""
        return self._edit("POST", "/prompts", _given(prompt=_to_json(prompt), object_id=object_id, name=name))

    def move(self, prompt_id: int, to: Prompt) -> MaskUpdate:
        """Replace a prompt."""
        return self._edit("PUT", f"/prompts/{prompt_id}", {"prompt": _to_json(to)})

    def remove(self, prompt_id: int) -> MaskUpdate:
        """Remove a prompt."""
        return self._edit("DELETE", f"/prompts/{prompt_id}")

    def undo(self) -> MaskUpdate:
        """Undo the last edit."""
        return self._edit("POST", "/undo", {})

    def redo(self) -> MaskUpdate:
        """Redo the edit that was undone last."""
        return self._edit("POST", "/redo", {})

    def new_object(self, name: str | None = None) -> int:
        """Make an object without prompts; it becomes the current one."""
        self._edit("POST", "/objects", _given(name=name))
        return self.current

    def edit_object(self, object_id: int, **changes: Any) -> None:
        """Change ``name``, ``colour``, ``visible``, ``locked`` or ``code``."""
        self._edit("PATCH", f"/objects/{object_id}", _given(**changes))

    def clean(self, cleaning: Cleaning, object_id: int | None = None) -> MaskUpdate:
        """As ``Session.clean``."""
        return self._edit("POST", f"/objects/{object_id or self.current}/clean", asdict(cleaning))

    def remove_object(self, object_id: int) -> MaskUpdate:
        """Remove an object with all its prompts."""
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
        """Whether there is an edit to undo."""
        return self._state["can_undo"]

    @property
    def can_redo(self) -> bool:
        """Whether there is an edit to redo."""
        return self._state["can_redo"]

    @property
    def revision(self) -> int:
        """Grows with every change of the session, by any client."""
        return self._state["revision"]

    def refresh(self) -> None:
        """Read the session again, after a 409: another client changed it."""
        self._state = self._client.call("GET", self._path)
        self._masks.clear()
        self._read_masks()

    def mask_of(self, object_id: int) -> NDArray[np.uint8]:
        """An object's mask, uint8 (D, H, W) on the image's own grid; a copy.

        Raises:
            InputError: if there is no such object.
        """
        if object_id not in self._masks and not any(o["id"] == object_id for o in self._state["objects"]):
            raise InputError(f"object {object_id} has no mask yet: add a prompt first")
        return self._mask(object_id).copy()

    def probability(self, object_id: int | None = None) -> NDArray[np.float32]:
        """An object's probability in steps of 1/255, float32 (D, H, W)."""
        path = f"{self._path}/objects/{object_id or self.current}/probability.nii.gz"
        with self._client.answer("GET", path) as answer:
            raw = gzip.decompress(answer.read())
        values = np.frombuffer(raw, np.uint8, offset=_NIFTI_HEADER).reshape(self._shape)
        return values.astype(np.float32) / np.float32(255.0)

    def suggest_click(self, object_id: int | None = None) -> Point:
        """A click where the model is least certain."""
        body = self._client.call("GET", f"{self._path}/suggest", params=_given(object_id=object_id))
        return Point(tuple(body["at"]), body["positive"], body["space"])

    def export(self, path: str | Path, format: str = "nifti") -> None:
        """Write the result to a local file, completely or not at all.

        Raises:
            InputError: if the file cannot be written.
        """
        params = {"format": format}
        with replacing(path) as partial, self._client.answer("GET", f"{self._path}/export", params=params) as answer:
            with partial.open("wb") as file:
                file.writelines(answer.iter_bytes())

    def delete(self) -> None:
        """Delete the session on the server, with its prompts."""
        self._client.call("DELETE", self._path)

    def close(self) -> None:
        """Free the masks that are kept here. The session stays on the server."""
        self._masks.clear()

    @property
    def _path(self) -> str:
        return f"/api/sessions/{self.id}"

    @property
    def _shape(self) -> IntTriple:
        return self.size_ijk[::-1]

    def _edit(self, method: str, path: str, body: dict[str, Any] | None = None) -> MaskUpdate:
        # The masks here are those of this revision: the server refuses an edit if another client made a newer one.
        revision = {"revision": self.revision}
        request = {"params": revision} if body is None else {"json": {**body, **revision}}
        answer = self._client.call(method, self._path + path, **request)
        self._state = answer["session"]
        known = {entry["id"] for entry in self._state["objects"]}
        for removed in set(self._masks) - known:
            del self._masks[removed]
        prompt_id = answer["prompt_id"] or 0
        update = MaskUpdate(EMPTY_REGION, np.zeros((0, 0, 0), np.uint8), answer["seconds"], self.current, prompt_id)
        for entry in answer["updates"]:
            object_id, region, mask = update_from_json(entry, self.size_ijk)
            update = MaskUpdate(region, mask, answer["seconds"], object_id, prompt_id)
            if object_id in known:
                self._mask(object_id)[region.slices] = mask
        return update

    def _read_masks(self) -> None:
        for entry in self._client.call("GET", f"{self._path}/masks")["updates"]:
            object_id, region, mask = update_from_json(entry, self.size_ijk)
            self._mask(object_id)[region.slices] = mask

    def _mask(self, object_id: int) -> NDArray[np.uint8]:
        return self._masks.setdefault(object_id, np.zeros(self._shape, np.uint8))


def update_from_json(entry: Any, size_ijk: IntTriple) -> tuple[int, Region, NDArray[np.uint8]]:
    """A mask update of the server: object, region (stored zyx) and the uint8 mask inside it.

    Raises:
        InputError: if the box leaves the volume, or the bits are damaged or not as many as the box has voxels.
    """
    if not isinstance(entry, dict) or type(entry.get("object_id")) is not int:
        raise InputError("an update must be an object with object_id, start, stop and bits")
    packed = PackedMask.from_json({**entry, "size": list(size_ijk)})
    return entry["object_id"], packed.region, packed.inside().astype(np.uint8)


def _detail(answer: httpx.Response) -> str:
    answer.read()
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.reason_phrase}"


def _to_json(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, Mask) and isinstance(prompt.mask, str):
        raise InputError(f"a mask for a server must be an array, got the path {prompt.mask}; read it first")
    return {"space": prompt.space, **prompt_to_json(prompt)}


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
