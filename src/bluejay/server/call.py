"""One call of one route: who calls, what the body says, how to answer. Handlers of all dialects take one.

@routes.post("/v1/things", **documented(Thing, ThingList))
@access(Access.USER)
async def things(call: TheCall) -> Response:
    asked = await call.read(Thing)
    run = await call.begin(asked.model, [Item(asked.prompt, asked.params())])
    return call.reply({"things": [output.text for output in await call.finish(run)]})
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Annotated, Any, TypeVar

import structlog
from fastapi import Depends
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from bluejay.accounts.store import Store
from bluejay.engine.request import RequestOutput
from bluejay.errors import EngineError, InvalidRequest, Overloaded
from bluejay.server.auth import Access, Door, Principal
from bluejay.server.dumps import dumps_in_parts
from bluejay.server.errors import ClientGone, Failure, TooLarge, TooSlow, failure_of, log_reason
from bluejay.server.generation import Asked, Caller, Item, Run, Service
from bluejay.server.jobs import Jobs
from bluejay.server.models import Models, ServedModel
from bluejay.server.options import ServerOptions
from bluejay.server.shelf import Shelf
from bluejay.server.threads import Threads, store_threads
from bluejay.server.tracing import NO_TRACING, Tracing

Body = TypeVar("Body", bound=BaseModel)
Coming = TypeVar("Coming")
Parsed = TypeVar("Parsed")
Found = TypeVar("Found")
Handler = Callable[..., Coroutine[Any, Any, Response]]
Render = Callable[[Failure], Any]

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPTION = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,39}")
MAX_FIELDS = 256  # of a body; to find out that each of a million is none takes seconds
MAX_TABLE = 2048  # entries of a table within it
LARGE_BODY = 64 * 2**10  # bytes; what is larger is read in a thread
MAX_READ_BYTES = 64 * 2**20  # of large bodies that wait to be read; whoever sends a further one is told to come again
MAX_VALUES = 2**19  # of a large body: as many token ids as a request may have, and more
MAX_NESTED = 2**15  # lists, objects and fields of a large body, which take ten times as long as short texts
FEW_VALUES = 2048  # of an answer; to render and write them takes ten ms, at most
MAX_ANSWERS = 2**16  # that wait to be written; fewer run
MAX_TOLD = 8  # problems of one body; the first ones are what helps

_names = random.Random()  # drawn from the system once, not for each request: ids are to be told apart, not kept secret

_log = logging.getLogger("bluejay.server")


@dataclass(frozen=True)
class Dialect:
    """A way of speaking.

    Attributes:
        name: in metrics, logs and the ledger.
        render: from a failure to the JSON that tells of it.
        status: the HTTP status that this dialect has for a failure, where it is not the failure's own.
        headers: beside the failure's own.
    """

    name: str
    render: Render
    status: Callable[[Failure], int] | None = None
    headers: Callable[[Failure], Mapping[str, str]] | None = None

    def answer(self, failure: Failure) -> Response:
        """What is sent."""
        status = failure.status if self.status is None else self.status(failure)
        own = {} if self.headers is None else self.headers(failure)
        return json_response(self.render(failure), status, {**failure.headers, **own})


@dataclass
class Life:
    """Where a server is in its life.

    Attributes:
        draining: it was told to end, and finishes what runs.
        hurried: it was told twice.
    """

    draining: bool = False
    hurried: bool = False


@dataclass(frozen=True)
class House:
    """What all calls share; made once, where the server is started.

    Attributes:
        store: projects, keys, usage, what filters flagged.
        jobs: what is answered later.
        uploads: data that callers sent ahead of what is to be done with it.
        store_threads: that ask the store.
        reading, writing: where large bodies are read, and large answers rendered and written.
    """

    options: ServerOptions
    models: Models
    service: Service
    door: Door
    store: Store
    life: Life
    jobs: Jobs
    uploads: Shelf[Any]
    tracing: Tracing = NO_TRACING
    store_threads: Threads = field(default_factory=store_threads)
    reading: Threads = field(default_factory=lambda: Threads("the reading of bodies", 1, MAX_READ_BYTES))
    writing: Threads = field(default_factory=lambda: Threads("the writing of answers", 1, MAX_ANSWERS))


class Call:
    """One call. Handlers get it as their argument.

    Attributes:
        request: Starlette's.
        house: what all calls share.
        dialect: whose route this is.
        caller: who calls, and the request's id.
    """

    def __init__(self, request: Request, house: House, dialect: Dialect, caller: Caller) -> None:
        self.request = request
        self.house = house
        self.dialect = dialect
        self.caller = caller

    @property
    def principal(self) -> Principal:
        return self.caller.principal

    async def body(self) -> bytes:
        """All bytes of the body. Raises: TooLarge, TooSlow, ClientGone."""
        options = self.house.options
        told = self.request.headers.get("content-length", "")
        if told.isascii() and told.isdigit() and int(told[:20]) > options.max_body_bytes:
            raise _too_large(options.max_body_bytes)
        parts, size = [], 0
        try:
            async with asyncio.timeout(options.body_timeout_s):
                async for part in self.request.stream():
                    size += len(part)
                    if size > options.max_body_bytes:
                        raise _too_large(options.max_body_bytes)
                    parts.append(part)
        except TimeoutError:
            raise TooSlow(f"the body did not come within {options.body_timeout_s:g} s") from None
        except ClientDisconnect:
            raise ClientGone("the client went before its request was read") from None
        return b"".join(parts)

    async def json(self) -> Any:
        """The body as JSON, whatever its type is called. Raises: InvalidRequest, and as `body`."""
        return await self.parsed(await self.body(), read_json)

    async def read(self, kind: type[Body]) -> Body:
        """The body as a pydantic model. Raises: InvalidRequest with everything that is wrong, and as `body`."""
        return await self.parsed(await self.body(), partial(read_checked, kind))

    async def parsed(self, body: bytes, parse: Callable[[bytes], Parsed]) -> Parsed:
        """What is made of a body; of a large one in a thread. Raises: what that raises, Overloaded."""
        if len(body) <= LARGE_BODY:
            return parse(body)
        return await self.house.reading.run(parse, body, size=len(body))

    async def ask_store(self, question: Callable[..., Found], *values: Any, **named: Any) -> Found:
        """What the store says. Raises: StoreError, Overloaded if too many ask."""
        return await self.house.store_threads.run(partial(question, *values, **named))

    def find(self, name: str | None, *, any_id: bool = False) -> ServedModel:
        """The model of a name. Raises: ModelNotFound."""
        return self.house.models.find(name, any_id=any_id)

    async def begin(self, model: ServedModel, items: Sequence[Item], *, asked_model: str | None = None) -> Run:
        """Admit a request; give the run to `finish`, `answer` or `stream`, which close it.

        Raises: as `Service.begin`, and as `finish`.
        """
        asked = Asked(model, items, self.dialect.name, model.name if asked_model is None else asked_model)
        structlog.contextvars.bind_contextvars(model=model.name)
        async with until_gone(self.request.receive), self._deadline():
            return await self.house.service.begin(self.caller, asked)

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        """Count a request that needs no run, and hold its place. Raises: QuotaExceeded, Overloaded, ClientGone."""
        async with until_gone(self.request.receive), self._deadline():
            with await self.house.service.place(self.caller):
                yield

    async def finish(self, run: Run) -> list[RequestOutput]:
        """Everything that comes, at its end; one output for each prompt. Counts as delivered.

        Raises: EngineError, Overloaded if it takes longer than the server allows, ClientGone.
        """
        try:
            async with until_gone(self.request.receive), self._deadline():
                outputs = await run.outputs()
            run.deliver()
            return outputs
        finally:
            run.close()

    async def answer(
        self,
        run: Run,
        coming: Callable[[], Awaitable[Coming]],
        render: Callable[[Coming], Any],
        num_values: int,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        """What comes of a run, at its end, in JSON. An answer of many values is rendered and written in a thread.

        The run keeps its places until that is done: no more is written together than may run.

        Args:
            coming: the run's `outputs` or `vectors`.
            num_values: numbers in the answer, about.
        Raises: RequestError, and as `finish`.
        """

        def written(came: Coming) -> Response:
            return json_response(render(came), 200, headers, in_parts=True)

        try:
            async with until_gone(self.request.receive), self._deadline():
                came = await coming()
                if num_values <= FEW_VALUES:
                    response = self.reply(render(came), headers=headers)
                else:
                    response = await self.house.writing.run(written, came)
            run.deliver()
            return response
        finally:
            run.close()

    def stream(
        self,
        run: Run,
        chunks: AsyncGenerator[bytes, None],
        *,
        on_failure: Callable[[Failure], bytes],
        media_type: str = "text/event-stream",
    ) -> Response:
        """Send chunks as they come. What fails before the first one is told as it is without a stream, with its status.

        Args:
            chunks: made of `run.events()`; what the model has said when a chunk comes counts as delivered with it.
            on_failure: the last chunk, where something goes wrong on the way.
        """
        return _Stream(self, run, chunks, on_failure, media_type)

    def reply(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        """An answer in JSON."""
        return json_response(content, status, headers)

    def _deadline(self) -> AbstractAsyncContextManager[None]:
        return deadline(self.caller, self.house.options.request_timeout_s)


@asynccontextmanager
async def deadline(caller: Caller, limit_s: float) -> AsyncIterator[None]:
    """Run the body until a request has taken so long since it came. Raises: Overloaded when it has."""
    try:
        async with asyncio.timeout(max(0.0, caller.received_s + limit_s - time.monotonic())):
            yield
    except TimeoutError:
        raise Overloaded(f"the request was not done within {limit_s:g} s; ask for less, or later", 5.0) from None


class _Stream(Response):
    """Chunks as they come; a client that goes, or does not read, ends them."""

    def __init__(
        self,
        call: Call,
        run: Run,
        chunks: AsyncGenerator[bytes, None],
        on_failure: Callable[[Failure], bytes],
        media_type: str,
    ) -> None:
        super().__init__(None, 200, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type)
        del self.headers["content-length"]
        self._call = call
        self._run = run
        self._chunks = chunks
        self._on_failure = on_failure
        self._first: bytes | None = None

    async def begin(self) -> None:
        """Wait for the first chunk. Raises: what fails before it, and ClientGone."""
        try:
            async with until_gone(self._call.request.receive), self._call._deadline():
                self._first = await anext(self._chunks, None)
        except BaseException:
            await self._chunks.aclose()
            self._run.close()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with until_gone(receive):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    async with self._call._deadline(), aclosing(self._chunks) as chunks:
                        if self._first is not None:
                            self._run.deliver()
                            await send({"type": "http.response.body", "body": self._first, "more_body": True})
                        async for chunk in chunks:
                            self._run.deliver()
                            await send({"type": "http.response.body", "body": chunk, "more_body": True})
                except Exception as error:
                    note_failure(error, self._call.caller.request_id)
                    last = self._on_failure(failure_of(error))
                    await send({"type": "http.response.body", "body": last, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            pass
        finally:
            self._run.close()
            self._call.caller.span.end(200)


@asynccontextmanager
async def until_gone(receive: Receive) -> AsyncIterator[None]:
    """Run the body while the client is there. Raises: ClientGone as soon as it goes."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone or task.uncancel() > 0:
            raise
        raise ClientGone("the client went before it was answered") from None
    finally:
        watcher.cancel()


