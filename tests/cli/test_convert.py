import json
import re

import pytest
import torch
import typer
from typer.testing import CliRunner

from bluejay.checkpoints import open_checkpoint, save
from bluejay.cli.convert import convert
from bluejay.errors import CheckpointError


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
