"""Neuro's API, as its client `npu` speaks it: predictions at once, predictions as tasks, uploaded data.

    curl -d '{"modelId": "60ca2a1e54f6ecb69867c72c", "data": "When I visit Bath I will"}' \
        http://127.0.0.1:8000/SyncPredict?include_result=True

Source: the package npu 0.3.900, Neuro's documents of its models, its examples.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt
from starlette.responses import PlainTextResponse, Response

from bluejay.decoding.params import SamplingParams
from bluejay.engine.request import RequestOutput
from bluejay.errors import InvalidRequest, UnsupportedOption
from bluejay.server.auth import Access
from bluejay.server.call import (
    MAX_FIELDS,
    Call,
    Dialect,
    House,
    TheCall,
    access,
    checked,
    documented,
    read_checked,
    read_json,
    route_class,
)
from bluejay.server.errors import Failure, NoSuchThing, NotServed
from bluejay.server.generation import Asked, Item
from bluejay.server.jobs import JobState, Work
from bluejay.server.models import ServedModel
from bluejay.server.multipart import is_form, read_form
from bluejay.server.npz import digest_of_chunks, is_npz, read_texts
from bluejay.server.options import ServerOptions
from bluejay.server.sampling import known_only, refuse_untold, sampling_params, split_known

# The model's config: it draws, and 50 tokens with the prompt are its default.
DEFAULTS = {"do_sample": True, "max_length": 50}
OWN_NAMES = {"penalty": "repetition_penalty", "response_length": "max_new_tokens"}
OPEN_PROJECT = "0" * 24
MAX_NAMES = 16  # that one upload may have
HASH = re.compile(r"[0-9a-fA-F]{32}")  # MD5
STATES = {
    JobState.QUEUED: "PENDING",
    JobState.RUNNING: "RUNNING",
    JobState.DONE: "COMPLETE",
    JobState.FAILED: "FAILURE",
    JobState.EXPIRED: "FAILURE",
    JobState.CANCELLED: "STOPPED",
}
NO_TRAINING = "training is not part of this API here: `bluejay train` does it"
NO_MODELS = "models are not uploaded, compiled or exported over this API: the server's operator names what it serves"

RESULT = {"type": "object", "required": ["state"]}
TASK = {"type": "object", "required": ["state", "taskType", "progress"]}


class Asking(BaseModel):
    """What every prediction says; the client's names."""

    model_config = ConfigDict(extra="forbid")

    model_id: str | None = Field(None, alias="modelId")
    model_name: str | None = None
    model_attr: str | None = None
    input_kwargs: dict[str, Any] | None = Field(
        None,
        description="Options of Hugging Face's generate, and penalty (its repetition_penalty), response_length (its "
        "max_new_tokens), remove_input.",
    )
    scripts: list[Any] | None = Field(None, description="Not served: nothing that clients send is executed.")
    project: Any = Field(None, description="Not needed: the key says whose it is.")
    token: Any = Field(None, description="As project.")


class SyncAsking(Asking):
    """A prediction that is answered at once."""

    data: str | list[Any] | None = Field(None, description="A text or a list; in a form the part `file` instead.")
    generic_file: StrictBool = False
    hash: Any = None
    collection: Any = None


class TaskAsking(Asking):
    """A prediction that is asked for by its id, of data that were uploaded."""

    data_id: str | None = Field(None, alias="dataId")
    data_name: str | None = None
    data_start: StrictInt | None = Field(None, description="The first item; counted as in a slice of Python.")
    data_end: StrictInt | None = None
    data_hub_ds: StrictBool = False
    task_id: str | None = None


class Uploading(BaseModel):
    """What comes with a file."""

    model_config = ConfigDict(extra="ignore")  # sizes and shapes, which the data say themselves

    hash: str = Field(pattern=f"^{HASH.pattern}$")
    collection: int = 1
    given_name: str = ""
    generic_file: StrictBool = False
    chunked: StrictBool = False
    is_last: StrictBool = False


@dataclass
class Upload:
    """Data of a project.

    Attributes:
        files: one, or the chunks of a loader.
        generic: a file of text rather than arrays.
        complete: whether the last chunk is there.
    """

    id: str
    hash: str
    generic: bool
    names: set[str] = field(default_factory=set)
    files: list[bytes] = field(default_factory=list)
    complete: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.files))

    def call(self, name: str) -> None:
        """Give it a name more."""
        if name and len(self.names) < MAX_NAMES:
            self.names.add(name[:200])


