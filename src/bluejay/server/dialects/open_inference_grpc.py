"""The Open Inference Protocol over gRPC: the service inference.GRPCInferenceService, on a port of its own.

Calls go the way of those over HTTP: the same keys (metadata `authorization` or `x-api-key`), plans, queue and ledger.
Raw contents are answered by raw contents. A parameter may travel as text: gRPC's of the protocol know no floats.

Source: the Open Inference Protocol's gRPC specification; ModelStreamInfer and RepositoryIndex are Triton's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from grpc import StatusCode

from bluejay import __version__
from bluejay.engine.request import RequestOutput
from bluejay.errors import ConfigError, EngineError, InvalidRequest, Stopped, UnsupportedOption
from bluejay.server.auth import Access, Principal
from bluejay.server.call import MAX_TABLE, House, deadline, log_answer, name_request, note_failure
from bluejay.server.dialects.open_inference_messages import MESSAGES, RECEIVED, SERVICE
from bluejay.server.dialects.open_inference_models import (
    EXTENSIONS,
    PLATFORM,
    VERSION,
    check_load,
    check_version,
    load_model,
    model_metadata,
    state_of,
)
from bluejay.server.dialects.open_inference_tensors import (
    MAX_TENSORS,
    Inference,
    Tensor,
    answer_tensors,
    check_stream,
    parsed,
    piece_tensors,
    read_inference,
    tensor_of_bytes,
    tensor_of_values,
)
from bluejay.server.errors import Failure, TooSlow, failure_of
from bluejay.server.generation import Asked, Caller, Run
from bluejay.server.models import ServedModel
from bluejay.server.tracing import NO_TRACING, Span

NAME = "open_inference_grpc"  # in metrics, logs and the ledger
ENVELOPE_BYTES = 64 * 1024  # of a message, beside what would be the body over HTTP
MAX_DETAILS = 1000  # characters; details travel in a header, of which clients take 8 kB
POLL_S = 0.25  # how soon an idle stream notices that the server is about to end
CODES = {
    400: StatusCode.INVALID_ARGUMENT,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.NOT_FOUND,
    408: StatusCode.DEADLINE_EXCEEDED,
    413: StatusCode.RESOURCE_EXHAUSTED,
    429: StatusCode.RESOURCE_EXHAUSTED,
    499: StatusCode.CANCELLED,
    501: StatusCode.UNIMPLEMENTED,
    503: StatusCode.UNAVAILABLE,
}
# Where values of a datatype are, if they are not raw.
CONTENTS = {
    "BYTES": "bytes_contents",
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}

Context = Any  # grpc.aio.ServicerContext, of a package without types


@dataclass(frozen=True)
class GrpcCall:
    """One call: who calls, and what the house has."""

    house: House
    caller: Caller

    def find(self, name: str, version: str = "") -> ServedModel:
        """The model of a name; none is the only one. Raises: ModelNotFound."""
        model = self.house.models.find(name or None)
        check_version(model, version)
        return model

    async def begin(self, model: ServedModel, asked: Inference, asked_model: str) -> Run:
        """Admit a request. Raises: as `Service.begin`."""
        structlog.contextvars.bind_contextvars(model=model.name)
        items = asked.items(self.house.options)
        return await self.house.service.begin(self.caller, Asked(model, items, NAME, asked_model or model.name))

    async def finish(self, run: Run) -> list[RequestOutput]:
        """Everything that comes, at its end. Raises: EngineError, Overloaded if it takes too long."""
        try:
            async with deadline(self.caller, self.house.options.request_timeout_s):
                outputs = await run.outputs()
            run.deliver()
            return outputs
        finally:
            run.close()


Handle = Callable[[GrpcCall, Any], Awaitable[Mapping[str, Any]]]


class GrpcServer:
    """Serves a house over gRPC, in the loop that runs."""

    def __init__(self, house: House) -> None:
        self._house = house
        options = house.options
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=options.max_connections,
            options=(
                ("grpc.max_allowed_incoming_connections", options.max_connections),
                ("grpc.max_receive_message_length", options.max_body_bytes + ENVELOPE_BYTES),
                ("grpc.so_reuseport", 0),  # two servers on one port would each get some of the calls
                # Only plain messages: a compressed one is bounded before it is inflated, not after.
                ("grpc.compression_enabled_algorithms_bitset", 1),
                ("grpc.server_handshake_timeout_ms", int(1e3 * options.header_timeout_s)),
                ("grpc.max_connection_idle_ms", int(1e3 * options.idle_timeout_s)),
                ("grpc.keepalive_time_ms", int(1e3 * options.idle_timeout_s)),  # finds out who went without a word
                ("grpc.keepalive_timeout_ms", int(1e3 * options.write_timeout_s)),
            ),
        )
        unary = {
            name: grpc.unary_unary_rpc_method_handler(self._unary(name, needed, handle))
            for name, (needed, handle) in METHODS.items()
        }
        stream = {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {**unary, **stream}),))

    def listen(self) -> str:
        """Take the port; the host and port that reach it. Raises: ConfigError if it is taken or not ours to take."""
        host, port = self._house.options.host, self._house.options.grpc_port
        host = f"[{host}]" if ":" in host else host
        try:
            return f"{host}:{self._server.add_insecure_port(f'{host}:{port}')}"
        except RuntimeError:
            raise ConfigError(
                f"cannot listen for gRPC on {host} port {port}, which is taken or not ours to take; choose another: "
                "--grpc-port N, or none: --grpc-port -1"
            ) from None

    async def start(self) -> None:
        """Begin to answer."""
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Take no further calls, and let those that run have so long."""
        await self._server.stop(grace_s)

    def _unary(self, name: str, needed: Access, handle: Handle) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def serve(data: bytes, context: Context) -> bytes:
            headers = _headers(context)
            opened = self._open(name, needed, headers)
            try:
                principal = await self._house.door.admit(needed, headers)
                call = GrpcCall(self._house, opened.caller(principal))
                told = await handle(call, _read(f"{name}Request", data))
                answer: bytes = MESSAGES[f"{name}Response"](**told).SerializeToString()
            except Exception as error:
                failure = self._note(error, opened)
            except asyncio.CancelledError:
                opened.span.end(499)
                raise
            else:
                context.set_trailing_metadata((("x-request-id", opened.request_id),))
                self._answered(opened, 200)
                return answer
            await _abort(context, failure, opened.request_id)
            return b""  # not reached: an abort raises

        return serve

    async def _stream(self, _: Any, context: Context) -> None:
        """ModelStreamInfer: one request after the other; what is wrong with one is told, and the next one read."""
        headers = _headers(context)
        opened = self._open("ModelStreamInfer", Access.USER, headers, traced=False)  # each of its requests is
        try:
            principal = await self._house.door.admit(Access.USER, headers)
            while (data := await self._next(context)) is not None:
                one = self._open("ModelStreamInfer", Access.USER, headers)
                async with aclosing(self._answers(one, principal, data)) as answers:
                    async for answer in answers:
                        await self._write(context, answer)
        except Exception as error:
            failure = self._note(error, opened)
        else:
            return
        await _abort(context, failure, opened.request_id)

    async def _next(self, context: Context) -> bytes | None:
        """The next message of a stream; None at its end. Raises: TooSlow, Stopped."""
        reading = asyncio.ensure_future(context.read())
        until_s = time.monotonic() + self._house.options.idle_timeout_s
        try:
            while not reading.done():
                await asyncio.wait([reading], timeout=POLL_S)
                if not reading.done() and self._house.life.draining:
                    raise Stopped("the server is about to end")
                if not reading.done() and time.monotonic() > until_s:
                    raise TooSlow(f"no request came for {self._house.options.idle_timeout_s:g} s")
        finally:
            reading.cancel()
        data = reading.result()
        return None if data is grpc.aio.EOF else bytes(data)

    async def _write(self, context: Context, answer: Mapping[str, Any]) -> None:
        limit_s = self._house.options.write_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await context.write(MESSAGES["ModelStreamInferResponse"](**answer).SerializeToString())
        except TimeoutError:
            raise TooSlow(f"what was answered was not read within {limit_s:g} s") from None

    async def _answers(
        self, opened: _Opened, principal: Principal, data: bytes
    ) -> AsyncGenerator[Mapping[str, Any], None]:
        """What answers one request of a stream."""
        told_id, call = "", GrpcCall(self._house, opened.caller(principal))
        try:
            asked = _read("ModelInferRequest", data)
            told_id = asked.id
            async with aclosing(_stream_infer(call, asked)) as answers:
                async for answer in answers:
                    yield {"infer_response": answer}
        except Exception as error:
            failure = self._note(error, opened)
            yield {"error_message": failure.message[:MAX_DETAILS], "infer_response": {"id": told_id}}
        except (asyncio.CancelledError, GeneratorExit):  # the client went, or does not read
            opened.span.end(499)
            raise
        else:
            self._answered(opened, 200)

    def _open(self, name: str, needed: Access, headers: Mapping[str, str], *, traced: bool = True) -> _Opened:
        """Name a request that has come, and begin to tell of it in logs and traces."""
        request_id = name_request(headers)
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id, dialect=NAME)
        tracing = self._house.tracing if traced and needed is not Access.PUBLIC else NO_TRACING
        span = tracing.begin(NAME, "POST", f"/{SERVICE}/{name}", request_id, headers)  # what HTTP/2 sees of it
        if span.trace_id is not None:
            structlog.contextvars.bind_contextvars(trace_id=span.trace_id)
        return _Opened(name, needed, request_id, span)

    def _note(self, error: Exception, opened: _Opened) -> Failure:
        note_failure(error, opened.request_id)
        failure = failure_of(error)
        self._answered(opened, failure.status, failure)
        return failure

    def _answered(self, opened: _Opened, status: int, failure: Failure | None = None) -> None:
        """A request has ended, with what would be its status over HTTP."""
        opened.span.end(status)
        self._house.service.metrics.answered(NAME, status)
        if opened.needed is not Access.PUBLIC:
            log_answer(time.monotonic() - opened.began_s, failure, "%s %d", opened.name, status)


