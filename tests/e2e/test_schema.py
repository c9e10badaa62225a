"""The whole schema, put to the test by schemathesis: whatever is sent, nothing breaks and nothing is given away."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

CONFIGURATION = Path(__file__).with_name("schemathesis")
# Small requests, so that there is time for many of them.
SETTINGS = "[server]\nmax_tokens = 600\nrequest_timeout_s = 20\nmax_queue = 64\n"
CHECKS = (
    "not_a_server_error,content_type_conformance,response_headers_conformance,response_schema_conformance,"
    "unsupported_method,allow_header_conformance,nothing_of_the_inside"
)
UNLOAD = r"/(un)?load$"  # the model would be gone for everything behind it; their own tests call them


def _test(start_server: Any, python: Path, folder: Path, *options: str, timeout_s: float) -> None:
    with start_server(settings=SETTINGS) as serving:
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "SCHEMATHESIS_HOOKS": "hooks"}
        done = subprocess.run(
            [
                *(python.with_name("schemathesis"), "--config-file", CONFIGURATION / "schemathesis.toml"),
                *("run", f"{serving.url}/openapi.json", "--checks", CHECKS, "--exclude-path-regex", UNLOAD),
                *("--generation-database", "none", "--request-timeout", "60", "--continue-on-failure", "--no-color"),
                *("--warnings", "off", *options),
            ],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=folder,
            env={**environment, "PYTHONPATH": str(CONFIGURATION)},
        )
        with serving.client() as http:
            assert http.get("/readyz").json() == {"ready": True, "reasons": []}
        assert "Traceback" not in serving.log, serving.log[-4000:]
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_the_whole_schema(
    start_server: Callable[..., AbstractContextManager[Any]], client_python: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ("--phases", "fuzzing", "--max-examples", "6", "--seed", "1")
    _test(start_server, client_python("schemathesis"), tmp_path, *options, timeout_s=300)


@pytest.mark.slow
def test_the_whole_schema_at_length(
    start_server: Callable[..., AbstractContextManager[Any]], client_python: Callable[[str], Path], tmp_path: Path
) -> None:
    options = ("--phases", "examples,coverage,fuzzing", "--max-examples", "300", "-w", "2")
    _test(start_server, client_python("schemathesis"), tmp_path, *options, timeout_s=7200)