def render(failure: Failure) -> Any:
    """The client prints `error`."""
    return {"error": failure.message}


DIALECT = Dialect("neuro", render)


def routes(house: House) -> APIRouter:
    """Everything here."""
    router = APIRouter(route_class=route_class(house, DIALECT), tags=["Neuro"])
    router.post("/Token", summary="The project of a key", **documented({"type": "object"}, {"type": "string"}))(token)
    router.post("/SyncPredict", summary="Go on from texts", **_form(SyncAsking, RESULT))(sync_predict)
    router.post("/Predict", summary="Go on from texts, as a task", **documented(TaskAsking, None))(predict)
    router.get("/status/{task_id}", summary="A task", **documented(None, TASK))(status)
    router.get("/Hash", summary="Whether data are there", **documented(None, {"type": "string"}))(find_data)
    router.post("/UploadData", summary="Send data", **_form(Uploading, {"type": "string"}))(upload)
    for path in ("/Train", "/UploadModel"):
        router.post(path, summary="Not served", **documented(None, None))(not_trained)
    for path in ("/RetrieveModel", "/Export", "/ModelType"):
        router.get(path, summary="Not served", **documented(None, None))(not_exported)
    return router


def _form(asked: type[BaseModel], answered: dict[str, Any]) -> dict[str, Any]:
    """What the schema says of a route that takes a form."""
    options = documented(asked, answered)
    form = {
        "type": "object",
        "required": ["file", "json"],
        "properties": {"file": {"type": "string", "format": "binary"}, "json": {"type": "string"}},
    }
    content = options["openapi_extra"]["requestBody"]["content"]
    content["multipart/form-data"] = {"schema": form, "encoding": {"json": {"contentType": "application/json"}}}
    if asked is Uploading:
        del content["application/json"]
    return options


@access(Access.USER)
async def token(call: TheCall) -> Response:
    """The key has been looked at before; every project's name means the key's own project."""
    if not isinstance(await call.json(), dict):
        raise InvalidRequest("the body is no object, expected token and project_name")
    return call.reply(call.principal.project_id or OPEN_PROJECT)


@access(Access.USER)
async def sync_predict(call: TheCall) -> Response:
    """One text for each item, or as many as `num_return_sequences` says."""
    asked, texts, others = await _read_sync(call)
    model, name = _model(call, asked)
    params, remove_input, headers = _params(call, model, asked.input_kwargs, others)
    run = await call.begin(model, [Item(text, params) for text in texts], asked_model=name)
    outputs = await call.finish(run)
    told: dict[str, Any] = {"state": "COMPLETE"}
    if _include_result(call):
        told["result"] = _results(texts, outputs, remove_input)
    return call.reply(told, headers=headers)


@access(Access.USER)
async def predict(call: TheCall) -> Response:
    """The task's id, as bare text."""
    body = await call.body()
    asked, others = await _read(call, TaskAsking, body)
    model, name = _model(call, asked)
    params, remove_input, headers = _params(call, model, asked.input_kwargs, others)
    texts = await _uploaded_texts(call, asked)
    work = Work(
        Asked(model, [Item(text, params) for text in texts], call.dialect.name, name or model.name),
        lambda outputs: _results(texts, outputs, remove_input),
        len(body) + sum(map(len, texts)),
    )
    return PlainTextResponse(call.house.jobs.submit(call.principal, work).id, headers=headers)


@access(Access.USER)
async def status(call: TheCall) -> Response:
    """Where a task is; with its result, or why there is none, if that is asked for."""
    job = call.house.jobs.find(_owner(call), call.dialect.name, call.request.path_params["task_id"])
    told: dict[str, Any] = {"state": STATES[job.state], "taskType": "Predict", "progress": job.progress}
    if job.state.ended and _include_result(call):
        told["result"] = job.answer if job.failure is None else job.failure.message
    return call.reply(told)


@access(Access.USER)
async def find_data(call: TheCall) -> Response:
    """The data's id; 204 asks for them."""
    asked = call.request.query_params
    _check_collection(asked.get("collection", "1"))
    if not HASH.fullmatch(hashed := asked.get("hash", "")):
        raise InvalidRequest(f"hash is {hashed[:100]!r}, expected 32 hexadecimal digits", "hash")
    found = _find_by_hash(call, hashed)
    if found is None:
        return Response(status_code=204)
    if not found.complete:  # somebody went while sending chunks, and now begins anew
        call.house.uploads.drop(_owner(call), found.id)
        return Response(status_code=204)
    found.call(asked.get("given_name", ""))
    return call.reply(found.id)