@dataclass(frozen=True)
class _Opened:
    """A request that has come, and was not yet answered."""

    name: str
    needed: Access
    request_id: str
    span: Span
    began_s: float = field(default_factory=time.monotonic)

    def caller(self, principal: Principal) -> Caller:
        return Caller(principal, self.request_id, self.began_s, self.span)


def _headers(context: Context) -> dict[str, str]:
    """A call's metadata, less what is no text."""
    pairs = context.invocation_metadata() or ()
    return {key.lower(): value for key, value in pairs if isinstance(value, str)}


async def _abort(context: Context, failure: Failure, request_id: str) -> None:
    """End a call with what went wrong, by an exception of gRPC's."""
    trailing = [(name.lower(), value) for name, value in failure.headers.items()]
    code = CODES.get(failure.status, StatusCode.INTERNAL)
    await context.abort(code, failure.message[:MAX_DETAILS], (*trailing, ("x-request-id", request_id)))


def _read(name: str, data: bytes) -> Any:
    """A message. Raises: InvalidRequest where the bytes are none."""
    try:
        return RECEIVED[name].FromString(data)
    except DecodeError:
        raise InvalidRequest(f"the message is no {name}") from None


async def _server_live(call: GrpcCall, asked: Any) -> Mapping[str, Any]:
    return {"live": True}


