"""Logits in float32 against transformers: at most 1e-4 of the largest logit apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bluejay.model import CausalAttention, ModelConfig

GPTJ = ModelConfig("gptj", vocab_size=97, n_positions=64, n_embd=48, n_layer=2, n_head=4, rotary_dim=6)
GPT_NEO = ModelConfig(
    "gpt_neo",
    vocab_size=97,
    n_positions=64,
    n_embd=48,
    n_layer=3,
    n_head=4,
    attention_layers=("global", "local", "local"),
    window_size=7,
    tie_word_embeddings=True,
)
CONFIGS = {
    "gptj": GPTJ,
    "gptj-whole-head": replace(GPTJ, rotary_dim=12),
    "gptj-two-dims": replace(GPTJ, rotary_dim=2),
    "gptj-odd-fraction": replace(GPTJ, rotary_dim=10),
    # transformers sizes the angles of a null rotary_dim for the whole width, which fits one head only.
    "gptj-null": replace(GPTJ, n_head=1, rotary_dim=None),
    "gptj-one-head": replace(GPTJ, n_head=1, rotary_dim=16),
    "gptj-two-heads": replace(GPTJ, n_head=2, n_inner=80),
    "gptj-three-heads-gelu": replace(GPTJ, n_head=3, rotary_dim=8, activation_function="gelu"),
    "gptj-relu": replace(GPTJ, activation_function="relu"),
    "gptj-silu-epsilon": replace(GPTJ, activation_function="silu", layer_norm_epsilon=1e-2),
    "gpt-neo": GPT_NEO,
    "gpt-neo-one-head": replace(GPT_NEO, n_head=1, n_inner=80),
    "gpt-neo-two-heads-local-first": replace(GPT_NEO, n_head=2, attention_layers=("local", "global", "local")),
    "gpt-neo-window-of-one": replace(GPT_NEO, n_head=3, window_size=1, activation_function="gelu"),
    "gpt-neo-window-past-the-context": replace(GPT_NEO, window_size=256, activation_function="relu"),
    "gpt-neo-silu": replace(GPT_NEO, activation_function="silu"),
}


def random_rows(lengths, vocab_size):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def our_logits(model, row):
    tokens = torch.tensor([row])
    positions = torch.arange(len(row))[None]
    return model.logits(model(tokens, positions, CausalAttention()))[0]


def assert_same(ours, theirs):
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert difference <= 1e-4, f"logits differ by {difference:.1e} of the largest"


@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_rows_have_transformers_logits(oracle, write_hf, make_model, name):
    model = make_model(CONFIGS[name])
    handle = oracle.open(write_hf(model))
    rows = random_rows([64, 1, 23, 40], 97)
    width = max(map(len, rows))
    padded = [[0] * (width - len(row)) + row for row in rows]
    masks = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    theirs = oracle.logits(handle, padded, masks)
    oracle.close(handle)
    for row, expected in zip(rows, theirs, strict=True):
        assert_same(our_logits(model, row), expected[-len(row) :])


@pytest.mark.parametrize("config", [GPTJ, replace(GPT_NEO, window_size=256)], ids=["gptj", "gpt-neo"])
@pytest.mark.parametrize("context", [600, 2048])
def test_long_contexts_have_transformers_logits(oracle, write_hf, make_model, config, context):
    model = make_model(replace(config, n_positions=2048))
    handle = oracle.open(write_hf(model))
    [row] = random_rows([context], 97)
    theirs = oracle.logits(handle, [row], [[1] * context])
    oracle.close(handle)
    assert_same(our_logits(model, row), theirs[0])


def test_gptjs_real_width_has_transformers_logits(oracle, write_hf, make_model):
    config = ModelConfig("gptj", vocab_size=300, n_positions=2048, n_embd=4096, n_layer=2, n_head=16, rotary_dim=64)
    model = make_model(config)
    handle = oracle.open(write_hf(model))
    rows = random_rows([160, 31], 300)
    padded = [rows[0], [0] * 129 + rows[1]]
    theirs = oracle.logits(handle, padded, [[1] * 160, [0] * 129 + [1] * 31])
    oracle.close(handle)
    for row, expected in zip(rows, theirs, strict=True):
        assert_same(our_logits(model, row), expected[-len(row) :])
