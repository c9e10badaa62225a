"""Many more clients than places: each is answered in full or told when to come again, and the server stays awake."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from benchmarks.server_load import Overload, Target, held, overload

Start = Callable[..., AbstractContextManager[Any]]


def _load(serving: Any, seconds: float, ramp_s: float) -> Overload:
    async def load() -> Overload:
        target = Target.of(serving.url)
        found = await overload(
            target,
            clients=1000,
            seconds=seconds,
            tokens=32,
            stream=True,
            pid=serving.process.pid,
            ramp_s=ramp_s,
        )
        assert not await held(target)
        return found

    found = asyncio.run(load())
    assert not found.wrong, found
    assert found.full > 8, found
    assert found.sent_away > 100, found
    settled = found.memory_mib[len(found.memory_mib) // 3 :]
    assert max(settled) - min(settled) < 50, found
    return found


def test_a_thousand_clients_at_eight_places(start_server: Start) -> None:
    with start_server("--max-running", "8", "--max-queue", "64") as serving:
        found = _load(serving, 10, 2)
        assert found.probes["/livez"]["p50_ms"] < 250, found  # the machine that tests run on may be busy itself


@pytest.mark.slow
def test_a_thousand_clients_for_a_minute(start_server: Start) -> None:
    with start_server("--max-running", "8", "--max-queue", "64") as serving:
        found = _load(serving, 60, 5)
    print(found)
    assert found.refused_p99_ms <= 100, found
    assert found.probes["/livez"]["p99_ms"] <= 25, found
    assert found.probes["/readyz"]["p99_ms"] <= 50, found
