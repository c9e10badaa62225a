"""Quantised models behind `LLM` and `load`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bluejay import ops
from bluejay.checkpoints import convert
from bluejay.decoding.params import SamplingParams
from bluejay.engine import LLM, load
from bluejay.errors import CheckpointError, ConfigError
from bluejay.model.quantized import Quantization, is_quantized, quantize

PARAMS = SamplingParams(max_new_tokens=12)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def int8_dir(model_dir: Path, tmp_path: Path) -> Path:
    convert(model_dir, tmp_path / "int8", quantization=Quantization(8))
    return tmp_path / "int8"


def test_quantising_while_loading_is_converting_and_is_quantising_in_memory(model_dir: Path, int8_dir: Path) -> None:
    loaded, opened = LLM(model_dir, dtype="int8"), LLM(int8_dir)
    assert is_quantized(loaded.model)
    assert is_quantized(opened.model)
    assert opened.dtype == torch.float32
    expected = quantize(load(model_dir), 8).state_dict()
    for model in (loaded.model, opened.model):
        state = model.state_dict()
        assert set(state) == set(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    ids = [seq.token_ids for seq in opened.generate("the fox", PARAMS)[0].sequences]
    assert ids == [seq.token_ids for seq in loaded.generate("the fox", PARAMS)[0].sequences]
    assert len(ids[0]) > 0


def test_a_stored_model_opens_as_stored_or_as_floats(int8_dir: Path) -> None:
    assert is_quantized(load(int8_dir, dtype="int8"))
    floats = LLM(int8_dir, dtype="float32")
    assert not is_quantized(floats.model)
    assert floats.model.transformer.h[0].attn.q_proj.weight.dtype == torch.float32
    assert floats.score([("the fox", " and the jay")])[0].logprob == pytest.approx(
        LLM(int8_dir).score([("the fox", " and the jay")])[0].logprob, rel=0.02
    )
    with pytest.raises(ConfigError, match=r"dtype is int4, .*int8 is stored as int8; quantise the float weights"):
        LLM(int8_dir, dtype="int4")


def test_the_draft_is_where_its_model_is(int8_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = LLM(int8_dir).generate("the fox", PARAMS)[0].token_ids
    monkeypatch.setattr(
        "bluejay.engine.llm.choose_device", lambda name: torch.device("meta" if name == "auto" else name)
    )
    assert LLM(int8_dir, draft=model_dir).generate("the fox", PARAMS)[0].token_ids == expected


def test_quantised_models_stay_on_the_cpu(int8_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for path, dtype in ((int8_dir, "auto"), (model_dir, "int4")):
        with pytest.raises(ConfigError, match=r"device is 'cuda', and int. runs on the CPU"):
            LLM(path, dtype=dtype, device="cuda")
        assert LLM(path, dtype=dtype).device.type == "cpu"  # "auto" would be the GPU


def test_quantised_models_are_not_trained(int8_dir: Path, model_dir: Path) -> None:
    for path, dtype in ((int8_dir, "auto"), (model_dir, "int8")):
        with pytest.raises(ConfigError, match="int8 weights cannot be trained"):
            load(path, dtype=dtype, trainable=True)


@pytest.mark.skipif(ops.voice() == ops.REFERENCE, reason="the reference runs on PyTorch's threads")
def test_pytorch_leaves_the_threads_to_the_kernels(int8_dir: Path) -> None:
    torch.set_num_threads(2)
    LLM(int8_dir)
    assert torch.get_num_threads() == 1


def test_another_programs_quantisation_is_named(model_dir: Path) -> None:
    raw = json.loads((model_dir / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model_dir / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="quant_method is 'gptq', Bluejay opens only its own"):
        LLM(model_dir)
