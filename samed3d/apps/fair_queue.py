"""One worker for all predictions, fair across sessions: each session waits in its own line and the lines take turns.

A job whose client has gone is taken out of its line before it starts; one that runs is finished. Not here: what a job
does (``sessions.py``). Needs neither torch nor FastAPI.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from samed3d.apps.protocol import ApiError

logger = logging.getLogger(__name__)

T = TypeVar("T")
_LOOK_EVERY_S = 0.2
"""How often a waiting request looks whether its client is still there."""

Job = tuple["Future[Any]", Callable[[], Any]]


class FairQueue:
    """A worker thread and one line of jobs per session.

    Args:
        longest_line: Jobs that one session may have waiting; a further one is refused.
    """

    def __init__(self, longest_line: int = 64) -> None:
        self._lines: OrderedDict[str, deque[Job]] = OrderedDict()
        self._ready = threading.Condition()
        self._running: str | None = None
        self._closed = False
        self._longest = longest_line
        self._thread = threading.Thread(target=self._work, name="samed3d-predictions", daemon=True)
        self._thread.start()

    def submit(self, line: str, job: Callable[[], T]) -> Future[T]:
        """Put a job at the end of a session's line.

        Raises:
            ApiError: 503 when the queue is closed, 429 when the line is too long.
        """
        future: Future[T] = Future()
        with self._ready:
            if self._closed:
                raise ApiError(503, "the server is stopping; try again when it is back", retry_after=5)
            waiting = self._lines.setdefault(line, deque())
            if len(waiting) >= self._longest:
                raise ApiError(
                    429,
                    f"this session already has {len(waiting)} requests waiting; wait for their answers",
                    retry_after=1,
                )
            waiting.append((future, job))
            self._ready.notify()
        return future

    async def run(self, line: str, job: Callable[[], T], gone: Callable[[], Awaitable[bool]] | None = None) -> T:
        """Wait for a job's turn and its result.

        Args:
            line: The session it belongs to.
            job: Run on the worker thread.
            gone: Says whether the client has gone; a job that has not started by then is dropped.

        Raises:
            ApiError: as ``submit``; 499 when the client has gone.
        """
        future = self.submit(line, job)
        result = asyncio.wrap_future(future)
        try:
            while not (await asyncio.wait({result}, timeout=_LOOK_EVERY_S))[0]:
                if gone is not None and not future.running() and await gone() and future.cancel():
                    raise ApiError(499, "the client closed the connection before its turn came")
        except asyncio.CancelledError:
            future.cancel()
            raise
        return result.result()

    def depth(self, line: str | None = None) -> int:
        """Jobs waiting or running, of one session or of all."""
        with self._ready:
            lines = list(self._lines.items()) if line is None else [(line, self._lines.get(line, deque()))]
            waiting = sum(1 for _, jobs in lines for future, _ in jobs if not future.cancelled())
            return waiting + int(self._running is not None and line in (None, self._running))

    def close(self, timeout: float = 30.0) -> None:
        """Refuse new jobs, answer the waiting ones with 503, and let the running one end."""
        with self._ready:
            self._closed = True
            waiting = [future for jobs in self._lines.values() for future, _ in jobs]
            self._lines.clear()
            self._ready.notify_all()
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(
                    ApiError(503, "the server is stopping; the request was not carried out", retry_after=5)
                )
        self._thread.join(timeout)

    def _next(self) -> Job | None:
        """The first job of the line whose turn it is; that line goes to the end. None when closed."""
        with self._ready:
            self._running = None
            while True:
                while not self._lines:
                    if self._closed:
                        return None
                    self._ready.wait()
                line, jobs = self._lines.popitem(last=False)
                future, job = jobs.popleft()
                if jobs:
                    self._lines[line] = jobs
                if future.set_running_or_notify_cancel():
                    self._running = line
                    return future, job

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            future, job = taken
            try:
                future.set_result(job())
            except BaseException as error:  # whatever it was, it belongs to the request that asked
                future.set_exception(error)
            del taken, future, job  # a session must not be kept alive by the last job that touched it
