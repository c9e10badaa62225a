import json
import re

import pytest
import torch
import typer
from typer.testing import CliRunner

from bluejay import ops
from bluejay.checkpoints import open_checkpoint, save
from bluejay.cli.convert import convert
from bluejay.errors import CheckpointError, ConfigError


def run(*arguments):
    app = typer.Typer(rich_markup_mode="rich")
    app.command()(convert)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def source(tiny_gptj, tmp_path):
    save(tiny_gptj, tiny_gptj.config, tmp_path / "source")
    return tmp_path / "source"


def test_a_conversion_says_what_it_wrote_on_stderr(source, tmp_path):
    result = run(source, tmp_path / "out", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert re.search(r"out: 2 files, [\d,]+ bytes", result.stderr)
    assert {info.dtype for info in open_checkpoint(tmp_path / "out").tensors().values()} == {torch.bfloat16}


@pytest.mark.parametrize(("to", "expected"), [("torch-bin", "torch_bin"), ("mesh-jax", "mesh_jax")])
def test_other_formats_are_named_by_to(source, tmp_path, to, expected):
    assert run(source, tmp_path / "out", "--to", to, *["--cores-per-replica", 2] * (to == "mesh-jax")).exit_code == 0
    assert open_checkpoint(tmp_path / "out").format == expected


def test_mesh_transformer_jax_takes_its_config(source, tmp_path, tiny_gptj):
    run(source, tmp_path / "step_0", "--to", "mesh-jax", "--cores-per-replica", 2)
    config = (tmp_path / "step_0" / "config.json").rename(tmp_path / "tiny.json")
    assert json.loads(config.read_text())["layers"] == 2
    result = run(tmp_path / "step_0", tmp_path / "back", "--config", config)
    assert result.exit_code == 0, result.output
    checkpoint = open_checkpoint(tmp_path / "back")
    for name, weight in tiny_gptj.state_dict().items():
        assert torch.equal(checkpoint.read(name), weight)


def test_force_is_needed_to_overwrite(source, tmp_path):
    run(source, tmp_path / "out")
    assert isinstance(run(source, tmp_path / "out").exception, CheckpointError)
    assert run(source, tmp_path / "out", "--force").exit_code == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--dtype", "int8"],
        ["--to", "gguf"],
        ["--cores-per-replica", "2"],
        ["--to", "mesh-jax", "--cores-per-replica", "0"],
    ],
)
def test_a_wrong_option_is_a_usage_error(source, tmp_path, options):
    assert run(source, tmp_path / "out", *options).exit_code == 2
    assert not (tmp_path / "out").exists()


def test_help_has_examples():
    assert "bluejay convert step_383500/ out/ --config 6B_roto_256.json" in run("--help").output


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_quantised_models_are_written_by_quantize(source, tmp_path, name):
    result = run(source, tmp_path / "out", "--quantize", name, "--group-size", 64)
    assert result.exit_code == 0, result.output
    assert re.search(r"out: 2 files, [\d,]+ bytes", result.stderr)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["quantization_config"]["bits"] == int(name[-1])
    assert raw["quantization_config"]["group_size"] == 64
    result = run(tmp_path / "out", tmp_path / "floats", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert {info.dtype for info in open_checkpoint(tmp_path / "floats").tensors().values()} == {torch.float32}


def test_quantising_uses_the_threads_of_the_settings(source, tmp_path, monkeypatch):
    before = ops.num_threads()
    monkeypatch.setenv("BLUEJAY_THREADS", "3")
    try:
        assert run(source, tmp_path / "out", "--quantize", "int8").exit_code == 0
        assert ops.num_threads() == 3
    finally:
        ops.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group-size", 64], "belongs to --quantize"),
        (["--quantize", "int4", "--dtype", "float16"], "does not go with --dtype"),
        (["--quantize", "int4", "--to", "torch-bin"], "does not go with --to"),
        (["--quantize", "int2"], "int2"),
    ],
)
def test_options_that_do_not_go_together_are_refused(source, tmp_path, options, message):
    result = run(source, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_group_size_that_is_none_is_an_error(source, tmp_path):
    result = run(source, tmp_path / "out", "--quantize", "int4", "--group-size", 48)
    assert isinstance(result.exception, ConfigError)
    assert "group_size is 48, expected 32 or 64" in str(result.exception)
