import json

import pytest
import torch

from bluejay.checkpoints import inspect, open_checkpoint, save
from bluejay.errors import CheckpointError


@pytest.fixture
def folder(tiny_gptj, tmp_path):
    save(tiny_gptj, tiny_gptj.config, tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


def change_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def test_a_sound_checkpoint_is_described(folder, tiny_gptj):
    found = inspect(folder, count_tokens=lambda directory: (257, 257))
    num_parameters = sum(weight.numel() for weight in tiny_gptj.parameters())
    assert found.problems == ()
    assert found.format == "safetensors"
    assert found.config is not None
    assert found.config.model_type == "gptj"
    assert found.num_parameters == num_parameters
    assert found.num_bytes == 2 * num_parameters
    assert found.dtypes == {"bfloat16": num_parameters}
    assert found.tensors["lm_head.bias"].shape == (300,)
    assert found.tokenizer_files == ("tokenizer.json",)
    assert found.num_tokens == 257


def test_a_tied_head_is_counted_once(tiny_gpt_neo, tmp_path):
    save(tiny_gpt_neo, tiny_gpt_neo.config, tmp_path)
    assert inspect(tmp_path).num_parameters == sum(weight.numel() for weight in tiny_gpt_neo.parameters())


def test_every_problem_is_listed_at_once(folder):
    change_config(folder, n_inner=99, vocab_size=100)
    found = inspect(folder, count_tokens=lambda directory: (257, 257))
    # fc_in's weight and bias and fc_out's weight, twice; the embedding, the head and its bias; the tokenizer.
    assert len(found.problems) == 6 + 3 + 1
    assert "the tokenizer has ids up to 256, the embedding has only 100 rows" in found.problems
    assert found.num_parameters > 0


def test_a_broken_tokenizer_is_a_problem_among_others(folder):
    def fail(directory):
        raise CheckpointError(f"{directory}: no tokenizer")

    change_config(folder, n_layer=1)
    found = inspect(folder, count_tokens=fail)
    assert found.problems[-1] == f"{folder}: no tokenizer"
    assert any("unexpected" in problem for problem in found.problems)
    assert found.num_tokens is None


def test_a_missing_tokenizer_is_no_problem_of_mesh_jax(tmp_path, make_model, tiny_gptj):
    from bluejay.checkpoints import convert

    save(tiny_gptj, tiny_gptj.config, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mesh", to="mesh_jax", cores_per_replica=2)
    found = inspect(tmp_path / "mesh", count_tokens=lambda directory: pytest.fail("there is nothing to count"))
    assert (found.format, found.problems) == ("mesh_jax", ())


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cut short"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    ],
)
def test_what_cannot_be_opened_is_described_not_raised(folder, damage, problem):
    damage(folder)
    found = inspect(folder, count_tokens=lambda directory: (257, 257))
    assert len(found.problems) == 1
    assert problem in found.problems[0]
    assert found.format is None
    assert found.num_parameters == 0
    assert found.num_tokens == 257


def test_a_truncated_file_is_described(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "model.safetensors" in inspect(folder).problems[0]


def test_nothing_at_all_is_described(tmp_path):
    found = inspect(tmp_path / "nowhere", count_tokens=lambda directory: pytest.fail("there is nothing to count"))
    assert found.problems == (f"{tmp_path / 'nowhere'}: no such file or directory",)


def test_the_largest_id_must_have_a_row_however_few_tokens_there_are(folder):
    found = inspect(folder, count_tokens=lambda directory: (257, 301))
    assert found.problems == ("the tokenizer has ids up to 300, the embedding has only 300 rows",)
    assert (found.num_tokens, found.num_token_ids) == (257, 301)


def test_the_network_is_told_though_the_weights_do_not_open(folder, tiny_gptj):
    (folder / "model.safetensors").write_bytes(b"")
    found = inspect(folder, count_tokens=lambda directory: (257, 301))
    assert found.config is not None
    assert found.config.n_embd == tiny_gptj.config.n_embd
    assert "ids up to 300" in found.problems[-1]


def test_a_directory_that_may_not_be_read_is_described(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("pathlib.Path.iterdir", refuse)  # not chmod, which does not stop root
    with pytest.raises(CheckpointError, match=rf"{folder}: cannot be read: Permission denied"):
        open_checkpoint(folder)
    assert inspect(folder).problems == (f"{folder}: cannot be read: Permission denied",)
