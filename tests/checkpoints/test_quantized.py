import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bluejay.checkpoints import convert, inspect, load_model, open_checkpoint, save
from bluejay.errors import CheckpointError, ConfigError
from bluejay.model import CausalAttention, ModelConfig, build
from bluejay.model.quantized import Quantization, is_quantized, linear_shapes, quantize

ODD = ModelConfig("gptj", vocab_size=307, n_positions=32, n_embd=24, n_layer=3, n_head=3, n_inner=50, rotary_dim=4)
INT8, INT4 = Quantization(8), Quantization(4)


@pytest.fixture
def source(tiny_model, tmp_path):
    save(tiny_model, tiny_model.config, tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def logits_of(model):
    ids = torch.arange(20)[None] * 7
    with torch.inference_mode():
        return model.logits(model(ids, torch.arange(20)[None], CausalAttention()))


def tensors_of(path):
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    return {name: checkpoint.read(name) for name in checkpoint.tensors()}


def rewrite(path, change):
    """Write a quantised checkpoint again with other tensors, past every check of ours."""
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def set_config(path, **changed):
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"] |= changed
    (path / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("quantization", [INT8, INT4, Quantization(8, 64), Quantization(4, 64)], ids=str)
def test_quantised_then_saved_is_converted_byte_by_byte(tiny_model, source, tmp_path, quantization):
    convert(source, tmp_path / "converted", quantization=quantization)
    quantize(tiny_model, quantization.bits, quantization.group_size)
    save(tiny_model, tiny_model.config, tmp_path / "saved")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    assert (tmp_path / "converted" / "tokenizer.json").exists()


@pytest.mark.parametrize("quantization", [INT8, INT4], ids=str)
def test_saved_and_opened_is_the_same_network(tiny_model, tmp_path, quantization):
    expected = logits_of(quantize(tiny_model, quantization.bits))
    save(tiny_model, tiny_model.config, tmp_path / "saved")
    found = load_model(tmp_path / "saved")
    assert is_quantized(found)
    assert torch.equal(logits_of(found), expected)
    assert Quantization.of(found.config) == quantization
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert raw["quantization_config"] == {
        "quant_method": "bluejay",
        "bits": quantization.bits,
        "group_size": 32,
        "version": 2,
    }


@pytest.mark.parametrize("to", ["torch_bin", "mesh_jax"])
def test_every_format_quantises_to_the_same(make_model, tmp_path, to):
    config = ModelConfig("gptj", vocab_size=48, n_positions=16, n_embd=32, n_layer=11, n_head=8, rotary_dim=4)
    save(make_model(config), config, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "other", to=to)
    convert(tmp_path / "source", tmp_path / "one", quantization=INT4)
    convert(tmp_path / "other", tmp_path / "two", quantization=INT4)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_sizes_that_fill_neither_groups_nor_tiles(make_model, tmp_path):
    model = make_model(ODD)
    save(model, ODD, tmp_path / "source")
    for quantization in (INT8, Quantization(4, 64)):
        target = tmp_path / quantization.name
        convert(tmp_path / "source", target, quantization=quantization)
        assert logits_of(load_model(target)).shape == (1, 20, 307)
        assert tensors_of(target)["lm_head.weight"].shape[0] == 20


def test_what_is_opened_is_mapped_and_not_copied(source, tmp_path):
    convert(source, tmp_path / "int8", quantization=INT8)
    model = load_model(tmp_path / "int8")
    maps = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "int8/model.safetensors" in line:
            maps.append([int(number, 16) for number in line.split()[0].split("-")])
    for name, tensor in model.state_dict().items():
        mapped = any(start <= tensor.data_ptr() < end for start, end in maps)
        assert mapped, name
        if tensor.dtype == torch.uint8 and "lm_head" not in name:
            assert tensor.data_ptr() % 64 == 0, name  # whole cache lines


def test_shards_and_progress(source, tmp_path):
    seen = []
    convert(source, tmp_path / "whole", quantization=INT4, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(t.numel() * t.itemsize for t in tensors_of(tmp_path / "whole").values())
    model = load_model(tmp_path / "whole")
    save(model, model.config, tmp_path / "shards", max_shard_bytes=20_000)
    assert len(list((tmp_path / "shards").glob("model-*"))) > 2
    for name, tensor in tensors_of(tmp_path / "shards").items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_floats_come_out_again(tiny_model, source, tmp_path):
    convert(source, tmp_path / "int4", quantization=INT4)
    convert(tmp_path / "int4", tmp_path / "floats", dtype=torch.float32)
    raw = json.loads((tmp_path / "floats/config.json").read_text())
    assert "quantization_config" not in raw
    quantized, floats = load_model(tmp_path / "int4"), tensors_of(tmp_path / "floats")
    assert {tensor.dtype for tensor in floats.values()} == {torch.float32}
    for name in linear_shapes(tiny_model.config):
        if name == "lm_head" and tiny_model.config.tie_word_embeddings:
            continue  # the embedding, which was never quantised
        assert torch.equal(floats[f"{name}.weight"], quantized.get_submodule(name).dequantized())
    assert torch.equal(
        logits_of(load_model(tmp_path / "int4", dtype=torch.float32)), logits_of(load_model(tmp_path / "floats"))
    )
    convert(tmp_path / "int4", tmp_path / "bin", dtype=torch.float16, to="torch_bin")
    assert torch.equal(tensors_of(tmp_path / "bin")["transformer.ln_f.bias"], floats["transformer.ln_f.bias"].half())


def test_quantised_again_gives_the_same_integers(source, tmp_path):
    """8 bits: floats made of integers become those integers again."""
    convert(source, tmp_path / "one", quantization=INT8)
    convert(tmp_path / "one", tmp_path / "floats", dtype=torch.float32)
    convert(tmp_path / "floats", tmp_path / "two", quantization=INT8)
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    for name, tensor in one.items():
        if name != "lm_head.weight" and name != "lm_head.scales":  # a tied one is the embedding again
            torch.testing.assert_close(two[name].float(), tensor.float(), rtol=1e-3, atol=1e-6, msg=name)


def test_what_was_quantised_is_copied_as_it_is(source, tmp_path):
    convert(source, tmp_path / "one", quantization=INT8)
    convert(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert (tmp_path / "one/config.json").read_bytes() == (tmp_path / "two/config.json").read_bytes()


def test_what_excludes_one_another_is_said_before_anything_is_written(source, tmp_path):
    convert(source, tmp_path / "int8", quantization=INT8)
    with pytest.raises(CheckpointError, match=r"quantised already \(int8\); quantise the float weights"):
        convert(tmp_path / "int8", tmp_path / "new", quantization=INT4)
    with pytest.raises(ConfigError, match="safetensors"):
        convert(source, tmp_path / "new", quantization=INT4, to="torch_bin")
    with pytest.raises(ConfigError, match="have no dtype"):
        convert(source, tmp_path / "new", quantization=INT4, dtype=torch.float16)
    with pytest.raises(ConfigError, match="torch_bin holds no int8 weights; name a dtype"):
        convert(tmp_path / "int8", tmp_path / "new", to="torch_bin")
    assert not (tmp_path / "new").exists()


def test_weights_that_are_no_numbers_are_named_and_leave_nothing(tiny_gptj, tmp_path):
    with torch.no_grad():
        tiny_gptj.transformer.h[1].attn.q_proj.weight[3, 3] = float("inf")
    save(tiny_gptj, tiny_gptj.config, tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.attn\.q_proj\.weight: .*infinity"):
        convert(tmp_path / "source", tmp_path / "new", quantization=INT8)
    assert not (tmp_path / "new").exists()


def test_an_interrupted_conversion_does_not_open(source, tmp_path):
    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "new", quantization=INT8, on_progress=stop)
    assert not (tmp_path / "new").exists()


def test_only_what_has_scales_is_quantised(tiny_model, source, tmp_path):
    """A mixed file: one layer and the head left as floats."""
    convert(source, tmp_path / "mixed", quantization=INT8)
    layer = next(iter(linear_shapes(tiny_model.config)))
    tied = tiny_model.config.tie_word_embeddings
    expected = load_model(tmp_path / "mixed").state_dict()

    def change(tensors):
        for name in (layer, "lm_head"):
            del tensors[f"{name}.scales"]
        tensors[f"{layer}.weight"] = tiny_model.get_submodule(layer).weight.detach().half()
        if tied:
            del tensors["lm_head.weight"]
        else:
            tensors["lm_head.weight"] = tiny_model.lm_head.weight.detach()

    rewrite(tmp_path / "mixed", change)
    mixed = load_model(tmp_path / "mixed")
    assert is_quantized(mixed)
    assert mixed.get_submodule(layer).weight.dtype == torch.float32
    assert mixed.lm_head.weight is None if tied else mixed.lm_head.weight.dtype == torch.float32
    state = mixed.state_dict()
    kept = [name for name in expected if name.endswith(".scales") and name in state]
    assert len(kept) == len(linear_shapes(tiny_model.config)) - 2
    assert all(torch.equal(state[name], expected[name]) for name in kept)
    exact = logits_of(tiny_model)
    assert (logits_of(mixed) - exact).norm() / exact.norm() < 0.06
    save(mixed, mixed.config, tmp_path / "again")
    assert torch.equal(logits_of(load_model(tmp_path / "again")), logits_of(mixed))


@pytest.fixture
def int8(tiny_gptj, tmp_path):
    save(quantize(tiny_gptj, 8), tiny_gptj.config, tmp_path / "int8")
    return tmp_path / "int8"


def test_everything_that_is_wrong_is_listed_at_once(int8):
    first, second = "transformer.h.0.attn.q_proj", "transformer.h.1.mlp.fc_in"

    def change(tensors):
        del tensors[f"{first}.scales"]
        tensors[f"{second}.scales"] = torch.zeros(8, 2, 16, dtype=torch.float16)
        tensors["lm_head.scales"] = tensors["lm_head.scales"].float()
        tensors["transformer.h.9.scales"] = torch.zeros(1)
        tensors["transformer.ln_f.weight"] = torch.zeros(32, dtype=torch.int32)
        del tensors["transformer.h.0.mlp.fc_out.weight"]

    rewrite(int8, change)
    with pytest.raises(CheckpointError) as found:
        load_model(int8)
    message = str(found.value)
    for line in (
        f"missing: the scales of {first}.weight, which is uint8 in model.safetensors",
        f"misshapen: {second}.scales is [8, 2, 16] in model.safetensors, the config asks for [8, 1, 16]",
        "wrong dtype: lm_head.scales is torch.float32 in model.safetensors, expected torch.float16",
        "unexpected: 'transformer.h.9.scales' [1] in model.safetensors",
        "wrong dtype: transformer.ln_f.weight is torch.int32 in model.safetensors, expected floating point",
        "missing: transformer.h.0.mlp.fc_out.weight [2, 32, 64]",
    ):
        assert line in message
    assert {line.strip() for line in message.splitlines()[1:]} <= set(inspect(int8).problems)


@pytest.mark.parametrize("changed", [{"bits": 4}, {"group_size": 64}])
def test_a_config_that_says_otherwise_than_the_shapes_is_found_out(int8, changed):
    set_config(int8, **changed)
    with pytest.raises(CheckpointError, match=r"misshapen: \S+\.weight is \[\d+, \d+, 64\]"):
        load_model(int8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"version": 99}, "version is 99"),
        ({"bits": "8"}, "bits is 8, expected 4 or 8"),
        ({"group_size": -32}, "group_size is -32, expected 32 or 64"),
    ],
)
def test_a_config_that_will_not_do_is_a_checkpoint_error(int8, changed, message):
    set_config(int8, **changed)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(int8)
    assert any(message in problem for problem in inspect(int8).problems)


def test_scales_without_a_word_in_the_config_are_found_out(int8):
    raw = json.loads((int8 / "config.json").read_text())
    del raw["quantization_config"]
    (int8 / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"unexpected: .*scales.*the config has no quantization_config"):
        load_model(int8)


def test_a_file_that_was_cut_short_does_not_open(int8):
    content = (int8 / "model.safetensors").read_bytes()
    (int8 / "model.safetensors").write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match="fetch the file again"):
        load_model(int8)


