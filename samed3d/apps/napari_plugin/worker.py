"""One thread beside the window that does the session's jobs in their order, and tells their end in the window's own
thread.

Used by ``widget.py``; what a runner is, is said in ``controller.py``. Read ``widget.py`` next.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from qtpy.QtCore import QObject, Signal


class Worker(QObject):
    """A runner for ``Controller``; call it as one.

    Attributes:
        busy_changed: Signal with the number of jobs that are not done yet.
    """

    busy_changed = Signal(int)
    _ended = Signal(object)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="samed3d")
        self._waiting = 0
        self._ended.connect(self._tell)  # across threads Qt queues it

    def __call__(
        self, job: Callable[[], Any], done: Callable[[Any], None], failed: Callable[[Exception], None]
    ) -> None:
        """Queue a job."""
        self._waiting += 1
        self.busy_changed.emit(self._waiting)
        self._pool.submit(self._do, job, done, failed)

    @property
    def waiting(self) -> int:
        """Jobs whose end was not told yet."""
        return self._waiting

    def stop(self) -> None:
        """Finish what was begun, drop what waits."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _do(self, job: Callable[[], Any], done: Callable[[Any], None], failed: Callable[[Exception], None]) -> None:
        try:
            result = job()
        except Exception as error:
            caught = error
            self._ended.emit(lambda: failed(caught))
            return
        self._ended.emit(lambda: done(result))

    def _tell(self, call: Callable[[], None]) -> None:
        self._waiting -= 1
        try:
            call()
        finally:
            self.busy_changed.emit(self._waiting)
