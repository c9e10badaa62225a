"""Baseten's routes, as it served the GPT-J Truss: the classic ones with an envelope, the newer ones, and a Truss's own.

    curl -X POST http://127.0.0.1:8000/models/ANY_ID/predict -d '[{"prompt": "If I was a billionaire, I would"}]'

Source: the GPT-J Truss and its document; the packages baseten 0.8.2 and 0.13.1; the server of truss 0.18.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from starlette.responses import Response

from bluejay.engine.request import FinishReason, RequestOutput
from bluejay.errors import InvalidRequest, RequestError, UnsupportedOption
from bluejay.server.auth import Access
from bluejay.server.call import Call, Dialect, House, TheCall, access, checked, documented, read_json, route_class
from bluejay.server.errors import Failure
from bluejay.server.generation import Asked, Item, bound_prompts
from bluejay.server.jobs import Job, JobState, Retries, Work
from bluejay.server.models import ServedModel
from bluejay.server.options import ServerOptions
from bluejay.server.sampling import listed, sampling_params, split_known

PARAMETERS = (
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "length_penalty",
    "encoder_no_repeat_ngram_size",
    "num_return_sequences",
    "max_time",
    "num_beam_groups",
    "diversity_penalty",
    "remove_invalid_values",
)
DEFAULTS = {"max_length": 20}  # transformers' of that time; it counts the prompt
PLACES = ("/production", "/development", "/environments/{environment}", "/deployment/{deployment}", "")
STATES = {
    JobState.QUEUED: "QUEUED",
    JobState.RUNNING: "IN_PROGRESS",
    JobState.DONE: "SUCCEEDED",
    JobState.FAILED: "FAILED",
    JobState.EXPIRED: "EXPIRED",
    JobState.CANCELLED: "CANCELED",
}
# HTTP's statuses in the words of the newer routes, and of what became of an asynchronous request.
CODES = {401: "unauthorized", 403: "unauthorized", 408: "timeout", 413: "payload_too_large", 429: "rate_limited"}
CODES |= {500: "internal_baseten_error", 503: "model_unavailable", 504: "timeout"}
ERRORS = {503: "MODEL_UNAVAILABLE", 504: "MODEL_PREDICT_TIMEOUT", 500: "INTERNAL_SERVER_ERROR"}

INPUT: dict[str, Any] = {
    "type": "object",
    "required": ["prompt"],
    "additionalProperties": False,
    "properties": {"prompt": {"type": "string"}, **{name: {} for name in PARAMETERS}},
    "description": "`prompt`, and options of Hugging Face's generate.",
}
INPUTS = {"anyOf": [INPUT, {"type": "array", "items": INPUT, "minItems": 1}]}
RESULT = {"type": "object", "required": ["status", "data", "message"]}
RESULTS = {"anyOf": [RESULT, {"type": "array", "items": RESULT}]}
OBJECT = {"type": "object"}


class InferenceRetry(BaseModel):
    """How often a prediction that could not be finished is tried."""

    model_config = ConfigDict(extra="forbid")

    max_attempts: StrictInt = Field(3, ge=1, le=10)
    initial_delay_ms: StrictInt = Field(1000, ge=0, le=10_000)
    max_delay_ms: StrictInt = Field(5000, ge=0, le=60_000)


class AsyncPredict(BaseModel):
    """An input that is answered later."""

    model_config = ConfigDict(extra="forbid")

    model_input: Annotated[Any, Field(description="As for predict.", json_schema_extra=INPUTS)]
    webhook_endpoint: None = Field(None, description="Not served: the server opens no connections of its own.")
    priority: StrictInt = Field(0, ge=0, le=2, description="The lower comes first.")
    max_time_in_queue_seconds: StrictInt = Field(600, ge=10, le=259_200)
    inference_retry_config: InferenceRetry | None = None


def _render_classic(failure: Failure) -> Any:
    return {"error": failure.message}


def _render_newer(failure: Failure) -> Any:
    code = "model_does_not_exist" if failure.kind == "ModelNotFound" else CODES.get(failure.status, "client_error")
    return {
        "error": failure.message,
        "error_code": code,
        "detail": None if failure.param is None else f"see {failure.param}",
    }


def _render_truss(failure: Failure) -> Any:
    return {"error": f"Invalid JSON payload: {failure.message}" if failure.status == 400 else failure.message}


def _truss_headers(failure: Failure) -> Mapping[str, str]:
    return {"x-baseten-error-source": "04", "x-baseten-error-code": "700" if failure.status == 400 else "600"}


CLASSIC = Dialect("baseten", _render_classic)
NEWER = Dialect("baseten", _render_newer)
TRUSS = Dialect("baseten", _render_truss, headers=_truss_headers)


def routes(house: House) -> APIRouter:
    """Everything here."""
    router = APIRouter(tags=["Baseten"])
    router.include_router(_newer_routes(house))
    router.include_router(_classic_routes(house))
    # A Truss calls whatever it serves "model"; KServe's protocol, which has the same paths, calls models by name.
    if not any("model" in (model.name, *model.options.aliases) for model in house.models):
        router.include_router(_truss_routes(house))
    return router


def _newer_routes(house: House) -> APIRouter:
    """For a server of one model, and below /models/NAME for one of several: there the host's name said which."""
    router = APIRouter(route_class=route_class(house, NEWER))
    for prefix in ("", "/models/{model:path}"):
        shown: dict[str, Any] = {"include_in_schema": prefix == ""}
        for place in PLACES:
            path = prefix + place
            if path != "/models/{model:path}":  # the classic route
                router.post(f"{path}/predict", summary="Go on from a text", **shown, **documented(INPUTS, RESULTS))(
                    predict
                )
            router.post(
                f"{path}/async_predict",
                status_code=201,
                summary="Go on from a text, later",
                **shown,
                **documented(AsyncPredict, None),
            )(async_predict)
            router.get(f"{path}/async_queue_status", summary="How many wait", **shown, **documented(None, OBJECT))(
                queue_status
            )
            router.post(f"{path}/wake", status_code=202, summary="Nothing sleeps", **shown, **documented(None, None))(
                wake
            )
        path = f"{prefix}/async_request/{{request_id}}"
        router.get(path, summary="An asynchronous request", **shown, **documented(None, OBJECT))(request_status)
        router.delete(path, summary="Cancel it", **shown, **documented(None, OBJECT))(cancel_request)
    return router


