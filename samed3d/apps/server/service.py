"""What all routes of a server share: options, sessions, metrics, work on one session, JSON of requests and answers."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Depends, Request
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from samed3d.apps.server.security import Access, ApiError
from samed3d.apps.server.sessions import Limits, Registry, ServerSession, SessionInfo
from samed3d.errors import InputError
from samed3d.geometry import Region, bounding_region
from samed3d.inference.session import Session, SessionObject
from samed3d.models.base import PromptableModel
from samed3d.prompts import Mask, PackedMask, Prompt, prompt_from_json, prompt_to_json
from samed3d.volume.files import ReadLimits

T = TypeVar("T")
Json = dict[str, Any]

BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_UPLOADS_AT_ONCE = 2
_COMPRESSION = 1  # higher levels save little on masks and would delay every click


@dataclass(frozen=True)
class ServerOptions:
    """How a server is set up.

    Attributes:
        sessions: Folder in which sessions are kept.
        roots: Folders whose images clients may open by path.
        model: The model of sessions that do not name one.
        models: Names that they may choose; ``model`` is always one.
        device: As ``Session.open``.
        access: Which requests are accepted.
        limits: How many sessions, and for how long.
        images: How large an image may be.
        page: Folder of the web page that is shown at ``/``, or None.
    """

    sessions: Path
    roots: tuple[Path, ...] = ()
    model: str = "default"
    models: tuple[str, ...] = ()
    device: str = "auto"
    access: Access = field(default_factory=Access)
    limits: Limits = field(default_factory=Limits)
    images: ReadLimits = field(default_factory=ReadLimits)
    page: Path | None = None


class Service:
    """A server's options, sessions and metrics.

    Attributes:
        requests: Counts answers by method, route (the pattern, so that ids do not become labels) and status.
        predictions: Histogram of the seconds from a prompt's turn to its mask.
        uploads: Held while a volume is received or decoded; bounds how many are in memory at once.
    """

    def __init__(self, options: ServerOptions, load: Callable[[str], PromptableModel]) -> None:
        self.options = options
        self.registry = registry = Registry(options.sessions, load, options.limits, options.device)
        self.uploads = asyncio.Semaphore(_UPLOADS_AT_ONCE)
        self._metrics = metrics = CollectorRegistry()
        ProcessCollector(registry=metrics)
        labels = ("method", "route", "status")
        self.requests = Counter("samed3d_requests", "Answered requests.", labels, registry=metrics)
        meaning = "Time from a prompt's turn to its mask."
        self.predictions = Histogram("samed3d_prediction_seconds", meaning, buckets=BUCKETS_S, registry=metrics)
        for name, meaning, value in (
            ("sessions_loaded", "Sessions in memory.", lambda: len(registry.loaded())),
            ("sessions_stored", "Sessions on disk.", lambda: len(registry.stored())),
            ("jobs_waiting", "Jobs that wait or run.", registry.queue.depth),
        ):
            Gauge(f"samed3d_{name}", meaning, registry=metrics).set_function(value)

    def metrics(self) -> bytes:
        """The page ``/metrics``, as Prometheus text."""
        return generate_latest(self._metrics)

    @property
    def models(self) -> list[str]:
        """Names of the models that clients may choose, the default first."""
        return [self.options.model, *(m for m in self.options.models if m != self.options.model)]

    def model_name(self, requested: str | None) -> str:
        """The model to use.

        Raises:
            ApiError: 400 for a model that this server does not offer; a file of the server is never one.
        """
        if requested is None:
            return self.options.model
        if requested not in self.models:
            raise ApiError(400, f"model must be one of {', '.join(self.models)}, got {requested[:80]!r}")
        return requested

    @asynccontextmanager
    async def new_session(self) -> AsyncIterator[ServerSession]:
        """A new session, which is deleted if the block fails."""
        entry = self.registry.create()
        try:
            yield entry
        except BaseException:
            await self.registry.delete(entry)
            raise

    async def open(self, entry: ServerSession, info: SessionInfo, request: Request) -> Json:
        """Open an image in a session; the session as JSON."""
        gone = request.is_disconnected
        await self.registry.queue.run(entry.id, lambda: self.registry.set_image(entry, info), gone)
        return await self.registry.use(entry, lambda session: session_to_json(entry, session), gone)


class SessionWork:
    """The session that a request names, and what the request does to it.

    Attributes:
        entry: The session.
        service: The server's.
        is_gone: Whether the client has disconnected.
    """

    def __init__(self, entry: ServerSession, service: Service, request: Request) -> None:
        self.entry, self.service, self.is_gone = entry, service, request.is_disconnected

    async def run(self, job: Callable[[Session], T], revision: int | None = None) -> T:
        """Run a job on the session in its turn; arguments and errors as ``Registry.use``."""
        return await self.service.registry.use(self.entry, job, self.is_gone, revision)


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _session_work(session_id: str, request: Request) -> SessionWork:
    service = await _service(request)
    return SessionWork(service.registry.get(session_id), service, request)


SharedService = Annotated[Service, Depends(_service)]
"""A route's parameter of this type receives the server's ``Service``."""
OneSession = Annotated[SessionWork, Depends(_session_work)]
"""A route's parameter of this type receives the session that its path names."""


