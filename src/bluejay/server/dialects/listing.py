"""What models there are, told at once in the words of KServe V1, of OpenAI and of a Truss, which share these paths."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from bluejay.errors import ModelNotFound
from bluejay.server.auth import Access
from bluejay.server.call import Dialect, House, TheCall, access, documented, route_class
from bluejay.server.errors import Failure
from bluejay.server.models import ServedModel


def render(failure: Failure) -> Any:
    """KServe reads `error` as a text."""
    return {"error": failure.message}


DIALECT = Dialect("listing", render)
OBJECT = {"type": "object"}
OPENAI_HEADER = "x-stainless-lang"  # its clients send it; they show nothing of an error that is a text


def routes(house: House) -> APIRouter:
    """Everything here."""
    router = APIRouter(route_class=route_class(house, DIALECT), tags=["Models"])
    router.get("/", summary="The server lives", **documented(None, OBJECT))(alive)
    router.get("/v1/models", summary="All models", **documented(None, OBJECT))(models)
    router.get("/v1/models/{model:path}", summary="One model", **documented(None, OBJECT))(one)
    for path, handler in (("/openai/v1/models", models), ("/openai/v1/models/{model:path}", one)):  # as KServe has them
        router.get(path, include_in_schema=False, **documented(None, OBJECT))(handler)
    return router


@access(Access.PUBLIC)
async def alive(call: TheCall) -> Response:
    """As KServe's model server says it."""
    return call.reply({"status": "alive"})


@access(Access.USER)
async def models(call: TheCall) -> Response:
    """`models` is KServe's list, `data` OpenAI's."""
    served = list(call.house.models)
    return call.reply(
        {"object": "list", "data": [_card(model) for model in served], "models": [model.name for model in served]}
    )


@access(Access.USER)
async def one(call: TheCall) -> Response:
    """`name` and `ready` are KServe's, the rest is OpenAI's. 503 while it is not ready, as KServe answers."""
    name = call.request.path_params["model"]
    try:
        model = call.find(name)
    except ModelNotFound as error:
        if OPENAI_HEADER not in call.request.headers:
            raise ModelNotFound(f"Model with name {name} does not exist.", "model") from None
        told = {"message": str(error), "type": "not_found_error", "param": "model", "code": "model_not_found"}
        return call.reply({"error": told}, 404)
    if not model.ready:
        return call.reply({"error": f"Model with name {model.name} is not ready."}, 503)
    return call.reply({"name": name, "ready": True, **_card(model)})


def _card(model: ServedModel) -> dict[str, Any]:
    positions = {} if model.facts is None else {"max_model_len": model.facts.n_positions}
    return {"id": model.name, "object": "model", "created": model.created_at, "owned_by": "bluejay", **positions}
