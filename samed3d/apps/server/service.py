"""The server's state: its options, sessions, models, worker and metrics, and the work of one request on a session.

All sessions are on disk and a few of them in memory. A session that was unused for a while, or whose client fell
silent, is unloaded; the next request loads it again from its journal, as after a crash. All work on sessions runs on
the one thread of ``fair_queue.py``.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

from fastapi import Depends, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.exceptions import HTTPException

from samed3d.apps.server.fair_queue import FairQueue, IsGone
from samed3d.apps.server.sessions import JOURNAL, VIEWED, Json, ServerSession, SessionInfo, read_info, session_to_json
from samed3d.errors import InputError, check_keys
from samed3d.inference.session import Session
from samed3d.models.base import PromptableModel
from samed3d.output import lock, write_json
from samed3d.prompts import Mask, Prompt, prompt_from_json
from samed3d.volume import read_volume
from samed3d.volume.files import ReadLimits

T = TypeVar("T")

BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_UPLOADS_AT_ONCE = 2
_ID = re.compile(r"[A-Za-z0-9_-]{22}")


@dataclass(frozen=True)
class ServerOptions:
    """How a server is set up.

    Attributes:
        sessions: Folder in which sessions are kept; only one server at a time may use it.
        roots: Folders whose images clients may open by path.
        model: The model of sessions that do not name one.
        models: Names that they may choose; ``model`` is always one.
        device: As ``Session.open``.
        page: Folder of the web page that is shown at ``/``, or None.
        token: Required as ``Authorization: Bearer TOKEN``; empty for none, which only a loopback address may have.
        hosts: Names that a Host header may carry besides loopback and, where a token is set, any IP address.
        largest_json: Bytes of an ordinary request body.
        largest_upload: Bytes of a body that holds a volume.
        images: How large an image may be.
        loaded: Sessions in memory at once.
        memory_bytes: Of all of them together: images, features, logits and masks.
        stored: Sessions on disk.
        idle_seconds: A session without a request of a user for so long is unloaded.
        liveness_seconds: A session whose client sends heartbeats is unloaded after so long without one.
        busy_seconds: A session used more recently than this is never unloaded to make room for another.
    """

    sessions: Path
    roots: tuple[Path, ...] = ()
    model: str = "default"
    models: tuple[str, ...] = ()
    device: str = "auto"
    page: Path | None = None
    token: str = ""
    hosts: frozenset[str] = frozenset()
    largest_json: int = 32 * 2**20
    largest_upload: int = 2 * 2**30
    images: ReadLimits = field(default_factory=ReadLimits)
    loaded: int = 16
    memory_bytes: int = 2**30
    stored: int = 1000
    idle_seconds: float = 600.0
    liveness_seconds: float = 60.0
    busy_seconds: float = 30.0


class Service:
    """All sessions of a server, and what they share.

    Attributes:
        queue: Runs all jobs on sessions.
        model: Returns a model by name, loaded once; on the worker thread only.
        uploads: Held while a volume is received or decoded; bounds how many are in memory at once.
        requests: Counts answers by method, route (the pattern, so that ids do not become labels) and status.
        predictions: Histogram of the seconds from a prompt's turn to its mask.

    Raises:
        InputError: if the folder of sessions cannot be written, or another server uses it.
    """

    def __init__(self, options: ServerOptions, load: Callable[[str], PromptableModel]) -> None:
        self.options, self.folder = options, options.sessions
        self._lock = _locked(self.folder)
        self._sessions: dict[str, ServerSession] = {}
        self.queue, self.model = FairQueue(), functools.cache(load)
        self.uploads = asyncio.Semaphore(_UPLOADS_AT_ONCE)
        self._metrics = metrics = CollectorRegistry()
        ProcessCollector(registry=metrics)
        labels = ("method", "route", "status")
        self.requests = Counter("samed3d_requests", "Answered requests.", labels, registry=metrics)
        meaning = "Time from a prompt's turn to its mask."
        self.predictions = Histogram("samed3d_prediction_seconds", meaning, buckets=BUCKETS_S, registry=metrics)
        for name, meaning, value in (
            ("sessions_loaded", "Sessions in memory.", lambda: len(self.loaded())),
            ("sessions_stored", "Sessions on disk.", lambda: len(self.stored())),
            ("jobs_waiting", "Jobs that wait or run.", self.queue.depth),
        ):
            Gauge(f"samed3d_{name}", meaning, registry=metrics).set_function(value)

    def metrics(self) -> bytes:
        """The page ``/metrics``, as Prometheus text."""
        return generate_latest(self._metrics)

    @property
    def models(self) -> list[str]:
        """Names of the models that clients may choose, the default first."""
        return list(dict.fromkeys((self.options.model, *self.options.models)))

    def model_name(self, requested: str | None) -> str:
        """The model to use.

        Raises:
            HTTPException: 400 for a model that this server does not offer; a file of the server is never one.
        """
        if requested is None:
            return self.options.model
        if requested not in self.models:
            raise HTTPException(400, f"model must be one of {', '.join(self.models)}, got {requested[:80]!r}")
        return requested

    def create(self) -> ServerSession:
        """Make a session without an image.

        Raises:
            HTTPException: 503 when all places in memory are in use, 507 when too many sessions are stored.
        """
        self._make_room(None)
        if len(self.stored()) >= self.options.stored:
            raise HTTPException(507, f"the server keeps at most {self.options.stored} sessions; delete some")
        session_id = secrets.token_urlsafe(16)
        entry = ServerSession(session_id, self.folder / session_id, None)
        entry.folder.mkdir(mode=0o700)
        self._sessions[entry.id] = entry
        return entry

    @asynccontextmanager
    async def new_session(self) -> AsyncIterator[ServerSession]:
        """A new session, which is deleted if the block fails."""
        entry = self.create()
        try:
            yield entry
        except BaseException:
            await self.delete(entry)
            raise

    def set_image(self, entry: ServerSession, info: SessionInfo) -> None:
        """Set a session's image, which the next ``use`` opens; the prompts on an earlier image are deleted."""
        entry.unload()
        for name in (JOURNAL, VIEWED):
            (entry.folder / name).unlink(missing_ok=True)
        entry.info = info
        write_json(entry.folder / "session.json", asdict(info))

    async def open(self, entry: ServerSession, info: SessionInfo, request: Request) -> Json:
        """Open an image in a session; the session as JSON."""
        gone = request.is_disconnected
        await self.queue.run(entry.id, lambda: self.set_image(entry, info), gone)
        return await self.use(entry, lambda session: session_to_json(entry, session), gone)

    def get(self, session_id: str) -> ServerSession:
        """A session by its id, from memory or from disk.

        Raises:
            HTTPException: 404 if there is none.
        """
        if session_id in self._sessions:
            return self._sessions[session_id]
        folder = self.folder / session_id
        if not _ID.fullmatch(session_id) or not folder.is_dir():
            raise HTTPException(404, f"there is no session {session_id[:40]!r}; GET /api/sessions lists them")
        return self._sessions.setdefault(session_id, ServerSession(session_id, folder, read_info(folder)))

    def stored(self) -> list[str]:
        """The ids of all sessions, loaded or not."""
        return [entry.name for entry in os.scandir(self.folder) if _ID.fullmatch(entry.name)]

    def loaded(self) -> list[ServerSession]:
        """The sessions in memory."""
        return [entry for entry in list(self._sessions.values()) if entry.session is not None]

    async def use(
        self, entry: ServerSession, job: Callable[[Session], T], gone: IsGone, revision: int | None = None
    ) -> T:
        """Wait for a session's turn, load it where necessary, and run a job on it.

        Args:
            entry: As ``get`` returns it.
            job: Called with the session on the worker thread.
            gone: Whether the client has disconnected; a job that has not started by then is dropped.
            revision: The revision that the client last saw; a session that has changed since is left unchanged.

        Raises:
            HTTPException: 409 if the revision is an older one or there is no image yet, 503 when there is no room.
            Exception: What ``job`` raises.
        """
        entry = self._sessions.setdefault(entry.id, entry)  # one object per id: a journal must have one writer
        entry.used = entry.seen = time.monotonic()
        async with entry.reading:
            if entry.session is None and entry.image is None and (info := entry.info) is not None:
                entry.image = await asyncio.to_thread(functools.partial(read_volume, info.image, **info.reading))

        def with_session() -> T:
            session = self._loaded(entry)
            if revision is not None and revision != entry.revision:
                message = f"the session changed elsewhere (revision {entry.revision}, got {revision}); read it again"
                raise HTTPException(409, message)
            try:
                return job(session)
            finally:
                entry.used = entry.seen = time.monotonic()
                self._fit_memory()

        try:
            return await self.queue.run(entry.id, with_session, gone)
        finally:
            if self.queue.depth(entry.id) == 0:
                entry.image = None

    async def delete(self, entry: ServerSession) -> None:
        """Delete a session and its files, once its turn comes."""

        def job() -> None:
            entry.unload()
            self._sessions.pop(entry.id, None)
            shutil.rmtree(entry.folder, ignore_errors=True)

        await self.queue.run(entry.id, job)

    async def expire(self) -> list[str]:
        """Unload every session that nobody uses, and return their ids; nothing is lost."""
        now, options, expired = time.monotonic(), self.options, []
        for entry in list(self._sessions.values()):
            idle = now - entry.used > options.idle_seconds
            has_heartbeat = entry.info is not None and entry.info.kind != "rest"
            silent = has_heartbeat and now - entry.seen > options.liveness_seconds
            if not (idle or silent) or self.queue.depth(entry.id) or entry.reading.locked():
                continue
            if entry.session is None:
                self._sessions.pop(entry.id, None)  # ``get`` reads it again from its folder
            else:
                expired.append(entry.id)
                await self.queue.run(entry.id, functools.partial(self._unload_if_last, entry))
        return expired

    async def close(self) -> None:
        """Let the running job finish, refuse the others, and close every session."""
        await self.queue.close()
        for entry in self._sessions.values():
            entry.unload()
        self._lock.close()

    def _loaded(self, entry: ServerSession) -> Session:
        if entry.session is not None:
            return entry.session
        if not entry.folder.is_dir():
            self._sessions.pop(entry.id, None)
            raise HTTPException(404, "the session was deleted")
        info = entry.info
        if info is None:
            raise HTTPException(409, "the session has no image yet; send one first")
        self._make_room(entry)
        source, model = entry.image or info.image, self.model(info.model)
        journal = entry.folder / JOURNAL
        entry.session = Session.open(source, model, self.options.device, journal=journal, **info.reading)
        entry.image = None
        return entry.session

    def _unload_if_last(self, entry: ServerSession) -> None:
        """Unload a session unless further requests arrived before this job ran."""
        if self.queue.depth(entry.id) <= 1:
            entry.unload()

    def _make_room(self, new: ServerSession | None) -> None:
        """Unload the sessions that were unused the longest until ``new`` fits; None only checks that one would."""
        options = self.options
        while len(loaded := self.loaded()) >= options.loaded:
            since = time.monotonic() - options.busy_seconds
            unused = [e for e in loaded if e is not new and e.used < since and self.queue.depth(e.id) == 0]
            if not unused:
                message = f"all {options.loaded} places are in use; try again in a moment"
                raise HTTPException(503, message, {"Retry-After": "10"})
            if new is None:
                return
            min(unused, key=lambda e: e.used).unload()

    def _fit_memory(self) -> None:
        """Delete what can be computed again, then unload sessions, those unused the longest first, until they fit."""
        unused = sorted(self.loaded(), key=lambda e: e.used)[:-1]
        since = time.monotonic() - self.options.busy_seconds
        idle = [e for e in unused if e.used < since and self.queue.depth(e.id) == 0]
        for free in (*(e.trim for e in unused), *(e.unload for e in idle)):
            if sum(e.nbytes for e in self.loaded()) <= self.options.memory_bytes:
                return
            free()


