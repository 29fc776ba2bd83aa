"""Cases spread over processes, each finished piece a file of its own: a run that was killed goes on where it stopped.

The numbers do not depend on how many processes there are, for every structure, seed and way has its own generator; but
torch rounds otherwise with other numbers of threads, which processes share. Read ``measuring.py`` for
what a piece is.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from samed3d.errors import InputError
from samed3d.evaluation.cases import LabelledCase, Loaded
from samed3d.evaluation.measuring import Ask, measure
from samed3d.evaluation.methods import Method, method_of
from samed3d.evaluation.protocols import protocol_of
from samed3d.evaluation.results import Row
from samed3d.volume.label_maps import EmptyLabelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A whole run.

    Attributes:
        cases: In the order of the results.
        methods: In the order of the results.
        names: What the methods were made from, to make them again in another process.
        protocols: Names.
        pairs: Which method is measured under which protocol, by name.
        ask: How often and how much.
        parts: Folder of the pieces.
        device: Of networks.
    """

    cases: tuple[LabelledCase, ...]
    methods: tuple[Method, ...] = field(repr=False)
    names: tuple[str | Method, ...] = field(repr=False)
    protocols: tuple[str, ...]
    pairs: frozenset[tuple[str, str]]
    ask: Ask
    parts: Path
    device: str = "cpu"

    def pieces(self, number: int) -> Iterator[tuple[int, str, Path]]:
        """(method, protocol, file) of the ``number``-th case."""
        case = self.cases[number]
        safe = re.sub(r"[^\w.-]", "_", f"{case.source}.{case.case}")[:80]
        for method, one in enumerate(self.methods):
            for protocol in [p for p in self.protocols if (one.name, p) in self.pairs]:
                yield method, protocol, self.parts / f"{number:05d}.{safe}.{method}.{protocol}.json"

    def part_files(self) -> list[Path]:
        """Every piece by model, protocol and case: the order of ``cases.csv``."""
        found = [
            (method, protocol, n, path) for n in range(len(self.cases)) for method, protocol, path in self.pieces(n)
        ]
        return [path for *_, path in sorted(found, key=lambda f: (f[0], self.protocols.index(f[1]), f[2]))]

    def pending(self) -> list[int]:
        """Cases of which a piece is missing."""
        return [n for n in range(len(self.cases)) if not all(path.exists() for *_, path in self.pieces(n))]


def measure_cases(job: Job, processes: int, progress: bool) -> None:
    """Measure every case that is not finished.

    Raises:
        InputError: if a case or an answer cannot be used; finished pieces stay.
    """
    pending = job.pending()
    if len(pending) < len(job.cases):
        logger.info("%d of %d cases were measured before", len(job.cases) - len(pending), len(job.cases))
    if processes == 1 or len(pending) <= 1:
        for number in _shown(pending, len(pending), progress):
            _measure_case(job, number)
        return
    if any(not isinstance(name, str) for name in job.names):
        raise InputError(
            f"models given as objects are measured in one process, got processes={processes}; save them to a file, or use 1"
        )
    context = multiprocessing.get_context("spawn")
    processes = min(processes, len(pending))
    threads = max(1, torch.get_num_threads() // processes)
    bare = replace(job, methods=())
    with ProcessPoolExecutor(processes, context, _begin, (bare, threads, context.Value("i", 0))) as pool:
        futures = [pool.submit(_measure_here, number) for number in pending]
        try:
            for future in _shown(as_completed(futures), len(futures), progress):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_WORKER: dict[str, Job] = {}
"""The job of a worker process, with methods of its own."""


def _begin(job: Job, threads: int, counter: Any) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    if job.device.startswith("cuda"):
        with counter.get_lock():
            rank, counter.value = counter.value, counter.value + 1
        torch.cuda.set_device(rank % torch.cuda.device_count())
    methods = tuple(method_of(name, job.device) for name in job.names if isinstance(name, str))
    _WORKER["job"] = replace(job, methods=methods)


def end_with_parent() -> None:
    """End this worker when the process that started it is gone: one that was killed cannot say so, and its workers
    would wait for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _measure_here(number: int) -> None:
    _measure_case(_WORKER["job"], number)


def _measure_case(job: Job, number: int) -> None:
    case = job.cases[number]
    loaded: Loaded | None = None
    for method, protocol, path in job.pieces(number):
        if path.exists():
            continue
        if loaded is None:
            try:
                loaded = case.loaded()
            except EmptyLabelError as error:
                logger.warning("passed over %s: %s", case.case, error)
                loaded = None
        part: dict[str, Any] = {"rows": [], "lines": []}
        if loaded is not None:
            found = measure(case, job.methods[method], protocol_of(protocol), job.ask, loaded)
            part = {"rows": [_without_nan(row) for row in found.rows], "lines": found.lines}
        partial = path.with_name(f".{path.name}.{os.getpid()}.part")
        partial.write_text(json.dumps(part), encoding="utf-8")
        os.replace(partial, path)


def _without_nan(row: Row) -> Row:
    """nan says "does not apply", which is an empty cell."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def _shown(items: Iterable[Any], total: int, progress: bool) -> Iterable[Any]:
    if not progress:
        return items
    from rich.progress import track

    return track(items, description="measuring", total=total)