def _classic_routes(house: House) -> APIRouter:
    router = APIRouter(route_class=route_class(house, CLASSIC))
    answered = {"type": "object", "required": ["model_output"]}
    for kind in ("models", "model_versions"):
        router.post(f"/{kind}/{{model:path}}/predict", summary="Go on from texts", **documented(INPUTS, answered))(
            predict_classic
        )
    return router


def _truss_routes(house: House) -> APIRouter:
    router = APIRouter(route_class=route_class(house, TRUSS))
    router.post("/v1/models/model:predict", summary="Go on from texts", **documented(INPUTS, RESULTS))(predict_truss)
    for path in ("/v1/models/model", "/v1/models/model/loaded"):
        router.get(path, summary="Whether it is ready", **documented(None, OBJECT))(loaded)
    return router


@access(Access.USER)
async def predict_classic(call: TheCall) -> Response:
    """The model's output in an envelope, and beside it for those who read the document."""
    model = _model(call)
    output = await _output_or_failure(call, model, await call.json())
    beside = output if isinstance(output, dict) else {}
    return call.reply({"model_output": output, **beside}, headers={"X-Served-Model": model.name})


@access(Access.USER)
async def predict(call: TheCall) -> Response:
    """The model's output alone."""
    model = _model(call)
    output = await _output(call, model, await call.json())
    return call.reply(output, headers={"X-Served-Model": model.name})


@access(Access.USER)
async def predict_truss(call: TheCall) -> Response:
    """The model's output alone; the Truss told of a wrong input there as well."""
    model = call.find(None)
    output = await _output_or_failure(call, model, await call.json())
    return call.reply(output, headers={"X-Served-Model": model.name})


