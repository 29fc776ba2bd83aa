"""The sessions of a server: all of them on disk, a few of them loaded in memory.

Each session has a folder with ``session.json`` (which image, which model), ``journal.jsonl`` (every prompt, which
``Session`` writes before the server answers) and the image where the client uploaded it. A session that was unused for
a while, or whose client fell silent, is unloaded; the next request loads it again from its journal, as after a crash.
All work on sessions runs on the one thread of ``fair_queue.py``. What a session does is in ``inference/session.py``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TypeVar

from samed3d.apps.server.fair_queue import FairQueue, IsGone
from samed3d.apps.server.security import ApiError
from samed3d.errors import InputError
from samed3d.inference.session import Session
from samed3d.models.base import PromptableModel
from samed3d.output import lock, write_json
from samed3d.volume import Volume, read_volume

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ID = re.compile(r"[A-Za-z0-9_-]{22}")
JOURNAL = "journal.jsonl"
VIEWED = "viewed.nii.gz"
"""The image as a web page receives it; written at the first request for it."""


@dataclass(frozen=True)
class Limits:
    """How many sessions a server holds, and for how long.

    Attributes:
        loaded: Sessions in memory at once.
        stored: Sessions on disk.
        idle_seconds: A session without a request of a user for so long is unloaded.
        liveness_seconds: A session whose client sends heartbeats is unloaded after so long without one.
        busy_seconds: A session used more recently than this is never unloaded to make room for another.
    """

    loaded: int = 16
    stored: int = 1000
    idle_seconds: float = 600.0
    liveness_seconds: float = 60.0
    busy_seconds: float = 30.0


@dataclass(frozen=True)
class SessionInfo:
    """How to open a session again: the content of ``session.json``."""

    image: str
    name: str
    model: str
    channel: int | None = None
    series: str | None = None
    kind: str = "rest"
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


@dataclass
class ServerSession:
    """One session of the server, loaded or not.

    Attributes:
        info: None before the session has an image.
        session: None while the session is not loaded.
        used: When a user last requested something, by the monotonic clock.
        seen: When its client last sent anything.
        reading: Held while the image is read. That happens outside the worker thread, so that a large image does not
            delay the clicks of others.
        image: The image once it is read, until the session takes it.
    """

    id: str
    folder: Path
    info: SessionInfo | None
    session: Session | None = None
    used: float = field(default_factory=time.monotonic)
    seen: float = field(default_factory=time.monotonic)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    image: Volume | None = None

    @property
    def revision(self) -> int:
        """Length of the journal. It grows with every edit, restarts included: edits are only ever appended."""
        try:
            return (self.folder / JOURNAL).stat().st_size
        except FileNotFoundError:
            return 0

    def unload(self) -> None:
        """Free the session's memory; on the worker thread only."""
        if self.session is not None:
            self.session.close()
            self.session = None
            logger.info("session %s is unloaded; its journal is kept", self.id[:6])


