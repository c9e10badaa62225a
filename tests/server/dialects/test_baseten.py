"""Baseten's routes on a running server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bluejay.accounts.store import Store

from .golden_pairs import check, pairs

PROMPT = {"prompt": "If I was a billionaire, I would", "max_length": 20}


@pytest.fixture(scope="module")
def http(server: Any) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize("pair", [*pairs("baseten/classic"), *pairs("baseten/newer"), *pairs("baseten/truss")])
def test_answers_are_as_recorded(http: httpx.Client, pair: dict[str, Any]) -> None:
    check(http, pair)


def test_every_route_says_the_same_because_nothing_is_drawn(http: httpx.Client) -> None:
    classic = http.post("/models/any/predict", json=PROMPT)
    newer = http.post("/production/predict", json=PROMPT)
    truss = http.post("/v1/models/model:predict", json=PROMPT)
    assert classic.json()["model_output"] == newer.json() == truss.json()
    assert {answer.headers["x-served-model"] for answer in (classic, newer, truss)} == {"bluejay"}
    again = http.post("/predict", json={**PROMPT, "max_length": 12}).json()
    assert newer.json()["data"].startswith(again["data"])


def test_errors_of_a_truss_carry_its_headers(http: httpx.Client) -> None:
    answer = http.post("/v1/models/model:predict", content=b"{")
    assert (answer.headers["x-baseten-error-source"], answer.headers["x-baseten-error-code"]) == ("04", "700")


def _followed(http: httpx.Client, request_id: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        told: dict[str, Any] = http.get(f"/async_request/{request_id}", headers=headers).json()
        if told["status"] not in ("QUEUED", "IN_PROGRESS"):
            return told
        time.sleep(0.02)
    pytest.fail(f"still {told}")


def test_an_asynchronous_request_ends_with_the_models_output(http: httpx.Client) -> None:
    asked = {
        "model_input": PROMPT,
        "webhook_endpoint": None,
        "priority": 2,
        "max_time_in_queue_seconds": 60,
        "inference_retry_config": {"max_attempts": 2, "initial_delay_ms": 0},
    }
    accepted = http.post("/deployment/rqvz1xw/async_predict", json=asked)
    assert accepted.status_code == 201
    told = _followed(http, accepted.json()["request_id"])
    assert told["model_output"] == http.post("/predict", json=PROMPT).json()
    assert {key: told[key] for key in ("model_id", "deployment_id", "status", "webhook_status", "errors")} == {
        "model_id": "bluejay",
        "deployment_id": "rqvz1xw",
        "status": "SUCCEEDED",
        "webhook_status": "NO_WEBHOOK_PROVIDED",
        "errors": [],
    }
    assert told["created_at"] <= told["status_at"]
    gone = http.delete(f"/async_request/{told['request_id']}").json()
    assert (gone["canceled"], "SUCCEEDED" in gone["message"]) == (False, True)


def test_a_request_that_cannot_be_done_has_failed_and_says_why(http: httpx.Client) -> None:
    asked = {"model_input": {"prompt": "many words " * 20}}
    told = _followed(http, http.post("/async_predict", json=asked).json()["request_id"])
    assert told["status"] == "FAILED"
    [error] = told["errors"]
    assert error["code"] == "MODEL_INVALID_INPUT"
    assert "max_length is 20" in error["message"]


def test_a_request_can_be_cancelled(http: httpx.Client) -> None:
    asked = {"model_input": {"prompt": "Once", "max_length": 512, "min_length": 64, "num_beams": 8}}
    request_id = http.post("/production/async_predict", json=asked).json()["request_id"]
    answer = http.delete(f"/async_request/{request_id}").json()
    assert (answer["request_id"], answer["canceled"]) == (request_id, True)
    assert http.get(f"/models/bluejay/async_request/{request_id}").json()["status"] == "CANCELED"


@pytest.fixture(scope="module")
def keyed(
    start_server: Callable[..., AbstractContextManager[Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Two models, settings of one's own, and three projects with a key each: a client, the keys' texts, the store."""
    database = f"sqlite:///{tmp_path_factory.mktemp('database') / 'accounts.db'}"
    store = Store.open(database)
    keys = []
    for name in ("one", "two", "three"):
        store.create_project(name, "premium")
        keys.append(store.create_key(name, name).text)
    settings = '[server]\nbaseten_failed = "error"\nbaseten_max_length = 9\n'
    flags = ("--database", database, "jay=default-draft", "model=default-draft")
    try:
        with start_server(*flags, settings=settings) as serving, serving.client() as client:
            yield client, keys, store
    finally:
        store.close()


