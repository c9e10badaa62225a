"""One request on a connection and its answer: what ASGI's `receive` and `send` are to an application."""

from __future__ import annotations

import asyncio
import http
import logging
import re
from collections.abc import Iterable
from typing import Protocol

from starlette.types import ASGIApp, Message, Scope

_PHRASES = {int(status): status.phrase for status in http.HTTPStatus}
STATUS_LINES = {status: f"HTTP/1.1 {status} {_PHRASES.get(status, '')}\r\n".encode() for status in range(200, 600)}
NO_HEADER = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
NO_BODY = (204, 304)

_log = logging.getLogger("bluejay.server")


class Line(Protocol):
    """What an exchange asks of the connection that it is on."""

    @property
    def default_headers(self) -> Iterable[tuple[bytes, bytes]]: ...
    @property
    def last(self) -> bool: ...
    def write(self, data: bytes) -> None: ...
    async def writable(self) -> None: ...
    def listen(self) -> None: ...
    def answered(self, exchange: Exchange) -> None: ...
    def abort(self) -> None: ...


class Exchange:
    """One request and its answer.

    Args:
        line: the connection.
        scope: ASGI's.
        keep_alive: whether the client means to send more on this connection.
        expects_continue: whether the client waits for "100 Continue" before it sends the body.

    Attributes:
        received: whether all of the body is here.
        answered: whether all of the answer was written.
        gone: nobody is left to read it.
        closes: whether the connection ends with this answer; known when it begins.
    """

    def __init__(self, line: Line, scope: Scope, *, keep_alive: bool, expects_continue: bool) -> None:
        self.scope = scope
        self.body = bytearray()
        self.received = False
        self.started = False
        self.answered = False
        self.gone = False
        self.closes = False
        self._line = line
        self._keep_alive = keep_alive
        self._awaits_continue = expects_continue
        self._chunked = False
        self._left: int | None = None  # bytes of the body that were announced
        self._held = b""  # the head of an answer, until its body is there: they leave together
        self._news = asyncio.Event()

    def take(self, part: bytes) -> None:
        """More of the body came."""
        if not self.answered:
            self.body += part
            self._news.set()

    def end(self) -> None:
        """All of the body came."""
        self.received = True
        self._news.set()

    def leave(self) -> None:
        """The client went."""
        self.gone = True
        self._news.set()

    def make_last(self) -> None:
        """Nothing that comes behind this request will be read."""
        self._keep_alive = False

    async def run(self, app: ASGIApp) -> None:
        """Let an application answer. Whatever happens, there is an answer, or the connection ends."""
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:  # the server's time to end is over
            await self._excuse(503, b'{"error":"the server ends; try again"}', [(b"retry-after", b"1")])
        except Exception as error:
            _log.error("an answer failed", exc_info=error)
            await self._excuse(500, b'{"error":"something went wrong on the server"}')
        if not self.answered and not self.gone:
            self._line.abort()

    async def _excuse(self, status: int, body: bytes, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Answer instead of an application that did not begin to."""
        if self.started or self.gone:
            return
        own = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
        self._keep_alive = False
        await self.send({"type": "http.response.start", "status": status, "headers": own})
        await self.send({"type": "http.response.body", "body": body})

    async def receive(self) -> Message:
        """The next part of the body; "http.disconnect" when the client has gone, or has all of its answer."""
        if self._awaits_continue and not self.started and not self.gone:
            self._awaits_continue = False
            self._line.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if not self.gone and not self.answered:
            self._line.listen()
            await self._news.wait()
            self._news.clear()
        if self.gone or self.answered:
            return {"type": "http.disconnect"}
        body, self.body = bytes(self.body), bytearray()
        return {"type": "http.request", "body": body, "more_body": not self.received}

    async def send(self, message: Message) -> None:
        """Write the head or a part of the body; waits while the client does not read."""
        await self._line.writable()
        if self.gone:
            return
        kind = message["type"]
        if kind == "http.response.start" and not self.started:
            self._begin(message["status"], message.get("headers", ()))
        elif kind == "http.response.body" and self.started and not self.answered:
            self._go_on(message.get("body", b""), ends=not message.get("more_body", False))
        else:
            raise RuntimeError(f"{kind} was sent where it cannot be")

    def _begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.started = True
        # A body that was not read would be taken for the next request.
        self.closes = not (self._keep_alive and self.received) or self._line.last
        parts = [STATUS_LINES[status]]
        for name, value in (*self._line.default_headers, *headers):
            if NO_HEADER.search(name) or NO_HEADER.search(value):
                raise RuntimeError(f"the header {name!r} has signs that none may have")
            name = name.lower()
            if name == b"content-length":
                self._left = int(value)
            parts += [name, b": ", value, b"\r\n"]
        if self.closes:
            parts.append(b"connection: close\r\n")
        if self.scope["method"] == "HEAD" or status in NO_BODY:
            self._left = None
        elif self._left is None:
            self._chunk(parts)
        parts.append(b"\r\n")
        self._held = b"".join(parts)
        if self._left is None:
            self._flush(b"")

    def _chunk(self, parts: list[bytes]) -> None:
        """An answer of unknown length: in chunks, or, for HTTP/1.0, until the connection ends."""
        self._chunked = self.scope["http_version"] != "1.0"
        if self._chunked:
            parts.append(b"transfer-encoding: chunked\r\n")

    def _go_on(self, body: bytes, *, ends: bool) -> None:
        if self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (ends and self._left):
                raise RuntimeError("the answer is not as long as was announced")
        elif self._chunked:
            body = (b"%x\r\n%b\r\n" % (len(body), body) if body else b"") + (b"0\r\n\r\n" if ends else b"")
        elif self.scope["method"] == "HEAD":
            body = b""
        self._flush(body)
        if ends:
            self.answered = True
            self._news.set()
            self._line.answered(self)

    def _flush(self, body: bytes) -> None:
        data, self._held = self._held + body, b""
        if data:
            self._line.write(data)