def access(needed: Access) -> Callable[[Handler], Handler]:
    """Say what a route asks of who calls it; without, the route cannot be made."""

    def mark(handler: Handler) -> Handler:
        handler.access = needed  # type: ignore[attr-defined]
        return handler

    return mark


def route_class(house: House, dialect: Dialect) -> type[APIRoute]:
    """The class of a dialect's routes: each call is admitted first, and whatever fails is told in the dialect's way."""

    class Route(APIRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
            if not isinstance(needed := getattr(endpoint, "access", None), Access):
                raise TypeError(f"{path}: {endpoint.__name__} has no @access(…): who may call it?")
            self.access = needed
            self.beginning = path.partition("{")[0]
            super().__init__(path, endpoint, **options)

        def matches(self, scope: Scope) -> tuple[Match, Scope]:
            # Every route is asked for every request; how its path begins tells most of a hundred apart at once.
            if not scope["path"].startswith(self.beginning) and not scope.get("root_path"):
                return Match.NONE, {}
            return super().matches(scope)

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            needed = self.access
            # Most handlers take the call and nothing else: what FastAPI does to find that out costs more than they.
            handle = _direct(self.endpoint) if len(signature(self.endpoint).parameters) == 1 else None
            handle = handle or super().get_route_handler()

            async def guarded(request: Request) -> Response:
                return await _guarded(request, handle, needed, house, dialect)

            return guarded

    return Route


def _direct(handler: Handler) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def handle(request: Request) -> Response:
        return await handler(request.state.call)

    return handle


async def _guarded(
    request: Request,
    handle: Callable[[Request], Coroutine[Any, Any, Response]],
    needed: Access,
    house: House,
    dialect: Dialect,
) -> Response:
    began_s = time.monotonic()
    request_id, route = name_request(request.headers), request.scope["route"].path
    tracing = NO_TRACING if needed is Access.PUBLIC else house.tracing
    span = tracing.begin(dialect.name, request.method, route, request_id, request.headers)
    failure: Failure | None = None
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id, dialect=dialect.name)
    if span.trace_id is not None:
        structlog.contextvars.bind_contextvars(trace_id=span.trace_id)
    try:
        principal = await house.door.admit(needed, request.headers)
        request.state.call = Call(request, house, dialect, Caller(principal, request_id, began_s, span))
        response = await handle(request)
        if isinstance(response, _Stream):
            await response.begin()
    except ClientGone:
        response = Response(status_code=499)  # nobody reads it
    except Exception as error:
        note_failure(error, request_id)
        failure = failure_of(error)
        response = dialect.answer(failure)
    except asyncio.CancelledError:
        span.end(499)
        raise
    if not isinstance(response, _Stream):  # which ends it itself
        span.end(response.status_code)
    response.headers["X-Request-Id"] = request_id
    house.service.metrics.answered(dialect.name, response.status_code)
    if needed is not Access.PUBLIC:
        # Not the path: what a caller writes there could be anything.
        told = (request.method, route, response.status_code)
        _soon(log_answer, time.monotonic() - began_s, failure, "%s %s %d", *told)
    return response


