"""Clients that go, at every stage, and clients that take their time: nothing is held for them, nobody else suffers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from benchmarks.server_load import HELD, Target, disconnects, held, metrics, num_files, slow

BUSY_MACHINE_S = 10.0  # the server forgets them within a second; a machine that does other things may take longer


async def _until_nothing_is_held(target: Target, pid: int, num_files_before: int, within_s: float) -> None:
    end_s = time.monotonic() + within_s
    while True:
        left, files = await held(target), num_files(pid)
        if not left and files <= num_files_before:
            return
        assert time.monotonic() < end_s, f"{left}; {files} files are open, {num_files_before} were"
        await asyncio.sleep(0.1)


async def _go_and_look(server: Any, clients: int, within_s: float) -> None:
    target, pid = Target.of(server.url), server.process.pid
    assert set(HELD) <= set(await metrics(target)) | {"bluejay_requests_running"}
    await disconnects(target, clients=8, stream=True)  # what is opened once and kept
    await _until_nothing_is_held(target, pid, 10_000, BUSY_MACHINE_S)
    before = num_files(pid)
    await disconnects(target, clients=clients, stream=True)
    await _until_nothing_is_held(target, pid, before, within_s)


def test_nothing_is_held_for_clients_that_went(server: Any) -> None:
    asyncio.run(_go_and_look(server, 120, BUSY_MACHINE_S))


@pytest.mark.slow
def test_nothing_is_held_for_two_thousand_clients_that_went(
    start_server: Callable[..., AbstractContextManager[Any]],
) -> None:
    with start_server("--max-running", "8") as serving:
        asyncio.run(_go_and_look(serving, 2000, 1.5))


def test_slow_clients_are_closed_and_others_are_served(server: Any) -> None:
    found = asyncio.run(slow(Target.of(server.url), clients=30, seconds=12))
    assert (found.closed, found.still_open) == (30, 0), found
    assert found.others > 3, found
    assert found.others_failed == 0, found


@pytest.mark.slow
def test_two_hundred_slow_clients_are_closed_within_ten_seconds(server: Any) -> None:
    found = asyncio.run(slow(Target.of(server.url), clients=200, seconds=12))
    assert (found.closed, found.still_open, found.others_failed) == (200, 0, 0), found
    assert found.longest_s <= 10, found
