import json
import os
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

import bluejay
from bluejay import ops
from bluejay.cli.info import _processor_name, info
from bluejay.ops import native


def run(*arguments, **environment):
    app = typer.Typer(rich_markup_mode="rich")
    app.command()(info)
    return CliRunner(env={"COLUMNS": "200", **environment}).invoke(app, list(arguments))


@pytest.fixture
def settings_file(tmp_path, monkeypatch):
    for name in ("MODEL", "DEVICE", "DTYPE", "THREADS", "DATABASE"):
        monkeypatch.delenv(f"BLUEJAY_{name}", raising=False)
    file = tmp_path / "config.toml"
    file.write_text('dtype = "bfloat16"\n')
    monkeypatch.setenv("BLUEJAY_CONFIG", str(file))
    return file


def test_json_tells_what_was_found_and_where_settings_come_from(settings_file):
    result = run("--json", BLUEJAY_THREADS="3")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["bluejay"] == bluejay.__version__
    assert found["kernels"]["chosen"] == ops.voice()
    assert found["kernels"]["available"] == ops.available_voices()
    assert found["threads"] == {"number": 3, "reason": "set by BLUEJAY_THREADS"}
    assert found["settings"]["threads"] == {"value": 3, "source": "BLUEJAY_THREADS"}
    assert found["settings"]["dtype"] == {"value": "bfloat16", "source": str(settings_file)}
    assert found["settings"]["model"] == {"value": "default", "source": "default"}
    assert found["settings_file"] == {"path": str(settings_file), "exists": True}
    assert found["default_model"]["family"] == "gptj"
    assert 0 < found["memory"]["free_bytes"] <= found["memory"]["total_bytes"]


def test_the_databases_password_is_not_told(settings_file):
    result = run("--json", BLUEJAY_DATABASE="postgresql://me:secret@host/accounts")
    assert json.loads(result.stdout)["settings"]["database"]["value"] == "postgresql://***@host/accounts"
    assert "secret" not in result.output


def test_the_table_has_every_fact(settings_file):
    result = run()
    assert result.exit_code == 0, result.output
    for part in (bluejay.__version__, "PyTorch", ops.voice(), "memory", "gptj", f"dtype = bfloat16 ({settings_file})"):
        assert part in result.stdout


def test_missing_kernels_are_told_and_do_not_warn(settings_file, monkeypatch):
    def extension():
        raise native.Missing("they were left at home")

    monkeypatch.setattr(native, "extension", extension)
    monkeypatch.setattr(ops, "_voice", None)
    found = json.loads(run("--json").stdout)
    assert found["kernels"]["missing"] == "they were left at home"
    assert found["kernels"]["available"] == ["reference"]
    assert "they were left at home" in run().stdout


def test_a_choice_from_the_environment_is_told():
    environ = {**os.environ, "BLUEJAY_KERNELS": "reference"}
    command = [sys.executable, "-m", "bluejay", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60, check=True)
    kernels = json.loads(done.stdout)["kernels"]
    assert (kernels["chosen"], kernels["forced_by"]) == ("reference", "BLUEJAY_KERNELS")


def test_a_processor_has_its_makers_name(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Fine Processor @ 2 GHz\n")
    assert _processor_name(tmp_path / "cpuinfo") == "A Fine Processor @ 2 GHz"
    assert _processor_name(tmp_path / "none")
