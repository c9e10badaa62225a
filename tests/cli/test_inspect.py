import json

import pytest
import typer
from typer.testing import CliRunner

from bluejay.checkpoints import save
from bluejay.cli.inspect import inspect
from bluejay.errors import ModelNotFound
from bluejay.tokenizer import train_bpe


def run(*arguments):
    app = typer.Typer(rich_markup_mode="rich")
    app.command()(inspect)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tiny_gptj, tmp_path):
    save(tiny_gptj, tiny_gptj.config, tmp_path / "model")
    train_bpe(["a story of a bird"], 257).save(tmp_path / "model")
    return tmp_path / "model"


def test_a_sound_model_is_described(folder, tiny_gptj):
    result = run(folder)
    num_parameters = sum(weight.numel() for weight in tiny_gptj.parameters())
    assert result.exit_code == 0, result.output
    for part in (
        "gptj (safetensors)",
        "2 layers, width 32, 2 heads of 16",
        f"{num_parameters:,}",
        "float32",
        "257 tokens",
    ):
        assert part in result.stdout
    assert "what is wrong" not in result.stdout


def test_layers_are_shown_together(folder):
    lines = [line.split() for line in run(folder).stdout.splitlines()]
    assert ["transformer.h.*.attn.q_proj.weight", "[32,", "32]", "float32", "2"] in lines
    assert ["lm_head.bias", "[300]", "float32", "1"] in lines


def test_a_broken_model_is_described_and_fails(folder):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "n_inner": 99}))
    result = run(folder)
    assert result.exit_code == 1
    for part in ("what is wrong", "misshapen: transformer.h.0.mlp.fc_in.weight", "no tokenizer"):
        assert part in result.stdout


def test_markup_in_a_name_is_not_obeyed(folder):
    (folder.parent / "[bold]odd[").mkdir()
    result = run(folder.parent / "[bold]odd[")
    assert "[bold]odd[" in result.stdout
    assert result.exit_code == 1


def test_json_names_each_tensor(folder):
    result = run(folder, "--json")
    found = json.loads(result.stdout)
    assert found["format"] == "safetensors"
    assert found["config"]["n_embd"] == 32
    assert found["num_tokens"] == 257
    assert found["problems"] == []
    assert found["dtypes"] == {"float32": found["num_parameters"]}
    assert found["tensors"]["lm_head.bias"] == {
        "shape": [300],
        "dtype": "float32",
        "file": str(folder / "model.safetensors"),
    }


def test_json_of_a_broken_model_is_still_json(tmp_path):
    result = run(tmp_path, "--json")
    assert result.exit_code == 1
    assert "holds no weights" in json.loads(result.stdout)["problems"][0]


def test_a_model_that_is_not_there_is_named(tmp_path):
    result = run(tmp_path / "nowhere", "--json")
    assert isinstance(result.exception, ModelNotFound)
    assert "nowhere" in str(result.exception)


def test_help_has_examples():
    assert "bluejay inspect gpt-j-6b/" in run("--help").output


def test_a_model_without_readable_weights_still_has_a_family(folder):
    (folder / "model.safetensors").write_bytes(b"")
    result = run(folder)
    assert result.exit_code == 1
    for part in ("gptj", "2 layers, width 32", "cut short"):
        assert part in result.stdout
    assert "parameters" not in result.stdout


def test_a_tokenizer_is_held_against_the_embedding_by_its_largest_id(folder):
    (folder / "tokenizer.json").unlink(missing_ok=True)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    last = max(vocabulary, key=vocabulary.get)
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {last: 300}))
    result = run(folder)
    assert result.exit_code == 1
    assert "257 tokens, ids below 301" in result.stdout
    assert "the tokenizer has ids up to 300, the embedding has only 300 rows" in result.stdout