def log_answer(took_s: float, failure: Failure | None, text: str, *values: Any) -> None:
    """The line of a request that has been answered; `failure` is what it was answered with, if so."""
    refused = {} if failure is None else {"refused": failure.kind, "param": _plain(failure.param)}
    # Of who was turned away there may be thousands each second; the metrics count them.
    level = logging.DEBUG if refused.get("refused") in ("Overloaded", "QuotaExceeded") else logging.INFO
    _log.log(level, text, *values, extra={"took_ms": round(1e3 * took_s, 1), **refused})


def _soon(call: Callable[..., None], *values: Any, **more: Any) -> None:
    """Call when what is ready to be sent is on its way: a line of the log takes as long as several tokens."""
    asyncio.get_running_loop().call_soon(partial(call, *values, **more))


async def _the_call(request: Request) -> Call:  # not async, FastAPI would call it in another thread
    call: Call = request.state.call
    return call


TheCall = Annotated[Call, Depends(_the_call)]


def documented(
    asked: type[BaseModel] | Mapping[str, Any] | None, answered: type[BaseModel] | Mapping[str, Any] | None, **more: Any
) -> dict[str, Any]:
    """What the schema says of a route that reads its body itself: pydantic models, or JSON schemas."""
    extra: dict[str, Any] = dict(more.pop("openapi_extra", {}))
    if asked is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _schema(asked)}}}
    responses = dict(more.pop("responses", {}))
    if answered is not None:
        responses[200] = {"description": "Done", "content": {"application/json": {"schema": _schema(answered)}}}
    return {"openapi_extra": extra, "responses": responses, "response_model": None, **more}


