"""Whether the server lives, whether it takes requests, how far its models are, and what it counts."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from bluejay import __version__
from bluejay.engine.client import Phase
from bluejay.errors import BluejayError
from bluejay.server.auth import Access
from bluejay.server.call import Dialect, House, TheCall, access, documented, route_class
from bluejay.server.errors import Failure
from bluejay.server.models import ServedModel

STATISTICS_S = 1.0  # an engine that does not answer for so long is told of without its numbers


def render(failure: Failure) -> Any:
    """An error of these routes."""
    return {"error": failure.message, "code": failure.kind}


DIALECT = Dialect("bluejay", render)


def routes(house: House) -> APIRouter:
    """Everything here."""
    router = APIRouter(route_class=route_class(house, DIALECT), tags=["Bluejay"])
    router.get("/livez", summary="Whether the server lives", **documented(None, {"type": "object"}))(livez)
    router.get("/readyz", summary="Whether it takes requests", **documented(None, {"type": "object"}))(readyz)
    router.get("/loading", summary="How far its models are", **documented(None, {"type": "object"}))(loading)
    text: dict[int | str, Any] = {
        200: {"description": "Done", "content": {"text/plain": {"schema": {"type": "string"}}}}
    }
    router.get(
        "/metrics", summary="What Prometheus reads", response_model=None, response_class=Response, responses=text
    )(metrics)
    return router


@access(Access.PUBLIC)
async def livez(call: TheCall) -> Response:
    """The event loop turns."""
    return call.reply({"live": True})


@access(Access.PUBLIC)
async def readyz(call: TheCall) -> Response:
    """All models are ready, and the server is not about to end. Where keys are asked for, it names no model."""
    house = call.house
    waiting = [model for model in house.models if not model.ready]
    if house.door.is_open:
        reasons = [f"{model.name}: {model.state.phase}" for model in waiting]
    else:
        phases = Counter(str(model.state.phase) for model in waiting)
        reasons = [f"{phase}: {count} of {len(list(house.models))} models" for phase, count in phases.items()]
    if house.life.draining:
        reasons.insert(0, "the server is about to end")
    ready = house.models.ready and not house.life.draining
    return call.reply({"ready": ready, "reasons": [] if ready else reasons}, 200 if ready else 503)


@access(Access.USER)
async def loading(call: TheCall) -> Response:
    """Each model's phase, and its bytes read and in all while weights load."""
    return call.reply({"version": __version__, "models": [_progress(model) for model in call.house.models]})


def _progress(model: ServedModel) -> dict[str, Any]:
    state = model.state
    ended = state.phase in (Phase.FAILED, Phase.STOPPED)
    return {
        "model": model.name,
        "phase": "ready" if model.ready else "loading" if state.phase is Phase.READY else str(state.phase),
        "done_bytes": state.done_bytes,
        "total_bytes": state.total_bytes,
        "note": "the server's log says why" if ended else "",
    }


@access(Access.USER)
async def metrics(call: TheCall) -> Response:
    """In Prometheus's text format."""
    house = call.house
    for model in house.models:
        statistics = None
        with suppress(BluejayError, TimeoutError):
            async with asyncio.timeout(STATISTICS_S):
                statistics = await model.engine.statistics()
        house.service.metrics.engine(model, statistics)
    house.service.metrics.ledger(house.service.ledger.pending())
    body = generate_latest(house.service.metrics.registry)
    return Response(body, media_type=CONTENT_TYPE_LATEST)
