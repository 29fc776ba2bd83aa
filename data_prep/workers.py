"""Doing the tasks: one after the other, in processes of this machine (joblib's loky), or on a Dask cluster. Outcomes in
any order.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from data_prep.convert import Outcome, Task, convert
from samed3d.errors import InputError

logger = logging.getLogger(__name__)

_CONNECT_SECONDS = "20s"


def run_tasks(tasks: list[Task], jobs: int, cluster: str | None = None) -> Iterator[Outcome]:
    """Outcomes as they come.

    Args:
        tasks: What to do.
        jobs: Processes on this machine; 1 works in this one.
        cluster: Address of a Dask scheduler, whose workers see the same files under the same paths; ``jobs`` is then
            not used.

    Raises:
        InputError: if the cluster cannot be reached, or a worker process was killed.
    """
    if cluster:
        yield from _on_cluster(tasks, cluster)
    elif jobs == 1 or len(tasks) < 2:
        yield from map(convert, tasks)
    else:
        yield from _in_processes(tasks, jobs)


def _in_processes(tasks: list[Task], jobs: int) -> Iterator[Outcome]:
    try:
        from joblib import Parallel, delayed
        from joblib.externals.loky.process_executor import TerminatedWorkerError
    except ModuleNotFoundError as error:
        raise InputError(
            "more than one process needs joblib: pip install 'samed3d[corpus]', or give --jobs 1"
        ) from error
    # One case at a time to each process (no batches): a case takes seconds, and the bar moves with every one.
    pool: Any = Parallel(
        n_jobs=jobs,
        backend="loky",
        return_as="generator_unordered",
        batch_size=1,
        pre_dispatch="2*n_jobs",
        max_nbytes=None,
    )
    try:
        yield from pool(delayed(convert)(task) for task in tasks)
    except TerminatedWorkerError as error:
        raise InputError(
            f"a worker process was killed, most likely for want of memory ({jobs} at once); give fewer --jobs. Finished cases are kept"
        ) from error


def _on_cluster(tasks: list[Task], address: str) -> Iterator[Outcome]:
    try:
        from distributed import Client, as_completed
    except ModuleNotFoundError as error:
        raise InputError("--cluster needs Dask: pip install 'samed3d[cluster]'") from error
    try:
        client = Client(address, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(
            f"--cluster cannot be reached: {address} ({error}); start one with dask scheduler and dask worker"
        ) from error
    with client:
        waiting = {client.submit(convert, task, pure=False, retries=1): task for task in tasks}
        for future in as_completed(list(waiting)):
            case = waiting.pop(future).case
            failure = future.exception()
            yield (
                future.result()
                if failure is None
                else Outcome(case.source, case.id, case.id, error=f"cluster worker failed: {failure}")
            )
            future.release()
