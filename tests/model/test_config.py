import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bluejay.errors import ConfigError
from bluejay.model import PRESETS, ModelConfig

# The hub's own files, as far as they describe the network.
GPT_J_6B = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "rotary": True,
    "rotary_dim": 64,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}},
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "vocab_size": 50400,
}
GPT_NEO_125M = {
    "activation_function": "gelu_new",
    "architectures": ["GPTNeoForCausalLM"],
    "attention_types": [[["global", "local"], 6]],
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neo",
    "num_heads": 12,
    "num_layers": 12,
    "vocab_size": 50257,
    "window_size": 256,
}


@pytest.mark.parametrize(("raw", "preset"), [(GPT_J_6B, "gpt-j-6b"), (GPT_NEO_125M, "gpt-neo-125m")])
def test_the_hubs_config_is_the_preset(raw, preset):
    assert ModelConfig.from_dict(raw) == PRESETS[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_written_is_the_config_read(preset, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PRESETS[preset].to_dict()))
    assert ModelConfig.from_file(path) == PRESETS[preset]


def test_keys_that_bluejay_does_not_use_are_carried_along():
    written = ModelConfig.from_dict(GPT_J_6B).to_dict()
    assert {key: written.get(key) for key in GPT_J_6B} == GPT_J_6B


def test_attention_types_are_spelled_out():
    raw = {**GPT_NEO_125M, "num_layers": 5, "attention_types": [[["local", "global"], 2], [["local"], 1]]}
    config = ModelConfig.from_dict(raw)
    assert config.attention_layers == ("local", "global", "local", "global", "local")
    assert [config.window(layer) for layer in range(5)] == [256, None, 256, None, 256]


def test_a_missing_rotary_dim_is_transformers_default_and_null_is_the_whole_head():
    without = {key: value for key, value in GPT_J_6B.items() if key != "rotary_dim"}
    assert ModelConfig.from_dict(without).rotated_dims == 64
    assert ModelConfig.from_dict({**GPT_J_6B, "rotary_dim": None}).rotated_dims == 256


def test_all_wrong_values_are_named_at_once():
    raw = {
        **GPT_J_6B,
        "n_embd": 0,
        "n_head": "16",
        "n_positions": 2.5,
        "activation_function": "tanh",
        "eos_token_id": -1,
    }
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw, where="here.json")
    message = str(caught.value)
    assert "here.json" in message
    for part in ("n_embd is 0", "n_head is 16", "n_positions is 2.5", "'tanh'", "eos_token_id is -1"):
        assert part in message


def test_all_missing_keys_are_named_at_once():
    with pytest.raises(ConfigError, match=r"missing .*hidden_size.*num_layers.*num_heads"):
        ModelConfig.from_dict({"model_type": "gpt_neo", "vocab_size": 10, "max_position_embeddings": 8})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "'llama'.*'gptj' and 'gpt_neo'"),
        ({"model_type": None}, "model_type is None"),
        ({"n_head": 3}, "n_embd 4096 is not a multiple of n_head 3"),
        ({"rotary_dim": 63}, "rotary_dim 63 must be even"),
        ({"rotary_dim": 258}, "at most the head size 256"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
    ],
)
def test_a_wrong_gptj_value_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**GPT_J_6B, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_types": [[["global", "local"], 5]]}, "names 10 layers, n_layer is 12"),
        ({"attention_types": [[["global", "sliding"], 6]]}, "sliding"),
        ({"attention_types": [[["global"], 10**9]]}, "at most 10,000 layers"),
        ({"attention_types": "global"}, "attention_types is global"),
        ({"attention_types": [[["global"], 10**20], [["global"], -(10**20)]]}, "at most 10,000 layers"),
        ({"attention_types": [[[["global"]], 12]]}, "attention_layers holds"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"window_size": 0}, "window_size is 0"),
    ],
)
def test_a_wrong_gpt_neo_value_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**GPT_NEO_125M, **change})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b"null"])
def test_a_file_that_is_no_config_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        ModelConfig.from_file(tmp_path / "config.json")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["global", "local"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    base=st.sampled_from([GPT_J_6B, GPT_NEO_125M]),
    changes=st.dictionaries(
        st.sampled_from(sorted({*GPT_J_6B, *GPT_NEO_125M, "attention_layers", "torch_dtype", "dtype"})),
        JSON,
        max_size=4,
    ),
    dropped=st.sets(st.sampled_from(sorted({*GPT_J_6B, *GPT_NEO_125M})), max_size=3),
)
def test_any_json_is_a_config_or_a_config_error(base, changes, dropped):
    raw = {key: value for key, value in {**base, **changes}.items() if key not in dropped}
    try:
        config = ModelConfig.from_dict(raw)
    except ConfigError:
        return
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ConfigError, match="is larger than"):
        ModelConfig.from_file(path)
