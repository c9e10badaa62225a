"""The Open Inference Protocol, KServe's "V2", over HTTP; with Triton's binary tensors, repository and generate calls.

    curl http://127.0.0.1:8000/v2/models/bluejay/infer \
        -d '{"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["Once upon a time"]}]}'

Source: the Open Inference Protocol's REST specification; Triton's extensions binary data, model repository, generate.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr
from starlette.responses import Response

from bluejay import __version__
from bluejay.errors import EngineError, InvalidRequest, UnsupportedOption
from bluejay.server.auth import Access
from bluejay.server.call import Call, Dialect, House, TheCall, access, documented, read_checked, route_class
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
    MAX_DIMS,
    MAX_ELEMENTS,
    MAX_TENSORS,
    Inference,
    Tensor,
    answer_tensors,
    check_stream,
    read_inference,
    read_options,
    tensor_of_bytes,
    tensor_of_values,
)
from bluejay.server.errors import Failure, NotServed, TooLarge
from bluejay.server.generation import Run
from bluejay.server.models import ServedModel

HEADER_LENGTH = "Inference-Header-Content-Length"  # bytes of JSON before the binary tensors
OBJECT = {"type": "object"}


class Input(BaseModel):
    """A tensor that is sent."""

    model_config = ConfigDict(extra="forbid")

    name: StrictStr
    shape: list[StrictInt] = Field(max_length=MAX_DIMS, fail_fast=True)
    datatype: StrictStr
    parameters: dict[str, Any] | None = Field(None, description="binary_data_size: bytes behind the JSON.")
    data: list[Any] | None = Field(
        None, max_length=MAX_ELEMENTS, description="Flat, or nested as the shape says; none for a binary tensor."
    )


class Output(BaseModel):
    """A tensor that is asked for."""

    model_config = ConfigDict(extra="forbid")

    name: StrictStr
    parameters: dict[str, Any] | None = Field(None, description="binary_data: whether it comes as bytes.")


class Infer(BaseModel):
    """An inference. The path names the model; what the body says of that is not read."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    id: StrictStr | None = None
    model_name: str | None = None
    model_version: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="Options of Hugging Face's generate; exclude_prompt, binary_data_output."
    )
    inputs: list[Input] = Field(max_length=MAX_TENSORS, fail_fast=True)
    outputs: list[Output] | None = Field(
        None, max_length=MAX_TENSORS, fail_fast=True, description="None: the answer's text alone."
    )


class Generate(BaseModel):
    """A text to go on from. Fields beside these are options too."""

    model_config = ConfigDict(extra="allow")

    id: StrictStr | None = None
    text_input: StrictStr
    parameters: dict[str, Any] | None = None


class Index(BaseModel):
    """Which models to list."""

    model_config = ConfigDict(extra="ignore")  # Triton's clients may name a repository; there is one

    ready: bool = False


class Load(BaseModel):
    """How to load or unload."""

    model_config = ConfigDict(extra="forbid")

    parameters: dict[str, Any] | None = None


def render(failure: Failure) -> Any:
    """The protocol's error."""
    return {"error": failure.message}


DIALECT = Dialect("open_inference", render)


def routes(house: House) -> APIRouter:
    """Everything here. What has a longer path stands before what would take it for a model's name."""
    router = APIRouter(route_class=route_class(house, DIALECT), tags=["Open Inference"])
    router.get("/v2", summary="What the server is", **documented(None, OBJECT))(server)
    router.get("/v2/health/live", summary="Whether it lives", **documented(None, OBJECT))(live)
    router.get("/v2/health/ready", summary="Whether it takes requests", **documented(None, OBJECT))(ready)
    router.get("/v2/models", summary="All models", **documented(None, OBJECT))(models)
    listed = {"type": "array"}
    router.post("/v2/repository/index", summary="All models, and their state", **documented(Index, listed))(index)
    model = "/v2/repository/models/{model:path}"
    router.post(f"{model}/load", summary="Load a model", **documented(Load, OBJECT))(load)
    router.post(f"{model}/unload", summary="Unload a model", **documented(Load, OBJECT))(unload)
    for path in ("/v2/models/{model:path}/versions/{version}", "/v2/models/{model:path}"):
        router.post(f"{path}/infer", summary="Infer", **documented(Infer, OBJECT))(infer)
        router.post(f"{path}/generate", summary="Go on from a text", **documented(Generate, OBJECT))(generate)
        router.post(f"{path}/generate_stream", summary="… as it comes", **documented(Generate, None))(generate_stream)
        router.get(f"{path}/ready", summary="Whether a model is ready", **documented(None, OBJECT))(model_ready)
        for name in ("config", "stats"):
            router.get(f"{path}/{name}", include_in_schema=False, **documented(None, None))(not_served)
    for path in ("/v2/models/{model:path}/versions/{version}", "/v2/models/{model:path}"):
        router.get(path, summary="What a model takes and gives", **documented(None, OBJECT))(metadata)
    return router