async def _server_ready(call: GrpcCall, asked: Any) -> Mapping[str, Any]:
    return {"ready": call.house.models.ready and not call.house.life.draining}


async def _model_ready(call: GrpcCall, asked: Any) -> Mapping[str, Any]:
    return {"ready": call.find(asked.name, asked.version).ready}


async def _server_metadata(call: GrpcCall, asked: Any) -> Mapping[str, Any]:
    return {"name": PLATFORM, "version": __version__, "extensions": EXTENSIONS}


async def _model_metadata(call: GrpcCall, asked: Any) -> Mapping[str, Any]:
    return model_metadata(call.find(asked.name, asked.version))


async def _model_infer(call: GrpcCall, asked: Any) -> Mapping[str, Any]:
    model = call.find(asked.model_name, asked.model_version)
    parameters = _options(asked)
    raw = _is_raw(asked, parameters)
    inference = _inference(asked, parameters, model)
    if inference.stream:
        raise UnsupportedOption("stream is true, and ModelInfer answers once; use ModelStreamInfer", "stream")
    tokenizer, _ = model.opened()
    run = await call.begin(model, inference, asked.model_name)
    return _answer(model, asked, answer_tensors(inference, await call.finish(run), tokenizer), raw)


async def _stream_infer(call: GrpcCall, asked: Any) -> AsyncGenerator[Mapping[str, Any], None]:
    """One answer, or with `stream` its pieces; the last one says so.

    Triton's clients may ask for an empty one at the end, which alone says so.
    """
    model = call.find(asked.model_name, asked.model_version)
    parameters = _options(asked)
    empty_end = parameters.pop("triton_enable_empty_final_response", False) is True
    raw = _is_raw(asked, parameters)
    inference = _inference(asked, parameters, model)
    if inference.stream:
        check_stream(inference)
    tokenizer, _ = model.opened()
    run = await call.begin(model, inference, asked.model_name)
    if inference.stream:
        async with aclosing(_pieces(call, run, inference)) as pieces:
            async for tensors, index, is_last in pieces:
                marks: dict[str, dict[str, Any]] = {"triton_final_response": {"bool_param": is_last and not empty_end}}
                if len(inference.prompts) * inference.params.num_return_sequences > 1:
                    marks["index"] = {"int64_param": index}
                yield _answer(model, asked, tensors, raw, marks)
    else:
        tensors = answer_tensors(inference, await call.finish(run), tokenizer)
        yield _answer(model, asked, tensors, raw, {"triton_final_response": {"bool_param": not empty_end}})
    if empty_end:
        yield _answer(model, asked, [], raw, {"triton_final_response": {"bool_param": True}})


