"""A server in a process of its own, and real clients that drive it from environments of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .answers import Answers

ROOT = Path(__file__).parents[2]
DRIVERS = Path(__file__).with_name("clients")
READY_S = 120  # opening the default model takes some seconds on an idle core
STOP_S = 30
DRIVER_S = 300  # the longest driver makes some hundred requests


@dataclass(frozen=True)
class Server:
    """A running `bluejay serve`. `grpc` is its host and port of gRPC, None where it serves none."""

    url: str
    grpc: str | None
    pid: int

    @property
    def grpc_port(self) -> int | None:
        return int(self.grpc.rpartition(":")[2]) if self.grpc else None

    def get(self, path: str) -> Any:
        """The JSON at a path, asked without a proxy."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=60) as response:
            return json.load(response)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The default model on loopback, open: there is no key."""
    folder = tmp_path_factory.mktemp("server")
    ready, log = folder / "ready.json", folder / "log.txt"
    command = [sys.executable, "-m", "bluejay", "serve", "--host", "127.0.0.1", "--port", "0", "--grpc-port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--ready-file", str(ready)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**_environment(folder), "BLUEJAY_HOME": str(folder / "bluejay")},
        )
    try:
        yield _when_ready(process, ready, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"the server did not end within {STOP_S} s of SIGTERM; its log ends with:\n{_end_of(log)}")


def _when_ready(process: subprocess.Popen[bytes], ready: Path, log: Path) -> Server:
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        if process.poll() is not None:
            pytest.fail(f"the server ended with status {process.returncode}; its log ends with:\n{_end_of(log)}")
        if ready.exists():
            told = json.loads(ready.read_text())
            return Server(told["url"].rstrip("/"), told["grpc"], told["pid"])
        time.sleep(0.05)
    pytest.fail(f"the server was not ready within {READY_S} s; its log ends with:\n{_end_of(log)}")


@pytest.fixture(scope="module")
def model_name(server: Server) -> str:
    """The name of the model that the server serves."""
    return str(server.get("/v1/models")["data"][0]["id"])


@pytest.fixture(scope="session")
def client_python() -> Callable[[str], Path]:
    """The Python of a client's environment by the environment's name: "neuro", "openai" …"""

    def find(name: str) -> Path:
        python = ROOT / ".venvs" / f"clients-{name}" / "bin" / "python"
        if not (python.parents[1] / ".installed").exists():
            reason = f"the client's environment is not there ({python}); `make clients` makes it"
            if os.environ.get("BLUEJAY_REQUIRE_CLIENTS"):
                pytest.fail(reason)
            pytest.skip(reason)
        return python

    return find


@pytest.fixture(scope="session")
def run_driver(
    client_python: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Answers]:
    """Run a driver of tests/e2e/clients in a client's environment: what each of its steps returned or raised."""

    def run(name: str, script: str, *arguments: str, env: dict[str, str] | None = None) -> Answers:
        home = tmp_path_factory.mktemp(script)
        try:
            done = subprocess.run(
                [client_python(name), DRIVERS / f"{script}.py", *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=DRIVER_S,
                cwd=home,
                env={**_environment(home), **(env or {})},
            )
        except subprocess.TimeoutExpired as expired:
            pytest.fail(
                f"{script} did not end within {DRIVER_S} s; its stderr ends with:\n{str(expired.stderr)[-4000:]}"
            )
        if done.returncode:
            pytest.fail(f"{script} ended with status {done.returncode}; its stderr ends with:\n{done.stderr[-4000:]}")
        answers: Answers = json.loads(done.stdout)
        return answers

    return run


def _environment(home: Path) -> dict[str, str]:
    """No proxies, no settings of the one who runs the tests, a home of its own, offline."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    return {
        **kept,
        "HOME": str(home),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]