@access(Access.USER)
async def server(call: TheCall) -> Response:
    """Name, version, extensions."""
    return call.reply({"name": PLATFORM, "version": __version__, "extensions": list(EXTENSIONS)})


@access(Access.PUBLIC)
async def live(call: TheCall) -> Response:
    """The event loop turns."""
    return call.reply({"live": True})


@access(Access.PUBLIC)
async def ready(call: TheCall) -> Response:
    """All models are ready, and the server is not about to end; 503 while not."""
    is_ready = call.house.models.ready and not call.house.life.draining
    return call.reply({"ready": is_ready}, 200 if is_ready else 503)


@access(Access.USER)
async def models(call: TheCall) -> Response:
    """Names."""
    return call.reply({"models": [model.name for model in call.house.models]})


@access(Access.USER)
async def metadata(call: TheCall) -> Response:
    """Tensors of a model; -1 is any size."""
    return call.reply(model_metadata(_model(call)))


@access(Access.USER)
async def model_ready(call: TheCall) -> Response:
    """503 while it is not."""
    model = _model(call)
    return call.reply({"name": model.name, "ready": model.ready}, 200 if model.ready else 503)


@access(Access.USER)
async def not_served(call: TheCall) -> Response:
    """Triton's own; the metrics and the settings of this server are elsewhere."""
    raise NotServed(f"{call.request.url.path} is not served; metrics are at /metrics")


@access(Access.USER)
async def index(call: TheCall) -> Response:
    """All models, or those that are ready."""
    body = await call.body()
    asked = await call.parsed(body, partial(read_checked, Index)) if body.strip() else Index()
    return call.reply([state_of(model) for model in call.house.models if model.ready or not asked.ready])


@access(Access.ADMIN)
async def load(call: TheCall) -> Response:
    """Returns when it is ready."""
    model = await _repository_model(call)
    await load_model(model)
    return call.reply({"name": model.name, "load": True})


@access(Access.ADMIN)
async def unload(call: TheCall) -> Response:
    """Ends what it is working on."""
    model = await _repository_model(call)
    await model.unload()
    return call.reply({"name": model.name, "unload": True})


@access(Access.USER)
async def infer(call: TheCall) -> Response:
    """Tensors in, tensors out; either may be binary."""
    model = _model(call)
    length = call.request.headers.get(HEADER_LENGTH)

    def read(body: bytes) -> tuple[Infer, bool, Inference]:
        asked, raw = split(body, length)
        parameters = dict(asked.parameters or {})
        all_binary = _flag(parameters.pop("binary_data_output", None), "binary_data_output")
        names = [output.name for output in asked.outputs or []]
        return asked, all_binary, read_inference(_tensors(asked.inputs, raw), parameters, names, model.options.defaults)

    asked, all_binary, inference = await call.parsed(await _body(call), read)
    if inference.stream:
        raise UnsupportedOption("stream is true, and infer answers once; generate_stream and gRPC stream", "stream")
    binary = {output.name: _is_binary(output, all_binary) for output in asked.outputs or []}
    tokenizer, _ = model.opened()
    run = await call.begin(model, inference.items(call.house.options), asked_model=call.request.path_params["model"])
    tensors = answer_tensors(inference, await call.finish(run), tokenizer)
    return _reply(
        call, model, _head(asked, model), tensors, [binary.get(tensor.name, all_binary) for tensor in tensors]
    )


