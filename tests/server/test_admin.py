"""The administrator's routes on a server with keys."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from bluejay.accounts.keys import digest_of
from bluejay.accounts.plans import PLANS
from bluejay.accounts.records import KeyRecord, ProjectRecord
from bluejay.accounts.store import Store
from bluejay.errors import Overloaded, StoreError, Unauthenticated
from bluejay.server import auth
from bluejay.server.auth import Access, Door
from bluejay.server.errors import failure_of

PREDICT = "/v1/models/bluejay:predict"
FLAGGED = {"request_id": "r", "project_id": None, "model": "bluejay", "rule": "rude", "action": "mask"}


def database(home: Path) -> str:
    (home / "data" / "bluejay").mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{home}/data/bluejay/bluejay.db"


class Admins:
    """A running server, an administrator's client, a user's key, and the database beside it."""

    def __init__(self, serving: Any, admin: httpx.Client, user: str, store: Store) -> None:
        self.serving = serving
        self.http = admin
        self.user = user
        self.store = store

    def as_user(self, key: str | None = None) -> dict[str, str]:
        return {"authorization": f"Bearer {key or self.user}"}


@pytest.fixture(scope="module")
def admins(
    start_server: Callable[..., AbstractContextManager[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Admins]:
    home = tmp_path_factory.mktemp("keyed")
    store = Store.open(database(home))
    store.create_project("staff")
    admin = store.create_key("staff", "Ada", scopes=("user", "admin")).text
    user = store.create_key("staff", "Uma").text
    for number in range(5):
        store.add_flagged(**FLAGGED, prompt=f"prompt {number}", text=f"tëxt {number}")
    settings = "[plans.batch]\npriority = -5\n"
    with (
        start_server(home=home, settings=settings) as serving,
        serving.client(headers={"authorization": f"Bearer {admin}"}) as http,
    ):
        yield Admins(serving, http, user, store)
    store.close()


def test_only_administrators_come_in(admins: Admins) -> None:
    with admins.serving.client() as http:
        for method, path in (
            ("GET", "/admin/projects"),
            ("POST", "/admin/projects"),
            ("PATCH", "/admin/projects/staff"),
            ("GET", "/admin/keys"),
            ("POST", "/admin/keys"),
            ("DELETE", "/admin/keys/x"),
            ("GET", "/admin/usage"),
            ("GET", "/admin/flagged"),
            ("GET", "/admin/flagged/1"),
            ("GET", "/admin/flagged/export"),
            ("POST", "/admin/flagged/1/accept"),
            ("POST", "/admin/flagged/1/reject"),
            ("GET", "/admin/models"),
            ("POST", "/admin/models/bluejay/load"),
            ("POST", "/admin/models/bluejay/unload"),
            ("GET", "/admin/plans"),
        ):
            nobody = http.request(method, path)
            assert (nobody.status_code, nobody.json()["code"]) == (401, "Unauthenticated"), path
            user = http.request(method, path, headers=admins.as_user())
            assert (user.status_code, user.json()["code"]) == (403, "Forbidden"), path
            assert list(user.json()) == ["error", "code"]


def test_projects_are_opened_changed_and_closed(admins: Admins) -> None:
    made = admins.http.post("/admin/projects", json={"name": "lab", "plan": "developer"})
    assert made.status_code == 201
    assert made.json()["plan"] == "developer"
    assert {project["name"] for project in admins.http.get("/admin/projects").json()["projects"]} >= {"lab", "staff"}
    key = admins.http.post("/admin/keys", json={"project": "lab", "name": "k"}).json()["key"]
    with admins.serving.client(headers=admins.as_user(key)) as http:
        assert http.get("/v1/models").status_code == 200
        closed = admins.http.patch("/admin/projects/lab", json={"disabled": True, "plan": "batch"}).json()
        assert closed["disabled_at"] is not None
        assert closed["plan"] == "batch"
        assert http.get("/v1/models").status_code == 401
        opened = admins.http.patch(f"/admin/projects/{closed['id']}", json={"disabled": False}).json()
        assert opened["disabled_at"] is None
        assert http.get("/v1/models").status_code == 200


def test_keys_are_shown_once_and_refused_as_soon_as_revoked(admins: Admins) -> None:
    wanted = {"project": "staff", "name": "once", "expires_at": "2100-01-31"}
    made = admins.http.post("/admin/keys", json=wanted)
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    told = made.json()
    assert (told["project"], told["scopes"], told["expires_at"]) == ("staff", ["user"], "2100-01-31T00:00:00+00:00")
    assert "note" not in told
    listed = admins.http.get("/admin/keys", params={"project": "staff"})
    assert told["id"] in {key["id"] for key in listed.json()["keys"]}
    assert told["key"] not in listed.text
    assert "digest" not in listed.text
    with admins.serving.client(headers=admins.as_user(told["key"])) as http:
        assert http.get("/v1/models").status_code == 200
        revoked = admins.http.delete(f"/admin/keys/{told['prefix']}").json()
        assert "was revoked" in revoked["problem"]
        assert http.get("/v1/models").status_code == 401
    assert told["key"] not in admins.serving.log


def generated(admins: Admins, by: str, group: str) -> int:
    """Tokens of a group; the ledger may take a moment to bring them into the database."""
    until_s = time.monotonic() + 20
    while True:
        totals = admins.http.get("/admin/usage", params={"by": by, "since": "2026-01-01"}).json()["totals"]
        count = sum(total["generated_tokens"] for total in totals if total["group"] == group)
        if count or time.monotonic() > until_s:
            return count
        time.sleep(0.05)


def test_usage_is_added_up(admins: Admins) -> None:
    with admins.serving.client(headers=admins.as_user()) as http:
        body = {"instances": ["A bird"], "parameters": {"max_length": 6}}
        assert http.post(PREDICT, json=body).status_code == 200
    for by, group in (("project", "staff"), ("model", "bluejay"), ("day", f"{datetime.now(UTC):%Y-%m-%d}")):
        assert generated(admins, by, group) > 0
    before = admins.http.get("/admin/usage", params={"until": "2001-01-01T00:00:00+01:00"}).json()["totals"]
    assert [total["num_requests"] for total in before] == [0]


def test_flagged_generations_are_reviewed(admins: Admins) -> None:
    first = admins.http.get("/admin/flagged", params={"limit": 3}).json()
    assert len(first["flagged"]) == 3
    rest = admins.http.get("/admin/flagged", params={"limit": 3, "after": first["next"]}).json()
    assert rest["next"] is None
    one, two = (record["id"] for record in first["flagged"][:2])
    assert admins.http.get(f"/admin/flagged/{one}").json()["text"] == "tëxt 0"
    accepted = admins.http.post(f"/admin/flagged/{one}/accept", json={"note": "harmless"}).json()
    assert (accepted["status"], accepted["reviewer"], accepted["note"]) == ("accepted", "Ada", "harmless")
    assert admins.http.post(f"/admin/flagged/{two}/reject").json()["status"] == "rejected"
    pending = admins.http.get("/admin/flagged", params={"status": "pending"}).json()["flagged"]
    assert {one, two}.isdisjoint(record["id"] for record in pending)
    for missing in ("999", "0", "-1", "x", str(2**63), str(2**80)):
        answer = admins.http.get(f"/admin/flagged/{missing}")
        assert (answer.status_code, answer.json()["code"]) == (404, "NoSuchThing")


def test_flagged_generations_are_exported_as_lines(admins: Admins) -> None:
    answer = admins.http.get("/admin/flagged/export", params={"status": "rejected"})
    assert answer.headers["content-type"] == "application/jsonl"
    assert all(json.loads(line)["status"] == "rejected" for line in answer.text.splitlines())
    everything = admins.http.get("/admin/flagged/export").text
    assert [json.loads(line)["prompt"] for line in everything.splitlines()] == [f"prompt {n}" for n in range(5)]
    assert "tëxt 4" in everything


def test_models_are_unloaded_and_loaded(admins: Admins) -> None:
    assert [model["ready"] for model in admins.http.get("/admin/models").json()["models"]] == [True]
    assert admins.http.post("/admin/models/bluejay/unload").json()["ready"] is False
    with admins.serving.client(headers=admins.as_user()) as http:
        refused = http.post(PREDICT, json={"instances": ["A bird"]})
        assert (refused.status_code, "was unloaded" in refused.text) == (503, True)
        loaded = admins.http.post("/admin/models/bluejay/load").json()
        assert (loaded["ready"], loaded["phase"]) == (True, "ready")
        again = http.post(PREDICT, json={"instances": ["A bird"], "parameters": {"max_length": 4}})
        assert again.status_code == 200


def test_plans_are_those_of_the_server(admins: Admins) -> None:
    plans = {plan["name"]: plan for plan in admins.http.get("/admin/plans").json()["plans"]}
    assert set(plans) == {*PLANS, "batch"}
    assert plans["batch"]["priority"] == -5


@pytest.mark.parametrize(
    "method, path, body, status, message",
    [
        ("POST", "/admin/projects", {"name": "a b"}, 400, "project is 'a b'"),
        ("POST", "/admin/projects", {"name": "staff"}, 400, "there is a project staff already"),
        ("POST", "/admin/projects", {"name": "new", "plan": "gold"}, 400, "plan is 'gold', expected one of free"),
        ("POST", "/admin/projects", {"nam": "x"}, 400, "name: Field required"),
        ("POST", "/admin/projects", [], 400, "valid dictionary"),
        ("PATCH", "/admin/projects/nope", {"plan": "free"}, 404, "there is no project 'nope'"),
        ("PATCH", "/admin/projects/staff", {"disabled": "yes"}, 400, "disabled"),
        ("POST", "/admin/keys", {"project": "nope", "name": "x"}, 400, "there is no project 'nope'"),
        ("POST", "/admin/keys", {"project": "staff", "name": ""}, 400, "name is ''"),
        ("POST", "/admin/keys", {"project": "staff", "name": "x", "scopes": ["root"]}, 400, "scopes.0"),
        ("POST", "/admin/keys", {"project": "staff", "name": "x", "expires_at": "soon"}, 400, "expected a day"),
        ("POST", "/admin/keys", {"project": "staff", "name": "x", "expires_at": "2001-01-01"}, 400, "which is over"),
        ("DELETE", "/admin/keys/nope", None, 404, "there is no key 'nope'"),
        ("GET", "/admin/usage?by=colour", None, 400, "by: Input should be 'project', 'key', 'model' or 'day'"),
        ("GET", "/admin/usage?since=0001-01-01T00:00:00%2B23:00", None, 400, "expected a year from 1970"),
        ("GET", "/admin/usage?colour=red", None, 400, "colour: Extra inputs"),
        ("GET", "/admin/usage?project=nope", None, 400, "there is no project"),
        ("GET", "/admin/flagged?status=odd", None, 400, "status: Input should be"),
        ("GET", f"/admin/flagged?after={2**63}", None, 400, "after: Input should be less"),
        ("GET", "/admin/flagged?limit=0", None, 400, "limit: Input should be greater"),
        ("POST", "/admin/flagged/1/accept", {"note": 3}, 400, "note"),
        ("POST", "/admin/models/nope/load", None, 404, "there is no model 'nope'"),
    ],
)
def test_what_is_wrong_is_named(admins: Admins, method: str, path: str, body: Any, status: int, message: str) -> None:
    content = None if body is None else json.dumps(body)
    answer = admins.http.request(method, path, content=content)
    assert (answer.status_code, list(answer.json())) == (status, ["error", "code"])
    assert message in answer.json()["error"]


class Slow:
    """A store of one key; a look-up reads, and then waits to be let on."""

    def __init__(self) -> None:
        self.revoked_at: datetime | None = None
        self.away = False
        self.looked_up = 0
        self.on_look_up: Callable[[], None] = lambda: None

    def find_key(self, digest: str) -> KeyRecord | None:
        self.looked_up += 1
        if self.away:
            raise StoreError("away")
        now = datetime.now(UTC)
        project = ProjectRecord("p", "staff", "free", now, None)
        found = KeyRecord("k", project, "Ada", "bj-x", digest_of("bj-x"), ("user",), now, None, self.revoked_at, None)
        self.on_look_up()
        return found

    def touch_key(self, key_id: str, now: datetime) -> None:
        pass


def test_a_key_that_is_revoked_while_it_is_looked_up_is_refused() -> None:
    store = Slow()
    door = Door(store, PLANS)
    headers = {"x-api-key": "bj-x"}

    def revoke() -> None:
        store.on_look_up = lambda: None
        store.revoked_at = datetime.now(UTC)
        door.forget(digest_of("bj-x"))

    store.on_look_up = revoke
    with pytest.raises(Unauthenticated, match="was revoked"):
        asyncio.run(door.admit(Access.USER, headers))
    assert store.looked_up == 2


def test_a_forgotten_key_needs_the_database() -> None:
    store = Slow()
    door = Door(store, PLANS)
    headers = {"x-api-key": "bj-x"}
    assert asyncio.run(door.admit(Access.USER, headers)).reviewer == "Ada"
    store.away = True
    assert asyncio.run(door.admit(Access.USER, headers)).key_name == "Ada"
    door.forget()
    with pytest.raises(StoreError):
        asyncio.run(door.admit(Access.USER, headers))


def test_a_database_that_hangs_holds_nobody_whose_key_was_right(monkeypatch: pytest.MonkeyPatch) -> None:
    store, answering = Slow(), threading.Event()
    door = Door(store, PLANS)

    async def scenario() -> None:
        await door.admit(Access.USER, {"x-api-key": "bj-x"})
        monkeypatch.setattr(auth, "REMEMBERED_S", 0.0)
        store.on_look_up = lambda: assert_soon(answering)
        began_s = time.monotonic()
        callers = [door.admit(Access.USER, {"x-api-key": "bj-x"}) for _ in range(50)]
        assert {caller.key_name for caller in await asyncio.gather(*callers)} == {"Ada"}
        assert (await door.admit(Access.USER, {"x-api-key": "bj-x"})).key_name == "Ada"
        assert time.monotonic() - began_s < 4 * auth.PATIENCE_S
        assert store.looked_up == 2  # one question for all of them
        waiting = asyncio.create_task(door.admit(Access.USER, {"x-api-key": "bj-unknown"}))
        await asyncio.sleep(2 * auth.PATIENCE_S)
        assert not waiting.done()
        store.revoked_at = datetime.now(UTC)
        answering.set()
        with pytest.raises(Unauthenticated):
            await waiting
        async with asyncio.timeout(20):
            with pytest.raises(Unauthenticated, match="was revoked"):
                while True:  # the other thread may be a little slower
                    await door.admit(Access.USER, {"x-api-key": "bj-x"})

    asyncio.run(scenario())


def test_a_database_that_hangs_is_away_for_keys_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    store, answering = Slow(), threading.Event()
    monkeypatch.setattr(auth, "LOOKUP_S", 0.2)
    monkeypatch.setattr(auth, "MAX_LOOKUPS", 6)
    door = Door(store, PLANS)

    async def scenario() -> None:
        store.on_look_up = lambda: assert_soon(answering)
        callers = [door.admit(Access.USER, {"x-api-key": f"bj-{number}"}) for number in range(20)]
        refused = await asyncio.gather(*callers, return_exceptions=True)
        assert [type(error) for error in refused] == [StoreError] * 6 + [Overloaded] * 14
        assert "within 0.2 s" in str(refused[0])
        assert failure_of(refused[0]).status == failure_of(refused[-1]).status == 503
        answering.set()
        async with asyncio.timeout(20):
            with pytest.raises(Unauthenticated):
                while True:  # until the threads are there again
                    with suppress(Overloaded):
                        await door.admit(Access.USER, {"x-api-key": "bj-unknown"})
                    await asyncio.sleep(0.001)

    asyncio.run(scenario())


def assert_soon(event: threading.Event) -> None:
    assert event.wait(30)
