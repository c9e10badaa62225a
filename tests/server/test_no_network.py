"""A server with no network at all works, and one with a network opens no connection to anybody."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

PREDICT = "/v1/models/gpt-j:predict"
BODY = {"instances": ["A bird"], "parameters": {"max_length": 8}}

# Every way out of a Python process comes by these; the worker's too, since PYTHONPATH is handed on.
WATCH = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(FILE, "a") as file:
            file.write(f"{event} {arguments[-1] if event == 'socket.connect' else arguments[1:]}\\n")

sys.addaudithook(watch)
"""

# Run where there is no network: start a server, ask it, end it.
INSIDE = """
import http.client, json, signal, subprocess, sys, time
from pathlib import Path

ready, log = Path(sys.argv[1]), open(sys.argv[2], "wb")
command = [sys.executable, "-m", "bluejay", "serve", "--port", "0", "--grpc-port", "0", "--ready-file", str(ready)]
server = subprocess.Popen(command, stdout=log, stderr=log)
try:
    end_s = time.monotonic() + 120
    while not ready.exists() and server.poll() is None and time.monotonic() < end_s:
        time.sleep(0.05)
    port = int(json.loads(ready.read_text())["url"].rpartition(":")[2])
    asking = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    asking.request("POST", sys.argv[3], sys.argv[4])
    print(asking.getresponse().read().decode())
finally:
    server.send_signal(signal.SIGTERM)
    server.wait(60)
"""


def test_it_works_without_a_network(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("unshare and ip are not both here")
    alone = ["unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$0" "$@"']
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("the system does not let this user take the network away from a process (unshare --net)")
    from tests.conftest import server_environment

    done = subprocess.run(
        [
            *alone,
            sys.executable,
            "-c",
            INSIDE,
            tmp_path / "ready.json",
            tmp_path / "log.txt",
            PREDICT,
            json.dumps(BODY),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=server_environment(tmp_path),
    )
    assert done.returncode == 0, done.stderr + (tmp_path / "log.txt").read_text()[-3000:]
    assert json.loads(done.stdout)["predictions"][0]["generated_text"].startswith("A bird")


def test_it_connects_to_nobody(start_server: Callable[..., AbstractContextManager[Any]], tmp_path: Path) -> None:
    seen = tmp_path / "seen.txt"
    (tmp_path / "sitecustomize.py").write_text(f"FILE = {str(seen)!r}\n{WATCH}")
    with start_server(env={"PYTHONPATH": str(tmp_path)}) as serving, serving.client() as http:
        assert http.post(PREDICT, json=BODY).status_code == 200
        for path in ("/metrics", "/docs", "/openapi.json", "/v1/models"):
            assert http.get(path).status_code == 200
    lines = seen.read_text().splitlines()
    assert any("bluejay-" in line for line in lines), "the worker's connection to its server was not seen"
    outgoing = [line for line in lines if "/bluejay-" not in line]
    # A server looks up the names of its own address.
    assert not [line for line in outgoing if "127.0.0.1" not in line and "localhost" not in line], outgoing
    assert not [line for line in outgoing if "socket.connect" in line], outgoing
