import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from bluejay.checkpoints import hub
from bluejay.cli.pull import pull
from bluejay.errors import InvalidRequest

from ..checkpoints.small_hub import SmallHub, model_files, small_hub

NAME = "owner/tiny-gpt-j"


@pytest.fixture
def server() -> Iterator[SmallHub]:
    with small_hub() as running:
        running.add(NAME, model_files())
        yield running


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(pull)
    return CliRunner().invoke(app, list(arguments))


def bluejay(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads the environment when it is imported."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", "from bluejay.cli import main; main()", *arguments]
    return subprocess.run(command, env={**inherited, **settings}, capture_output=True, text=True, check=False)


def test_the_environment_is_honoured(server: SmallHub, tmp_path: Path) -> None:
    server.token = "hf_secret"
    settings = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
    first = bluejay("pull", NAME, **settings)
    assert first.returncode == 0, first.stderr
    assert Path(first.stdout.strip()).is_relative_to(tmp_path / "hub")
    assert f"bluejay generate --model {NAME}" in first.stderr
    server.requests.clear()
    second = bluejay("pull", NAME, "a/b", HF_HUB_OFFLINE="1", **settings)
    assert second.stdout == first.stdout
    assert second.returncode == 2
    assert "a/b is not in the cache" in second.stderr
    assert "HF_HUB_OFFLINE is set" in second.stderr
    assert server.requests == []


def test_paths_go_to_stdout_in_order(server: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def remember(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return Path(name)

    monkeypatch.setattr(hub, "pull", remember)
    result = run(NAME, "gpt-j-6b", "--revision", "v1")
    assert result.stdout == f"{NAME}\ngpt-j-6b\n"
    assert "bluejay generate --model EleutherAI/gpt-j-6b@v1" in result.stderr
    assert asked == [(NAME, "v1"), ("gpt-j-6b", "v1")]


def test_all_names_are_read_before_the_first_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "pull", lambda *_: pytest.fail("something was fetched"))
    result = run(NAME, "../evil")
    assert isinstance(result.exception, InvalidRequest)


def test_help_has_examples() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "bluejay pull gpt-j-6b@float16" in result.stdout


def test_a_name_is_needed() -> None:
    assert run().exit_code == 2
