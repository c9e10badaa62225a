"""The oracle itself: what it says of errors, padding and scores."""

from __future__ import annotations

import pytest
import torch

from bluejay.model import ModelConfig

CONFIG = ModelConfig(
    "gptj", vocab_size=50, n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, bos_token_id=0, eos_token_id=0
)


@pytest.fixture(scope="module")
def handle(oracle, write_hf, make_model):
    handle = oracle.open(write_hf(make_model(CONFIG)))
    yield handle
    oracle.close(handle)


def test_what_transformers_raises_comes_back_with_its_class(oracle, handle):
    with pytest.raises(Exception, match=r"ValueError.*num_return_sequences"):
        oracle.generate(handle, [[1, 2]], num_return_sequences=3, max_new_tokens=2)


def test_a_key_that_transformers_misses_is_an_error(oracle, write_hf, make_model):
    model = make_model(CONFIG)
    del model.transformer.ln_f.bias
    model.transformer.ln_f.register_buffer("extra", torch.zeros(1))
    with pytest.raises(Exception, match=r"ln_f\.bias.*ln_f\.extra"):
        oracle.open(write_hf(model))


def test_left_padding_does_not_change_a_row(oracle, handle):
    together = oracle.generate(handle, [[7], [3, 4, 5, 6]], max_new_tokens=5, min_new_tokens=5)
    alone = [oracle.generate(handle, [row], max_new_tokens=5, min_new_tokens=5) for row in ([7], [3, 4, 5, 6])]
    assert together.sequences == [one.sequences[0] for one in alone]
    assert [len(row) for row in together.sequences] == [5, 5]


def test_processed_scores_are_those_a_token_was_drawn_from(oracle, handle):
    out = oracle.processed(handle, [[1, 2]], top_k=3, max_new_tokens=4, min_new_tokens=4, seed=1)
    scores = out.arrays["scores"]
    assert scores.shape == (4, 1, 50)
    for token, row in zip(out.sequences[0], scores[:, 0], strict=True):
        assert torch.isfinite(row).sum() == 3
        assert torch.isfinite(row[token])
