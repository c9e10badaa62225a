import json
import shutil

import pytest
import torch

from bluejay.checkpoints import convert, load_model, open_checkpoint, save
from bluejay.errors import BluejayError, CheckpointError, ConfigError
from bluejay.model import ModelConfig

CONFIG = ModelConfig(
    "gptj", vocab_size=48, n_positions=16, n_embd=32, n_layer=11, n_head=8, rotary_dim=4, bos_token_id=1, eos_token_id=2
)


@pytest.fixture
def model(make_model):
    return make_model(CONFIG)


@pytest.fixture
def source(model, tmp_path):
    save(model, CONFIG, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def read_all(path, config=None):
    checkpoint = open_checkpoint(path, config=config)
    checkpoint.check()
    return {name: checkpoint.read(name) for name in checkpoint.tensors()}


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", ["safetensors", "torch_bin", "mesh_jax"])
def test_there_and_back_is_the_source_in_the_dtype(source, model, tmp_path, to, dtype):
    expected = {name: weight.to(dtype or torch.float32) for name, weight in model.state_dict().items()}
    convert(source, tmp_path / "there", to=to, dtype=dtype, cores_per_replica=4)
    assert open_checkpoint(tmp_path / "there").format == to
    convert(tmp_path / "there", tmp_path / "back")
    assert_equal(read_all(tmp_path / "back"), expected)


@pytest.mark.parametrize("to", ["safetensors", "torch_bin"])
def test_gpt_neo_goes_there_and_back(tiny_gpt_neo, tmp_path, to):
    save(tiny_gpt_neo, tiny_gpt_neo.config, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "there", to=to)
    assert open_checkpoint(tmp_path / "there").config == open_checkpoint(tmp_path / "source").config
    assert_equal(read_all(tmp_path / "there"), tiny_gpt_neo.state_dict())


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_opens_the_bin_file(source, model, tmp_path, mmap):
    convert(source, tmp_path / "bin", to="torch_bin", dtype=torch.bfloat16)
    state = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True, mmap=mmap)
    assert_equal(state, {name: weight.bfloat16() for name, weight in model.state_dict().items()})


def test_storages_of_a_bin_file_are_aligned(source, tmp_path):
    import zipfile

    convert(source, tmp_path / "bin", to="torch_bin")
    path = tmp_path / "bin" / "pytorch_model.bin"
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if "/data/" in info.filename:
                lengths = content[info.header_offset + 26 : info.header_offset + 30]
                name_bytes, extra_bytes = int.from_bytes(lengths[:2], "little"), int.from_bytes(lengths[2:], "little")
                assert (info.header_offset + 30 + name_bytes + extra_bytes) % 64 == 0


@pytest.mark.parametrize("cores", [1, 2, 8])
def test_a_mesh_jax_target_has_the_layout_of_a_slim_checkpoint(source, tmp_path, cores):
    convert(source, tmp_path / "step_0", to="mesh_jax", cores_per_replica=cores)
    assert sorted(path.name for path in (tmp_path / "step_0").glob("shard_*")) == [f"shard_{i}" for i in range(cores)]
    for shard in range(cores):
        assert len(list((tmp_path / "step_0" / f"shard_{shard}").iterdir())) == 16
    raw = json.loads((tmp_path / "step_0" / "config.json").read_text())
    assert raw == {
        "cores_per_replica": cores,
        "d_model": 32,
        "layers": 11,
        "n_heads": 8,
        "n_vocab": 48,
        "norm": "layernorm",
        "pe": "rotary",
        "pe_rotary_dims": 4,
        "seq": 16,
    }


def test_the_converted_model_computes_the_same(source, model, tmp_path):
    from bluejay.model import CausalAttention

    convert(source, tmp_path / "mesh", to="mesh_jax", cores_per_replica=2)
    convert(tmp_path / "mesh", tmp_path / "back")
    tokens, positions = torch.arange(10)[None], torch.arange(10)[None]
    with torch.no_grad():
        expected = model(tokens, positions, CausalAttention())
        assert torch.equal(load_model(tmp_path / "back")(tokens, positions, CausalAttention()), expected)


@pytest.mark.parametrize("to", ["safetensors", "torch_bin", "mesh_jax"])
def test_the_tokenizer_comes_along_and_every_file_is_named(source, tmp_path, to):
    written = convert(source, tmp_path / "there", to=to)
    assert (tmp_path / "there" / "tokenizer.json").read_text() == "{}"
    assert set(written) == {path for path in (tmp_path / "there").rglob("*") if path.is_file()}


@pytest.mark.parametrize("to", ["safetensors", "torch_bin", "mesh_jax"])
def test_progress_rises_to_the_bytes_of_the_target(source, model, tmp_path, to):
    seen = []
    convert(source, tmp_path / "there", to=to, dtype=torch.float16, on_progress=lambda *now: seen.append(now))
    total = 2 * sum(weight.numel() for weight in model.parameters())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)
    assert {of for _, of in seen} == {total}


