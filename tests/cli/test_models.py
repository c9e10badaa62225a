import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner, Result

from bluejay.checkpoints import hub, hub_cache
from bluejay.cli.models import models
from bluejay.errors import CheckpointError, InvalidRequest, ModelNotFound

from ..checkpoints.small_hub import model_files, small_hub

NAME = "owner/tiny-gpt-j"
SIZE = sum(len(model_files()[name]) for name in ("config.json", "tokenizer.json", "model.safetensors"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a package without default model."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_cache, "DEFAULT_MODEL_DIR", tmp_path / "default_model")
    return tmp_path / "hub"


@pytest.fixture
def path(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model in the cache; its snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with small_hub() as server:
        server.add(NAME, model_files())
        yield hub.pull(NAME, endpoint=server.endpoint)


def run(*arguments: str, answer: str | None = None) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(models, list(arguments), input=answer)


def test_an_empty_list_says_what_to_do() -> None:
    result = run()
    assert (result.exit_code, result.stdout) == (0, "")
    assert "get one with: bluejay pull gpt-neo-125m" in result.stderr
    assert json.loads(run("--json").stdout) == []


def test_the_list_as_a_table(path: Path) -> None:
    heading, row = run().stdout.splitlines()
    assert heading.split() == ["Name", "Revision", "Family", "Weights", "Size", "Last", "used"]
    assert row.split()[:4] == [NAME, "main", "gptj", "safetensors"]
    assert row.split()[4:6] == [str(SIZE), "bytes"]


@pytest.mark.parametrize(("method", "shown"), [("bluejay", "int4"), ("gptq", "other")])
def test_the_list_tells_how_weights_are_quantised(path: Path, method: str, shown: str) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32, "version": 2}
    (path / "config.json").write_text(json.dumps(config))
    assert run().stdout.splitlines()[1].split()[3:5] == ["safetensors", shown]
    assert json.loads(run("--json").stdout)[0]["quantization"] == shown


def test_the_list_as_json(path: Path) -> None:
    (row,) = json.loads(run("--json").stdout)
    assert row["name"] == NAME
    assert row["size_bytes"] == SIZE
    assert row["path"] == str(path)
    assert set(row) == {"name", "revision", "path", "size_bytes", "family", "format", "quantization", "last_used"}


def test_a_commit_is_shortened_and_a_branch_is_not(path: Path) -> None:
    refs = path.parents[1] / "refs"
    (refs / "main").rename(refs / "a-branch-with-a-long-name")
    assert run().stdout.splitlines()[1].split()[1] == "a-branch-with-a-long-name"
    (refs / "a-branch-with-a-long-name").unlink()
    assert run().stdout.splitlines()[1].split()[1] == path.name[:12]


def test_json_belongs_to_the_list() -> None:
    result = run("--json", "verify", NAME)
    assert result.exit_code == 2
    assert "belongs to the list" in result.stderr


def test_verify(path: Path) -> None:
    assert run("verify", NAME).stdout == f"{NAME}: 3 files, all of them intact\n"
    (path / "config.json").resolve().write_text("{}")
    result = run("verify", NAME)
    assert isinstance(result.exception, CheckpointError)
    assert "config.json: git SHA-1 is" in str(result.exception)
    assert f"bluejay models rm {NAME}, then bluejay pull {NAME}" in str(result.exception)


def test_verify_names_what_it_cannot_check(path: Path) -> None:
    (path / "notes.txt").write_text("mine")
    assert "notes.txt: no hash is known, not checked" in run("verify", NAME).stderr


def test_rm_asks_first(path: Path) -> None:
    result = run("rm", NAME, answer="n\n")
    assert result.exit_code == 1
    assert f"Remove {NAME} ({SIZE} bytes)?" in result.stdout
    assert path.exists()
    assert f"{SIZE} bytes freed" in run("rm", NAME, answer="y\n").stdout
    assert not path.exists()


def test_rm_without_asking(path: Path) -> None:
    assert run("rm", f"{NAME}@main", "--yes").stdout == f"{NAME}@main removed, {SIZE} bytes freed\n"
    assert not path.exists()


def test_rm_of_what_is_not_there_does_not_ask() -> None:
    result = run("rm", NAME)
    assert isinstance(result.exception, ModelNotFound)
    assert "Remove" not in result.stdout
    assert isinstance(run("rm", "default").exception, InvalidRequest)
    assert isinstance(run("rm", "../evil").exception, InvalidRequest)


@pytest.mark.parametrize("arguments", [("--help",), ("verify", "--help"), ("rm", "--help")])
def test_help_has_examples(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0
    assert "bluejay models" in result.stdout


def test_a_damaged_model_of_the_package_is_not_to_be_pulled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = hub_cache.Verification(tmp_path, 1, (hub_cache.DamagedFile("config.json", "SHA-256 is another"),))
    monkeypatch.setattr(hub, "verify", lambda name, revision: damaged)
    result = run("verify", "default-draft")
    assert isinstance(result.exception, CheckpointError)
    assert "install Bluejay again" in str(result.exception)
    assert "bluejay pull" not in str(result.exception)
