from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bluejay.bench.weights import kv_bytes, random_model, step_weight_bytes, weight_bytes
from bluejay.model import CausalAttention, ModelConfig
from bluejay.model.quantized import Quantization

from ..conftest import TINY_GPT_NEO, TINY_GPTJ

INT8, INT4 = Quantization(8, 32), Quantization(4, 32)
WIDTH, INNER, VOCABULARY = 32, 128, 300


def taken(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def test_a_step_of_floats_reads_each_weight_once_and_a_row_of_the_embedding_per_prompt() -> None:
    norm = 2 * WIDTH
    block = norm + 4 * WIDTH * WIDTH + (INNER * WIDTH + INNER) + (WIDTH * INNER + WIDTH)
    weights = 2 * block + norm + VOCABULARY * WIDTH + VOCABULARY
    model = random_model(TINY_GPTJ, None, torch.float32, 0)
    assert step_weight_bytes(model, 1) == 4 * (weights + WIDTH)
    assert step_weight_bytes(model, 5) == 4 * (weights + 5 * WIDTH)
    assert step_weight_bytes(random_model(TINY_GPTJ, None, torch.bfloat16, 0), 1) == 2 * (weights + WIDTH)


def test_a_step_of_a_tied_head_reads_the_whole_embedding_too() -> None:
    norm = 2 * WIDTH
    block = 2 * norm + 4 * WIDTH * WIDTH + WIDTH + (INNER * WIDTH + INNER) + (WIDTH * INNER + WIDTH)
    weights = 2 * block + norm + VOCABULARY * WIDTH
    model = random_model(TINY_GPT_NEO, None, torch.float32, 0)
    assert step_weight_bytes(model, 3) == 4 * (weights + 3 * 2 * WIDTH)  # of each prompt a token's and a position's row


@pytest.mark.parametrize(("quantization", "share"), [(INT8, 1), (INT4, 2)])
def test_a_step_of_integers_reads_weights_scales_biases_and_norms(quantization: Quantization, share: int) -> None:
    def linear(outputs: int, inputs: int) -> int:
        return outputs * inputs // share + 2 * outputs * inputs // 32  # integers, and a float16 for each 32

    norm = 4 * 2 * WIDTH
    block = norm + 4 * linear(WIDTH, WIDTH) + linear(INNER, WIDTH) + 4 * INNER + linear(WIDTH, INNER) + 4 * WIDTH
    padded = 304  # outputs of the head, in tiles of 16
    weights = 2 * block + norm + linear(padded, WIDTH) + 4 * VOCABULARY
    model = random_model(TINY_GPTJ, quantization, torch.float32, 0)
    assert step_weight_bytes(model, 1) == weights + 2 * WIDTH  # a row of 16 bits
    assert step_weight_bytes(model, 8) == weights + 8 * 2 * WIDTH


@pytest.mark.parametrize("config", [TINY_GPTJ, TINY_GPT_NEO], ids=lambda config: config.model_type)
@pytest.mark.parametrize("quantization", [None, INT8, INT4, Quantization(4, 64)])
def test_sizes_are_told_before_anything_is_made(config: ModelConfig, quantization: Quantization | None) -> None:
    model = random_model(config, quantization, torch.float32, 0)
    assert weight_bytes(config, quantization, torch.float32) == taken(model)


def test_sizes_of_gpt_j_6b() -> None:
    from bluejay.model import PRESETS

    config = PRESETS["gpt-j-6b"]
    assert weight_bytes(config, None, torch.bfloat16) == 2 * 6_050_882_784
    assert 3.6e9 < weight_bytes(config, INT4, torch.float32) < 3.8e9
    assert kv_bytes(config, 1, 2) == 448 * 1024


def test_keys_and_values_of_a_local_layer_end_at_its_window() -> None:
    global_layer, local_layer = 2 * 20 * WIDTH * 4, 2 * 8 * WIDTH * 4
    assert kv_bytes(TINY_GPT_NEO, 20, 4) == global_layer + local_layer
    assert kv_bytes(replace(TINY_GPT_NEO, window_size=64), 20, 4) == 2 * global_layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, INT8, INT4])
@pytest.mark.parametrize("config", [TINY_GPTJ, TINY_GPT_NEO], ids=lambda config: config.model_type)
def test_random_weights_compute_and_are_the_same_for_a_seed(
    config: ModelConfig, quantization: Quantization | None, dtype: torch.dtype
) -> None:
    ids = torch.arange(10)[None]

    @torch.inference_mode()
    def logits(seed: int) -> torch.Tensor:
        model = random_model(config, quantization, dtype, seed)
        return model.logits(model(ids, ids, CausalAttention()))

    found = logits(0)
    assert found.isfinite().all()
    assert found.std() > 0.01
    assert torch.equal(found, logits(0))
    assert not torch.equal(found, logits(1))