@access(Access.USER)
async def upload(call: TheCall) -> Response:
    """Keep data for `Predict`, in memory, for a while."""
    parts = read_form(call.request.headers.get("content-type", ""), await call.body())
    told = await call.parsed(parts.get("json", b""), partial(read_checked, Uploading))
    data = parts.get("file", b"")
    _check_collection(str(told.collection))
    if not data:
        raise InvalidRequest("the form has no part 'file'", "file")
    if not told.chunked and hashlib.md5(data, usedforsecurity=False).hexdigest() != told.hash.lower():
        raise InvalidRequest("the file is not the one that hash was made of; send it again", "hash")
    found = _find_by_hash(call, told.hash)
    if found is None or (told.chunked and found.complete):
        found = Upload(secrets.token_hex(12), told.hash.lower(), told.generic_file)
    if not found.complete:
        found = _with_chunk(found, data, call.house.options, is_last=told.is_last or not told.chunked)
        if told.chunked and found.complete:
            await _check_chunks(call, found)
        call.house.uploads.put(_owner(call), found.id, found, found.num_bytes)
    found.call(told.given_name)
    return call.reply(found.id, 201)


@access(Access.USER)
async def not_trained(call: TheCall) -> Response:
    """Clients send code for it, which is never executed."""
    raise NotServed(NO_TRAINING if call.request.url.path == "/Train" else NO_MODELS)


@access(Access.USER)
async def not_exported(call: TheCall) -> Response:
    """Clients take what comes for a pickle."""
    raise NotServed(NO_MODELS)


Kind = TypeVar("Kind", bound=Asking)


async def _read(call: Call, kind: type[Kind], body: bytes) -> tuple[Kind, list[str]]:
    """What is asked, and the names of fields that were passed over, where that is wanted. Raises: InvalidRequest."""

    def parse(body: bytes) -> tuple[Kind, list[str]]:
        value, others = read_json(body), list[str]()
        if call.house.options.ignore_unknown and isinstance(value, dict) and len(value) <= MAX_FIELDS:
            value, others = split_known(value, [field.alias or name for name, field in kind.model_fields.items()])
        return checked(kind, value), others

    return await call.parsed(body, parse)


async def _read_sync(call: Call) -> tuple[SyncAsking, list[str], list[str]]:
    """What is asked, the texts, of a form's file or of the JSON itself, and the fields that were passed over."""
    content_type, body, options = call.request.headers.get("content-type", ""), await call.body(), call.house.options
    if not is_form(content_type):
        asked, others = await _read(call, SyncAsking, body)
        return asked, _listed_texts(asked.data, options), others
    parts = read_form(content_type, body)
    asked, others = await _read(call, SyncAsking, parts.get("json", b""))
    if "file" not in parts or asked.data is not None:
        raise InvalidRequest("a form has its data in the part 'file', and not in 'data'", "data")
    return asked, await asyncio.to_thread(_file_texts, [parts["file"]], asked.generic_file, options), others


def _with_chunk(upload: Upload, data: bytes, options: ServerOptions, *, is_last: bool) -> Upload:
    """An upload with a file more; the one before stays as it is, for there may be no room for this one."""
    if len(upload.files) >= options.max_prompts:
        raise InvalidRequest(f"the data has more than {options.max_prompts:,} chunks; send larger ones", "file")
    return replace(upload, files=[*upload.files, data], complete=is_last)


async def _check_chunks(call: Call, upload: Upload) -> None:
    """Forget an upload whose chunks are not those that were announced. Raises: InvalidRequest."""
    options = call.house.options
    bounds = {"max_arrays": options.max_prompts, "max_bytes": options.max_kept_bytes}
    try:
        if await asyncio.to_thread(digest_of_chunks, upload.files, **bounds) != upload.hash:
            raise InvalidRequest(
                "the chunks are not those that hash was made of: some are missing, or somebody sent the same data at "
                "the same time; send them again",
                "hash",
            )
    except InvalidRequest:
        call.house.uploads.drop(_owner(call), upload.id)
        raise