def _schema(kind: type[BaseModel] | Mapping[str, Any]) -> dict[str, Any]:
    """A schema that stands by itself: what pydantic keeps aside is put where it is referred to."""
    if isinstance(kind, Mapping):
        return dict(kind)
    schema = kind.model_json_schema()
    aside = schema.pop("$defs", {})

    def whole(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return whole(aside[node["$ref"].rpartition("/")[2]])
            return {key: whole(value) for key, value in node.items()}
        return [whole(value) for value in node] if isinstance(node, list) else node

    found: dict[str, Any] = whole(schema)
    return found


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None, *, in_parts: bool = False
) -> Response:
    """JSON, with its length told; text in it stays readable, and what is no Unicode is escaped.

    Args:
        in_parts: let other threads work meanwhile.
    """
    dumps = dumps_in_parts if in_parts else partial(json.dumps, allow_nan=False, separators=(",", ":"))
    try:
        body = dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        body = dumps(content, ensure_ascii=True).encode()
    return Response(body, status, dict(headers or {}), "application/json")


def read_checked(kind: type[Body], body: bytes) -> Body:
    """JSON as a pydantic model. Raises: as `read_json` and `checked`."""
    return checked(kind, read_json(body))


def read_json(body: bytes) -> Any:
    """What the bytes say in JSON. Raises: InvalidRequest, with the place that is wrong."""
    if not body.strip():
        raise InvalidRequest("the body is empty, expected JSON")
    try:
        if len(body) <= LARGE_BODY:
            return json.loads(body, parse_constant=_no_number, parse_float=_finite)
        return json.loads(_with_few_values(body), parse_constant=_no_number, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the body is no valid {error.encoding}, at byte {error.start}") from None
    except ValueError as error:  # JSONDecodeError, and whole numbers of thousands of digits
        raise InvalidRequest(f"the body is no JSON: {error}") from None


def _with_few_values(body: bytes) -> str:
    """A large body as text, if it has so few values that they are read soon.

    The JSON library lets no other thread work before it is done, unless it calls Python: for numbers, which take the
    longest, it is made to. Of everything else so much could come that all others wait for half a second.

    Raises: InvalidRequest, UnicodeDecodeError.
    """
    text = body.decode(json.detect_encoding(body), "surrogatepass")
    bare = text.replace("\\\\", "").replace('\\"', "")  # without what is escaped each second " ends a text
    if bare.count('"') > 4 * MAX_VALUES:  # a table's entry has four
        raise InvalidRequest(f"the body has more than {MAX_VALUES:,} texts; send fewer at a time")
    outside = "".join(bare.split('"')[::2])
    if outside.count(",") > MAX_VALUES:
        raise InvalidRequest(f"the body has more than {MAX_VALUES:,} values; send fewer at a time")
    if sum(map(outside.count, "[{:")) > MAX_NESTED:
        raise InvalidRequest(f"the body has more than {MAX_NESTED:,} lists, objects and fields; send fewer at a time")
    return text


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


def _whole(text: str) -> int:
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is larger than any number here")
    return value


def checked(kind: type[Body], value: Any) -> Body:
    """The value as a pydantic model. Raises: InvalidRequest with everything that is wrong; its param is the first."""
    _bound_fields(value)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        told = [f"{_place(problem['loc'])}{problem['msg']}{_shown(problem)}" for problem in problems[:MAX_TOLD]]
        if len(problems) > MAX_TOLD:
            told.append(f"and {len(problems) - MAX_TOLD:,} more")
        first = problems[0]["loc"]
        raise InvalidRequest("; ".join(told), str(first[0])[:100] if first else None) from None


def _bound_fields(value: Any) -> None:
    if not isinstance(value, dict):
        return
    if len(value) > MAX_FIELDS:
        raise InvalidRequest(f"the body has {len(value):,} fields, expected at most {MAX_FIELDS}")
    for name, one in value.items():
        if isinstance(one, dict) and len(one) > MAX_TABLE:
            raise InvalidRequest(f"{name[:100]} has {len(one):,} entries, expected at most {MAX_TABLE:,}", name[:100])


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part)[:100] for part in loc) + ": " if loc else ""


