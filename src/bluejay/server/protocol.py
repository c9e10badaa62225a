"""HTTP/1.1 of one connection, with bounds on what a client may send and on how long it may take.

A connection is at one stage at a time, and each has its limit:

head     from its beginning, or from the first byte of a later request, until the headers are there
body     until the body is there
busy     a request is being answered
idle     between requests
linger   the last answer was sent; what still comes is thrown away, since closing at once would take the answer
         away from a client that has not read it yet

Beside that, a client that does not read what is written to it is let go.

Requests that come before the last one was answered wait, a few of them; reading goes on meanwhile, so that a client's
end is noticed at once.
"""

from __future__ import annotations

import asyncio
import json
import socket
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import httptools
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.server import ServerState

from bluejay.server.exchange import STATUS_LINES, Exchange
from bluejay.server.options import ServerOptions

MAX_HEAD_BYTES = 64 * 1024  # of a request line and all its headers; of all that comes between two parts of a body
MAX_HEADERS = 100
MAX_URL_BYTES = 8 * 1024
MAX_WAITING = 8  # requests that were sent before the one before was answered
MAX_UNREAD_BYTES = 64 * 1024  # of a body that its route has not asked for yet
MAX_LINGERING = 256  # connections beyond the limit that are still told so
LINGER_S = 1.0
BODY_GRACE_S = 0.5  # `Call.body` has the same limit and answers in its dialect's way; this is for routes without bodies
MIN_READ_BYTES = 16 * 1024  # a client that does not take so much within the write time-out does not read


class Stage(Enum):
    """Where a connection is."""

    HEAD = "head"
    BODY = "body"
    BUSY = "busy"
    IDLE = "idle"
    LINGER = "linger"


@dataclass(frozen=True)
class Refusal:
    """What is answered where there is no request that a route could answer."""

    status: int
    text: str
    headers: bytes = b""

    def bytes(self) -> bytes:
        """The whole answer."""
        body = json.dumps({"error": self.text}).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(body)
        return STATUS_LINES[self.status] + head + self.headers + b"\r\n" + body


MALFORMED = Refusal(400, "this is no request as RFC 9112 has them")
OTHER_VERSION = Refusal(505, "this server speaks HTTP 1.1 and 1.0")
NO_PROXY = Refusal(405, "this server connects nobody to another one", b"allow: GET, POST\r\n")
BAD_HOST = Refusal(400, "a request has one Host header")
LONG_URL = Refusal(414, f"the URL is longer than {MAX_URL_BYTES:,} bytes")
LARGE_HEAD = Refusal(431, f"the headers are larger than {MAX_HEAD_BYTES:,} bytes or more than {MAX_HEADERS}")
SLOW_HEAD = Refusal(408, "the headers did not come in time")
SLOW_BODY = Refusal(408, "the body did not come in time")
CROWDED = Refusal(503, "all connections are taken; try again in 1 s", b"retry-after: 1\r\n")


