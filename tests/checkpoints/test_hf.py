"""Hugging Face directories: every layout opens, every key is accounted for, no name leads out of the directory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bluejay.checkpoints import open_checkpoint
from bluejay.errors import CheckpointError, ConfigError
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ

Model = GPTJ | GPTNeo
Write = Callable[[dict[str, Tensor], Path], None]


def write_config(model: Model, directory: Path, **changes: object) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(model.config.to_dict() | changes))
    return directory


def write_shards(state: dict[str, Tensor], directory: Path, suffix: str = "safetensors") -> None:
    """Two shards and their index, as transformers writes them."""
    stem, write = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    names = list(state)
    weight_map = {}
    for part, keys in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-0000{part}-of-00002.{suffix}"
        write({key: state[key] for key in keys}, directory / file)
        weight_map |= dict.fromkeys(keys, file)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LAYOUTS: dict[str, Write] = {
    "safetensors": lambda state, directory: save_file(state, directory / "model.safetensors"),
    "torch_bin": lambda state, directory: torch.save(state, directory / "pytorch_model.bin"),
    "sharded safetensors": write_shards,
    "sharded torch_bin": lambda state, directory: write_shards(state, directory, "bin"),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@layouts
def test_every_layout_of_both_families_reads_back_equal(tmp_path: Path, tiny_model: Model, layout: str) -> None:
    LAYOUTS[layout](tiny_model.state_dict(), write_config(tiny_model, tmp_path))
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    assert checkpoint.path == tmp_path
    assert checkpoint.format == layout.removeprefix("sharded ")
    assert checkpoint.config == tiny_model.config
    state = tiny_model.state_dict()
    assert checkpoint.tensors().keys() == state.keys()
    for name, tensor in state.items():
        assert checkpoint.tensors()[name].shape == tensor.shape
        assert torch.equal(checkpoint.read(name), tensor)


@layouts
def test_legacy_buffers_are_left_out(tmp_path: Path, tiny_model: Model, layout: str) -> None:
    inner = "attn.attention." if tiny_model.config.model_type == "gpt_neo" else "attn."
    state = dict(tiny_model.state_dict())
    weights = set(state)
    state[f"transformer.h.0.{inner}bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    state[f"transformer.h.0.{inner}masked_bias"] = torch.tensor(-1e9)
    state[f"transformer.h.1.{inner}masked_bias"] = torch.tensor(-1e9)
    LAYOUTS[layout](state, write_config(tiny_model, tmp_path))
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    assert set(checkpoint.tensors()) == weights
    if tiny_model.config.model_type == "gpt_neo":
        assert "transformer.h.0.attn.attention.out_proj.bias" in checkpoint.tensors()


def test_a_tied_head_is_left_out(tmp_path: Path, tiny_gpt_neo: GPTNeo) -> None:
    state = dict(tiny_gpt_neo.state_dict())
    state["lm_head.weight"] = state["transformer.wte.weight"]
    torch.save(state, write_config(tiny_gpt_neo, tmp_path) / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    assert "lm_head.weight" not in checkpoint.tensors()


def test_the_bare_model_s_keys_are_accepted(tmp_path: Path, tiny_model: Model) -> None:
    state = {name.removeprefix("transformer."): tensor for name, tensor in tiny_model.state_dict().items()}
    state["h.0.attn.masked_bias"] = torch.tensor(-1e9)
    save_file(state, write_config(tiny_model, tmp_path) / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.check()
    assert torch.equal(checkpoint.read("transformer.wte.weight"), tiny_model.transformer.wte.weight)


def test_safetensors_go_before_bin_and_one_file_before_shards(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    state = tiny_gptj.state_dict()
    write_config(tiny_gptj, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even looked at")
    (tmp_path / "model.safetensors.index.json").write_bytes(b"not even looked at")
    save_file(state, tmp_path / "model.safetensors")
    open_checkpoint(tmp_path).check()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin", "weights.pt"])
def test_a_single_file_opens_with_the_config_beside_it_or_another(tmp_path: Path, tiny_gptj: GPTJ, name: str) -> None:
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(tiny_gptj.state_dict(), path)
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        open_checkpoint(path)
    elsewhere = write_config(tiny_gptj, tmp_path / "elsewhere") / "config.json"
    open_checkpoint(path, config=elsewhere).check()
    write_config(tiny_gptj, tmp_path)
    open_checkpoint(path).check()


def test_all_wrong_keys_are_reported_at_once(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    state = dict(tiny_gptj.state_dict())
    del state["transformer.ln_f.weight"], state["transformer.h.1.mlp.fc_in.bias"]
    state["transformer.extra"] = torch.zeros(3)
    state["transformer.wte.weight"] = torch.zeros(32, 300)
    state["lm_head.bias"] = torch.zeros(300, dtype=torch.int32)
    save_file(state, write_config(tiny_gptj, tmp_path) / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path).check()
    first, *others = str(caught.value).splitlines()
    assert first == f"{tmp_path}: the weights are not those of the config (gptj):"
    assert sorted(others) == [
        "  misshapen: transformer.wte.weight is [32, 300] in model.safetensors, the config asks for [300, 32]",
        "  missing: transformer.h.1.mlp.fc_in.bias [128]",
        "  missing: transformer.ln_f.weight [32]",
        "  unexpected: 'transformer.extra' [3] in model.safetensors",
        "  wrong dtype: lm_head.bias is torch.int32 in model.safetensors, expected floating point",
    ]


def test_a_long_list_of_wrong_keys_is_cut(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    save_file({f"transformer.{i}": torch.zeros(1) for i in range(40)}, tmp_path / "model.safetensors")
    write_config(tiny_gptj, tmp_path)
    with pytest.raises(CheckpointError, match=f"and {len(tiny_gptj.state_dict()) + 40 - 20} more") as caught:
        open_checkpoint(tmp_path).check()
    assert len(str(caught.value).splitlines()) == 22


def test_a_config_of_too_many_layers_builds_nothing(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    save_file(tiny_gptj.state_dict(), tmp_path / "model.safetensors")
    write_config(tiny_gptj, tmp_path, n_layer=10_000)
    with pytest.raises(CheckpointError, match="n_layer is 10000, but the files hold 25 tensors"):
        open_checkpoint(tmp_path).check()


def test_tensors_that_all_share_one_storage_are_refused(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    shared = torch.zeros(2**16)
    state = {f"transformer.{i}": shared for i in range(50)}
    torch.save(state, write_config(tiny_gptj, tmp_path) / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="claims weights of 13107200 bytes in files of"):
        open_checkpoint(tmp_path)


def test_a_directory_without_weights_says_what_was_looked_for(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    write_config(tiny_gptj, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no weights; looked for model\.safetensors, .*pytorch_model\.bin"):
        open_checkpoint(tmp_path)


def test_what_is_not_there_or_not_weights_is_refused(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    write_config(tiny_gptj, tmp_path)
    with pytest.raises(CheckpointError, match="nowhere: no such file or directory"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is neither \.safetensors nor \.bin"):
        open_checkpoint(tmp_path / "model.onnx")


# Indexes.


@pytest.fixture
def sharded(tmp_path: Path, tiny_gptj: GPTJ) -> Path:
    directory = write_config(tiny_gptj, tmp_path / "model")
    write_shards(tiny_gptj.state_dict(), directory)
    return directory


def edit_index(directory: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


WTE = "transformer.wte.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "..",
        ".",
        "",
        "/etc/passwd",
        "sub/../../outside.safetensors",
        "sub/inside.safetensors",
        "..\\outside.safetensors",
        "C:outside.safetensors",
        "outside.safetensors\0.bin",
        "%2e%2e/outside.safetensors",
        "．．/outside.safetensors",
        "a" * 300,
        "\ud800",
        "\x1b[2J",
    ],
)
def test_a_name_that_is_a_path_is_refused(sharded: Path, tiny_gptj: GPTJ, name: str) -> None:
    save_file(tiny_gptj.state_dict(), sharded.parent / "outside.safetensors")
    edit_index(sharded, lambda index: index.update({WTE: name}))
    with pytest.raises(CheckpointError, match="is not the plain name of a file") as caught:
        open_checkpoint(sharded)
    assert "\x1b" not in str(caught.value)


def test_an_index_that_does_not_match_its_shards_is_refused(sharded: Path) -> None:
    def change(index: dict[str, object]) -> None:
        index["transformer.ghost"] = FIRST
        index[WTE] = SECOND
        del index["lm_head.bias"]

    edit_index(sharded, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sharded)
    message = str(caught.value)
    assert f"'{WTE}' should be in {SECOND} and is not" in message
    assert f"'{WTE}' is in {FIRST}, the index says {SECOND}" in message
    assert f"'transformer.ghost' should be in {FIRST} and is not" in message
    assert f"'lm_head.bias' is in {FIRST} but not in the index" in message


def test_a_key_in_two_shards_is_refused(sharded: Path, tiny_gptj: GPTJ) -> None:
    state = tiny_gptj.state_dict()
    save_file({name: state[name] for name in [*list(state)[1::2], WTE]}, sharded / SECOND)
    with pytest.raises(CheckpointError, match=f"'{WTE}' is in {SECOND}, the index says {FIRST}"):
        open_checkpoint(sharded)


def test_a_missing_shard_is_named_with_a_key(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"'transformer.* should be in {SECOND}, and there is no such file"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "has no weight_map"),
        (b'{"weight_map": {}}', "has no weight_map"),
        (b'{"weight_map": []}', "has no weight_map"),
        (b'{"weight_map": {"a": 3}}', "the file of 'a' is int, expected a name"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' occurs twice"),
        (b"nonsense", "not readable as JSON"),
        (b" " * (9 * 2**20), "has 9437184 bytes, at most"),
    ],
    ids=["empty", "no keys", "list", "number", "twice", "nonsense", "huge"],
)
def test_a_broken_index_is_refused(sharded: Path, content: bytes, message: str) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


# Links.


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "config.json", FIRST])
def test_a_link_out_of_the_directory_is_refused(sharded: Path, tiny_gptj: GPTJ, name: str) -> None:
    outside = sharded.parent / "outside"
    save_file(tiny_gptj.state_dict(), outside)
    (sharded / name).unlink(missing_ok=True)
    (sharded / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link out of its directory"):
        open_checkpoint(sharded)


def test_links_in_a_circle_are_refused(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    directory = write_config(tiny_gptj, tmp_path)
    (directory / "model.safetensors").symlink_to(directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=str(directory)):
        open_checkpoint(directory)


def test_a_link_within_the_directory_is_followed(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    save_file(tiny_gptj.state_dict(), write_config(tiny_gptj, tmp_path) / "step_3.safetensors")
    (tmp_path / "model.safetensors").symlink_to("step_3.safetensors")
    open_checkpoint(tmp_path).check()


def test_the_links_of_hugging_face_s_cache_are_followed(tmp_path: Path, tiny_gptj: GPTJ) -> None:
    repository = tmp_path / "models--someone--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("0" * 40)
    write_config(tiny_gptj, blobs)
    snapshot.mkdir(parents=True)
    save_file(tiny_gptj.state_dict(), blobs / "1f2e")
    (blobs / "config.json").replace(blobs / "a0b1")
    (snapshot / "config.json").symlink_to("../../blobs/a0b1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1f2e")
    open_checkpoint(snapshot).check()
    # and through a link to the snapshot itself
    (tmp_path / "current").symlink_to(snapshot)
    open_checkpoint(tmp_path / "current").check()
    # huggingface_hub 2 keeps one content that several models share in the cache's own blobs
    shared = tmp_path / "blobs" / "9e" / "9e01"
    shared.parent.mkdir(parents=True)
    (blobs / "1f2e").replace(shared)
    (blobs / "1f2e").symlink_to("../../blobs/9e/9e01")
    open_checkpoint(snapshot).check()
    # but not out of the blobs
    save_file(tiny_gptj.state_dict(), tmp_path / "outside")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../outside")
    with pytest.raises(CheckpointError, match="is a link out of its directory"):
        open_checkpoint(snapshot)