class Registry:
    """All sessions of a server.

    Args:
        folder: Where sessions are kept; only one server at a time may use it.
        load: Returns a model by name; called once per name.
        limits: How many sessions, and for how long.
        device: As ``Session.open``.

    Raises:
        InputError: if the folder cannot be written, or another server uses it.
    """

    def __init__(
        self, folder: Path, load: Callable[[str], PromptableModel], limits: Limits | None = None, device: str = "auto"
    ) -> None:
        self.folder, self.limits, self.device = folder, limits or Limits(), device
        self._lock = _locked(folder)
        self.queue = FairQueue()
        self._load, self._models = load, dict[str, PromptableModel]()
        self._sessions: dict[str, ServerSession] = {}

    def create(self) -> ServerSession:
        """Make a session without an image.

        Raises:
            ApiError: 503 when all places in memory are in use, 507 when too many sessions are stored.
        """
        self._make_room(None)
        if len(self.stored()) >= self.limits.stored:
            raise ApiError(507, f"the server keeps at most {self.limits.stored} sessions; delete some")
        session_id = secrets.token_urlsafe(16)
        entry = ServerSession(session_id, self.folder / session_id, None)
        entry.folder.mkdir(mode=0o700)
        self._sessions[entry.id] = entry
        return entry

    def set_image(self, entry: ServerSession, info: SessionInfo) -> None:
        """Set a session's image, which the next ``use`` opens; the prompts on an earlier image are deleted."""
        entry.unload()
        for name in (JOURNAL, VIEWED):
            (entry.folder / name).unlink(missing_ok=True)
        entry.info = info
        write_json(entry.folder / "session.json", asdict(info))

    def get(self, session_id: str) -> ServerSession:
        """A session by its id, from memory or from disk.

        Raises:
            ApiError: 404 if there is none.
        """
        if session_id in self._sessions:
            return self._sessions[session_id]
        folder = self.folder / session_id
        if not _ID.fullmatch(session_id) or not folder.is_dir():
            raise ApiError(404, f"there is no session {session_id[:40]!r}; GET /api/sessions lists them")
        return self._sessions.setdefault(session_id, ServerSession(session_id, folder, read_info(folder)))

    def stored(self) -> list[str]:
        """The ids of all sessions, loaded or not."""
        return [entry.name for entry in os.scandir(self.folder) if _ID.fullmatch(entry.name)]

    def loaded(self) -> list[ServerSession]:
        """The sessions in memory."""
        return [entry for entry in self._sessions.values() if entry.session is not None]

    async def use(
        self,
        entry: ServerSession,
        job: Callable[[Session], T],
        gone: IsGone | None = None,
        revision: int | None = None,
    ) -> T:
        """Wait for a session's turn, load it where necessary, and run a job on it.

        Args:
            entry: As ``get`` returns it.
            job: Called with the session on the worker thread.
            gone: Whether the client has disconnected; a job that has not started by then is dropped.
            revision: The revision that the client last saw; a session that has changed since is left unchanged.

        Raises:
            ApiError: 409 if the revision is an older one or there is no image yet, 503 when there is no room, and what
                ``job`` raises.
        """
        entry = self._sessions.setdefault(entry.id, entry)  # one object per id: a journal must have one writer
        entry.used = entry.seen = time.monotonic()
        async with entry.reading:
            info = entry.info
            if entry.session is None and entry.image is None and info is not None:
                entry.image = await asyncio.to_thread(read_volume, info.image, channel=info.channel, series=info.series)

        def with_session() -> T:
            session = self._loaded(entry)
            if revision is not None and revision != entry.revision:
                message = f"the session changed elsewhere (revision {entry.revision}, got {revision}); read it again"
                raise ApiError(409, message)
            try:
                return job(session)
            finally:
                entry.used = entry.seen = time.monotonic()

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

    def expire(self) -> list[str]:
        """Unload every session that nobody uses; nothing is lost.

        Returns:
            Their ids.
        """
        now, expired = time.monotonic(), []
        for entry in list(self._sessions.values()):
            idle = now - entry.used > self.limits.idle_seconds
            has_heartbeat = entry.info is not None and entry.info.kind != "rest"
            silent = has_heartbeat and now - entry.seen > self.limits.liveness_seconds
            if not (idle or silent) or self.queue.depth(entry.id) or entry.reading.locked():
                continue
            if entry.session is None:
                self._sessions.pop(entry.id, None)  # ``get`` reads it again from its folder
            else:
                expired.append(entry.id)
                self.queue.submit(entry.id, lambda entry=entry: self._unload_if_last(entry))  # type: ignore[misc]
        return expired

    def close(self) -> None:
        """Let the running job finish, refuse the others, and close every session."""
        self.queue.close()
        for entry in self._sessions.values():
            entry.unload()
        self._lock.close()

    def model(self, name: str) -> PromptableModel:
        """A model by name, loaded once; on the worker thread only."""
        if name not in self._models:
            self._models[name] = self._load(name)
        return self._models[name]

    def _loaded(self, entry: ServerSession) -> Session:
        if entry.session is not None:
            return entry.session
        if not entry.folder.is_dir():
            self._sessions.pop(entry.id, None)
            raise ApiError(404, "the session was deleted")
        info = entry.info
        if info is None:
            raise ApiError(409, "the session has no image yet; send one first")
        self._make_room(entry)
        image, journal = entry.image or info.image, entry.folder / JOURNAL
        entry.session = Session.open(image, self.model(info.model), self.device, info.channel, info.series, journal)
        entry.image = None
        return entry.session

    def _unload_if_last(self, entry: ServerSession) -> None:
        """Unload a session unless further requests arrived before this job ran."""
        if self.queue.depth(entry.id) <= 1:
            entry.unload()

    def _make_room(self, new: ServerSession | None) -> None:
        """Unload the sessions that were unused the longest until ``new`` fits; None only checks that one would."""
        while len(self.loaded()) >= self.limits.loaded:
            since = time.monotonic() - self.limits.busy_seconds
            unused = [e for e in self.loaded() if e is not new and e.used < since and self.queue.depth(e.id) == 0]
            if not unused:
                message = f"all {self.limits.loaded} places are in use; try again in a moment"
                raise ApiError(503, message, retry_after=10)
            if new is None:
                return
            min(unused, key=lambda e: e.used).unload()


def read_info(folder: Path) -> SessionInfo | None:
    """The content of a session folder's ``session.json``; None before it has an image, or if the file is damaged."""
    try:
        return SessionInfo(**json.loads((folder / "session.json").read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        logger.warning("session %s has a damaged session.json: %s", folder.name[:6], error)
        return None


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
