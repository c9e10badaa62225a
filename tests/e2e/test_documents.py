"""Every command line and script of the hosted services' documents, as printed, but for the host."""

import ast
import json
import os
import re
import shutil
import subprocess

import pytest

from .documents import KSERVE, NEURO, baseten_command, kserve_command, neuro_script


@pytest.fixture
def shell(tmp_path):
    """Run a command line with the real curl: what it wrote."""
    if shutil.which("curl") is None:
        reason = "curl is not there"
        if os.environ.get("BLUEJAY_REQUIRE_CLIENTS"):
            pytest.fail(reason)
        pytest.skip(reason)

    def run(command: str) -> str:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "NO_PROXY": "*"}
        done = subprocess.run(
            ["sh", "-c", command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def _asked(command: str):
    return json.loads(re.search(r"-d '(.*)'", command, re.S).group(1))


@pytest.mark.parametrize("name", KSERVE)
def test_the_kserve_documents_commands(shell, server, name: str) -> None:
    command = kserve_command(name, server.url)
    instances = _asked(command)["instances"]
    predictions = json.loads(shell(command))["predictions"]
    rows = predictions if len(instances) > 1 else [predictions]  # a single one is not nested: both are printed so
    assert len(rows) == len(instances)
    for prompt, row in zip(instances, rows, strict=True):
        assert [set(item) for item in row] == [{"generated_text"}]
        assert row[0]["generated_text"].startswith(prompt)
        assert len(row[0]["generated_text"]) > len(prompt)


def test_basetens_command(shell, server) -> None:
    command = baseten_command(server.url, "rqvz1xw", "any-key")
    answer = json.loads(shell(command))
    assert (answer["status"], answer["message"]) == ("success", None)
    assert answer["data"].startswith(_asked(command)[0]["prompt"])
    assert answer["model_output"] == {key: answer[key] for key in ("status", "data", "message")}


@pytest.mark.parametrize("name", NEURO)
def test_neuros_scripts(client_python, server, tmp_path, name: str) -> None:
    done = subprocess.run(
        [client_python("neuro"), "-c", neuro_script(name, "any-key")],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "BASE_URL": f"{server.url}/"},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    *logged, printed = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()
    assert [re.sub(r"\d\d:\d\d:\d\d", "16:20:17", line) for line in logged] == [
        "[Neuro Ai] 16:20:17 - [INFO]: DEPLOYMENT MODE",
        "[Neuro Ai] 16:20:17 - [INFO]: Token successfully authenticated",
        "[Neuro Ai] 16:20:17 - [INFO]: Using project: Default",
    ]
    ((text,),) = (item.values() for item in ast.literal_eval(printed))
    assert text.startswith("When I visit Bath I will") == (name == "neuro-gpt-neo")  # the other says remove_input


def test_gpt_js_script_lacks_two_commas() -> None:
    """As printed it is no Python; a reader puts them in, and nothing else."""
    printed = neuro_script("neuro-gpt-j", "API_TOKEN")
    assert printed.count(", #") == 3
    ast.parse(printed)
    with pytest.raises(SyntaxError):
        ast.parse(printed.replace(", #", " #"))
