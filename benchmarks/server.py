"""What the server is held to beside its engine: `python -m benchmarks.server throughput --rounds 5`.

    throughput   16 streams of the default model over HTTP, against the same engine in this process and in its worker

The streams are read by a process of its own, which does nothing with them but count. All share this machine's cores, as
engine, server and clients of one machine do. Sides alternate; what is compared are medians of the rounds' ratios.
Results go to docs/benchmarks/server.json and are drawn to docs/benchmarks/server.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from benchmarks.contest import ROOT

NUM_STREAMS = 16
NUM_TOKENS = 200  # of each stream
READY_S = 120.0

Found = dict[str, Any]
Reading = tuple[float, float]  # tokens a second, and the median of the times to first tokens, in seconds


def prompts() -> list[str]:
    """Each stream's own, so that none finds another's in the cache."""
    return [f"Once upon a time there were {number} birds, and the smallest of them" for number in range(2, 18)]


def body(prompt: str) -> Found:
    """What a client asks."""
    return {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}


def throughput(rounds: int) -> Found:
    """Each side once to warm up, then turn by turn."""
    found: Found = {
        "what": f"{NUM_STREAMS} streams of {NUM_TOKENS} tokens each, the default model, greedy",
        "goal": "over HTTP at least 0.85 of the engine's tokens/s, the first token within 10 ms of its time",
    }
    sides = ("engine", "worker", "http")
    readings: dict[str, list[Reading]] = {side: [] for side in sides}
    with _engine() as engine, _worker() as worker, _served() as url:
        runs: dict[str, Callable[[], Reading]] = {"engine": engine, "worker": worker, "http": lambda: _over_http(url)}
        for side in sides:
            runs[side]()
        for _ in range(rounds):
            for side in sides:
                readings[side].append(runs[side]())
    for side in sides:
        found[f"{side}_tokens_per_s"] = [reading[0] for reading in readings[side]]
        found[f"{side}_first_token_ms"] = [1e3 * reading[1] for reading in readings[side]]
    for side in ("engine", "worker"):
        pairs = list(zip(readings["http"], readings[side], strict=True))
        found[f"http_to_{side}"] = median(http[0] / other[0] for http, other in pairs)
        found[f"http_first_token_later_than_{side}_ms"] = median(1e3 * (http[1] - other[1]) for http, other in pairs)
    return found


@contextmanager
def _engine() -> Iterator[Callable[[], Reading]]:
    """The engine in this process, stepped in a loop, with as many threads as a worker gives it."""
    from collections import deque

    from bluejay import LLM, SamplingParams
    from bluejay.engine.request import GenerationEvent, GenerationRequest
    from bluejay.engine.threads import set_model_threads

    llm = LLM()
    set_model_threads(llm, 0, one_by_one=True)
    params = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)

    def run() -> Reading:
        requests = [GenerationRequest(llm.encode(prompt), params, tenant=str(time.time())) for prompt in prompts()]
        inbox: deque[GenerationEvent] = deque()
        firsts: dict[int, float] = {}
        began = time.perf_counter()
        for request in requests:
            llm.engine.add(request, inbox)
        while llm.engine.has_work:
            llm.engine.step()
            now = time.perf_counter()
            while inbox:
                firsts.setdefault(inbox.popleft().request, now - began)
        return _reading(time.perf_counter() - began, list(firsts.values()))

    yield run


@contextmanager
def _worker() -> Iterator[Callable[[], Reading]]:
    """The engine in its worker, as a server holds it, asked by this process."""
    import uvloop

    from bluejay import SamplingParams
    from bluejay.engine.client import EngineClient
    from bluejay.engine.request import GenerationRequest
    from bluejay.tokenizer import load_tokenizer

    params = SamplingParams(max_new_tokens=NUM_TOKENS, ignore_eos=True)
    client = EngineClient()

    async def one(prompt: list[int], tenant: str, began: float) -> float:
        first = 0.0
        async for _ in client.generate(GenerationRequest(prompt, params, tenant=tenant)):
            first = first or time.perf_counter() - began
        return first

    async def all_of_them() -> Reading:
        assert client.facts is not None
        tokenizer, tenant = load_tokenizer(Path(client.facts.path)), str(time.time())
        encoded = [tokenizer.encode(prompt) for prompt in prompts()]
        began = time.perf_counter()
        firsts = await asyncio.gather(*(one(prompt, tenant, began) for prompt in encoded))
        return _reading(time.perf_counter() - began, list(firsts))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(client.start())
        try:
            yield lambda: runner.run(all_of_them())
        finally:
            runner.run(client.close())


@contextmanager
def _served() -> Iterator[str]:
    """`bluejay serve` in a home of its own, without the prefix cache: that would know the last round's prompts."""
    with tempfile.TemporaryDirectory(prefix="bluejay-benchmark-") as folder:
        home, ready = Path(folder), Path(folder, "ready.json")
        (home / "config.toml").write_text("[engine]\nprefix_cache = false\n")
        env = {
            **os.environ,
            "BLUEJAY_HOME": folder,
            "XDG_DATA_HOME": folder,
            "BLUEJAY_CONFIG": str(home / "config.toml"),
        }
        command = [sys.executable, "-m", "bluejay", "serve", "--port", "0", "--grpc-port", "-1", "--ready-file"]
        with (home / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [*command, str(ready)], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            until = time.monotonic() + READY_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the server was not ready:\n{(home / 'log.txt').read_text()[-2000:]}")
                time.sleep(0.05)
            yield json.loads(ready.read_text())["url"]
        finally:
            process.terminate()
            process.wait()


def _over_http(url: str) -> Reading:
    """From a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.server", "load", "--url", url], check=True, capture_output=True, cwd=ROOT
    )
    took_s, firsts = json.loads(done.stdout)
    return _reading(took_s, firsts)


def _reading(took_s: float, firsts: list[float]) -> Reading:
    assert len(firsts) == NUM_STREAMS
    return NUM_STREAMS * NUM_TOKENS / took_s, median(firsts)


class _Reader(asyncio.Protocol):
    """Sends one request when it is told to, and reads its stream to the end without looking into it."""

    def __init__(self, host: str, prompt: str) -> None:
        sent = json.dumps(body(prompt)).encode()
        self._request = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent
        )
        self._last = b""
        self.first_s = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def send(self) -> None:
        self.began_s = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.first_s and b"data: " in data:
            self.first_s = time.perf_counter() - self.began_s
        self._last = (self._last + data)[-32:]
        if b"data: [DONE]" in self._last and not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or EOFError("the server closed the connection"))


def _same(reader: _Reader) -> _Reader:
    return reader


async def _load(url: str) -> tuple[float, list[float]]:
    """All streams at once: seconds until the last has ended, and each one's time to its first token."""
    address = urlsplit(url)
    loop = asyncio.get_running_loop()
    readers = []
    for prompt in prompts():
        reader = _Reader(address.netloc, prompt)
        await loop.create_connection(partial(_same, reader), address.hostname or "", address.port or 0)
        readers.append(reader)
    began = time.perf_counter()
    for reader in readers:
        reader.send()
    await asyncio.gather(*(reader.done for reader in readers))
    return time.perf_counter() - began, [reader.first_s for reader in readers]


def _load_and_print(url: str) -> None:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(_load(url))))