def parse_json(text: str | bytes, what: str) -> Any:
    """JSON of a request.

    Raises:
        ApiError: 400 if it is damaged; the message begins with ``what``.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{what} must be JSON, got something else ({error})") from error


def prompt_from_client(entry: Any, space: str = "ijk", where: str = "prompt") -> Prompt:
    """A prompt of a request, written as in a prompt file, except that a mask brings its bits, never a file's path.

    Raises:
        InputError: if it breaks the schema.
    """
    prompt = prompt_from_json(entry, space, where)
    if isinstance(prompt, Mask) and isinstance(prompt.mask, str):
        raise InputError(f"{where}: a mask must bring its bits (size, start, stop, bits), got the path of a file")
    return prompt


def session_to_json(entry: ServerSession, session: Session) -> Json:
    """A session as clients see it: the image's grid, the objects with their prompts, and whether undo is possible."""
    grid, info = session.volume.grid, entry.info
    return {
        "id": entry.id,
        **{key: getattr(info, key, "") for key in ("name", "model", "created")},
        "revision": entry.revision,
        "size_ijk": list(grid.size_ijk),
        "spacing_mm": list(grid.spacing_xyz_mm),
        "affine_ras": grid.affine_ras.tolist(),
        "notes": list(session.volume.notes),
        "current": session.current,
        "others_are_negative": session.others_are_negative,
        "can_undo": session.can_undo,
        "can_redo": session.can_redo,
        "objects": [_object_to_json(o) for o in session.objects()],
    }


def _object_to_json(entry: SessionObject) -> Json:
    prompts = []
    for number, prompt in entry.numbered.items():
        body = prompt_to_json(prompt)
        body.pop("bits", None)  # a mask is only named here
        prompts.append({"id": number, "space": prompt.space, **body})
    keys = ("id", "name", "colour", "visible", "locked", "voxels")
    return {**{key: getattr(entry, key) for key in keys}, "prompts": prompts}


def update_to_json(object_id: int, region: Region, mask: NDArray) -> Json:
    """The mask of one object inside a box.

    The answer holds ``object_id``, ``start`` (inclusive) and ``stop`` (exclusive) as i, j, k, and ``bits``: one bit per
    voxel of the box, x fastest, the highest bit of a byte first, zlib ("deflate" in a browser), base64.

    Args:
        object_id: The object.
        region: The box, stored zyx.
        mask: (d, h, w) of the region's shape; voxels that are not 0 belong to the object.
    """
    bits = zlib.compress(np.packbits(mask != 0).tobytes(), _COMPRESSION)
    body = PackedMask(region.stop_zyx, region, bits).to_json()
    del body["size"]
    return {"object_id": object_id, **body}


def whole_mask_to_json(object_id: int, mask: NDArray[np.uint8]) -> Json:
    """An object's whole mask, as an update of its bounding box."""
    region = bounding_region(mask)
    return update_to_json(object_id, region, mask[region.slices])