@access(Access.USER)
async def generate(call: TheCall) -> Response:
    """One answer is a text, several are a list."""
    model, asked, inference = await _generate(call)
    if inference.stream:
        raise InvalidRequest("stream is true, and this call answers once; use generate_stream", "stream")
    tokenizer, _ = model.opened()
    run = await call.begin(model, inference.items(call.house.options), asked_model=call.request.path_params["model"])
    tensors = answer_tensors(inference, await call.finish(run), tokenizer)
    told = {tensor.name: tensor.values[0] if len(tensor.values) == 1 else tensor.values for tensor in tensors}
    return call.reply({**_head(asked, model), **told}, headers={"X-Served-Model": model.name})


@access(Access.USER)
async def generate_stream(call: TheCall) -> Response:
    """Events with the next piece of the answer each; with `stream` false one with all of it."""
    model, asked, inference = await _generate(call)
    check_stream(inference)
    run = await call.begin(model, inference.items(call.house.options), asked_model=call.request.path_params["model"])

    async def whole() -> AsyncGenerator[bytes, None]:
        tokenizer, _ = model.opened()
        tensors = answer_tensors(inference, await run.outputs(), tokenizer)
        told = {tensor.name: tensor.values[0] if len(tensor.values) == 1 else tensor.values for tensor in tensors}
        yield _event({**_head(asked, model), **told})

    chunks = whole() if inference.stream is False else _pieces(run, inference, _head(asked, model))
    return call.stream(run, chunks, on_failure=lambda failure: _event(render(failure)))


def split(body: bytes, header_length: str | None) -> tuple[Infer, bytes]:
    """A body's JSON, and the binary tensors behind it. Raises: InvalidRequest."""
    length = len(body)
    if header_length is not None:
        text = header_length.strip()
        if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= length):
            raise InvalidRequest(
                f"{HEADER_LENGTH} is {text[:40]!r}, expected a number of bytes, at most the {length:,} of the body",
                HEADER_LENGTH,
            )
        length = int(text)
    return read_checked(Infer, body[:length]), body[length:]


def _tensors(inputs: Sequence[Input], raw: bytes) -> list[Tensor]:
    """All tensors of a request; binary ones are taken from `raw` in their order. Raises: InvalidRequest."""
    tensors, place = [], 0
    for given in inputs:
        size = (given.parameters or {}).get("binary_data_size")
        if unknown := set(given.parameters or {}) - {"binary_data_size"}:
            raise InvalidRequest(
                f"input {given.name[:100]!r} has the parameter {min(unknown)[:100]!r}; expected none but "
                "binary_data_size",
                "inputs",
            )
        if (size is None) == (given.data is None):
            both = "neither data nor" if size is None else "both data and"
            raise InvalidRequest(f"input {given.name[:100]!r} has {both} binary_data_size; it needs one", "inputs")
        if given.data is not None:
            values = _flat(given.data, len(given.shape))
            tensors.append(tensor_of_values(given.name, given.datatype, given.shape, values))
            continue
        if type(size) is not int or not 0 <= size <= len(raw) - place:
            raise InvalidRequest(
                f"input {given.name[:100]!r}: binary_data_size is {str(size)[:40]}, and {len(raw) - place:,} bytes are "
                f"left behind the JSON, whose length the header {HEADER_LENGTH} tells",
                "inputs",
            )
        tensors.append(tensor_of_bytes(given.name, given.datatype, given.shape, raw[place : place + size]))
        place += size
    if place != len(raw):
        raise InvalidRequest(f"{len(raw) - place:,} bytes behind the JSON belong to no input", "inputs")
    return tensors


def _flat(data: list[Any], num_dims: int) -> list[Any]:
    """Nested lists as one, down to the shape's depth; what is nested deeper is no value of any datatype."""
    for _ in range(num_dims - 1):
        if data and all(isinstance(row, list) for row in data):
            data = [value for row in data for value in row]
    return data