MEASURES: dict[str, Callable[[int], Found]] = {"throughput": throughput}


def page(found: Found) -> str:
    """docs/benchmarks/server.md."""
    from benchmarks.engine import table

    lines = [
        "# The server's figures",
        "*Written by `python -m benchmarks.server`; do not edit. Readings of every round: [server.json](server.json). "
        "`engine` is the engine in one process, `worker` the same in a process of its own, `http` streams of "
        "`/v1/completions`, read by another process; all on the same cores. Sides alternate in one run; ratios are "
        "medians of the rounds' ratios, on a machine that others use too.*",
    ]
    for name, own in found.items():
        lines += table(name, own)
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Run the measures that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=[*MEASURES, "load"], help="load: only send the streams, and tell the times")
    parser.add_argument("--rounds", type=int, default=5, help="of each side (default: 5)")
    parser.add_argument("--url", help="of the server that load is sent to")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="where results are written")
    asked = parser.parse_args()
    if asked.measure == "load":
        _load_and_print(asked.url)
        return
    from benchmarks.machine import describe

    file = asked.out / "server.json"
    found: Found = json.loads(file.read_text()) if file.exists() else {}
    command = f"python -m benchmarks.server {asked.measure} --rounds {asked.rounds}"
    found[asked.measure] = {"command": command, **describe(), **MEASURES[asked.measure](asked.rounds)}
    file.write_text(json.dumps(found, indent=1) + "\n")
    (asked.out / "server.md").write_text(page(found))
    told = {key: value for key, value in found[asked.measure].items() if key != "machine"}
    print(asked.measure, json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
