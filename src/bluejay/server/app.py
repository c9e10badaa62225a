"""The one place that wires: routes of all dialects, what happens where no route is, what every answer carries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import structlog
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from bluejay import __version__
from bluejay.server import admin, health, schema
from bluejay.server.call import House, json_response, log_answer, name_request
from bluejay.server.dialects import baseten, kserve_v1, listing, neuro, open_inference, openai

NO_DIALECT = "http"  # in metrics and logs

# Each dialect is a file; none knows another. Where paths overlap, the first that fits is taken.
DIALECTS: tuple[Callable[[House], APIRouter], ...] = (
    health.routes,
    schema.routes,
    admin.routes,
    baseten.routes,  # a Truss's own path is one that KServe would take for a model's
    neuro.routes,
    kserve_v1.routes,
    open_inference.routes,
    openai.routes,
    listing.routes,
)


def create_app(house: House) -> FastAPI:
    """The ASGI application of a server."""
    app = FastAPI(
        title="Bluejay",
        version=__version__,
        description="GPT-J and GPT-Neo, in every dialect in which they were ever served.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    # Not include_router, which keeps routers whole: a request would look into each in turn, for longer than all else.
    app.router.routes.extend(all_routes(house))
    described = cache(lambda: schema.describe(app, all_routes(house), keys=not house.door.is_open))
    app.openapi = described  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, partial(_no_route, house))
    return app


def all_routes(house: House) -> list[APIRoute]:
    """Every route of a server, dialect by dialect."""
    return [route for routes in DIALECTS for route in _flat(routes(house).routes)]


def _flat(routes: Iterable[Any]) -> Iterator[APIRoute]:
    """Routes, and those of the routers among them. Raises: TypeError for anything that no policy guards."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif (router := getattr(route, "original_router", None)) is not None:  # FastAPI keeps an included router whole
            yield from _flat(router.routes)
        else:
            raise TypeError(f"{route!r} is no route of a dialect: who may call it?")


async def _no_route(house: House, request: Request, error: Exception) -> Response:
    """A path or a method that no dialect has, in the words that FastAPI, and so KServe and Truss, have for it."""
    assert isinstance(error, HTTPException)
    request_id = name_request(request.headers)
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id, dialect=NO_DIALECT)
    house.service.metrics.answered(NO_DIALECT, error.status_code)
    log_answer(0.0, None, "%s without a route %d", request.method, error.status_code)
    headers = {**(error.headers or {}), "X-Request-Id": request_id}
    return json_response({"detail": error.detail}, error.status_code, headers)
