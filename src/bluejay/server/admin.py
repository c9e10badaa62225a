"""What an administrator does over HTTP: projects, keys, usage, flagged generations, models, plans.

    curl -H "Authorization: Bearer $KEY" http://127.0.0.1:8000/admin/projects

The database is asked in threads; while it is away these routes answer 503.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime, time
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictStr
from starlette.responses import Response, StreamingResponse

from bluejay.accounts.plans import DEFAULT_PLAN
from bluejay.accounts.records import FlaggedRecord, KeyRecord, ProjectRecord
from bluejay.accounts.store import Group
from bluejay.errors import BluejayError, InvalidRequest, Stopped
from bluejay.server.auth import Access
from bluejay.server.call import (
    Call,
    Dialect,
    House,
    TheCall,
    access,
    checked,
    documented,
    note_failure,
    read_checked,
    route_class,
)
from bluejay.server.errors import NoSuchThing, failure_of
from bluejay.server.health import render
from bluejay.server.models import ServedModel

DIALECT = Dialect("admin", render)
YEARS = range(1970, 9999)  # whatever the zone, such a time is one in UTC too
MAX_ID = 2**63 - 1
PAGE = 500
OBJECT = {"type": "object"}
Status = Literal["pending", "accepted", "rejected"]
Wanted = TypeVar("Wanted", bound=BaseModel)


def _moment(value: Any) -> Any:
    """A day, or a time; UTC where it names no zone."""
    if not isinstance(value, str):
        raise ValueError("expected a day as 2026-01-31, or a time as 2026-01-31T12:00:00Z")
    try:
        found = datetime.combine(date.fromisoformat(value), time()) if len(value) == 10 else None
        found = found or datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("expected a day as 2026-01-31, or a time as 2026-01-31T12:00:00Z") from None
    if found.year not in YEARS:
        raise ValueError(f"expected a year from {YEARS[0]} to {YEARS[-1]}")
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


Moment = Annotated[
    datetime,
    BeforeValidator(_moment, json_schema_input_type=str),
    Field(description="A day (2026-01-31) or a time (2026-01-31T12:00:00Z); UTC where it names no zone."),
]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewProject(_Asked):
    """A project to open."""

    name: StrictStr = Field(description="1 to 63 letters, digits, dots, dashes and underscores.")
    plan: StrictStr = Field(DEFAULT_PLAN, description="One of /admin/plans.")


class ProjectChange(_Asked):
    """What is to be otherwise; what is not named stays."""

    plan: StrictStr | None = None
    disabled: StrictBool | None = Field(None, description="Whether its keys are refused.")


class NewKey(_Asked):
    """A key to make."""

    project: StrictStr = Field(description="The project's name or id.")
    name: StrictStr = Field(description="What it is for.")
    scopes: list[Literal["user", "admin"]] = Field(default=["user"], min_length=1, max_length=2, fail_fast=True)
    expires_at: Moment | None = None


class KeysWanted(_Asked):
    """Which keys."""

    project: str | None = None


class UsageWanted(_Asked):
    """What is added up: requests that started in [since, until)."""

    by: Group | None = None
    project: str | None = None
    since: Moment | None = None
    until: Moment | None = None


class FlaggedWanted(_Asked):
    """A page of flagged generations, by id."""

    status: Status | None = None
    after: int = Field(0, ge=0, le=MAX_ID, description="The last id of the page before.")
    limit: int = Field(100, ge=1, le=PAGE)


class ExportWanted(_Asked):
    """What is exported."""

    status: Status | None = None


class Verdict(_Asked):
    """What a person thinks of it."""

    note: StrictStr | None = Field(None, max_length=10_000)


def routes(house: House) -> APIRouter:
    """Everything here."""
    router = APIRouter(prefix="/admin", route_class=route_class(house, DIALECT), tags=["Administration"])
    router.get("/projects", summary="All projects", **_documented())(list_projects)
    router.post("/projects", summary="Open a project", **_documented(NewProject, status=201))(create_project)
    router.patch("/projects/{project}", summary="Change a project", **_documented(ProjectChange, ("project",)))(
        change_project
    )
    router.get("/keys", summary="All keys, without their texts", **_documented(query=KeysWanted))(list_keys)
    router.post("/keys", summary="Make a key; shown once", **_documented(NewKey, status=201))(create_key)
    router.delete("/keys/{key}", summary="Revoke a key", **_documented(None, ("key",)))(revoke_key)
    router.get("/usage", summary="Usage, added up", **_documented(query=UsageWanted))(usage)
    router.get("/flagged", summary="Flagged generations", **_documented(query=FlaggedWanted))(list_flagged)
    lines = {
        200: {"description": "A record each line", "content": {"application/jsonl": {"schema": {"type": "string"}}}}
    }
    exported = _documented(query=ExportWanted)
    exported |= {"response_class": StreamingResponse, "responses": exported["responses"] | lines}
    router.get("/flagged/export", summary="As lines of JSON", **exported)(export_flagged)
    router.get("/flagged/{id}", summary="One of them", **_documented(None, ("id",)))(one_flagged)
    router.post("/flagged/{id}/accept", summary="Accept it", **_documented(Verdict, ("id",), required=False))(accept)
    router.post("/flagged/{id}/reject", summary="Reject it", **_documented(Verdict, ("id",), required=False))(reject)
    router.get("/models", summary="All models and where they are", **_documented())(list_models)
    router.post("/models/{model:path}/load", summary="Load a model", **_documented(None, ("model",)))(load)
    router.post("/models/{model:path}/unload", summary="Unload a model", **_documented(None, ("model",)))(unload)
    router.get("/plans", summary="All plans", **_documented())(list_plans)
    return router


def _documented(
    asked: type[BaseModel] | None = None,
    path: Sequence[str] = (),
    *,
    query: type[BaseModel] | None = None,
    status: int = 200,
    required: bool = True,
) -> dict[str, Any]:
    """What the schema says of a route here."""
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in path]
    for name, schema in (query.model_json_schema()["properties"] if query is not None else {}).items():
        parameters.append({"name": name, "in": "query", "required": False, "schema": schema})
    told = documented(asked, None if status != 200 else OBJECT, openapi_extra={"parameters": parameters})
    if asked is not None:
        told["openapi_extra"]["requestBody"]["required"] = required
    if status != 200:
        told["status_code"] = status
    codes = {400: "Wrong values", 401: "No key", 403: "No administrator's key", 503: "The database is away"}
    told["responses"] |= {code: {"description": text} for code, text in codes.items()}
    return told | {"responses": told["responses"] | ({404: {"description": "No such thing"}} if path else {})}


def _query(call: Call, kind: type[Wanted]) -> Wanted:
    return checked(kind, dict(call.request.query_params))


# Projects


@access(Access.ADMIN)
async def list_projects(call: TheCall) -> Response:
    """By name, the disabled ones too."""
    found = await call.ask_store(call.house.store.list_projects)
    return call.reply({"projects": [_project(project) for project in found]})


@access(Access.ADMIN)
async def create_project(call: TheCall) -> Response:
    """With a plan of this server's."""
    asked = await call.read(NewProject)
    _check_plan(call, asked.plan)
    made = await call.ask_store(call.house.store.create_project, asked.name, asked.plan)
    return call.reply(_project(made), 201)


