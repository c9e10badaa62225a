"""Connections: what is no HTTP, what is too much of it, and clients that take their time, byte by byte."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from bluejay.server.call import until_gone
from bluejay.server.errors import ClientGone
from bluejay.server.options import ServerOptions
from bluejay.server.protocol import MAX_LINGERING, bounded, tune

GET = b"GET /small HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: localhost\r\n"
QUICK: dict[str, Any] = {
    "header_timeout_s": 0.4,
    "body_timeout_s": 0.2,
    "write_timeout_s": 0.4,
    "idle_timeout_s": 0.6,
}
LONG_S = 20.0  # longer than anything takes, also where the machine is busy


@dataclass
class House:
    """An application with a few routes, behind bounded connections.

    Attributes:
        paths: that were asked for.
        gone: paths whose clients went before they were answered.
        refused: statuses that no route gave.
    """

    port: int = 0
    draining: bool = False
    paths: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    keys: list[bytes | None] = field(default_factory=list)
    state: ServerState = field(default_factory=ServerState)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.paths.append(path)
        if path == "/boom":
            raise RuntimeError("/secret/path")
        if path == "/never":
            try:
                async with until_gone(receive):
                    await asyncio.sleep(LONG_S)
            except ClientGone:
                self.gone.append(path)
            return
        body = b"small"
        if path == "/echo":
            body = await _read(receive)
        elif path == "/large":
            body = b"x" * 16_000_000
        elif path == "/stream":
            await self._stream(receive, send)
            return
        self.keys.append(dict(scope["headers"]).get(b"authorization"))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, receive: Any, send: Any) -> None:
        try:
            async with until_gone(receive):
                await send({"type": "http.response.start", "status": 200, "headers": []})
                for _ in range(500):
                    await send({"type": "http.response.body", "body": b"y" * 30_000, "more_body": True})
                await send({"type": "http.response.body"})
        except ClientGone:
            self.gone.append("/stream")

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(LONG_S):
            while not holds():
                await asyncio.sleep(0.01)


async def _read(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body
        body += message["body"]
        more = message["more_body"]
    return body


@asynccontextmanager
async def house(**options: Any) -> AsyncIterator[House]:
    app = House()
    protocol: Any = bounded(ServerOptions(**options), lambda: app.draining, app.refused.append)
    config = uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None)
    config.load()
    listening = socket.socket()
    tune(listening)
    listening.bind(("127.0.0.1", 0))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: protocol(config, app.state, {}), sock=listening)
    app.port = listening.getsockname()[1]
    try:
        yield app
    finally:
        server.close()
        for connection in list(app.state.connections):
            connection.abort()  # type: ignore[union-attr]
        for task in list(app.state.tasks):
            task.cancel()
        await asyncio.gather(*app.state.tasks, return_exceptions=True)


class Client:
    """A connection, with everything that came on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.heard = bytearray()

    async def rest(self) -> bytearray:
        """Everything until the server closes."""
        async with asyncio.timeout(LONG_S):
            while part := await self.reader.read(65536):
                self.heard += part
        return self.heard

    async def hear(self, text: bytes, times: int = 1) -> None:
        async with asyncio.timeout(LONG_S):
            while self.heard.count(text) < times:
                part = await self.reader.read(65536)
                assert part, f"closed, without {text!r} in {self.heard[:300]!r}"
                self.heard += part


@asynccontextmanager
async def client(app: House, *parts: bytes) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


async def alone(raw: bytes, **options: Any) -> tuple[House, bytearray]:
    """What is heard until the server closes."""
    async with house(**options) as app, client(app, raw) as one:
        return app, await one.rest()


