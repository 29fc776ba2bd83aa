"""One worker thread for all predictions: the jobs of a session run in order, and the sessions take turns."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.exceptions import HTTPException

T = TypeVar("T")
IsGone = Callable[[], Awaitable[bool]]
"""Whether the client of a request has disconnected."""


class FairQueue:
    """A worker thread and a line of jobs per session. Only the first job of each line waits for the worker, and these
    are served in the order in which they came, so that no session waits for more than one job of each other session.

    Args:
        longest: Jobs that one session may have waiting or running; a further one is refused.
    """

    def __init__(self, longest: int = 64) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="samed3d-predictions")
        self._turn = asyncio.Lock()
        self._lines: dict[str, asyncio.Lock] = {}
        self._depth: Counter[str] = Counter()
        self._longest, self._closed = longest, False

    async def run(self, session_id: str, job: Callable[[], T], gone: IsGone | None = None) -> T:
        """Wait until a job has run on the worker thread, and return its result.

        Args:
            session_id: The session that the job belongs to.
            job: Called on the worker thread.
            gone: Whether the client has disconnected; its job is then dropped when its turn comes.

        Raises:
            HTTPException: 503 when the queue is closed, 429 when the session has too many jobs waiting, 499 when the
                client has disconnected.
        """
        if self._closed:
            raise HTTPException(503, "the server is stopping; try again when it is back", {"Retry-After": "5"})
        if (depth := self._depth[session_id]) >= self._longest:
            message = f"this session already has {depth} requests waiting; wait for their answers"
            raise HTTPException(429, message, {"Retry-After": "1"})
        self._depth[session_id] += 1
        try:
            async with self._lines.setdefault(session_id, asyncio.Lock()), self._turn:
                if gone is not None and await gone():
                    raise HTTPException(499, "the client closed the connection before its turn came")
                if self._closed:
                    message = "the server is stopping; the request was not carried out"
                    raise HTTPException(503, message, {"Retry-After": "5"})
                return await asyncio.get_running_loop().run_in_executor(self._worker, job)
        finally:
            self._depth[session_id] -= 1
            if not self._depth[session_id]:
                del self._depth[session_id], self._lines[session_id]

    def depth(self, session_id: str | None = None) -> int:
        """Number of jobs that wait or run, of one session or of all."""
        return self._depth.total() if session_id is None else self._depth[session_id]

    async def close(self) -> None:
        """Refuse new jobs, answer the waiting ones with 503, and let the running one finish."""
        self._closed = True
        await asyncio.to_thread(self._worker.shutdown)
