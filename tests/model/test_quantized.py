import dataclasses
import subprocess
import sys

import pytest
import torch

from bluejay import ops
from bluejay.errors import ConfigError, KernelError
from bluejay.model import CausalAttention, ModelConfig, build
from bluejay.model.quantized import (
    Int4Linear,
    Int8Linear,
    Quantization,
    QuantizedHead,
    WidenedEmbedding,
    is_quantized,
    linear_shapes,
    pack_weight,
    quantize,
    random_quantized,
    stored_embedding,
    unpack_weight,
    with_quantization,
)

ODD = ModelConfig("gptj", vocab_size=307, n_positions=32, n_embd=24, n_layer=2, n_head=3, n_inner=50, rotary_dim=4)


def logits_of(model, length=20):
    ids = torch.arange(length)[None] * 7 % model.config.vocab_size
    with torch.inference_mode():
        return model.logits(model(ids, torch.arange(length)[None], CausalAttention()))[0]


def test_the_layers_that_are_quantised_are_those_that_multiply(tiny_model):
    names = linear_shapes(tiny_model.config)
    kinds = {name.split(".")[-1] for name in names}
    if tiny_model.config.model_type == "gptj":
        assert kinds == {"q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out", "lm_head"}
    else:
        assert kinds == {"q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj", "lm_head"}
    assert names["lm_head"] == (300, 32)
    assert len(names) == 2 * 6 + 1


# Weights of tiny networks are drawn large; GPT-Neo's scores, which nothing divides, feel it most.
@pytest.mark.parametrize(("bits", "most"), [(8, 0.06), (4, 0.4)])
def test_a_quantised_network_computes_nearly_the_same(tiny_model, bits, most):
    exact = logits_of(tiny_model)
    assert not is_quantized(tiny_model)
    found = quantize(tiny_model, bits)
    assert found is tiny_model
    assert is_quantized(found)
    assert (logits_of(found) - exact).norm() / exact.norm() < most


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_network_computes_what_its_dequantised_weights_say(make_model, bits, group_size):
    """Sizes that fill neither groups nor tiles; what is left is the rounding of the activations."""
    model = quantize(make_model(ODD), bits, group_size)
    floats = make_model(ODD)
    state = floats.state_dict()
    for name in linear_shapes(ODD):
        layer = model.get_submodule(name)
        state[f"{name}.weight"].copy_(layer.dequantized())
    state["transformer.wte.weight"].copy_(model.transformer.wte.weight.float())
    exact = logits_of(floats)
    assert (logits_of(model) - exact).norm() / exact.norm() < 0.03
    assert logits_of(model).shape == (20, 307)


def test_every_tensor_is_kept_as_promised(tiny_model):
    tied = tiny_model.config.tie_word_embeddings
    model = quantize(tiny_model, 4, 64)
    assert isinstance(model.transformer.h[0].mlp.get_submodule("c_fc" if tied else "fc_in"), Int4Linear)
    assert isinstance(model.lm_head, QuantizedHead)
    assert isinstance(model.transformer.wte, WidenedEmbedding)
    for name, tensor in model.state_dict().items():
        layer = name.rpartition(".")[0]
        if layer in linear_shapes(model.config) and name.endswith(".weight"):
            assert tensor.dtype == torch.uint8, name
        elif name.endswith(".scales") or "wte" in name or "wpe" in name:
            assert tensor.dtype == torch.float16, name
        else:
            assert tensor.dtype == torch.float32, name
    assert {"lm_head.weight", "lm_head.scales"} <= set(model.state_dict())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert Quantization.of(model.config) == Quantization(4, 64)


def test_a_network_of_16_bits_is_quantised_to_compute_in_float32(tiny_model):
    model = quantize(tiny_model.bfloat16(), 8)
    assert logits_of(model).dtype == torch.float32
    assert model.transformer.wte.weight.dtype == torch.bfloat16
    assert model.transformer.ln_f.weight.dtype == torch.float32


def test_progress_counts_weights(tiny_gptj):
    seen = []
    quantize(tiny_gptj, 8, on_progress=lambda done, total: seen.append((done, total)))
    total = sum(n * k for n, k in linear_shapes(tiny_gptj.config).values())
    assert len(seen) == 13
    assert seen[-1] == (total, total)
    assert sorted(seen) == seen


def test_what_cannot_be_quantised_is_named(tiny_gptj):
    with pytest.raises(ConfigError, match="bits is 3, expected 4 or 8; group_size is 48, expected 32 or 64"):
        quantize(tiny_gptj, 3, 48)
    with pytest.raises(ConfigError, match="not on the CPU"):
        quantize(build(tiny_gptj.config, device="meta"), 8)
    quantize(tiny_gptj, 8)
    with pytest.raises(ConfigError, match="quantised already"):
        quantize(tiny_gptj, 4)