async def _uploaded_texts(call: Call, asked: TaskAsking) -> list[str]:
    wanted = asked.data_id or asked.data_name
    if not wanted:
        raise InvalidRequest("there is no data; send dataId or data_name of what was uploaded", "dataId")
    uploads: Sequence[Upload] = call.house.uploads.values(_owner(call))
    found = [one for one in uploads if one.complete and (one.id == wanted or wanted in one.names)]
    if not found:
        raise NoSuchThing(
            f"there is no uploaded data {wanted[:100]!r} here; it is kept for a while only: send it again", "dataId"
        )
    texts = await asyncio.to_thread(_file_texts, found[-1].files, found[-1].generic, call.house.options)
    if not (texts := texts[asked.data_start : asked.data_end]):
        raise InvalidRequest(
            "no item is left of the data; send other ones, or other ends of data_start:data_end", "data"
        )
    return texts


def _file_texts(files: Sequence[bytes], generic: bool, options: ServerOptions) -> list[str]:
    """Texts of files, which strangers wrote."""
    texts: list[str] = []
    for file in files:
        if is_npz(file):
            left_bytes = options.max_body_bytes - 4 * sum(map(len, texts))
            texts += read_texts(file, max_texts=options.max_prompts - len(texts), max_bytes=left_bytes)
        elif generic:
            texts.append(_plain_text(file))
        else:
            raise InvalidRequest("the data is no .npz file, expected what numpy.savez writes", "data")
    return texts


def _plain_text(file: bytes) -> str:
    try:
        return file.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the file is no text in UTF-8, at byte {error.start}", "data") from None


def _listed_texts(data: str | list[Any] | None, options: ServerOptions) -> list[str]:
    """A text, or the texts of a list, which may hold lists."""
    if data is None:
        raise InvalidRequest("data is missing, expected a text or a list of texts", "data")
    texts: list[str] = []
    left = [data]
    while left:
        one = left.pop()
        if isinstance(one, str):
            texts.append(one)
        elif isinstance(one, list):
            left += reversed(one)
        else:
            raise InvalidRequest("data holds something that is no text, expected a text or a list of texts", "data")
        if len(texts) > options.max_prompts:
            raise InvalidRequest(f"data has more than {options.max_prompts:,} texts; send fewer at a time", "data")
    return texts


def _params(
    call: Call, model: ServedModel, chosen: dict[str, Any] | None, others: Sequence[str]
) -> tuple[SamplingParams, bool, dict[str, str]]:
    """The options, whether the prompt is left out of the answer, and the answer's headers.

    Args:
        others: fields beside the options that were passed over.
    """
    values = dict(chosen or {})
    remove_input = values.pop("remove_input", None)
    if not isinstance(remove_input, bool | None):
        raise InvalidRequest(f"remove_input is {str(remove_input)[:100]!r}, expected true or false", "remove_input")
    for theirs, ours in OWN_NAMES.items():
        if (value := values.pop(theirs, None)) is not None:
            if values.get(ours) not in (None, value):
                raise InvalidRequest(f"{theirs} and {ours} are the same option, with different values", theirs)
            values[ours] = value
    values, headers = known_only(values, ignore_unknown=call.house.options.ignore_unknown, beside=others)
    refuse_untold(values)
    headers["X-Served-Model"] = model.name
    return sampling_params(DEFAULTS, model.options.defaults, values), bool(remove_input), headers


def _model(call: Call, asked: Asking) -> tuple[ServedModel, str | None]:
    """The model, and what it was called. Refuses what would execute a client's code or is not to be had."""
    refused: dict[str, Any] = {"scripts": asked.scripts, "model_attr": asked.model_attr}
    if isinstance(asked, TaskAsking):
        refused |= {"task_id": asked.task_id, "data_hub_ds": asked.data_hub_ds}
    for name, value in refused.items():
        if value:
            raise UnsupportedOption(f"{name} cannot be served: this API only predicts, and executes nothing", name)
    called = asked.model_id or asked.model_name or None
    return call.find(called), None if called is None else called[:200]


def _results(texts: Sequence[str], outputs: Sequence[RequestOutput], remove_input: bool) -> list[dict[str, str]]:
    return [
        {"generated_text": sequence.text if remove_input else text + sequence.text}
        for text, output in zip(texts, outputs, strict=True)
        for sequence in output.sequences
    ]


def _check_collection(collection: str) -> None:
    if collection != "1":
        raise NotServed(NO_MODELS)


def _find_by_hash(call: Call, hashed: str) -> Upload | None:
    uploads: list[Upload] = call.house.uploads.values(_owner(call))
    return next((one for one in uploads if one.hash == hashed.lower()), None)


def _include_result(call: Call) -> bool:
    return call.request.query_params.get("include_result", "true").lower() not in ("false", "0")


def _owner(call: Call) -> str:
    return call.principal.project_id or ""
