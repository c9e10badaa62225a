"""What the ledger knows after the server was killed, and what it does while the database is away."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from benchmarks.server_load import Target

Start = Callable[..., AbstractContextManager[Any]]
STREAMS = 8


@dataclass
class Delivered:
    """What a client has in its hands: tokens, those of its last chunk, and whether it got everything."""

    tokens: int = 0
    last_chunk: int = 0
    whole: bool = False


async def _client(target: Target, delivered: dict[str, Delivered], until: asyncio.Event) -> None:
    """One stream after the other; a chunk's log-probabilities tell how many tokens it has."""
    body = {"model": "gpt-j", "prompt": "Once upon a time", "max_tokens": 40, "stream": True, "logprobs": 0}
    raw = target.request("POST", "/v1/completions", {**body, "ignore_eos": True})
    while not until.is_set():
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(target.host, target.port)
            try:
                writer.write(raw)
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                request_id = head.partition("x-request-id: ")[2].partition("\r\n")[0]
                one = delivered[request_id] = Delivered()
                async for line in reader:
                    if line.startswith(b"data: [DONE]"):
                        one.whole = True
                        break
                    if line.startswith(b"data: {"):
                        one.last_chunk = sum(
                            len(choice["logprobs"]["tokens"])
                            for choice in json.loads(line[6:])["choices"]
                            if choice["logprobs"]
                        )
                        one.tokens += one.last_chunk
            finally:
                writer.close()


async def _load_and_kill(serving: Any, after_s: float) -> dict[str, Delivered]:
    delivered: dict[str, Delivered] = {}
    until = asyncio.Event()
    clients = [asyncio.create_task(_client(Target.of(serving.url), delivered, until)) for _ in range(STREAMS)]
    await asyncio.sleep(after_s)
    serving.process.send_signal(signal.SIGKILL)
    until.set()
    await asyncio.gather(*clients)
    serving.process.wait()
    return delivered


def _ledger(home: Path) -> dict[str, tuple[int, str]]:
    database = home / "data" / "bluejay" / "bluejay.db"
    if not database.exists():
        return {}
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute("select request_id, generated_tokens, outcome from usage").fetchall()
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: (row[1], row[2]) for row in rows}


def _wait_for_ledger(home: Path, wanted: set[str]) -> dict[str, tuple[int, str]]:
    until = time.monotonic() + 60
    while not wanted <= (found := _ledger(home)).keys() and time.monotonic() < until:
        time.sleep(0.2)
    return found


def _kill_again_and_again(start_server: Start, home: Path, times: int) -> None:
    random_ = random.Random(5)
    delivered: dict[str, Delivered] = {}
    for _ in range(times):
        with start_server("--grpc-port", "-1", home=home) as serving:
            delivered |= asyncio.run(_load_and_kill(serving, random_.uniform(0.5, 2.0)))
    with start_server("--grpc-port", "-1", home=home):
        found = _wait_for_ledger(home, set(delivered))
    assert len(delivered) > 2 * times
    assert set(delivered) <= set(found)
    more = {name: found[name][0] - one.tokens for name, one in delivered.items()}
    # Whole answers are in it to the token. Of those that were cut, what a client has is in it too; a killed server may
    # have written one record more than it could still send, which is the one that was in flight.
    wrong = {name: (one, found[name]) for name, one in delivered.items() if one.whole and more[name]}
    assert not wrong
    assert min(more.values()) >= 0
    records = [name for name, tokens in more.items() if tokens]
    assert len(records) <= times, {name: (delivered[name], found[name]) for name in records}
    assert all(found[name][1] in ("lost", "cancelled", "completed") for name in delivered)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_a_killed_server_has_written_down_what_it_delivered(start_server: Start, home: Path) -> None:
    _kill_again_and_again(start_server, home, 2)


@pytest.mark.slow
def test_a_server_killed_fifty_times_has_written_down_what_it_delivered(start_server: Start, home: Path) -> None:
    _kill_again_and_again(start_server, home, 50)


def test_a_database_that_is_away_loses_nothing_and_stops_nobody(start_server: Start, home: Path) -> None:
    body = {"instances": ["Once upon a time"], "parameters": {"max_length": 12, "min_length": 12}}
    database = home / "data" / "bluejay" / "bluejay.db"
    with start_server("--grpc-port", "-1", home=home) as serving, serving.client() as http:
        with closing(sqlite3.connect(database, isolation_level=None)) as lock:
            lock.execute("begin exclusive")  # nobody else writes or reads while this lasts
            answers = [http.post("/v1/models/gpt-j:predict", json=body) for _ in range(20)]
            time.sleep(3)
            assert "bluejay_usage_pending 20.0" in http.get("/metrics").text
            lock.execute("rollback")
        assert {answer.status_code for answer in answers} == {200}
        found = _wait_for_ledger(home, {answer.headers["x-request-id"] for answer in answers})
    assert {answer.headers["x-request-id"] for answer in answers} == set(found)
    assert {outcome for _, outcome in found.values()} == {"completed"}