def test_quantised_weights_are_not_trained_and_stay_on_the_cpu(int8):
    with pytest.raises(ConfigError, match="int8 weights cannot be trained"):
        load_model(int8, trainable=True)
    with pytest.raises(ConfigError, match="int8 weights cannot be trained"):
        load_model(int8, dtype=torch.float32, trainable=True)
    with pytest.raises(ConfigError, match=r"device is 'cuda', and int8 runs on the CPU"):
        load_model(int8, device="cuda")
    with pytest.raises(ConfigError, match="cannot be written as"):
        model = load_model(int8)
        save(model, model.config, int8.parent / "new", dtype=torch.float16)


def test_a_quantised_model_is_inspected_as_what_it_is(tiny_gptj, int8):
    found = inspect(int8)
    assert found.problems == ()
    assert found.quantization == INT8
    # As many weights as before, not as many bytes, scales and fillings.
    assert found.num_parameters == sum(p.numel() for p in build(tiny_gptj.config, device="meta").parameters())
    assert found.num_bytes < (int8 / "model.safetensors").stat().st_size


_PEAK = """
import resource, sys
from pathlib import Path
import torch
from bluejay.checkpoints import convert
from bluejay.model.quantized import Quantization, pack_weight
pack_weight(torch.zeros(16, 32), Quantization(4))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(Path(sys.argv[1]), Path(sys.argv[2]), quantization=Quantization(4))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_converting_holds_one_tensor_at_a_time(tmp_path):
    config = ModelConfig("gptj", vocab_size=4000, n_positions=16, n_embd=1024, n_layer=8, n_head=8, rotary_dim=4)
    model = build(config).half()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.02, 0.02)
    save(model, config, tmp_path / "source")
    weights = sum(parameter.numel() for parameter in model.parameters())
    found = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "source"), str(tmp_path / "int4")],
        capture_output=True,
        text=True,
        check=True,
    )
    # Less than half of the floats: the largest tensor, 4 M weights, a few times over.
    assert int(found.stdout) < weights
