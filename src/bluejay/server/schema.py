"""What can be asked of this server: /openapi.json for programs, /docs for people; nothing comes from elsewhere."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.responses import Response

from bluejay.server.auth import Access
from bluejay.server.call import Dialect, House, TheCall, access, documented, route_class
from bluejay.server.errors import Failure, NoSuchThing

PAGES = {"docs.html": "text/html", "docs.css": "text/css", "docs.js": "text/javascript"}
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
KEY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}


def render(failure: Failure) -> Any:
    """An error of these routes."""
    return {"error": failure.message, "code": failure.kind}


DIALECT = Dialect("docs", render)


def routes(house: House) -> APIRouter:
    """Everything here."""
    router = APIRouter(route_class=route_class(house, DIALECT), tags=["Bluejay"])
    object_ = {"type": "object"}
    router.get("/openapi.json", summary="This schema", **documented(None, object_))(openapi)
    router.get("/docs", include_in_schema=False, response_model=None)(page)
    router.get("/docs/{name}", include_in_schema=False, response_model=None)(page)
    return router


@access(Access.PUBLIC)
async def openapi(call: TheCall) -> Response:
    """OpenAPI 3.1."""
    return call.reply(call.request.app.openapi())


@access(Access.PUBLIC)
async def page(call: TheCall) -> Response:
    """A page that shows it, its style and its script."""
    name = call.request.path_params.get("name", "docs.html")
    if name not in PAGES:
        raise NoSuchThing(f"there is no page {name[:100]!r}")
    return Response(_read(name), 200, SECURITY, PAGES[name])


@cache
def _read(name: str) -> bytes:
    return resources.files("bluejay.server").joinpath("pages", name).read_bytes()


def describe(app: FastAPI, routes: list[APIRoute], *, keys: bool) -> dict[str, Any]:
    """The schema: FastAPI's, with what only Bluejay knows.

    Args:
        keys: whether the server asks for them.
    """
    schema: dict[str, Any] = FastAPI.openapi(app)
    needed = {(route.path_format, method.lower()): route.access for route in routes for method in route.methods or ()}  # type: ignore[attr-defined]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            _complete(path, operation, needed[path, method], keys=keys)
    parts = schema.setdefault("components", {})
    if keys:
        parts["securitySchemes"] = KEY_SCHEMES
    return schema


def _complete(path: str, operation: dict[str, Any], needed: Access, *, keys: bool) -> None:
    """Add a path's parameters, how an operation fails, and which key it asks for."""
    parameters = operation.setdefault("parameters", [])
    known = {parameter["name"] for parameter in parameters}
    parameters += [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", path)
        if name not in known
    ]
    answers = operation["responses"]
    answers.pop("422", None)  # FastAPI's own; here a dialect tells what is wrong
    answers.setdefault("default", {"description": "What went wrong, as this protocol tells it", "content": {"*/*": {}}})
    if keys and needed is not Access.PUBLIC:
        operation["security"] = [{name: []} for name in KEY_SCHEMES]
    operation["x-access"] = str(needed)
