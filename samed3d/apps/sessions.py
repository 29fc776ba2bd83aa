"""The sessions of a server: few awake in memory, all of them on disk, so that none of a user's work ends with a time
limit or a crash.

Each session has a folder: ``session.json`` (which image, which model), ``journal.jsonl`` (every prompt, written by
``Session`` before it is acknowledged) and the image where it was uploaded. A session that has not been used for a
while, or whose client fell silent, is put to sleep: its memory is freed, and the next request wakes it from its
journal, as after a restart of the server. All work on sessions runs on the one thread of ``fair_queue.py``. Read
``inference/session.py`` for what a session does, ``server.py`` for the routes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from samed3d.apps.fair_queue import FairQueue
from samed3d.apps.protocol import ApiError
from samed3d.apps.session_files import About, locked, read_about, write_json
from samed3d.inference.session import Session
from samed3d.models.base import PromptableModel
from samed3d.volume import Volume, read_volume

logger = logging.getLogger(__name__)

T = TypeVar("T")
Gone = Callable[[], Awaitable[bool]]

_ID = re.compile(r"[A-Za-z0-9_-]{22}")
JOURNAL = "journal.jsonl"
VIEWED = "viewed.nii.gz"
"""The image as a viewer was given it; made when first asked for."""


@dataclass(frozen=True)
class Limits:
    """How much a server holds.

    Attributes:
        awake: Sessions in memory at once.
        stored: Sessions on disk.
        idle_seconds: Without a request of a user, after which a session sleeps.
        liveness_seconds: Without any sign of its client, after which a session of a client that sends heartbeats
            sleeps.
        busy_seconds: A session used more recently than this is never put to sleep to make room for another.
    """

    awake: int = 16
    stored: int = 1000
    idle_seconds: float = 600.0
    liveness_seconds: float = 60.0
    busy_seconds: float = 30.0


@dataclass
class Entry:
    """A session that this process knows, awake or asleep.

    Attributes:
        used: When a user last asked for something, by the monotonic clock.
        seen: When its client last gave a sign.
        reading: Held while the image is read, beside the worker: a large one must not hold up the others' clicks.
        image: Read, and not yet taken over by the session.
    """

    id: str
    folder: Path
    about: About | None
    session: Session | None = None
    used: float = field(default_factory=time.monotonic)
    seen: float = field(default_factory=time.monotonic)
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)
    image: Volume | None = None

    @property
    def revision(self) -> int:
        """Grows with every edit, over restarts too: the length of the journal, to which edits are only ever added."""
        try:
            return (self.folder / JOURNAL).stat().st_size
        except FileNotFoundError:
            return 0


class Registry:
    """All sessions of a server.

    Args:
        folder: Where sessions are kept; one server at a time.
        load: Gives a model by name; called once per name.
        limits: See there.
        device: As ``Session.open``.
    """

    def __init__(
        self, folder: Path, load: Callable[[str], PromptableModel], limits: Limits | None = None, device: str = "auto"
    ) -> None:
        self.folder, self.limits, self.device = folder, limits or Limits(), device
        self.queue = FairQueue()
        self._load, self._models = load, dict[str, PromptableModel]()
        self._entries: dict[str, Entry] = {}
        self._lock = locked(folder)

    def create(self, kind: str = "rest") -> Entry:
        """A new session without an image yet.

        Raises:
            ApiError: 503 when all places in memory are in use, 507 when too many sessions are stored.
        """
        self._check_room()
        if len(self.stored()) >= self.limits.stored:
            raise ApiError(507, f"the server keeps at most {self.limits.stored} sessions; delete some")
        entry = Entry(secrets.token_urlsafe(16), Path(), None)
        entry.folder = self.folder / entry.id
        entry.folder.mkdir(mode=0o700)
        self._entries[entry.id] = entry
        if kind != "rest":  # such a client may say for long what it is not yet showing an image of
            write_json(entry.folder / "lease.json", {"kind": kind})
        return entry

    def set_image(self, entry: Entry, about: About) -> None:
        """Say what an entry's image is; the session opens at the next ``use``. An earlier image's prompts go with
        it.
        """
        if entry.session is not None:
            entry.session.close()
            entry.session = None
        for name in (JOURNAL, VIEWED):
            (entry.folder / name).unlink(missing_ok=True)
        entry.about = about
        write_json(entry.folder / "session.json", asdict(about))

    def get(self, session_id: str) -> Entry:
        """An entry by id, from memory or from disk.

        Raises:
            ApiError: 404 if there is none.
        """
        if session_id in self._entries:
            return self._entries[session_id]
        folder = self.folder / session_id
        if not _ID.fullmatch(session_id) or not folder.is_dir():
            raise ApiError(404, f"there is no session {session_id[:40]!r}; GET /api/sessions lists them")
        return self._entries.setdefault(session_id, Entry(session_id, folder, read_about(folder)))

    def stored(self) -> list[str]:
        """The ids of all sessions, awake or not."""
        return [entry.name for entry in os.scandir(self.folder) if _ID.fullmatch(entry.name)]

    async def use(
        self, entry: Entry, job: Callable[[Session], T], gone: Gone | None = None, revision: int | None = None
    ) -> T:
        """Wait for the session's turn, wake it if it sleeps, and run a job on it.

        Args:
            entry: Of ``get``.
            job: Called with the session on the worker thread.
            gone: Whether the client has gone; then a job that has not started is dropped.
            revision: What the client last saw; a session that has changed since is not touched.

        Raises:
            ApiError: 409 if the revision is an older one or there is no image yet, 503 when there is no room, and what
            ``job`` raises.
        """
        entry = self._entries.setdefault(entry.id, entry)  # one entry per id, so that no journal has two writers
        entry.used = entry.seen = time.monotonic()
        async with entry.reading:
            about = entry.about
            if entry.session is None and entry.image is None and about is not None:
                entry.image = await asyncio.to_thread(
                    read_volume, about.image, channel=about.channel, series=about.series
                )

        def with_session() -> T:
            session = self._awake(entry)
            if revision is not None and revision != entry.revision:
                raise ApiError(
                    409, f"the session changed elsewhere (revision {entry.revision}, got {revision}); read it again"
                )
            try:
                return job(session)
            finally:
                entry.used = entry.seen = time.monotonic()

        try:
            return await self.queue.run(entry.id, with_session, gone)
        finally:
            if self.queue.depth(entry.id) == 0:
                entry.image = None

    def delete(self, entry: Entry) -> None:
        """Forget a session and its files."""
        self.sleep(entry)
        self._entries.pop(entry.id, None)
        shutil.rmtree(entry.folder, ignore_errors=True)

    def expire(self) -> list[str]:
        """Put every session to sleep that nobody uses; nothing is lost by it.

        Returns:
            Their ids.
        """
        now, asleep = time.monotonic(), []
        for entry in list(self._entries.values()):
            idle = now - entry.used > self.limits.idle_seconds
            silent = (
                entry.about is not None
                and entry.about.kind != "rest"
                and now - entry.seen > self.limits.liveness_seconds
            )
            if (idle or silent) and self.queue.depth(entry.id) == 0 and not entry.reading.locked():
                if entry.session is not None:
                    asleep.append(entry.id)
                    self.queue.submit(entry.id, lambda entry=entry: self._sleep_if_unused(entry))  # type: ignore[misc]
                else:
                    self._entries.pop(entry.id, None)  # its folder brings it back
        return asleep

    def close(self) -> None:
        """Let the running job end, refuse the rest, close every session."""
        self.queue.close()
        for entry in self._entries.values():
            if entry.session is not None:
                entry.session.close()
                entry.session = None
        self._lock.close()

    def awake(self) -> list[Entry]:
        """Entries whose session is in memory."""
        return [entry for entry in self._entries.values() if entry.session is not None]

    def model(self, name: str) -> PromptableModel:
        """A model by name, loaded once; on the worker thread only."""
        if name not in self._models:
            self._models[name] = self._load(name)
        return self._models[name]

    def _awake(self, entry: Entry) -> Session:
        if entry.session is not None:
            return entry.session
        if not entry.folder.is_dir():
            self._entries.pop(entry.id, None)
            raise ApiError(404, "the session was deleted")
        about = entry.about
        if about is None:
            raise ApiError(409, "the session has no image yet; send one first")
        self._make_room(entry)
        image = entry.image or about.image
        entry.session = Session.open(
            image, self.model(about.model), self.device, about.channel, about.series, entry.folder / JOURNAL
        )
        entry.image = None
        return entry.session

    def _check_room(self) -> None:
        """That a session could be opened now, without touching any."""
        if len(self.awake()) >= self.limits.awake and self._replaceable(None) is None:
            raise _full(self.limits.awake)

    def _make_room(self, new: Entry) -> None:
        while len(self.awake()) >= self.limits.awake:
            unused = self._replaceable(new)
            if unused is None:
                raise _full(self.limits.awake)
            self.sleep(unused)

    def _replaceable(self, new: Entry | None) -> Entry | None:
        """The awake session that was used longest ago, if it is in nobody's hands."""
        since = time.monotonic() - self.limits.busy_seconds
        unused = [e for e in self.awake() if e is not new and e.used < since and self.queue.depth(e.id) == 0]
        return min(unused, key=lambda e: e.used, default=None)

    def _sleep_if_unused(self, entry: Entry) -> None:
        if self.queue.depth(entry.id) <= 1:  # this job alone
            self.sleep(entry)

    def sleep(self, entry: Entry) -> None:
        """Free a session's memory; on the worker thread only."""
        if entry.session is not None:
            entry.session.close()
            entry.session = None
            logger.info("session %s sleeps; its journal brings it back", entry.id[:6])


def _full(awake: int) -> ApiError:
    return ApiError(503, f"all {awake} places are in use; try again in a moment", retry_after=10)