@access(Access.ADMIN)
async def change_project(call: TheCall) -> Response:
    """Its plan, or whether its keys are taken; known here at once, by other servers of the database within seconds."""
    name, store = call.request.path_params["project"], call.house.store
    asked = await call.read(ProjectChange)
    if asked.plan is not None:
        _check_plan(call, asked.plan)

    def change() -> ProjectRecord:
        found = store.find_project(name)
        if found is None:
            raise NoSuchThing(f"there is no project {name[:200]!r}", "project")
        if asked.plan is not None:
            found = store.set_plan(found.id, asked.plan)
        if asked.disabled is not None:
            found = store.disable_project(found.id) if asked.disabled else store.enable_project(found.id)
        return found

    changed = await call.ask_store(change)
    call.house.door.forget()
    return call.reply(_project(changed))


def _check_plan(call: Call, plan: str) -> None:
    if plan not in call.house.door.plans:
        raise InvalidRequest(f"plan is {plan[:100]!r}, expected one of {', '.join(call.house.door.plans)}", "plan")


# Keys


@access(Access.ADMIN)
async def list_keys(call: TheCall) -> Response:
    """The oldest first; revoked and expired ones too."""
    found = await call.ask_store(call.house.store.list_keys, _query(call, KeysWanted).project)
    return call.reply({"keys": [_key(key) for key in found]})


@access(Access.ADMIN)
async def create_key(call: TheCall) -> Response:
    """Its text is in this answer and nowhere else."""
    asked = await call.read(NewKey)
    made = await call.ask_store(
        call.house.store.create_key, asked.project, asked.name, scopes=asked.scopes, expires_at=asked.expires_at
    )
    note = {"note": "this server asks for no key before it is started again"} if call.house.door.is_open else {}
    return call.reply({"key": made.text, **_key(made.record), **note}, 201, {"Cache-Control": "no-store"})


@access(Access.ADMIN)
async def revoke_key(call: TheCall) -> Response:
    """By its id or its first characters. Refused here at once, by other servers of the database within seconds."""
    named, store = call.request.path_params["key"], call.house.store

    def revoke() -> KeyRecord:
        if not any(named in (key.id, key.prefix) for key in store.list_keys()):
            raise NoSuchThing(f"there is no key {named[:11]!r}; name it by its id or prefix", "key")
        return store.revoke_key(named)

    revoked = await call.ask_store(revoke)
    call.house.door.forget(revoked.digest)
    return call.reply(_key(revoked))


# Usage


