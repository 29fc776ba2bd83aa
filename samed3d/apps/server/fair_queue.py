"""One worker thread for all predictions: each session has its own queue of jobs, and the queues take turns.

A job whose client has disconnected is removed before it starts; a job that already runs is finished. Needs neither
torch nor FastAPI.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from samed3d.apps.server.security import ApiError

T = TypeVar("T")
Job = tuple["Future[Any]", Callable[[], Any]]
IsGone = Callable[[], Awaitable[bool]]
"""Whether the client of a request has disconnected."""

_CHECK_CLIENT_EVERY_S = 0.2


class FairQueue:
    """A worker thread and one queue of jobs per session.

    Args:
        longest: Jobs that one session may have waiting; a further one is refused.
    """

    def __init__(self, longest: int = 64) -> None:
        self._jobs: OrderedDict[str, deque[Job]] = OrderedDict()
        self._changed = threading.Condition()
        self._running: str | None = None
        self._closed = False
        self._longest = longest
        self._thread = threading.Thread(target=self._work, name="samed3d-predictions", daemon=True)
        self._thread.start()

    def submit(self, session_id: str, job: Callable[[], T]) -> Future[T]:
        """Add a job to the end of a session's queue.

        Raises:
            ApiError: 503 when the queue is closed, 429 when the session has too many jobs waiting.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._closed:
                raise ApiError(503, "the server is stopping; try again when it is back", retry_after=5)
            waiting = self._jobs.setdefault(session_id, deque())
            if len(waiting) >= self._longest:
                message = f"this session already has {len(waiting)} requests waiting; wait for their answers"
                raise ApiError(429, message, retry_after=1)
            waiting.append((future, job))
            self._changed.notify()
        return future

    async def run(self, session_id: str, job: Callable[[], T], gone: IsGone | None = None) -> T:
        """Wait until a job has run on the worker thread, and return its result.

        Args:
            session_id: The session that the job belongs to.
            job: Called on the worker thread.
            gone: Whether the client has disconnected; a job that has not started by then is dropped.

        Raises:
            ApiError: as ``submit``; 499 when the client has disconnected.
        """
        future = self.submit(session_id, job)
        result = asyncio.wrap_future(future)
        try:
            while not (await asyncio.wait({result}, timeout=_CHECK_CLIENT_EVERY_S))[0]:
                if gone is not None and not future.running() and await gone() and future.cancel():
                    raise ApiError(499, "the client closed the connection before its turn came")
        except asyncio.CancelledError:
            future.cancel()
            raise
        return result.result()

    def depth(self, session_id: str | None = None) -> int:
        """Number of jobs that wait or run, of one session or of all."""
        with self._changed:
            queues = self._jobs.values() if session_id is None else [self._jobs.get(session_id, deque())]
            waiting = sum(not future.cancelled() for jobs in queues for future, _ in jobs)
            return waiting + int(self._running is not None and session_id in (None, self._running))

    def close(self, timeout: float = 30.0) -> None:
        """Refuse new jobs, answer the waiting ones with 503, and let the running one finish."""
        with self._changed:
            self._closed = True
            waiting = [future for jobs in self._jobs.values() for future, _ in jobs]
            self._jobs.clear()
            self._changed.notify_all()
        error = ApiError(503, "the server is stopping; the request was not carried out", retry_after=5)
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        self._thread.join(timeout)

    def _next(self) -> Job | None:
        """The first job of the session whose turn it is, which then goes to the end; None when closed."""
        with self._changed:
            self._running = None
            while True:
                while not self._jobs:
                    if self._closed:
                        return None
                    self._changed.wait()
                session_id, jobs = self._jobs.popitem(last=False)
                future, job = jobs.popleft()
                if jobs:
                    self._jobs[session_id] = jobs
                if future.set_running_or_notify_cancel():
                    self._running = session_id
                    return future, job

    def _work(self) -> None:
        while (taken := self._next()) is not None:
            future, job = taken
            try:
                future.set_result(job())
            except BaseException as error:  # every error belongs to the request that submitted the job
                future.set_exception(error)
            del taken, future, job  # the last job must not keep its session in memory
