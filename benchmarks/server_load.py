"""Load and rough treatment for a running server, and what it makes of them.

    python -m benchmarks.server_load overload --url http://127.0.0.1:8000 --clients 1000 --seconds 60 --stream
    python -m benchmarks.server_load disconnects --url … --clients 2000
    python -m benchmarks.server_load slow --url … --clients 200

Each prints its figures as JSON. One process and one thread, with connections as cheap as asyncio has them, so that two
processors are left to the server; the latency of /livez and /readyz is measured by a process of its own. A server with
keys is sent the one in BLUEJAY_KEY.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.contest import ROOT

WORDS = ["Once", "upon", "a", "time", "a", "small", "bird", "sat", "on", "the", "roof", "and", "looked", "for"]
DRIP_S = 0.5  # between two bytes of a slow client
PROBE_S = 0.05


@dataclass(frozen=True)
class Target:
    """A server's address."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Target:
        """From http://HOST:PORT."""
        parts = urlsplit(url)
        return cls(parts.hostname or "127.0.0.1", parts.port or 80)

    def request(self, method: str, path: str, body: Any = None, *, close: bool = False) -> bytes:
        """The bytes of a request."""
        data = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", f"Host: localhost:{self.port}", f"Content-Length: {len(data)}"]
        if key := os.environ.get("BLUEJAY_KEY"):
            lines.append(f"Authorization: Bearer {key}")
        if close:
            lines.append("Connection: close")
        return "\r\n".join((*lines, "", "")).encode() + data

    def generation(self, *, tokens: int, stream: bool, model: str = "gpt-j", close: bool = False) -> bytes:
        """A request that makes a model write."""
        prompt = " ".join(random.choices(WORDS, k=8))
        if stream:
            body = {"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True}
            return self.request("POST", "/v1/completions", body, close=close)
        options = {"max_new_tokens": tokens, "max_length": None, "min_new_tokens": tokens, "min_length": None}
        return self.request(
            "POST", f"/v1/models/{model}:predict", {"instances": [prompt], "parameters": options}, close=close
        )


@dataclass
class Reply:
    """What came back.

    Attributes:
        status: 0 where there was none.
        whole: all of it came.
        first_s, total_s: from the request to the first byte and to the last.
        closes: the server takes no further request on this connection.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False
    first_s: float = 0.0
    total_s: float = 0.0
    closes: bool = False


class Connection(asyncio.Protocol):
    """A client's end: one request at a time."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.lost = False
        self._data = bytearray()
        self._began_s = 0.0
        self._reply = Reply()
        self._done: asyncio.Future[Reply] | None = None

    @classmethod
    async def to(cls, target: Target) -> Connection:
        """Connect. Raises: OSError."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, target.host, target.port)
        return connection

    def connection_made(self, transport: Any) -> None:
        """Asyncio's."""
        self.transport = transport

    async def ask(self, raw: bytes) -> Reply:
        """Send a request and wait for its answer, or for the connection's end."""
        self._data, self._reply, self._began_s = bytearray(), Reply(), time.perf_counter()
        self._done = asyncio.get_running_loop().create_future()
        if self.lost:
            return self._reply
        self.transport.write(raw)
        return await self._done

    def data_received(self, data: bytes) -> None:
        """Asyncio's."""
        reply = self._reply
        if not reply.first_s:
            reply.first_s = time.perf_counter() - self._began_s
        self._data += data
        if not reply.status and (end := self._data.find(b"\r\n\r\n")) >= 0:
            first, *lines = self._data[:end].decode("latin-1").split("\r\n")
            reply.status = int(first.split()[1])
            reply.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            reply.closes = reply.headers.get("connection") == "close"
            del self._data[: end + 4]
        if reply.status and self._is_whole():
            reply.whole, reply.body = True, bytes(self._data)
            self._end()

    def _is_whole(self) -> bool:
        length = self._reply.headers.get("content-length")
        return len(self._data) >= int(length) if length is not None else self._data.endswith(b"0\r\n\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio's."""
        self.lost = True
        self._end()

    def _end(self) -> None:
        self._reply.total_s = time.perf_counter() - self._began_s
        if self._done is not None and not self._done.done():
            self._done.set_result(self._reply)

    def close(self) -> None:
        """Go, without a word."""
        self.transport.abort()


async def fetch(target: Target, raw: bytes) -> Reply:
    """One request on a connection of its own. Raises: OSError."""
    connection = await Connection.to(target)
    try:
        return await connection.ask(raw)
    finally:
        connection.close()


async def metrics(target: Target) -> dict[str, float]:
    """What the server counts; values of the same name are added."""
    reply = await fetch(target, target.request("GET", "/metrics"))
    found: defaultdict[str, float] = defaultdict(float)
    for line in reply.body.decode().splitlines():
        if match := re.match(r"([a-z_]+)(?:\{.*\})? (\S+)$", line):
            found[match[1]] += float(match[2])
    return dict(found)


HELD = (
    "bluejay_engine_running",
    "bluejay_engine_waiting",
    "bluejay_engine_held_blocks",
    "bluejay_model_sequences",
    "bluejay_requests_running",
)


async def held(target: Target) -> dict[str, float]:
    """What the server holds for requests, where it is not nothing."""
    counts = await metrics(target)
    return {name: counts[name] for name in HELD if counts.get(name)}


def memory_bytes(pid: int) -> int:
    """A process's own memory, files that it maps left aside."""
    with Path(f"/proc/{pid}/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def num_files(pid: int) -> int:
    """Its open files and connections."""
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def percentile(values: Sequence[float], share: float) -> float:
    """The value that a share of all are not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


@dataclass
class Overload:
    """What became of many clients at few places.

    Attributes:
        full, sent_away: answers, and words to come again.
        wrong: everything else, by what it was.
        refused_p99_ms: from a request to the word to come again.
        memory_mib: of the server, at times in equal distances.
    """

    full: int = 0
    sent_away: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    refused_p50_ms: float = 0.0
    refused_p99_ms: float = 0.0
    refused_max_ms: float = 0.0
    answer_p50_s: float = 0.0
    answer_max_s: float = 0.0
    second_tries: int = 0
    second_tries_taken: int = 0
    probes: dict[str, Any] = field(default_factory=dict)
    memory_mib: list[float] = field(default_factory=list)


async def overload(
    target: Target, *, clients: int, seconds: float, tokens: int, stream: bool, pid: int | None, ramp_s: float = 1.0
) -> Overload:
    """Clients that ask again and again, and come again when they are told to."""
    found = Overload()
    refused_s: list[float] = []
    answered_s: list[float] = []
    end_s = time.perf_counter() + seconds

    async def client(number: int) -> None:
        await asyncio.sleep(ramp_s * number / clients)
        connection = await Connection.to(target)
        was_sent_away = False
        while time.perf_counter() < end_s:
            if connection.lost:
                connection = await Connection.to(target)
            reply = await connection.ask(target.generation(tokens=tokens, stream=stream))
            wait_s = _count(found, reply, refused_s, answered_s)
            if was_sent_away:
                found.second_tries += 1
                found.second_tries_taken += not wait_s
            was_sent_away = wait_s > 0
            if reply.closes:
                connection.close()
            left_s = end_s - time.perf_counter()
            await asyncio.sleep(max(0.0, min(wait_s, left_s)))
        connection.close()

    async def watch_memory() -> None:
        while pid is not None:
            found.memory_mib.append(round(memory_bytes(pid) / 2**20, 1))
            await asyncio.sleep(seconds / 12)

    prober = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.server_load", "probe", "--url", f"http://{target.host}:{target.port}",
        "--seconds", str(seconds), stdout=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    watching = asyncio.create_task(watch_memory())
    results = await asyncio.gather(*map(client, range(clients)), return_exceptions=True)
    found.wrong.update(repr(result) for result in results if isinstance(result, BaseException))
    out, _ = await prober.communicate()
    found.probes = json.loads(out)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    found.refused_p50_ms, found.refused_p99_ms, found.refused_max_ms = (
        round(1e3 * percentile(refused_s, share), 1) for share in (0.5, 0.99, 1.0)
    )
    found.answer_p50_s, found.answer_max_s = (round(percentile(answered_s, share), 2) for share in (0.5, 1.0))
    return found


def _count(found: Overload, reply: Reply, refused_s: list[float], answered_s: list[float]) -> float:
    """Note an answer; seconds until the client may come again."""
    if reply.status in (429, 503) and reply.whole and "retry-after" in reply.headers:
        found.sent_away += 1
        refused_s.append(reply.total_s)
        return float(reply.headers["retry-after"])
    if reply.status == 200 and reply.whole and b'"error"' not in reply.body:
        found.full += 1
        answered_s.append(reply.total_s)
    else:
        found.wrong[f"{reply.status} {'whole' if reply.whole else 'cut'} {reply.body[:100]!r}"] += 1
    return 0.0


async def probe(target: Target, *, seconds: float) -> dict[str, Any]:
    """How long /livez and /readyz take."""
    took_ms: dict[str, list[float]] = {"/livez": [], "/readyz": []}
    connections = {path: await Connection.to(target) for path in took_ms}
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        for path, readings in took_ms.items():
            reply = await connections[path].ask(target.request("GET", path))
            if reply.status != 200:
                raise SystemExit(f"{path} answered {reply.status}")
            readings.append(1e3 * reply.total_s)
        await asyncio.sleep(PROBE_S)
    for connection in connections.values():
        connection.close()
    return {
        path: {f"p{round(100 * share)}_ms": round(percentile(readings, share), 1) for share in (0.5, 0.99, 1.0)}
        for path, readings in took_ms.items()
    }


STAGES = ("connected", "headers", "body", "sent", "queue", "running", "first byte", "last byte")


async def disconnects(target: Target, *, clients: int, stream: bool, together: int = 64) -> None:
    """Clients that go, at every stage of a request."""
    gate = asyncio.Semaphore(together)

    async def client(number: int) -> None:
        stage = STAGES[number % len(STAGES)]
        async with gate:
            connection = await Connection.to(target)
            raw = target.generation(tokens=64 if stage != "last byte" else 4, stream=stream)
            head = raw.index(b"\r\n\r\n")
            cut = {"connected": 0, "headers": head // 2, "body": head + 20}.get(stage, len(raw))
            asking = asyncio.create_task(connection.ask(raw[:cut]))
            wait_s = {"sent": 0.0, "queue": 0.02, "running": random.random()}.get(stage)
            if wait_s is not None:
                await asyncio.sleep(wait_s)
            elif stage == "last byte":
                await asyncio.wait([asking], timeout=60)
            elif stage == "first byte":
                while stream and not asking.done() and not connection._reply.first_s:
                    await asyncio.sleep(0.002)
            connection.close()
            await asking

    await asyncio.gather(*map(client, range(clients)))


@dataclass
class Slow:
    """What became of clients that take their time.

    Attributes:
        closed, still_open: of them.
        longest_s: that one was borne with.
        others, others_p99_ms: quick requests meanwhile.
    """

    closed: int = 0
    still_open: int = 0
    longest_s: float = 0.0
    others: int = 0
    others_failed: int = 0
    others_p99_ms: float = 0.0


async def slow(target: Target, *, clients: int, seconds: float = 12.0) -> Slow:
    """Clients that send their headers or their body a byte at a time, or nothing."""
    found = Slow()
    took_s: list[float] = []
    end_s = time.perf_counter() + seconds

    async def drip(number: int) -> None:
        connection = await Connection.to(target)
        began_s = time.perf_counter()
        raw = target.request("POST", "/v1/models/gpt-j:predict", {"instances": ["x" * 1000]})
        cut = {0: 30, 1: raw.index(b"\r\n\r\n") + 10}.get(number % 3, 0)
        connection.transport.write(raw[:cut])
        while not connection.lost and time.perf_counter() < end_s:
            await asyncio.sleep(DRIP_S)
            if cut and not connection.lost:
                connection.transport.write(raw[cut : cut + 1])
                cut += 1
        found.closed += connection.lost
        found.still_open += not connection.lost
        if connection.lost:
            found.longest_s = max(found.longest_s, round(time.perf_counter() - began_s, 2))
        connection.close()

    async def other() -> None:
        while time.perf_counter() < end_s:
            reply = await fetch(target, target.generation(tokens=4, stream=False))
            found.others += 1
            found.others_failed += reply.status != 200
            took_s.append(reply.total_s)
            await asyncio.sleep(0.05)

    await asyncio.gather(*map(drip, range(clients)), other())
    found.others_p99_ms = round(1e3 * percentile(took_s, 0.99), 1)
    return found


async def _main(options: argparse.Namespace) -> Any:
    target = Target.of(options.url)
    match options.what:
        case "probe":
            return await probe(target, seconds=options.seconds)
        case "overload":
            return asdict(
                await overload(
                    target,
                    clients=options.clients,
                    seconds=options.seconds,
                    tokens=options.tokens,
                    stream=options.stream,
                    pid=options.pid,
                )
            )
        case "slow":
            return asdict(await slow(target, clients=options.clients))
        case _:
            await disconnects(target, clients=options.clients, stream=options.stream)
            await asyncio.sleep(1)
            return {"still_held": await held(target)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server_load")
    parser.add_argument("what", choices=("overload", "disconnects", "slow", "probe"))
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tokens", type=int, default=32, help="that each request asks for")
    parser.add_argument("--stream", action="store_true", help="ask /v1/completions for a stream, not :predict")
    parser.add_argument("--pid", type=int, help="of the server: its memory is looked at")
    print(json.dumps(asyncio.run(_main(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