async def _pieces(call: GrpcCall, run: Run, asked: Inference) -> AsyncGenerator[tuple[list[Tensor], int, bool], None]:
    """Tensors of each piece, the number of its answer, and whether it is the last of all."""
    answers = asked.params.num_return_sequences
    left = len(asked.prompts) * answers
    try:
        async with deadline(call.caller, call.house.options.request_timeout_s), aclosing(run.events()) as events:
            async for event in events:
                if event.error is not None:
                    raise EngineError(event.error)
                left -= event.finish_reason is not None
                if tensors := piece_tensors(asked, event):
                    run.deliver()
                    yield tensors, event.request * answers + event.index, left == 0
        run.deliver()
    finally:
        run.close()


async def _repository_index(call: GrpcCall, asked: Any) -> Mapping[str, Any]:
    return {"models": [state_of(model) for model in call.house.models if model.ready or not asked.ready]}


async def _load(call: GrpcCall, asked: Any) -> Mapping[str, Any]:
    model = _repository_model(call, asked)
    await load_model(model)
    return {"model_name": model.name, "isLoaded": True}


async def _unload(call: GrpcCall, asked: Any) -> Mapping[str, Any]:
    model = _repository_model(call, asked)
    await model.unload()
    return {"model_name": model.name, "isUnloaded": True}


METHODS: dict[str, tuple[Access, Handle]] = {
    "ServerLive": (Access.PUBLIC, _server_live),
    "ServerReady": (Access.PUBLIC, _server_ready),
    "ModelReady": (Access.USER, _model_ready),
    "ServerMetadata": (Access.USER, _server_metadata),
    "ModelMetadata": (Access.USER, _model_metadata),
    "ModelInfer": (Access.USER, _model_infer),
    "RepositoryIndex": (Access.USER, _repository_index),
    "RepositoryModelLoad": (Access.ADMIN, _load),
    "RepositoryModelUnload": (Access.ADMIN, _unload),
}


def _repository_model(call: GrpcCall, asked: Any) -> ServedModel:
    """The model to load or unload. In KServe's message its name has the number that Triton's repository has."""
    check_load(_keyed(asked.parameters))
    if not (name := asked.model_name or asked.repository_name):
        raise InvalidRequest("model_name is empty, expected the name of a model", "model_name")
    return call.find(name)


def _options(asked: Any) -> dict[str, Any]:
    """A request's parameters. Raises: InvalidRequest, also for more tensors than one request may have."""
    for name in ("inputs", "outputs", "raw_input_contents"):
        if (count := len(getattr(asked, name))) > MAX_TENSORS:
            raise InvalidRequest(f"there are {count:,} {name}, expected at most {MAX_TENSORS:,}", name)
    return _values(asked.parameters)