@pytest.mark.parametrize(
    "raw, status",
    [
        (b"\x00\x01\x02\xff\xfe\r\n\r\n", 400),
        (bytes.fromhex("16030100a5010000a1"), 400),  # TLS
        ("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("utf-16"), 400),
        (b"get /small HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /sma\x00ll HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        ("GET /smäll HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), 400),
        (b"GET /small HTTP/1.1\nHost: localhost\n\n", 400),
        (b"GET /small HTTP/1.1\r\nHost: localhost\r\nX-A: a\x00b\r\n\r\n", 400),
        (b"GET /small HTTP/1.1\r\nHost: localhost\r\nX-A: a\r\n b\r\n\r\n", 400),
        (b"GET /small HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
        (b"GET /small HTTP/1.1\r\n\r\n", 400),
        (b"GET /small HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /small HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT example:80 HTTP/1.1\r\nHost: example\r\n\r\n", 405),
        (b"CONNECT /small HTTP/1.1\r\nHost: example\r\n\r\nmore", 405),
        (POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc", 400),
        (POST + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabcde", 400),
        (POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (POST + b"Content-Length: -3\r\n\r\n", 400),
        (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: gzip\r\n\r\nabc", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n0\r\n\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n", 400),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n", 400),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
        (b"GET /small HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 100 + b"\r\n", 431),
        (b"GET /small HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"b" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /small HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"b" * 1_000_000, 431),
        (b"GET /small HTTP/1.1\r\nHost: localhost\r\n" + b"b" * 1_000_000, 431),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X-A: b\r\n" * 100 + b"\r\n", 431),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1;a=" + b"b" * 1_000_000, 431),
        (b"\r\n" * 100_000, 431),
    ],
)
def test_what_is_no_request_or_too_large_a_one_is_told_so_and_closed(raw: bytes, status: int) -> None:
    app, heard = asyncio.run(alone(raw))
    head, _, body = heard.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), heard[:200]
    assert b"connection: close" in head
    assert list(json.loads(body)) == ["error"]
    assert app.refused == [status]


@pytest.mark.parametrize(
    "raw, path",
    [
        (b"GET /%00%ff%c0%80%zz HTTP/1.0\r\n\r\n", "/\0\ufffd\ufffd\ufffd%zz"),
        (b"GET http://localhost/small HTTP/1.0\r\n\r\n", "/small"),
        (b"GET /small?a=%00&b=%zz HTTP/1.0\r\n\r\n", "/small"),
        (b"GET /small HTTP/1.0\r\nX-A: \xff\xfe\r\n\r\n", "/small"),
        (b"\r\n\r\nGET /small HTTP/1.0\r\n\r\n", "/small"),
    ],
)
def test_strange_but_right_requests_are_answered(raw: bytes, path: str) -> None:
    app, heard = asyncio.run(alone(raw))
    assert heard.startswith(b"HTTP/1.1 200 OK\r\n")
    assert app.paths == [path]


def test_a_failing_application_tells_nothing() -> None:
    _, heard = asyncio.run(alone(b"GET /boom HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    assert heard.startswith(b"HTTP/1.1 500 ")
    assert b"secret" not in heard


def test_bodies_come_in_chunks_in_parts_and_when_asked_for() -> None:
    async def test() -> None:
        async with house() as app:
            chunks = b"3;name=value\r\nabc\r\n2\r\nde\r\n0\r\nAuthorization: Bearer x\r\n\r\n"
            async with client(app, POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + GET) as one:
                await one.hear(b"abcde")
                await one.hear(b"small")
            assert app.keys == [None, None]  # a trailer is no header
            async with client(app, POST + b"Content-Length: 4\r\nExpect: 100-continue\r\n\r\n") as one:
                await one.hear(b"HTTP/1.1 100 Continue\r\n\r\n")
                one.writer.write(b"1234")
                await one.hear(b"\r\n\r\n1234")
            large = b"z" * 3_000_000
            async with client(app, POST + b"Content-Length: %d\r\n\r\n" % len(large), large) as one:
                await one.hear(large)

    run(test())


def test_a_wish_for_another_protocol_is_not_followed_and_its_body_is_read() -> None:
    async def test() -> None:
        wish = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
        async with (
            house() as app,
            client(
                app,
                POST + wish + b"Content-Length: 5\r\n\r\nhello" + GET.replace(b"\r\n\r\n", b"\r\n" + wish + b"\r\n"),
            ) as one,
        ):
            await one.hear(b"\r\n\r\nhello")
            await one.hear(b"\r\n\r\nsmall")
            one.writer.write(GET)
            await one.hear(b"\r\n\r\nsmall", 2)

    run(test())


def test_an_answer_of_unknown_length_to_http_1_0_ends_with_the_connection() -> None:
    _, heard = asyncio.run(alone(b"GET /stream HTTP/1.0\r\n\r\n"))
    head, _, body = heard.partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert body == b"y" * 15_000_000


def test_requests_that_come_together_are_answered_in_order_and_not_too_many() -> None:
    async def test() -> None:
        async with house() as app, client(app, GET * 5) as one:
            await one.hear(b"\r\n\r\nsmall", 5)
        _, heard = await alone(GET * 5000)
        assert 0 < heard.count(b"HTTP/1.1 200 OK") < 20
        assert heard.count(b"connection: close") == 1

    run(test())


def test_what_is_wrong_behind_a_request_does_not_disturb_its_answer() -> None:
    _, heard = asyncio.run(alone(GET + b"\x00\x00\x00\r\n\r\n"))
    assert heard.startswith(b"HTTP/1.1 200 OK")
    assert heard.count(b"HTTP/1.1") == 1
    assert heard.endswith(b"small")


def test_a_client_that_goes_is_noticed_also_with_requests_behind_the_first() -> None:
    never = b"GET /never HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def test() -> None:
        async with house() as app:
            for behind in (b"", GET, GET * 100, POST + b"Content-Length: 900000\r\n\r\n" + b"b" * 900_000):
                async with client(app, never + behind):
                    await app.until(lambda: "/never" in app.paths)
                await app.until(lambda: app.gone == ["/never"] and not app.state.tasks and not app.state.connections)
                assert app.paths == ["/never"]
                app.paths.clear()
                app.gone.clear()

    run(test())


def test_a_body_that_nobody_asked_for_ends_the_connection() -> None:
    async def test() -> None:
        raw = b"GET /small HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n"
        async with house() as app, client(app, raw + b"abc") as one:
            heard = await one.rest()
            assert b"connection: close" in heard
            assert heard.endswith(b"small")
            await app.until(lambda: not app.state.connections)
        async with house() as app, client(app, raw.replace(b"900000", b"3") + b"abc" + GET) as one:
            await one.hear(b"small", 2)

    run(test())


@pytest.mark.parametrize(
    "raw, drip, status",
    [
        (b"", b"", None),
        (b"GET /small HTTP/1.1\r\nHost: loc", b"a", 408),
        (b"", b"\r\n", 408),
        (POST + b"Content-Length: 100000\r\n\r\n", b"a", 408),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n", 408),
        (GET + b"GET /small HTTP/1.1\r\nX-A: ", b"a", 408),
        (GET, b"", 200),  # idle
    ],
)
def test_a_client_that_takes_its_time_is_let_go_and_others_are_served(
    raw: bytes, drip: bytes, status: int | None
) -> None:
    async def test() -> None:
        async with house(**QUICK) as app, client(app, raw) as slow:

            async def go_on() -> None:
                while True:
                    slow.writer.write(drip)
                    await asyncio.sleep(0.02)

            dripping = asyncio.create_task(go_on())
            async with client(app, GET) as other:
                await other.hear(b"small")
            heard = await slow.rest()
            dripping.cancel()
            await app.until(lambda: not app.state.connections and not app.state.tasks)
            last = heard.rpartition(b"HTTP/1.1 ")[2]
            assert last.startswith(b"%d " % status) if status else not heard

    run(test())


@pytest.mark.parametrize("path", [b"/large", b"/stream"])
def test_a_client_that_does_not_read_is_let_go(path: bytes) -> None:
    async def test() -> None:
        async with house(**QUICK) as app, client(app, GET.replace(b"/small", path)) as one:
            one.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await app.until(lambda: not app.state.connections and not app.state.tasks)
            assert app.gone == (["/stream"] if path == b"/stream" else [])

    run(test())


def test_a_client_that_reads_slowly_gets_everything() -> None:
    async def test() -> None:
        async with house(**QUICK) as app, client(app, GET.replace(b"/small", b"/stream")) as one:
            async with asyncio.timeout(LONG_S):
                while b"0\r\n\r\n" not in one.heard[-5:]:
                    one.heard += await one.reader.read(400_000)
                    await asyncio.sleep(0.02)
            assert len(one.heard) > 15_000_000
            assert not app.gone

    run(test())


def test_connections_are_bounded_and_who_comes_then_is_told_when_to_come_again() -> None:
    async def test() -> None:
        async with house(max_connections=3) as app:
            async with client(app, GET) as one, client(app, GET) as two, client(app):
                await one.hear(b"small")
                await two.hear(b"small")
                async with client(app, GET) as late:
                    heard = await late.rest()
                assert heard.startswith(b"HTTP/1.1 503 ")
                assert b"\r\nretry-after: 1\r\n" in heard
                one.writer.write(GET)
                await one.hear(b"small", 2)
            await app.until(lambda: not app.state.connections)
            async with client(app, GET) as again:
                await again.hear(b"small")

    run(test())


def test_a_crowd_does_not_hold_the_connections_that_are_refused() -> None:
    async def test() -> None:
        async with house(max_connections=1) as app, client(app):
            await app.until(lambda: len(app.state.connections) == 1)
            pairs = [await asyncio.open_connection("127.0.0.1", app.port) for _ in range(MAX_LINGERING + 100)]
            assert len(app.state.connections) <= MAX_LINGERING + 2
            await app.until(lambda: len(app.state.connections) == 1)
            for _, writer in pairs:
                writer.transport.abort()
            await asyncio.gather(*(writer.wait_closed() for _, writer in pairs), return_exceptions=True)

    run(test())


def test_while_the_server_drains_clients_are_told_to_connect_elsewhere() -> None:
    async def test() -> None:
        async with house() as app, client(app, GET) as one:
            await one.hear(b"small")
            app.draining = True
            one.writer.write(GET)
            await one.rest()
            assert one.heard.count(b"small") == 2
            assert one.heard.count(b"connection: close") == 1

    run(test())


def test_the_end_of_the_server_closes_idle_connections_and_finishes_what_has_begun() -> None:
    async def test() -> None:
        async with (
            house() as app,
            client(app, b"GET /small HTTP/1.1\r\nHo") as begun,
            client(app, POST + b"Content-Length: 3\r\n\r\na") as busy,
            client(app, GET) as idle,
        ):
            await idle.hear(b"small")
            await app.until(lambda: "/echo" in app.paths)
            for connection in list(app.state.connections):
                connection.shutdown()
            assert (await idle.rest()).count(b"HTTP/1.1") == 1
            busy.writer.write(b"bc")
            assert b"connection: close" in await busy.rest()
            assert busy.heard.endswith(b"abc")
            begun.writer.write(b"st: localhost\r\n\r\n")
            assert (await begun.rest()).endswith(b"small")

    run(test())
