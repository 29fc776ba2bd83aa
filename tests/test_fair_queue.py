"""The queue of predictions: sessions take turns, and every waiting request is answered."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from samed3d.apps.server.fair_queue import FairQueue
from samed3d.apps.server.security import ApiError


def test_sessions_take_turns():
    queue, order, gate = FairQueue(), [], threading.Event()
    queue.submit("first", gate.wait)
    time.sleep(0.05)
    jobs = [queue.submit(line, lambda line=line, n=n: order.append((line, n))) for line in "aab" for n in [len(order)]]
    jobs += [queue.submit("a", lambda: order.append(("a", 9))), queue.submit("c", lambda: order.append(("c", 0)))]
    assert queue.depth() == 6 and queue.depth("a") == 3
    gate.set()
    for job in jobs:
        job.result(5)
    assert [line for line, _ in order] == ["a", "b", "c", "a", "a"]
    queue.close()
    with pytest.raises(ApiError, match="stopping"):
        queue.submit("a", gate.wait)


def test_a_client_that_is_gone_waits_no_longer():
    queue, gate, done = FairQueue(), threading.Event(), []

    async def gone() -> bool:
        return True

    async def scenario() -> None:
        first = queue.submit("a", gate.wait)
        with pytest.raises(ApiError, match="closed the connection"):
            await queue.run("b", lambda: done.append(1), gone)
        gate.set()
        await asyncio.wrap_future(first)
        await queue.run("b", lambda: done.append(2), gone)

    asyncio.run(scenario())
    assert done == [2]
    queue.close()


def test_a_line_has_an_end_and_a_failure_reaches_its_asker():
    queue, gate = FairQueue(longest=2), threading.Event()
    queue.submit("a", gate.wait)
    time.sleep(0.05)
    waiting = [queue.submit("a", lambda: 1 / 0) for _ in range(2)]
    with pytest.raises(ApiError, match="already has 2"):
        queue.submit("a", gate.wait)
    queue.submit("b", gate.wait)
    gate.set()
    for job in waiting:
        with pytest.raises(ZeroDivisionError):
            job.result(5)
    queue.close()


def test_jobs_that_wait_when_the_server_stops_are_told():
    queue, gate = FairQueue(), threading.Event()
    running = queue.submit("a", gate.wait)
    time.sleep(0.05)
    waiting = queue.submit("b", gate.wait)
    threading.Timer(0.1, gate.set).start()
    queue.close()
    assert running.result(1)
    with pytest.raises(ApiError, match="was not carried out"):
        waiting.result(1)
