"""Bounds, counts and health of a server in this process, whose engines are not started."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from bluejay.accounts.ledger import Ledger
from bluejay.accounts.plans import read_plans
from bluejay.accounts.store import Store
from bluejay.engine.statistics import Statistics
from bluejay.errors import EngineError
from bluejay.server.generation import Item
from bluejay.server.metrics import ENGINE
from bluejay.server.models import ServedModel
from bluejay.server.options import ModelOptions, ServerOptions
from bluejay.server.serving import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    store = Store.open(f"sqlite:///{tmp_path}/accounts.db")
    ledger = Ledger(tmp_path / "journal", store)
    try:
        models = [ModelOptions("bluejay", "default")]
        yield Server(ServerOptions(), models, store=store, ledger=ledger, plans=read_plans({}))
    finally:
        ledger.close()
        store.close()


def get(server: Server, path: str) -> httpx.Response:
    return post(server, path, None, method="GET")


def post(server: Server, path: str, body: Any, method: str = "POST") -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(server.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.request(method, path, content=json.dumps(body))

    return asyncio.run(send())


def test_an_engine_that_does_not_answer_is_told_of_without_its_numbers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answers() -> Statistics:
        return numbers

    async def fails() -> Statistics:
        raise EngineError("the worker died")

    numbers: Any = SimpleNamespace(**dict.fromkeys(ENGINE, 7))
    [model] = server.models
    told = []
    for engine in (answers, fails, fails, answers):
        monkeypatch.setattr(model.engine, "statistics", engine)
        answer = get(server, "/metrics")
        told.append('bluejay_engine_steps{model="bluejay"} 7.0' in answer.text)
        assert 'bluejay_model_ready{model="bluejay"} 0.0' in answer.text
    assert told == [True, False, False, True]


MANY = ["a"] * 257


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/models/bluejay:predict", {"instances": MANY}),
        ("/v1/completions", {"prompt": MANY}),
        ("/v1/embeddings", {"input": MANY}),
        (
            "/v2/models/bluejay/infer",
            {"inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [257], "data": MANY}]},
        ),
        ("/predict", [{"prompt": text} for text in MANY]),
        ("/SyncPredict", {"data": MANY}),
    ],
)
def test_prompts_are_counted_before_anything_is_made_of_them(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: Any
) -> None:
    def make(*_: Any, **__: Any) -> None:
        raise AssertionError("an item was made")

    facts = SimpleNamespace(n_positions=8, n_embd=8)
    monkeypatch.setattr(ServedModel, "opened", lambda self: (None, facts))
    monkeypatch.setattr(Item, "__init__", make)
    answer = post(server, path, body)
    assert answer.status_code == 400, answer.text
    assert "257" in answer.text or "more than 256" in answer.text


@pytest.mark.parametrize("path, status", [("/nowhere", 404), ("/readyz", 405)])
def test_what_no_route_answers_is_counted_and_named(
    server: Server, caplog: pytest.LogCaptureFixture, path: str, status: int
) -> None:
    with caplog.at_level("INFO", "bluejay.server"):
        answer = post(server, path, {})
    assert (answer.status_code, list(answer.json())) == (status, ["detail"])
    assert answer.headers["x-request-id"]
    assert answer.headers.get("allow") == ("GET" if status == 405 else None)
    labels = {"dialect": "http", "status": str(status)}
    assert server.service.metrics.registry.get_sample_value("bluejay_http_answers_total", labels) == 1
    assert [record.getMessage() for record in caplog.records] == [f"POST without a route {status}"]