def _shown(problem: Any) -> str:
    if problem["type"] in ("missing", "extra_forbidden") or isinstance(problem["input"], dict | list):
        return ""
    return (
        f", got {str(problem['input'])[:80]!r}"
        if isinstance(problem["input"], str)
        else f", got {problem['input']}"[:100]
    )


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit:,} bytes; send less at a time")


def name_request(headers: Mapping[str, str]) -> str:
    """The server's own name of a request; what the caller calls it is kept in front, where that is harmless."""
    own = f"{_names.getrandbits(128):032x}"
    theirs = headers.get("x-request-id", "")
    return f"{theirs}-{own[:12]}" if REQUEST_ID.fullmatch(theirs) else own


def note_failure(error: BaseException, request_id: str) -> None:
    """Log what went wrong: with where, if it is a mistake of ours; why, if only the log is told that."""
    failure = failure_of(error)
    log_reason(error)
    if failure.status >= 500 and not isinstance(error, EngineError) and failure.status not in (501, 503):
        _log.error("request %s failed", request_id, exc_info=error)
    else:
        _log.debug("refused: %s", failure.kind, extra={"status": failure.status, "param": _plain(failure.param)})


def _plain(param: str | None) -> str | None:
    """An option's name, for the log; that of an unknown option is the caller's own text, and could be anything."""
    return param if param is not None and OPTION.fullmatch(param) else None