@access(Access.USER)
async def loaded(call: TheCall) -> Response:
    """Empty when it is ready."""
    if call.find(None).ready:
        return call.reply({})
    return call.reply({"error": "Model with name model is not ready."}, 503)


@access(Access.USER)
async def async_predict(call: TheCall) -> Response:
    """Take an input, and say under which id its status can be asked for."""
    model = _model(call)
    body = await call.body()
    asked = await call.parsed(body, _read_async)
    inputs = read_inputs(asked.model_input, model, call.house.options)
    retry = asked.inference_retry_config
    work = Work(
        Asked(model, [one.item for one in inputs], call.dialect.name, _asked_name(call) or model.name),
        lambda outputs: _results(asked.model_input, inputs, outputs, model),
        len(body),
        priority=asked.priority,
        max_queued_s=float(asked.max_time_in_queue_seconds),
        retries=Retries()
        if retry is None
        else Retries(retry.max_attempts, retry.initial_delay_ms / 1e3, retry.max_delay_ms / 1e3),
    )
    job = call.house.jobs.submit(call.principal, work)
    return call.reply({"request_id": job.id}, 201, {"X-Served-Model": model.name})


@access(Access.USER)
async def request_status(call: TheCall) -> Response:
    """Where an asynchronous request is; `model_output` when it is done, as there is no webhook to send it to."""
    job = _job(call)
    told = {
        "request_id": job.id,
        "model_id": job.model,
        "deployment_id": job.place,
        "status": STATES[job.state],
        "webhook_status": "NO_WEBHOOK_PROVIDED",
        "created_at": job.created_at.isoformat(),
        "status_at": job.changed_at.isoformat(),
        "errors": [] if job.failure is None or job.state is not JobState.FAILED else [_told(job.failure)],
    }
    return call.reply(told | ({"model_output": job.answer} if job.state is JobState.DONE else {}))


@access(Access.USER)
async def cancel_request(call: TheCall) -> Response:
    """End an asynchronous request, if it has not ended."""
    job = _job(call)
    cancelled = call.house.jobs.cancel(job)
    message = "the request was canceled" if cancelled else f"the request had ended before: {STATES[job.state]}"
    return call.reply({"request_id": job.id, "canceled": cancelled, "message": message})


@access(Access.USER)
async def queue_status(call: TheCall) -> Response:
    """The asynchronous requests of the caller's project."""
    model = _model(call)
    num_queued, num_running = call.house.jobs.count(call.principal.project_id or "", model.name)
    return call.reply(
        {
            "model_id": model.name,
            "deployment_id": call.request.path_params.get("deployment", model.name),
            "num_queued_requests": num_queued,
            "num_in_progress_requests": num_running,
        }
    )


@access(Access.USER)
async def wake(call: TheCall) -> Response:
    """Models here do not sleep: there is nothing to do."""
    _model(call)
    return call.reply({}, 202)


@dataclass(frozen=True)
class Input:
    """One input, read.

    Attributes:
        prompt: its text.
        notes: what was done otherwise than asked.
    """

    prompt: str
    item: Item
    notes: tuple[str, ...]


def read_inputs(value: Any, model: ServedModel, options: ServerOptions) -> list[Input]:
    """An input, or a list of them. Raises: InvalidRequest."""
    values = value if isinstance(value, list) else [value]
    if not values:
        raise InvalidRequest("the list of inputs is empty, expected at least one object with a 'prompt'", "prompt")
    bound_prompts(len(values), options, "inputs")
    inputs = []
    for number, one in enumerate(values, 1):
        try:
            inputs.append(_read_input(one, model, options))
        except RequestError as error:
            if len(values) == 1:
                raise
            raise InvalidRequest(f"input {number}: {error}", error.param) from None
    return inputs


