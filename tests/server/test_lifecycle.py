"""From a signal to the end: no request is lost, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from benchmarks.server_load import Connection, Reply, Target, fetch

Start = Callable[..., AbstractContextManager[Any]]

POLL_S = 0.05
LONG = {
    "instances": ["Once upon a time"],
    "parameters": {"max_length": 1000, "min_length": 1000, "num_return_sequences": 16},
}


class Balancer:
    """Sends requests to whichever replica says that it is ready, as a load balancer with readiness probes does."""

    def __init__(self, clients: int) -> None:
        self.replicas: list[Target] = []
        self.done = 0
        self.failed: list[str] = []
        self._clients = clients
        self._ready: set[Target] = set()
        self._ends = threading.Event()

    @contextmanager
    def running(self) -> Iterator[Balancer]:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(asyncio.run, self._run())
            try:
                yield self
            finally:
                self._ends.set()
                running.result()

    async def _run(self) -> None:
        polling = asyncio.create_task(self._poll())
        await asyncio.gather(*(self._client(number) for number in range(self._clients)))
        await polling

    async def _poll(self) -> None:
        while not self._ends.is_set():
            for replica in list(self.replicas):
                try:
                    async with asyncio.timeout(5):
                        reply = await fetch(replica, replica.request("GET", "/readyz"))
                except OSError:
                    reply = Reply()
                (self._ready.add if reply.status == 200 else self._ready.discard)(replica)
            await asyncio.sleep(POLL_S)

    async def _client(self, number: int) -> None:
        connections: dict[Target, Connection] = {}
        while not self._ends.is_set():
            ready = [replica for replica in self.replicas if replica in self._ready]
            if not ready:
                await asyncio.sleep(POLL_S)
                continue
            replica = ready[(number + self.done) % len(ready)]
            try:
                if (connection := connections.get(replica)) is None or connection.lost:
                    connection = connections[replica] = await Connection.to(replica)
                reply = await connection.ask(replica.generation(tokens=8, stream=False))
            except OSError as error:
                reply = Reply(body=repr(error).encode())
            if reply.status == 200 and reply.whole:
                self.done += 1
            else:
                self.failed.append(f"{reply.status} {'whole' if reply.whole else 'cut'} {reply.body[:200]!r}")
            if reply.closes:
                connections.pop(replica).close()
        for connection in connections.values():
            connection.close()


def _roll(start_server: Start, times: int) -> None:
    """Replace one replica after the other under load."""
    balancer = Balancer(clients=6)
    with ExitStack() as stack:
        serving = [stack.enter_context(start_server()) for _ in range(2)]
        balancer.replicas = [Target.of(one.url) for one in serving]
        with balancer.running():
            for _ in range(times):
                _wait_until(lambda: balancer.done > before + 20 or balancer.failed, before := balancer.done)
                old = serving.pop(0)
                assert old.stop() == 0
                balancer.replicas.remove(Target.of(old.url))
                serving.append(stack.enter_context(start_server()))
                balancer.replicas.append(Target.of(serving[-1].url))
            _wait_until(lambda: balancer.done > before + 20 or balancer.failed, before := balancer.done)
    assert not balancer.failed
    assert balancer.done > 20 * times


def _wait_until(holds: Callable[[], Any], _: Any = None, within_s: float = 60) -> None:
    end_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end_s, "it did not come to be"
        time.sleep(0.01)


def test_no_request_fails_while_replicas_are_replaced(start_server: Start) -> None:
    _roll(start_server, 1)


@pytest.mark.slow
def test_no_request_fails_while_replicas_are_replaced_twenty_times(start_server: Start) -> None:
    _roll(start_server, 20)


@contextmanager
def _long_request(serving: Any) -> Iterator[Callable[[], Reply]]:
    """A request that takes minutes, and what comes of it."""
    target = Target.of(serving.url)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(asyncio.run, fetch(target, target.request("POST", "/v1/models/gpt-j:predict", LONG)))
        with serving.client() as http:
            _wait_until(lambda: 'bluejay_engine_running{model="bluejay"} 0.0' not in http.get("/metrics").text)
        yield lambda: asking.result(60)


def test_who_drains_says_so_and_the_deadline_ends_what_is_left(start_server: Start) -> None:
    with start_server("--drain", "1.5") as serving, serving.client() as http, _long_request(serving) as reply:
        assert http.get("/readyz").status_code == 200
        serving.process.send_signal(signal.SIGTERM)
        _wait_until(lambda: http.get("/readyz").status_code == 503)
        live = http.get("/livez")
        assert live.status_code == 200
        assert live.headers["connection"] == "close"
        began_s = time.monotonic()
        assert serving.stop() == 0
        assert time.monotonic() - began_s < 20
        assert (reply().status, reply().whole) == (503, True)
        assert "Traceback" not in serving.log


def test_a_second_signal_ends_it_at_once(start_server: Start) -> None:
    with start_server("--drain", "300") as serving, _long_request(serving) as reply:
        serving.process.send_signal(signal.SIGTERM)
        with serving.client() as http:
            _wait_until(lambda: http.get("/readyz").status_code == 503)
        began_s = time.monotonic()
        assert serving.stop(signal.SIGINT) == 0
        assert time.monotonic() - began_s < 20
        assert (reply().status, reply().whole) == (503, True)


def test_a_server_that_is_killed_leaves_no_worker_and_no_port(start_server: Start) -> None:
    with start_server() as serving, _long_request(serving):
        workers = _children(serving.process.pid)
        assert workers
        os.kill(serving.process.pid, signal.SIGKILL)
        serving.process.wait()
        _wait_until(lambda: not any(_lives(pid) for pid in workers), within_s=10)
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", Target.of(serving.url).port))


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