def _reply(
    call: Call, model: ServedModel, head: Mapping[str, Any], tensors: Sequence[Tensor], binary: Sequence[bool]
) -> Response:
    """The answer in JSON, with what is to be binary behind it."""
    outputs, blobs = [], []
    for tensor, is_binary in zip(tensors, binary, strict=True):
        told = {"name": tensor.name, "shape": list(tensor.shape), "datatype": tensor.datatype}
        if is_binary:
            blobs.append(tensor.raw())
            outputs.append({**told, "parameters": {"binary_data_size": len(blobs[-1])}})
        else:
            outputs.append({**told, "data": list(tensor.values)})
    response = call.reply({**head, "outputs": outputs}, headers={"X-Served-Model": model.name})
    if not blobs:
        return response
    headers = {HEADER_LENGTH: str(len(response.body)), "X-Served-Model": model.name}
    return Response(b"".join((bytes(response.body), *blobs)), 200, headers, "application/octet-stream")


def _is_binary(output: Output, otherwise: bool) -> bool:
    parameters = output.parameters or {}
    if unknown := set(parameters) - {"binary_data"}:
        raise InvalidRequest(
            f"output {output.name[:100]!r} has the parameter {min(unknown)[:100]!r}; expected none but binary_data",
            "outputs",
        )
    return _flag(parameters["binary_data"], "binary_data") if "binary_data" in parameters else otherwise


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool | None):
        raise InvalidRequest(f"{name} is {str(value)[:80]!r}, expected true or false", name)
    return bool(value)


async def _generate(call: Call) -> tuple[ServedModel, Generate, Inference]:
    """What `generate` and `generate_stream` ask for."""
    model = _model(call)
    asked = await call.parsed(await _body(call), partial(read_checked, Generate))
    chosen = dict(asked.parameters or {})
    for name, value in (asked.model_extra or {}).items():
        if name in chosen:
            raise InvalidRequest(f"{name[:100]} is told twice, in parameters and beside them", name[:100])
        chosen[name] = value
    flags, params = read_options(chosen, model.options.defaults)
    return model, asked, Inference([asked.text_input], False, params, *flags, ("text_output", "finish_reason"))


async def _pieces(run: Run, asked: Inference, head: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
    """What comes, as it comes; `index` tells several answers apart."""
    several = asked.params.num_return_sequences > 1
    async with aclosing(run.events()) as events:
        async for event in events:
            if event.error is not None:
                raise EngineError(event.error)
            if not event.text and event.finish_reason is None:
                continue
            told = {**head, **({"index": event.index} if several else {}), "text_output": event.text}
            end = {} if event.finish_reason is None else {"finish_reason": str(event.finish_reason)}
            yield _event({**told, **end})


def _head(asked: Infer | Generate, model: ServedModel) -> dict[str, Any]:
    head = {"model_name": model.name, "model_version": VERSION}
    return head if asked.id is None else {**head, "id": asked.id}


def _event(told: Any) -> bytes:
    return b"data: " + json.dumps(told, ensure_ascii=False).encode(errors="replace") + b"\n\n"


def _model(call: Call) -> ServedModel:
    """The model of a path, in the version that there is."""
    model = call.find(call.request.path_params["model"])
    check_version(model, call.request.path_params.get("version", ""))
    return model


async def _repository_model(call: Call) -> ServedModel:
    """The model to load or unload; there is nothing to say of how."""
    model = call.find(call.request.path_params["model"])
    body = await call.body()
    asked = await call.parsed(body, partial(read_checked, Load)) if body.strip() else Load()
    check_load(asked.parameters or {})
    return model


async def _body(call: Call) -> bytes:
    """The body, as it was before it was compressed. Raises: InvalidRequest, TooLarge, and as `Call.body`."""
    body, encoding = await call.body(), call.request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("identity", ""):
        return body
    if encoding not in ("gzip", "deflate"):
        raise InvalidRequest(
            f"Content-Encoding is {encoding[:40]!r}, expected gzip, deflate or none", "Content-Encoding"
        )
    limit = call.house.options.max_body_bytes
    inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: by its first bytes, gzip or zlib
    try:
        inflated = inflate.decompress(body, limit + 1)
    except zlib.error:
        raise InvalidRequest(f"the body is not the {encoding} that Content-Encoding says", "Content-Encoding") from None
    if len(inflated) > limit:
        raise TooLarge(f"the body is larger than {limit:,} bytes when inflated; send less at a time")
    if not inflate.eof or inflate.unused_data:
        raise InvalidRequest(f"the body's {encoding} ends too early or too late", "Content-Encoding")
    return inflated