def _read_input(value: Any, model: ServedModel, options: ServerOptions) -> Input:
    if not isinstance(value, dict):
        raise InvalidRequest("the input is no object, expected one with a 'prompt'", "prompt")
    chosen = dict(value)
    prompt = chosen.pop("prompt", None)
    if not isinstance(prompt, str):
        raise InvalidRequest(f"prompt is {'missing' if prompt is None else 'no text'}, expected a text", "prompt")
    notes = []
    if options.ignore_unknown:
        chosen, others = split_known(chosen, PARAMETERS)
        notes += [f"passed over, as it is no option: {listed(others)}"] if others else []
    if unknown := sorted(set(chosen) - set(PARAMETERS)):
        names = ", ".join(repr(name[:100]) for name in unknown[:8])
        raise InvalidRequest(f"unknown option {names}; there are: prompt, {', '.join(PARAMETERS)}", unknown[0][:100])
    for name, most in (("max_length", options.baseten_max_length), ("min_length", options.baseten_min_length)):
        if type(chosen.get(name)) is int and chosen[name] > most:
            notes.append(f"{name} was {chosen[name]}"[:60] + f" and is limited to {most}")
            chosen[name] = most
    params = sampling_params(DEFAULTS, model.options.defaults, chosen)
    if params.num_return_sequences > 1:
        notes.append(f"data is the first of {params.num_return_sequences} answers")
    return Input(prompt, Item(prompt, params), tuple(notes))


async def _output(call: Call, model: ServedModel, value: Any) -> Any:
    """What the model makes of an input: one result, or a list of them. Raises: as `Call.begin` and `Call.finish`."""
    inputs = read_inputs(value, model, call.house.options)
    run = await call.begin(model, [one.item for one in inputs], asked_model=_asked_name(call))
    return _results(value, inputs, await call.finish(run), model)


async def _output_or_failure(call: Call, model: ServedModel, value: Any) -> Any:
    """As `_output`; what is wrong with an input is a result too."""
    try:
        return await _output(call, model, value)
    except RequestError as error:
        return {"status": call.house.options.baseten_failed, "data": None, "message": str(error)}


def _results(value: Any, inputs: Sequence[Input], outputs: Sequence[RequestOutput], model: ServedModel) -> Any:
    results = [_result(one, output, model) for one, output in zip(inputs, outputs, strict=True)]
    return results if isinstance(value, list) and len(value) > 1 else results[0]


def _result(asked: Input, output: RequestOutput, model: ServedModel) -> dict[str, str | None]:
    """The first answer, its end-of-text included, as the Truss decoded it."""
    tokenizer, first = model.tokenizer, output.sequences[0]
    assert tokenizer is not None  # it has encoded the prompt
    ended = first.finish_reason is FinishReason.STOP and first.token_ids[-1:] == [tokenizer.eos_token_id]
    text = asked.prompt + first.text + (tokenizer.eos_token or "" if ended else "")
    return {"status": "success", "data": text, "message": "; ".join(asked.notes) or None}


def _read_async(body: bytes) -> AsyncPredict:
    value = read_json(body)
    if isinstance(value, dict) and value.get("webhook_endpoint") is not None:
        raise UnsupportedOption(
            "webhook_endpoint cannot be served: this server opens no connections of its own; leave it out, and GET "
            "/async_request/ID tells the result as model_output",
            "webhook_endpoint",
        )
    return checked(AsyncPredict, value)


def _model(call: Call) -> ServedModel:
    """Whom the path means. Ids were Baseten's making, of letters and digits: a single model answers to any."""
    name = _named(call)
    return call.find(name, any_id=name is not None and "/" not in name)


def _named(call: Call) -> str | None:
    params = call.request.path_params
    name: str | None = params.get("model", params.get("deployment"))
    return name


def _asked_name(call: Call) -> str | None:
    name = _named(call)
    return None if name is None else name[:200]


def _job(call: Call) -> Job:
    return call.house.jobs.find(
        call.principal.project_id or "", call.dialect.name, call.request.path_params["request_id"]
    )


def _told(failure: Failure) -> dict[str, str]:
    return {"code": ERRORS.get(failure.status, "MODEL_INVALID_INPUT"), "message": failure.message}