@access(Access.ADMIN)
async def usage(call: TheCall) -> Response:
    """Of requests that have ended, as far as the ledger has brought them into the database."""
    wanted = _query(call, UsageWanted)
    totals = await call.ask_store(
        call.house.store.usage_totals, wanted.by, project=wanted.project, since=wanted.since, until=wanted.until
    )
    return call.reply({"by": wanted.by, "totals": [asdict(total) for total in totals]})


# Flagged generations


@access(Access.ADMIN)
async def list_flagged(call: TheCall) -> Response:
    """`next` is the next page's `after`; null behind the last."""
    wanted = _query(call, FlaggedWanted)
    found = await call.ask_store(call.house.store.list_flagged, wanted.status, after=wanted.after, limit=wanted.limit)
    following = found[-1].id if len(found) == wanted.limit else None
    return call.reply({"flagged": [_told(record) for record in found], "next": following})


@access(Access.ADMIN)
async def one_flagged(call: TheCall) -> Response:
    """With its prompt and its text."""
    return call.reply(_told(await _find_flagged(call)))


@access(Access.ADMIN)
async def accept(call: TheCall) -> Response:
    """A later verdict takes the place of an earlier one."""
    return await _review(call, "accepted")


@access(Access.ADMIN)
async def reject(call: TheCall) -> Response:
    """A later verdict takes the place of an earlier one."""
    return await _review(call, "rejected")


async def _review(call: Call, verdict: Literal["accepted", "rejected"]) -> Response:
    body = await call.body()
    asked = await call.parsed(body, partial(read_checked, Verdict)) if body.strip() else Verdict(note=None)
    found = await _find_flagged(call)
    review = call.house.store.review_flagged
    done = await call.ask_store(review, found.id, verdict, reviewer=call.principal.reviewer, note=asked.note)
    return call.reply(_told(done))


async def _find_flagged(call: Call) -> FlaggedRecord:
    text = call.request.path_params["id"]
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
    if 0 < number <= MAX_ID:
        for record in await call.ask_store(call.house.store.list_flagged, after=number - 1, limit=1):
            if record.id == number:
                return record
    raise NoSuchThing(f"there is no flagged generation {text[:40]!r}", "id")


@access(Access.ADMIN)
async def export_flagged(call: TheCall) -> Response:
    """All of them, page by page; should the database go away meanwhile, the last line says so."""
    pages = call.house.store.flagged_pages(_query(call, ExportWanted).status)
    first: list[FlaggedRecord] = await call.ask_store(next, pages, [])  # before the answer begins: it can still be 503
    return StreamingResponse(_lines(call, pages, first), media_type="application/jsonl")


async def _lines(
    call: Call, pages: Iterator[list[FlaggedRecord]], records: list[FlaggedRecord]
) -> AsyncIterator[bytes]:
    while records:
        yield b"".join(json.dumps(_told(record), ensure_ascii=False).encode() + b"\n" for record in records)
        try:
            records = await call.ask_store(next, pages, [])
        except BluejayError as error:
            note_failure(error, call.caller.request_id)
            yield json.dumps(render(failure_of(error))).encode() + b"\n"
            return


# Models and plans


@access(Access.ADMIN)
async def list_models(call: TheCall) -> Response:
    """Why one failed says the log."""
    return call.reply({"models": [_model(model) for model in call.house.models]})


@access(Access.ADMIN)
async def load(call: TheCall) -> Response:
    """Answers when it is ready."""
    model = call.find(call.request.path_params["model"])
    loading = asyncio.create_task(model.load())
    await asyncio.wait([loading])
    if loading.cancelled():
        raise Stopped(f"{model.name} was unloaded before it was ready")
    if (error := loading.exception()) is not None:
        if isinstance(error, BluejayError):
            raise Stopped(f"{model.name} could not be loaded; the server's log says why")
        raise error
    return call.reply(_model(model))


@access(Access.ADMIN)
async def unload(call: TheCall) -> Response:
    """Its memory is free afterwards; who is being served gets an error."""
    model = call.find(call.request.path_params["model"])
    await model.unload()
    return call.reply(_model(model))


@access(Access.ADMIN)
async def list_plans(call: TheCall) -> Response:
    """Null is no limit."""
    return call.reply({"plans": [asdict(plan) for plan in call.house.door.plans.values()]})


# Records as JSON


def _project(project: ProjectRecord) -> dict[str, Any]:
    return _told(project)


def _key(key: KeyRecord) -> dict[str, Any]:
    """Without the digest, which is nobody's business."""
    told = _told(key)
    del told["digest"]
    return told | {"project": key.project.name, "problem": key.problem(datetime.now(UTC))}


def _told(record: ProjectRecord | KeyRecord | FlaggedRecord) -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in vars(record).items()}


def _model(model: ServedModel) -> dict[str, Any]:
    state = model.state
    return {
        "name": model.name,
        "aliases": list(model.options.aliases),
        "ready": model.ready,
        "phase": str(state.phase),
        "done_bytes": state.done_bytes,
        "total_bytes": state.total_bytes,
        "n_positions": None if model.facts is None else model.facts.n_positions,
        "sequences": model.gate.num_inside,
    }