def test_a_target_that_is_not_empty_is_refused_unless_forced(source, tmp_path):
    target = tmp_path / "there"
    convert(source, target, dtype=torch.float16)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        convert(source, target)
    convert(source, target, force=True)
    assert {info.dtype for info in open_checkpoint(target).tensors().values()} == {torch.float32}
    assert (target / "notes.txt").read_text() == "mine"


def test_a_failure_leaves_the_model_that_was_there(source, tmp_path):
    def fail(done, total):
        raise KeyboardInterrupt

    target = tmp_path / "there"
    convert(source, target)
    (source / "tokenizer.json").write_text("[]")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, dtype=torch.float16, force=True, on_progress=fail)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


@pytest.mark.parametrize(("first", "then"), [("safetensors", "torch_bin"), ("torch_bin", "safetensors")])
def test_weights_of_another_format_are_never_left_beside_the_new(source, tmp_path, first, then):
    convert(source, tmp_path / "there", to=first)
    with pytest.raises(CheckpointError, match=f"which {then} does not replace; remove it first"):
        convert(source, tmp_path / "there", to=then, force=True)


def test_shards_are_never_mixed_with_others(source, tmp_path):
    convert(source, tmp_path / "there", to="mesh_jax")
    with pytest.raises(CheckpointError, match="shard_0"):
        convert(source, tmp_path / "there", to="mesh_jax", force=True)


@pytest.mark.parametrize("place", [".", "model.safetensors"])
def test_the_source_is_never_the_target(source, place):
    before = (source / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="the source is there"):
        convert(source / place, source, force=True)
    assert (source / "model.safetensors").read_bytes() == before


def test_a_target_that_is_a_file_is_refused(source, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        convert(source, tmp_path / "file")


@pytest.mark.parametrize("to", ["safetensors", "torch_bin", "mesh_jax"])
def test_an_interrupted_conversion_leaves_nothing(source, tmp_path, to):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "there", to=to, on_progress=interrupt)
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("to", ["torch_bin", "mesh_jax"])
def test_a_full_disk_is_found_before_anything_is_written(source, tmp_path, monkeypatch, to):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="the disk has 1,000 free"):
        convert(source, tmp_path / "there", to=to)
    assert not (tmp_path / "there").exists()


def test_a_source_that_does_not_fit_its_config_is_refused_first(source, tmp_path):
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**raw, "n_inner": 99}))
    with pytest.raises(CheckpointError, match=r"misshapen: .*fc_in"):
        convert(source, tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_a_network_that_mesh_jax_does_not_know_is_refused_with_every_reason(make_model, tmp_path):
    config = ModelConfig(
        "gptj",
        vocab_size=49,
        n_positions=16,
        n_embd=32,
        n_layer=1,
        n_head=2,
        n_inner=64,
        rotary_dim=4,
        activation_function="relu",
        layer_norm_epsilon=1e-3,
        tie_word_embeddings=True,
    )
    save(make_model(config), config, tmp_path / "source")
    with pytest.raises(ConfigError) as caught:
        convert(tmp_path / "source", tmp_path / "there", to="mesh_jax", cores_per_replica=4)
    for part in ("inner_dim is 64", "'relu'", "0.001", "tie_word_embeddings is True", "n_head 2", "vocab_size 49"):
        assert part in str(caught.value)


def test_gpt_neo_does_not_become_mesh_jax(tiny_gpt_neo, tmp_path):
    save(tiny_gpt_neo, tiny_gpt_neo.config, tmp_path / "source")
    with pytest.raises(ConfigError, match="model_type is 'gpt_neo'"):
        convert(tmp_path / "source", tmp_path / "there", to="mesh_jax")


@pytest.mark.parametrize("options", [{"to": "gguf"}, {"dtype": torch.int8}])
def test_an_unknown_format_or_dtype_is_named(source, tmp_path, options):
    with pytest.raises(BluejayError, match=r"gguf|int8"):
        convert(source, tmp_path / "there", **options)


@pytest.mark.parametrize("to", ["safetensors", "torch_bin", "mesh_jax"])
def test_the_generation_config_goes_along(source, tmp_path, to):
    (source / "generation_config.json").write_text('{"temperature": 0.8}')
    written = convert(source, tmp_path / "target", to=to, cores_per_replica=4)
    assert (tmp_path / "target" / "generation_config.json").read_text() == '{"temperature": 0.8}'
    assert tmp_path / "target" / "generation_config.json" in written


def test_the_generation_config_of_the_model_before_does_not_stay(source, tmp_path):
    convert(source, tmp_path / "target")
    (tmp_path / "target" / "generation_config.json").write_text('{"temperature": 0.8}')
    convert(source, tmp_path / "target", force=True)
    assert not (tmp_path / "target" / "generation_config.json").exists()