def test_weights_that_are_no_numbers_are_refused(tiny_gptj):
    with torch.no_grad():
        tiny_gptj.transformer.h[1].mlp.fc_in.weight[3, 3] = float("nan")
    with pytest.raises(KernelError, match="NaN"):
        quantize(tiny_gptj, 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_threads_change_nothing(bits):
    weight = torch.empty(700, 2048).normal_(0, 0.02, generator=torch.Generator().manual_seed(3))
    before = ops.num_threads()
    try:
        found = []
        for threads in (1, 3):
            ops.set_num_threads(threads)
            found.append(pack_weight(weight, Quantization(bits)))
    finally:
        ops.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    back = unpack_weight(*found[0], Quantization(bits), 700, 2048)
    assert (back - weight).norm() / weight.norm() < (0.01 if bits == 8 else 0.09)


def test_torch_keeps_its_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pack_weight(torch.ones(20, 40), Quantization(8))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_embeddings_become_16_bits_where_they_fit():
    assert stored_embedding(torch.ones(2, 2)).dtype == torch.float16
    assert stored_embedding(torch.full((2, 2), 1e6)).dtype == torch.float32
    assert stored_embedding(torch.full((2, 2), float("nan"))).dtype == torch.float32
    assert stored_embedding(torch.ones(2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def config_with(**changed):
    raw = {"quant_method": "bluejay", "bits": 8, "group_size": 32, "version": 2} | changed
    return dataclasses.replace(ODD, extras={"quantization_config": raw})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq', Bluejay opens only its own"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quant_method is 'bitsandbytes'"),
        ({"quant_method": None}, "quant_method is 'None'"),
        ({"version": 1}, "version is 1, this Bluejay reads 2"),
        ({"bits": 5, "group_size": "32"}, "bits is 5, expected 4 or 8; group_size is 32, expected 32 or 64"),
        ({"bits": True}, "bits is True"),
        ({"bits": 8.0}, "bits is 8.0"),
        ({"group_size": 10**400}, "group_size is 1000"),
        ({"group_size": [32]}, "group_size is "),
        ({"bits": None}, "bits is None"),
    ],
)
def test_a_config_that_will_not_do_is_named(changed, message):
    with pytest.raises(ConfigError, match=message):
        Quantization.of(config_with(**changed))


def test_a_config_goes_there_and_back():
    config = with_quantization(ODD, Quantization(4, 64))
    assert Quantization.of(config) == Quantization(4, 64)
    assert Quantization.of(ModelConfig.from_dict(config.to_dict())) == Quantization(4, 64)
    assert Quantization.of(with_quantization(config, None)) is None
    with pytest.raises(ConfigError, match="quant_method is 'int8'"):
        Quantization.of(dataclasses.replace(ODD, extras={"quantization_config": "int8"}))


@pytest.mark.parametrize("bits", [8, 4])
def test_random_weights_are_of_a_networks_size(tiny_model, bits):
    model = random_quantized(tiny_model.config, bits, seed=3)
    assert is_quantized(model)
    for name in linear_shapes(model.config):
        floats = model.get_submodule(name).dequantized()
        assert abs(floats.std() - 0.02) < 0.004, name
        assert abs(floats.mean()) < 0.003, name
    logits = logits_of(model)
    assert logits.isfinite().all()
    assert 0 < logits.std() < 100
    assert torch.equal(logits, logits_of(random_quantized(tiny_model.config, bits, seed=3)))
    assert not torch.equal(logits, logits_of(random_quantized(tiny_model.config, bits, seed=4)))


def test_layers_are_linear_layers():
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    for kind, bits in ((Int8Linear, 8), (Int4Linear, 4)):
        layer = kind(40, 18, group_size=64)
        assert (layer.in_features, layer.out_features) == (40, 18)
        weight = torch.randn(18, 40, generator=torch.Generator().manual_seed(1))
        layer.fill(weight, torch.ones(18))
        exact = x @ weight.t() + 1
        assert (layer(x) - exact).norm() / exact.norm() < (0.02 if bits == 8 else 0.12)
        assert set(dict(layer.named_buffers())) == {"weight", "scales", "bias"}
        assert kind(40, 18, bias=False).bias is None


_PEAK = """
import resource, sys, dataclasses
from bluejay.model import PRESETS
from bluejay.model.quantized import random_quantized
config = dataclasses.replace(PRESETS["gpt-j-6b"], n_layer=2)
random_quantized(dataclasses.replace(config, n_embd=64, n_head=1, vocab_size=64), 4)  # what PyTorch imports by then
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = random_quantized(config, 4)
held = sum(t.numel() * t.itemsize for t in model.state_dict().values())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, held)
"""


def test_random_weights_take_no_more_memory_than_themselves():
    found = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    peak, held = map(int, found.stdout.split())
    assert held == 755_954_560
    assert peak < held + 100e6
