"""Who may call what: every route with every kind of key, and an open server's pages of strangers."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from bluejay.accounts.ledger import Ledger
from bluejay.accounts.plans import read_plans
from bluejay.accounts.store import Store
from bluejay.errors import ConfigError
from bluejay.server import auth, generation
from bluejay.server.app import all_routes
from bluejay.server.auth import Access
from bluejay.server.call import Dialect, TheCall, access, route_class
from bluejay.server.options import ModelOptions, ServerOptions
from bluejay.server.serving import Server

# Anybody may call these; whoever adds one here says why it harms nobody.
PUBLIC = {
    "/": "KServe's word that the server lives",
    "/livez": "probes have no key",
    "/readyz": "probes have no key",
    "/openapi.json": "the schema of a public program",
    "/docs": "the same, for people",
    "/docs/{name}": "its style and its script",
    "/v2": "what the server is and which extensions it has, as the protocol has it",
    "/v2/": "the same",
    "/v2/health/live": "probes have no key",
    "/v2/health/ready": "probes have no key",
}
SCHEMES = ("Bearer {}", "Api-Key {}", "bearer {}")


@contextmanager
def made(folder: Path, **options: Any) -> Iterator[tuple[Server, Store]]:
    """A server whose engines are not started."""
    store = Store.open(f"sqlite:///{folder}/accounts.db")
    ledger = Ledger(folder / "journal", store)
    try:
        if options.pop("keyed", False):
            store.create_project("first")
            store.create_key("first", "operator", scopes=["admin"])
        models = [ModelOptions("bluejay", "default")]
        yield Server(ServerOptions(**options), models, store=store, ledger=ledger, plans=read_plans({})), store
    finally:
        ledger.close()
        store.close()


@pytest.fixture
def keyed(tmp_path: Path) -> Iterator[tuple[Server, dict[str, str]]]:
    """A server with keys, and a header for each kind of caller."""
    with made(tmp_path, keyed=True) as (server, store):
        store.create_project("people")
        soon = datetime.now(UTC) + timedelta(seconds=0.05)
        keys = {
            "user": store.create_key("people", "user").text,
            "admin": store.create_key("people", "admin", scopes=["user", "admin"]).text,
            "expired": store.create_key("people", "expired", expires_at=soon).text,
            "wrong": "bj-" + "A" * 43,
        }
        revoked = store.create_key("people", "revoked")
        store.revoke_key(revoked.record.id)
        store.create_project("gone")
        keys["disabled"] = store.create_key("gone", "user").text
        store.disable_project("gone")
        keys["revoked"] = revoked.text
        keys["other case"] = keys["user"].swapcase()
        while datetime.now(UTC) <= soon:
            pass
        yield server, {"no key": "", **keys}


def test_a_database_that_hangs_holds_its_own_threads_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generation, "RECALL_S", 0.1)
    answering = threading.Event()
    with made(tmp_path) as (server, store):
        monkeypatch.setattr(store, "usage_since", lambda *_: answering.wait(30))
        service, projects = server.service, [f"project {number}" for number in range(100)]

        async def scenario() -> None:
            async with asyncio.timeout(20):
                await asyncio.gather(*map(service._recall, projects))
                assert all(map(service.limits.knows, projects))  # from here on
                assert await asyncio.to_thread(lambda: "done") == "done"
            answering.set()

        asyncio.run(scenario())
    assert caplog.messages == ["the usage of today is not known: no answer within 0.1 s"] * 100


def ask(server: Server, calls: list[tuple[str, str, dict[str, str]]]) -> list[httpx.Response]:
    async def all_of_them() -> list[httpx.Response]:
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return [
                await http.request(
                    method, path, headers=[(name, text.encode("latin-1")) for name, text in more.items()]
                )
                for method, path, more in calls
            ]

    return asyncio.run(all_of_them())


def test_every_route_asks_for_what_it_says(keyed: tuple[Server, dict[str, str]]) -> None:
    server, keys = keyed
    routes = all_routes(server.house)
    table = [
        (route, method, caller, {"Authorization": f"Bearer {key}"} if key else {})
        for route in routes
        for method in sorted(route.methods)
        for caller, key in keys.items()
    ]
    calls = [(method, re.sub(r"\{[^}]*\}", "nope", route.path), headers) for route, method, _, headers in table]
    wrong = []
    for (route, method, caller, _), answer in zip(table, ask(server, calls), strict=True):
        needed = route.access  # type: ignore[attr-defined]
        refused = answer.status_code if answer.status_code in (401, 403) else None
        expected = None if needed is Access.PUBLIC or caller == "admin" else 401
        if caller == "user":
            expected = 403 if needed is Access.ADMIN else None
        if refused != expected:
            wrong.append(f"{method} {route.path} ({needed}) with {caller}: {answer.status_code}")
        if answer.status_code == 401 and answer.headers["www-authenticate"] != "Bearer":
            wrong.append(f"{method} {route.path}: 401 without a word on how to show a key")
    assert not wrong, "\n".join(wrong)


def test_the_public_routes_are_these_and_all_routes_are_of_a_dialect(tmp_path: Path) -> None:
    with made(tmp_path) as (server, _):
        public = {route.path for route in all_routes(server.house) if route.access is Access.PUBLIC}  # type: ignore[attr-defined]
        assert public <= set(PUBLIC)
        # Whatever else the application had would stand beside the dialects' routes, and have no policy.
        assert len(server.app.routes) == len(all_routes(server.house))


def test_who_shows_no_key_hears_no_models_name(keyed: tuple[Server, dict[str, str]], tmp_path: Path) -> None:
    [closed] = ask(keyed[0], [("GET", "/readyz", {})])
    assert closed.json() == {"ready": False, "reasons": ["stopped: 1 of 1 models"]}
    (tmp_path / "open").mkdir()
    with made(tmp_path / "open") as (server, _):
        [opened] = ask(server, [("GET", "/readyz", {})])
    assert opened.json() == {"ready": False, "reasons": ["bluejay: stopped"]}


def test_a_route_without_a_policy_cannot_be_made(tmp_path: Path) -> None:
    async def open_to_whom(call: TheCall) -> Any:
        return None

    with made(tmp_path) as (server, _):
        router = route_class(server.house, Dialect("any", lambda failure: None))
        with pytest.raises(TypeError, match="has no @access"):
            router("/x", open_to_whom)
        router("/x", access(Access.USER)(open_to_whom))


def test_a_key_comes_in_three_ways_and_is_never_echoed(keyed: tuple[Server, dict[str, str]]) -> None:
    server, keys = keyed
    good = [{"Authorization": scheme.format(keys["user"])} for scheme in SCHEMES] + [{"X-API-Key": keys["user"]}]
    bad: list[dict[str, str]] = [
        {"Authorization": keys["user"]},
        {"Authorization": f"Basic {keys['user']}"},
        {"Authorization": f"Bearer {keys['user']}x"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer \xff\xfe"},
        {"X-API-Key": keys["wrong"]},
    ]
    answers = ask(server, [("GET", "/v1/models", headers) for headers in good + bad])
    assert [answer.status_code for answer in answers] == [200] * len(good) + [401] * len(bad)
    assert not any(key in answer.text for answer in answers for key in keys.values() if key)


def test_unknown_keys_are_compared_like_known_ones(
    keyed: tuple[Server, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, keys = keyed
    compared: list[bool] = []

    def is_same(digest: str, kept: str | None) -> bool:
        compared.append(kept is not None)
        return same(digest, kept)

    same = auth.is_same
    monkeypatch.setattr(auth, "is_same", is_same)
    ask(server, [("GET", "/v1/models", {"X-API-Key": keys[name]}) for name in ("user", "wrong", "revoked")])
    assert compared == [True, False, True]


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "127.0.0.1:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "\xff"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
    ],
)
def test_an_open_server_does_not_answer_to_pages_of_strangers(
    tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    with made(tmp_path) as (server, _):
        [answer, live] = ask(server, [("GET", "/v1/models", headers), ("GET", "/livez", headers)])
        assert answer.status_code == status, answer.text
        assert live.status_code == 200  # probes name the host by its address


def test_plans_may_name_models_by_any_of_their_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plans = read_plans({"batch": {"models": ["bird", "gpt-j-6b", "dodo"]}})
    models = [ModelOptions("jay", "default", aliases=("bird",))]
    with (
        closing(Store.open(f"sqlite:///{tmp_path}/accounts.db")) as store,
        closing(Ledger(tmp_path / "journal", store)) as ledger,
    ):
        server = Server(ServerOptions(), models, store=store, ledger=ledger, plans=plans)
    assert server.house.door.plans["batch"].models == ("jay", "jay")
    assert "the plan batch has the model dodo, which is not served here" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kserve_defaults": 5}, "kserve_defaults: 5 came, expected a table"),
        ({"kserve_defaults": {"max_lenght": 3}}, "kserve_defaults: unknown option 'max_lenght'"),
        ({"host": 5}, "host is 5"),
        ({"drain_s": float("inf")}, "drain_s is inf"),
    ],
)
def test_settings_that_are_none_are_told_at_the_start(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerOptions(**options)


def test_a_server_that_others_reach_asks_for_keys_or_for_a_word(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--insecure"), made(tmp_path, host="0.0.0.0"):
        pass
    with pytest.raises(ConfigError, match="--insecure"), made(tmp_path, host="192.0.2.1"):
        pass
    with made(tmp_path, host="0.0.0.0", insecure=True) as (server, _):
        assert server.house.door.is_open
        admin = [route for route in all_routes(server.house) if route.access is Access.ADMIN]  # type: ignore[attr-defined]
        calls = [(method, re.sub(r"\{[^}]*\}", "x", route.path), {}) for route in admin for method in route.methods]
        assert all(answer.status_code == 403 for answer in ask(server, calls))
    with made(tmp_path, host="0.0.0.0", keyed=True) as (server, _):
        assert not server.house.door.is_open
