"""KServe's V1 protocol, as CoreWeave served GPT-J with it.

    curl -d '{"parameters": {"min_length": 150, "max_length": 200}, "instances": ["In a shocking finding"]}' \
        http://127.0.0.1:8000/v1/models/eleutherai-gpt-j-6b:predict

Source: KServe's model server; the predictor that CoreWeave's document describes.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictStr
from starlette.responses import Response

from bluejay.engine.request import RequestOutput
from bluejay.errors import InvalidRequest, ModelNotFound
from bluejay.server.auth import Access
from bluejay.server.call import Dialect, House, TheCall, access, documented, route_class
from bluejay.server.errors import Failure, NotServed
from bluejay.server.generation import items_of
from bluejay.server.sampling import known_only, refuse_untold, sampling_params

# What the hosted predictor took where a query said nothing; 50 tokens were the model config's.
DEFAULTS = {"do_sample": True, "max_length": 50, "min_length": 1, "temperature": 1.0, "repetition_penalty": 1.125}


class Predict(BaseModel):
    """A query: texts to go on from, and how."""

    model_config = ConfigDict(extra="ignore")  # clients of the standard add what other predictors read

    instances: list[StrictStr] = Field(min_length=1, fail_fast=True, description="Texts to go on from.")
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Options of Hugging Face's generate, in any case: min_length, max_length (both count the text), "
        "temperature, top_k, top_p, repetition_penalty, …",
    )


def render(failure: Failure) -> Any:
    """KServe's error."""
    return {"error": failure.message}


DIALECT = Dialect("kserve_v1", render)


def routes(house: House) -> APIRouter:
    """Everything here."""
    router = APIRouter(route_class=route_class(house, DIALECT), tags=["KServe V1"])
    # The document's few-shot lines end in ":predic"; who copied them is served as well.
    for end in ("predict", "predic"):
        router.post(
            f"/v1/models/{{model:path}}:{end}",
            summary="Go on from texts",
            include_in_schema=end == "predict",
            **documented(Predict, {"type": "object", "required": ["predictions"]}),
        )(predict)
    router.post("/v1/models/{model:path}:explain", summary="Not served", **documented(None, None))(explain)
    return router


@access(Access.USER)
async def predict(call: TheCall) -> Response:
    """One instance gives a flat list, several a list for each; the settings can make it nested always."""
    name = call.request.path_params["model"]
    try:
        model = call.find(name)
    except ModelNotFound:
        raise ModelNotFound(f"Model with name {name} does not exist.", "model") from None
    asked = await call.read(Predict)
    chosen = {key.lower(): value for key, value in asked.parameters.items()}
    if len(chosen) < len(asked.parameters):
        raise InvalidRequest("parameters names an option twice, in different cases", "parameters")
    chosen, headers = known_only(chosen, ignore_unknown=call.house.options.ignore_unknown)
    refuse_untold(chosen)
    params = sampling_params(DEFAULTS, call.house.options.kserve_defaults, model.options.defaults, chosen)
    items = items_of(asked.instances, params, call.house.options)
    run = await call.begin(model, items, asked_model=name)
    outputs = await call.finish(run)
    predictions = [_texts(text, output) for text, output in zip(asked.instances, outputs, strict=True)]
    flat = len(predictions) == 1 and not call.house.options.kserve_always_nested
    headers["X-Served-Model"] = model.name
    return call.reply({"predictions": predictions[0] if flat else predictions}, headers=headers)


@access(Access.USER)
async def explain(call: TheCall) -> Response:
    """There is no explainer."""
    raise NotServed("Could not find explainer_host.")


def _texts(prompt: str, output: RequestOutput) -> list[dict[str, str]]:
    return [{"generated_text": prompt + sequence.text} for sequence in output.sequences]