def _locked(folder: Path) -> IO[str]:
    """The folder's lock, held until the file is closed or the process ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (folder / "lock").open("a")
    except OSError as error:
        raise InputError(f"--sessions must be a writable folder, got {folder} ({error.strerror})") from error
    if not lock(file):
        file.close()
        raise InputError(f"another server uses the sessions in {folder}; stop it, or choose another folder: --sessions")
    return file


# What requests hold


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
        """Run a job on the session in its turn; arguments and errors as ``Service.use``."""
        return await self.service.use(self.entry, job, self.is_gone, revision)


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


SharedService = Annotated[Service, Depends(_service)]
"""A route's parameter of this type receives the server's ``Service``."""


async def known_query(request: Request) -> None:
    """Refuse parameters of an address that its route does not take."""
    dependants, known = [request.scope["route"].dependant], []
    while dependants:
        known += [query.alias for query in dependants[0].query_params]
        dependants += dependants.pop(0).dependencies
    check_keys(request.query_params, known, "the address", "parameter")


async def _session_work(session_id: str, request: Request, service: SharedService) -> SessionWork:
    return SessionWork(service.get(session_id), service, request)


OneSession = Annotated[SessionWork, Depends(_session_work)]
"""A route's parameter of this type receives the session that its path names."""


def parse_json(text: str | bytes, what: str) -> Any:
    """JSON of a request.

    Raises:
        HTTPException: 400 if it is damaged; the message begins with ``what``.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"{what} must be JSON, got something else ({error})") from error


def prompt_from_client(entry: Any, space: str = "ijk", where: str = "prompt") -> Prompt:
    """A prompt of a request, written as in a prompt file, except that a mask brings its bits, never a file's path.

    Raises:
        InputError: if it breaks the schema.
    """
    prompt = prompt_from_json(entry, space, where)
    if isinstance(prompt, Mask) and isinstance(prompt.mask, str):
        raise InputError(f"{where}: a mask must bring its bits (size, start, stop, bits), got the path of a file")
    return prompt