class _Refused(Exception):
    """Leaves the parser; carries what is answered."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal


def bounded(
    options: ServerOptions, is_draining: Callable[[], bool], note_refusal: Callable[[int], None] = lambda status: None
) -> type[BoundedProtocol]:
    """The class of a server's connections, as uvicorn takes it.

    Args:
        is_draining: whether clients are told to connect elsewhere for their next request.
        note_refusal: told the status of each answer that no route gave.
    """

    class Protocol(BoundedProtocol):
        """One connection of this server."""

        def __init__(self, config: Config, server_state: ServerState, app_state: Any, _loop: Any = None) -> None:
            super().__init__(config, server_state, options, is_draining, note_refusal)

    return Protocol


class BoundedProtocol(asyncio.Protocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        options: ServerOptions,
        is_draining: Callable[[], bool],
        note_refusal: Callable[[int], None],
    ) -> None:
        self._app: ASGIApp = cast(ASGIApp, config.loaded_app)
        self._state = server_state
        self._options = options
        self._is_draining = is_draining
        self._note_refusal = note_refusal
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)  # until the connection is made
        self._stage = Stage.HEAD
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._reads = True
        self._deaf = False  # what still comes is thrown away
        self._ends = False  # there is no request behind the one that is here
        self._server: tuple[str, int] | None = None
        self._client: tuple[str, int] | None = None
        self._fresh = True  # no request came yet
        self._unclaimed = 0  # bytes since the last part of a body, or since the last request
        self._in_head = True
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._num_headers = 0
        self._declined = b""  # a request that asked for another protocol, without that
        self._running: Exchange | None = None
        self._waiting: deque[Exchange] = deque()
        self._newest: Exchange | None = None

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self._transport = cast(asyncio.Transport, transport)
        self._server, self._client = (transport.get_extra_info(name) for name in ("sockname", "peername"))
        num_connections = len(self._state.connections)
        self._state.connections.add(cast(Any, self))
        self._wait_for(Stage.HEAD)
        if num_connections >= self._options.max_connections + MAX_LINGERING:
            self.abort()
        elif num_connections >= self._options.max_connections:
            self._refuse(CROWDED)

    def connection_lost(self, exc: Exception | None) -> None:
        """It went."""
        self._state.connections.discard(cast(Any, self))
        self._deaf = True
        for timer in (self._timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        for exchange in (*([self._running] if self._running else []), *self._waiting):
            exchange.leave()
        self._waiting.clear()
        self._may_write.set()
        self._parser = None  # type: ignore[assignment]  # it holds this object

    def eof_received(self) -> None:
        """The client sends no more, which is all that is ever seen of its end."""

    def data_received(self, data: bytes) -> None:
        """The client sent something."""
        if self._deaf:
            return
        self._unclaimed += len(data)
        try:
            self._feed(data)
        except (httptools.HttpParserError, _Refused) as error:
            cause = error if isinstance(error, _Refused) else error.__context__
            self._refuse(cause.refusal if isinstance(cause, _Refused) else MALFORMED)
        else:
            if self._unclaimed > MAX_HEAD_BYTES:
                self._refuse(LARGE_HEAD)
        self._look()

    def _feed(self, data: bytes) -> None:
        """Let the parser read; it stops where a request would go on in another protocol, and there it begins anew."""
        while True:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._declined:
                    raise _Refused(MALFORMED) from None
                data = self._declined + data[upgrade.args[0] :]
                self._declined = b""
                self._parser = httptools.HttpRequestParser(self)

    def pause_writing(self) -> None:
        """The client reads more slowly than is written."""
        self._may_write.clear()
        self._watch_writing()

    def resume_writing(self) -> None:
        """It has caught up."""
        self._may_write.set()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # What uvicorn calls.

    def shutdown(self) -> None:
        """End with the answer that is being given, or with that to a request which has begun to come."""
        self._ends = True
        if self._running is None and not self._unclaimed:
            self._close()

    # What the parser calls.

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = True
        self._url = b""
        self._headers = []
        self._num_headers = 0

    def on_url(self, url: bytes) -> None:
        """A part of its URL."""
        self._url += url
        if len(self._url) > MAX_URL_BYTES:
            raise _Refused(LONG_URL)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; behind a body it only counts: nobody may show a key there."""
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            raise _Refused(LARGE_HEAD)
        if self._in_head:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """All headers are here: the request can be answered, or waits."""
        self._in_head = False
        if sum(len(name) + len(value) for name, value in self._headers) > MAX_HEAD_BYTES:
            raise _Refused(LARGE_HEAD)
        self._unclaimed = 0
        self._fresh = False
        if self._deaf:
            return
        if self._parser.get_method() == b"CONNECT":
            raise _Refused(NO_PROXY)
        if self._parser.should_upgrade():
            self._decline()
            return
        if len(self._waiting) >= MAX_WAITING:
            self._deafen()
            return
        exchange = self._newest = self._exchange()
        if self._running is None:
            self._start(exchange)
        else:
            self._waiting.append(exchange)

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        self._unclaimed = 0
        exchange = self._newest
        if exchange is None or self._deaf:
            return
        exchange.take(body)
        if len(exchange.body) > MAX_UNREAD_BYTES:
            if exchange is self._running:
                self._pause_reading()
            else:  # reading has to go on, so that the end of the client is noticed: it has to send this again
                self._waiting.pop()
                self._deafen()

    def on_message_complete(self) -> None:
        """The request is all here."""
        self._unclaimed = 0
        if self._newest is not None and not self._deaf and not self._declined:
            self._newest.end()

    # What exchanges call.

    @property
    def default_headers(self) -> Iterable[tuple[bytes, bytes]]:
        """Of every answer."""
        return self._state.default_headers

    @property
    def last(self) -> bool:
        """Whether the client shall ask elsewhere next."""
        return self._is_draining() or (self._ends and not self._waiting)

    def write(self, data: bytes) -> None:
        """Send."""
        self._transport.write(data)

    async def writable(self) -> None:
        """Wait while the client does not read."""
        if not self._may_write.is_set():
            await self._may_write.wait()

    def listen(self) -> None:
        """Go on reading."""
        if not self._reads and not self._transport.is_closing():
            self._reads = True
            self._transport.resume_reading()

    def answered(self, exchange: Exchange) -> None:
        """An answer was written: begin the next one, or close."""
        self._state.total_requests += 1
        self._running = None
        self._watch_writing()
        if self._transport.is_closing():
            return
        self.listen()
        if exchange.closes or ((self._deaf or self._ends) and not self._waiting):
            if exchange.received and not self._deaf:
                self._close()
            else:
                self._linger()
        elif self._waiting:
            self._start(self._waiting.popleft())
        self._look()

    def abort(self) -> None:
        """End the connection at once."""
        self._deaf = True
        self._transport.abort()

    # Requests.

    def _exchange(self) -> Exchange:
        """The request whose headers are here. Raises: what the parser takes for a malformed one."""
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1"):
            raise _Refused(OTHER_VERSION)
        hosts = sum(name == b"host" for name, _ in self._headers)
        if hosts > 1 or (not hosts and version != "1.0"):
            raise _Refused(BAD_HOST)
        url = httptools.parse_url(self._url)
        if not url.path:
            raise _Refused(MALFORMED)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "server": self._server and self._server[:2],
            "client": self._client and self._client[:2],
            "scheme": "http",
            "method": self._parser.get_method().decode("ascii"),
            "root_path": "",
            "path": urllib.parse.unquote(url.path.decode("ascii")),
            "raw_path": url.path,
            "query_string": url.query or b"",
            "headers": self._headers,
            "state": {},
        }
        keep_alive = version != "1.0" and self._parser.should_keep_alive()
        expects = any(name == b"expect" and value.lower() == b"100-continue" for name, value in self._headers)
        return Exchange(self, scope, keep_alive=keep_alive, expects_continue=expects and version != "1.0")

    def _decline(self) -> None:
        """Write a request down without its wish for another protocol; Java and curl --http2 wish for HTTP/2 so."""
        version = self._parser.get_http_version().encode()
        parts = [b"%b %b HTTP/%b\r\n" % (self._parser.get_method(), self._url, version)]
        for name, value in self._headers:
            if name == b"connection":
                value = b",".join(part for part in value.split(b",") if part.strip().lower() != b"upgrade")
            if name != b"upgrade":
                parts += [name, b": ", value, b"\r\n"]
        self._declined = b"".join((*parts, b"\r\n"))

    def _start(self, exchange: Exchange) -> None:
        self._running = exchange
        task = self._loop.create_task(exchange.run(self._app))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def _deafen(self) -> None:
        """Answer what is here, and then end."""
        self._deaf = True
        if (last := self._waiting[-1] if self._waiting else self._running) is not None:
            last.make_last()
        self.listen()

    def _refuse(self, refusal: Refusal) -> None:
        """Tell what is wrong, if nothing else is being told, and end."""
        running = self._running
        if self._waiting or (running is not None and (running.received or running.started)):
            self._deafen()  # what is wrong came behind a request that is being answered
            return
        if running is not None:
            self._running = None
            running.leave()
        if not self._transport.is_closing():
            self._note_refusal(refusal.status)
            self._transport.write(refusal.bytes())
            self._linger()

    # Time.

    def _look(self) -> None:
        """Note at which stage the connection is, and how long it may stay there."""
        if self._stage is Stage.LINGER or self._transport.is_closing():
            return
        if (running := self._running) is not None:
            stage = Stage.BUSY if running.received else Stage.BODY
        else:
            stage = Stage.HEAD if self._fresh or self._unclaimed else Stage.IDLE
        if stage is not self._stage:
            self._wait_for(stage)

    def _wait_for(self, stage: Stage) -> None:
        self._stage = stage
        if self._timer is not None:
            self._timer.cancel()
        options = self._options
        limit_s = {
            Stage.HEAD: options.header_timeout_s,
            Stage.BODY: options.body_timeout_s + BODY_GRACE_S,
            Stage.BUSY: None,
            Stage.IDLE: options.idle_timeout_s,
            Stage.LINGER: LINGER_S,
        }[stage]
        self._timer = None if limit_s is None else self._loop.call_later(limit_s, self._too_long)

    def _too_long(self) -> None:
        """The client let the server wait for too long."""
        match self._stage:
            case Stage.HEAD if self._unclaimed:
                self._refuse(SLOW_HEAD)
            case Stage.BODY:
                self._refuse(SLOW_BODY)
            case Stage.LINGER:
                self.abort()
            case _:
                self._close()

    def _linger(self) -> None:
        """Say that nothing more will come, and wait for the client to see it."""
        self._deaf = True
        self.listen()
        try:
            self._transport.write_eof()
        except (OSError, RuntimeError):  # it has gone meanwhile
            self.abort()
            return
        self._wait_for(Stage.LINGER)

    def _close(self) -> None:
        """End when everything was sent, or the client does not read it."""
        self._deaf = True
        self._transport.close()
        self._watch_writing()

    def _pause_reading(self) -> None:
        if self._reads and not self._transport.is_closing():
            self._reads = False
            self._transport.pause_reading()

    def _watch_writing(self) -> None:
        """Let go of a client that does not read, where something waits for being read."""
        num_bytes = self._transport.get_write_buffer_size()
        if num_bytes and self._write_timer is None:
            self._write_timer = self._loop.call_later(self._options.write_timeout_s, self._look_at_writing, num_bytes)

    def _look_at_writing(self, num_bytes_then: int) -> None:
        self._write_timer = None
        goes_on = self._running is not None and self._may_write.is_set()  # more was written meanwhile
        if not goes_on and self._transport.get_write_buffer_size() > max(0, num_bytes_then - MIN_READ_BYTES):
            self.abort()
        else:
            self._watch_writing()


def tune(listening: socket.socket) -> None:
    """Bound what the system keeps for clients that do not read; connections inherit it."""
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 * 1024)
