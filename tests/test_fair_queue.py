"""The queue of predictions: sessions take turns, and every waiting request is answered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from starlette.exceptions import HTTPException

from samed3d.apps.server.fair_queue import FairQueue


def with_queue(scenario: Callable[[FairQueue, threading.Event, Callable], Coroutine], longest: int = 64) -> None:
    """Run a scenario on a queue whose worker is busy until the gate is opened; ``later`` submits a job."""

    async def run() -> None:
        queue, gate = FairQueue(longest), threading.Event()

        async def later(session_id: str, job: Callable[[], Any]) -> asyncio.Task:
            task = asyncio.create_task(queue.run(session_id, job))
            await asyncio.sleep(0.02)
            return task

        await later("first", lambda: gate.wait(5))
        await scenario(queue, gate, later)
        gate.set()
        await queue.close()

    asyncio.run(run())


def test_sessions_take_turns():
    order = []

    async def scenario(queue, gate, later):
        jobs = [await later(line, lambda line=line: order.append(line)) for line in "aabac"]
        assert queue.depth() == 6 and queue.depth("a") == 3
        gate.set()
        await asyncio.gather(*jobs)
        assert queue.depth() == 0
        await queue.close()
        with pytest.raises(HTTPException, match="stopping"):
            await queue.run("a", gate.wait)

    with_queue(scenario)
    assert order == ["a", "b", "c", "a", "a"]


def test_the_job_of_a_client_that_is_gone_is_dropped():
    done = []

    async def gone() -> bool:
        return True

    async def scenario(queue, gate, later):
        dropped = asyncio.create_task(queue.run("b", lambda: done.append(1), gone))
        kept = await later("b", lambda: done.append(2))
        gate.set()
        await kept
        with pytest.raises(HTTPException, match="closed the connection"):
            await dropped

    with_queue(scenario)
    assert done == [2]


def test_a_cancelled_request_leaves_its_place():
    async def scenario(queue, gate, later):
        first, second = await later("a", lambda: 1), await later("a", lambda: 2)
        first.cancel()
        gate.set()
        assert await second == 2

    with_queue(scenario)


def test_a_line_has_an_end_and_a_failure_reaches_its_asker():
    async def scenario(queue, gate, later):
        waiting = [await later("a", lambda: 1 / 0) for _ in range(2)]
        with pytest.raises(HTTPException, match="already has 2"):
            await queue.run("a", gate.wait)
        other = await later("b", lambda: "b")
        gate.set()
        for job in waiting:
            with pytest.raises(ZeroDivisionError):
                await job
        assert await other == "b"

    with_queue(scenario, longest=2)


def test_jobs_that_wait_when_the_server_stops_are_told():
    async def scenario(queue, gate, later):
        waiting = [await later("a", lambda: "not run"), await later("b", lambda: "not run")]
        closing = asyncio.create_task(queue.close())
        await asyncio.sleep(0.05)
        gate.set()
        await closing
        for job in waiting:
            with pytest.raises(HTTPException, match="was not carried out"):
                await job

    with_queue(scenario)
