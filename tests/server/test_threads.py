"""Threads with a bounded queue."""

from __future__ import annotations

import asyncio
import threading

import pytest

from bluejay.errors import Overloaded
from bluejay.server.threads import Threads


def test_beyond_what_may_wait_whoever_comes_is_sent_away_and_room_comes_back() -> None:
    threads, go = Threads("the work", 1, max_open=10), threading.Event()

    async def scenario() -> None:
        first = asyncio.create_task(threads.run(go.wait, 30, size=6))
        await asyncio.sleep(0)
        second = asyncio.create_task(threads.run(lambda: "done", size=4))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="too much waits for the work") as refused:
            await threads.run(lambda: None)
        assert refused.value.retry_after_s > 0
        second.cancel()  # who goes makes room: it had not begun
        await asyncio.wait([second])
        third = asyncio.create_task(threads.run(lambda: "done", size=4))
        await asyncio.sleep(0)
        go.set()
        assert await first and await third == "done"
        async with asyncio.timeout(20):
            while threads._open:
                await asyncio.sleep(0.001)
        assert await threads.run(lambda: "alone", size=1000) == "alone"

    asyncio.run(scenario())


def test_work_that_hangs_is_left_and_counts_until_it_ends() -> None:
    threads, go = Threads("the work", 1, max_open=1), threading.Event()

    async def scenario() -> None:
        with pytest.raises(TimeoutError):
            await threads.run(go.wait, 30, within_s=0.01)
        with pytest.raises(Overloaded):
            await threads.run(lambda: None)
        go.set()

    asyncio.run(scenario())
