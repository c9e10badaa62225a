"""The log of a server: a line for each request, and nothing of what was asked or answered."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import urlsplit

import pytest

from bluejay.errors import ConfigError
from bluejay.server.logs import set_up_logs

SECRET = "quetzalcoatlus"  # in no code, no path, and no vocabulary
PREDICT = "/v1/models/bluejay:predict"


@pytest.fixture
def logs(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What was logged as JSON since; afterwards logging is as it was."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    asked = {name: logging.getLogger(name).level for name in ("alembic", "uvicorn.error")}
    yield lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)
    for name, number in asked.items():
        logging.getLogger(name).setLevel(number)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).propagate = True
    logging.getLogger("asyncio").filters.clear()


def fail() -> None:
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        raise ExceptionGroup(SECRET, [ValueError(SECRET), RuntimeError(f"no {SECRET}")]) from error


def test_exceptions_are_told_without_what_they_say(logs: Callable[[], list[dict[str, Any]]]) -> None:
    set_up_logs(as_json=True)
    try:
        fail()
    except ExceptionGroup:
        logging.getLogger("x").exception("it failed", extra={"color_message": "red", "status": 500})
    [line] = logs()
    assert (line["event"], line["level"], line["logger"], line["status"]) == ("it failed", "error", "x", 500)
    assert line["timestamp"].endswith("Z")
    assert "color_message" not in line
    for part in ("KeyError", "ValueError", "RuntimeError", "ExceptionGroup", "in fail", "test_logs.py"):
        assert part in line["exception"]
    assert SECRET not in json.dumps(line)


def test_at_debug_exceptions_are_told_as_they_are(logs: Callable[[], list[dict[str, Any]]]) -> None:
    set_up_logs(as_json=True, level="debug")
    try:
        fail()
    except ExceptionGroup:
        logging.getLogger("x").exception("it failed")
    assert SECRET in logs()[0]["exception"]


def test_for_people_no_variables_are_shown(capsys: pytest.CaptureFixture[str], logs: Any) -> None:
    set_up_logs(as_json=False)
    prompt = SECRET + "!"
    try:
        fail()
    except ExceptionGroup:
        logging.getLogger("x").exception("it failed with %d", len(prompt))
    said = capsys.readouterr().err
    assert "it failed with 15" in said
    assert "in fail" in said
    assert SECRET not in said


def test_warnings_and_forgotten_tasks_are_logged(logs: Callable[[], list[dict[str, Any]]]) -> None:
    async def forget() -> None:
        task = asyncio.create_task(asyncio.to_thread(fail))
        await asyncio.wait([task])
        del task

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        set_up_logs(as_json=True)
        warnings.warn("something is old", DeprecationWarning, stacklevel=1)
        asyncio.run(forget())
    lines = logs()
    assert "something is old" in lines[0]["event"]
    assert lines[1]["event"] == "Task exception was never retrieved"
    assert SECRET not in json.dumps(lines)


def test_there_are_no_other_levels() -> None:
    with pytest.raises(ConfigError, match="log level is 'LOUD', expected one of DEBUG"):
        set_up_logs(as_json=True, level="loud")


def raw(url: str, request: bytes) -> bytes:
    """Send bytes as they are."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as client:
        client.sendall(request)
        return client.recv(65536)


def test_a_server_logs_what_it_does_and_its_workers_say_but_no_prompt(
    start_server: Callable[..., AbstractContextManager[Any]], tmp_path: Any
) -> None:
    # Python's start-up runs this in every process that finds it, the worker's among them.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'bluejay.engine.worker' in sys.orig_argv:\n    print('a worker speaks', file=sys.stderr)\n"
    )
    settings = f"[filters.f]\nwords = ['{SECRET}']\naction = 'refuse'\nprompt = true\nmodels = ['bluejay']\n"
    prompt = f"Tell of {SECRET}"
    bodies = (
        {"instances": [prompt], "parameters": {"max_length": 30}},
        {"instances": [prompt], "parameters": {"max_length": prompt}},
        {"instances": [prompt], "parameters": {prompt: 1}},
        {"instances": prompt},
        {"prompt": prompt, prompt: 2},
        {"instances": [prompt * 5000]},
        prompt,
    )
    with start_server("--log-json", settings=settings, env={"PYTHONPATH": str(tmp_path)}) as serving:
        with serving.client() as http:
            paths = sorted({*routes_of(http), PREDICT})
            for path in paths:
                for body in bodies:
                    http.post(path, json=body, headers={"x-request-id": "mine"})
                http.post(path, content=f'{{"instances": ["{prompt}"'.encode())
                http.get(path, params={"prompt": prompt})
            http.get(f"/v1/models/{prompt}")
            http.get(f"/{prompt}")
            http.post(f"/v1/models/{prompt}:predict", json=bodies[0])
            http.get("/v1/models", headers={"x-request-id": prompt, "authorization": f"Bearer {prompt}"})
        raw(serving.url, f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\n{SECRET}\r\n\r\n".encode())
        assert serving.stop() == 0
        lines = [json.loads(line) for line in serving.log.splitlines()]
    assert SECRET not in json.dumps(lines, ensure_ascii=False)
    served = [line for line in lines if line["event"] == "POST /v1/models/{model:path}:predict 200"]
    assert served
    assert all(line["request_id"].startswith("mine-") for line in served)
    assert any(line["event"].startswith("Bluejay listens on") for line in lines)
    assert [line["rule"] for line in lines if line["event"] == "filtered"] != []
    said = [line for line in lines if line["event"] == "worker: a worker speaks"]
    assert said
    assert all(line["worker_pid"] > 0 and line["level"] == "warning" for line in said)


def routes_of(http: Any) -> list[str]:
    """Paths of all routes that take a prompt, of whatever dialects are there."""
    schema = http.get("/openapi.json").json()
    paths = [path for path, methods in schema["paths"].items() if "post" in methods and "load" not in path]
    return [re.sub(r"\{[^}]*\}", "bluejay", path) for path in paths]


def test_a_wrong_level_is_named_before_anything_is_loaded() -> None:
    command = [sys.executable, "-m", "bluejay", "serve", "--log-level", "loud"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "log level is 'LOUD'" in done.stderr