def _inference(asked: Any, parameters: Mapping[str, Any], model: ServedModel) -> Inference:
    return read_inference(
        _tensors(asked), parameters, [output.name for output in asked.outputs], model.options.defaults
    )


def _tensors(asked: Any) -> list[Tensor]:
    """All tensors of a request. Raises: InvalidRequest."""
    raw: Sequence[bytes] = asked.raw_input_contents
    if raw and len(raw) != len(asked.inputs):
        raise InvalidRequest(
            f"there are {len(raw):,} raw_input_contents for {len(asked.inputs):,} inputs; expected one for each, or "
            "none at all",
            "raw_input_contents",
        )
    tensors = []
    for place, given in enumerate(asked.inputs):
        _check_input(given, len(raw[place]) if raw else None)
        if raw and given.HasField("contents"):
            raise InvalidRequest(f"input {given.name[:100]!r} has contents beside raw_input_contents", "inputs")
        told = (given.name, given.datatype, given.shape)
        if raw:
            tensors.append(tensor_of_bytes(*told, raw[place]))
        else:
            field = CONTENTS.get(given.datatype)
            tensors.append(tensor_of_values(*told, [] if field is None else getattr(given.contents, field)))
    return tensors


def _check_input(given: Any, num_raw_bytes: int | None) -> None:
    """Raises: InvalidRequest for parameters of an input that say anything but what is known."""
    for name, value in _values(given.parameters).items():
        if name != "binary_data_size":  # which KServe's client sends beside raw contents
            raise InvalidRequest(f"input {given.name[:100]!r} has a parameter {name[:100]!r}, expected none", "inputs")
        if value != num_raw_bytes:
            raise InvalidRequest(
                f"input {given.name[:100]!r}: binary_data_size is {str(value)[:40]}, the raw contents have "
                f"{num_raw_bytes or 0:,} bytes",
                "inputs",
            )


def _keyed(parameters: Sequence[Any]) -> dict[str, Any]:
    """Parameters by name, the last of each as the protocol has it. Raises: InvalidRequest if there are too many."""
    if len(parameters) > MAX_TABLE:
        raise InvalidRequest(f"there are {len(parameters):,} parameters, expected at most {MAX_TABLE:,}", "parameters")
    return {entry.key: entry.value for entry in parameters}


def _values(parameters: Sequence[Any]) -> dict[str, Any]:
    """Parameters by name; what travels as text has the type of its option. Raises: InvalidRequest."""
    values = {}
    for name, parameter in _keyed(parameters).items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest(f"the parameter {name[:100]} has no value", name[:100])
        value = getattr(parameter, kind)
        values[name] = parsed(name, value) if kind == "string_param" else value
    return values


def _is_raw(asked: Any, parameters: dict[str, Any]) -> bool:
    """Whether the answer's tensors are raw: as told, else as those of the request are. Takes what tells it."""
    told = [parameters.pop("binary_data_output")] if "binary_data_output" in parameters else []
    for output in asked.outputs:
        for name, value in _values(output.parameters).items():
            if name != "binary_data":
                raise InvalidRequest(
                    f"output {output.name[:100]!r} has the parameter {name[:100]!r}; expected none but binary_data",
                    "outputs",
                )
            told.append(value)
    if any(type(value) is not bool for value in told):
        raise InvalidRequest("binary_data_output and binary_data are true or false", "binary_data")
    return any(told) if told else len(asked.raw_input_contents) > 0


def _answer(
    model: ServedModel,
    asked: Any,
    tensors: Sequence[Tensor],
    raw: bool,
    marks: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """A ModelInferResponse; either all its tensors are raw or none."""
    outputs: list[dict[str, Any]] = []
    for tensor in tensors:
        outputs.append({"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape})
        if not raw:
            is_text = tensor.datatype == "BYTES"
            values = [text.encode(errors="replace") for text in tensor.values] if is_text else tensor.values
            outputs[-1]["contents"] = {CONTENTS[tensor.datatype]: values}
    return {
        "model_name": model.name,
        "model_version": VERSION,
        "id": asked.id,
        "outputs": outputs,
        "raw_output_contents": [tensor.raw() for tensor in tensors] if raw else [],
        "parameters": {name: MESSAGES["InferParameter"](**mark) for name, mark in (marks or {}).items()},
    }