def test_a_key_is_asked_for_in_each_routes_words(keyed: Any) -> None:
    http, keys, _ = keyed
    classic = http.post("/models/jay/predict", json=PROMPT)
    assert (classic.status_code, list(classic.json())) == (401, ["error"])
    newer = http.post("/predict", json=PROMPT)
    assert (newer.status_code, newer.json()["error_code"]) == (401, "unauthorized")
    answer = http.post("/models/jay/predict", json=PROMPT, headers={"authorization": f"Api-Key {keys[0]}"})
    assert answer.headers["x-served-model"] == "jay"


def test_settings_change_the_limits_and_the_word_for_failure(keyed: Any) -> None:
    http, keys, _ = keyed
    headers = {"authorization": f"Api-Key {keys[0]}"}
    one = http.post("/models/jay/predict", json={"prompt": "Once", "max_length": 10}, headers=headers).json()
    assert one["message"] == "max_length was 10 and is limited to 9"
    assert http.post("/models/jay/predict", json={}, headers=headers).json()["status"] == "error"


def test_one_of_several_models_is_named_by_the_path(keyed: Any) -> None:
    http, keys, _ = keyed
    headers = {"authorization": f"Api-Key {keys[0]}"}
    assert http.post("/models/rqvz1xw/predict", json=PROMPT, headers=headers).status_code == 404
    none = http.post("/production/predict", json=PROMPT, headers=headers)
    assert (none.status_code, none.json()["error_code"]) == (404, "model_does_not_exist")
    for path in ("/models/model/production/predict", "/deployment/model/predict"):
        assert http.post(path, json={"prompt": "Once"}, headers=headers).headers["x-served-model"] == "model"
    # A model of this name is KServe's; a Truss's path would hide it.
    asked = {"instances": ["One"], "parameters": {"max_length": 4}}
    kserve = http.post("/v1/models/model:predict", json=asked, headers=headers)
    assert list(kserve.json()) == ["predictions"]


def test_a_request_is_seen_by_its_project_alone(keyed: Any) -> None:
    http, keys, _ = keyed
    mine, theirs = ({"authorization": f"Bearer {key}"} for key in keys[:2])
    asked = {"model_input": {"prompt": "Once", "max_length": 6}}
    request_id = http.post("/models/jay/async_predict", json=asked, headers=mine).json()["request_id"]
    path = f"/async_request/{request_id}"
    assert http.get(path, headers=mine).status_code == 200
    assert http.get(path, headers=theirs).status_code == 404
    assert http.delete(path, headers=theirs).status_code == 404
    assert http.get(f"/status/{request_id}", headers=mine).status_code == 404  # it is no task of Neuro's


def test_what_a_request_took_is_in_the_usage(keyed: Any) -> None:
    http, keys, store = keyed
    project = store.find_project("three")
    asked = {"model_input": {"prompt": "Once", "max_length": 6}}
    headers = {"authorization": f"Bearer {keys[2]}"}
    request_id = http.post("/models/jay/async_predict", json=asked, headers=headers).json()["request_id"]
    assert _followed(http, request_id, headers)["status"] == "SUCCEEDED"
    until = time.monotonic() + 60
    while (total := store.usage_since(project.id, project.created_at)).num_requests == 0:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert (total.num_requests, total.num_tokens) == (1, 6)


def test_a_server_that_ends_finishes_what_runs(
    start_server: Callable[..., AbstractContextManager[Any]], tmp_path: Path
) -> None:
    database = f"sqlite:///{tmp_path / 'accounts.db'}"
    with start_server("--database", database, "jay=default-draft") as serving, serving.client() as http:
        asked = {"model_input": {"prompt": "Once", "max_length": 300, "min_length": 64, "num_beams": 4}}
        request_id = http.post("/async_predict", json=asked).json()["request_id"]
        while http.get(f"/async_request/{request_id}").json()["status"] == "QUEUED":
            time.sleep(0.01)
        assert serving.stop() == 0
    store = Store.open(database)
    [total] = store.usage_totals()
    store.close()
    assert total.num_requests == 1
    assert total.generated_tokens > 0
