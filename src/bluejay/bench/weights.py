"""Random weights, and how many bytes of a network a step reads."""

from __future__ import annotations

import torch
from torch import nn

from bluejay.model import ModelConfig, build
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ
from bluejay.model.quantized import Quantization, build_quantized, random_quantized

Model = GPTJ | GPTNeo


def random_model(config: ModelConfig, quantization: Quantization | None, dtype: torch.dtype, seed: int) -> Model:
    """A network with random weights; quantised ones are drawn as integers, so that no float weights take memory.

    Args:
        dtype: of the weights of a network that is not quantised.
    """
    if quantization is not None:
        return random_quantized(config, quantization.bits, quantization.group_size, seed=seed)
    model = build(config, device="meta", dtype=dtype).to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            weight.normal_(0, config.initializer_range, generator=generator)
        else:
            weight.fill_(1 if ".ln_" in name and name.endswith("weight") else 0)
    return model.eval()


def weight_bytes(config: ModelConfig, quantization: Quantization | None, dtype: torch.dtype) -> int:
    """What `random_model` will take, without making it."""
    if quantization is None:
        model = build(config, device="meta", dtype=dtype)
        return sum(parameter.nbytes for parameter in model.parameters())
    model = build_quantized(config, quantization, device="meta")
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    others = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return others - sum(weight.nbytes - 2 * weight.numel() for weight in embeddings)  # kept in 16 bits


def kv_bytes(config: ModelConfig, num_tokens: int, itemsize: int) -> int:
    """Keys and values that one more token of a sequence sees, itself included, in all layers.

    Args:
        num_tokens: that the sequence has, with the new one; a local layer sees at most its window.
        itemsize: bytes of one number in the cache.
    """
    windows = (config.window(layer) for layer in range(config.n_layer))
    seen = sum(num_tokens if window is None else min(window, num_tokens) for window in windows)
    return 2 * seen * config.n_embd * itemsize


def step_weight_bytes(model: Model, batch_size: int) -> int:
    """The bytes of weights that a decoding step must read.

    Each packed weight, scale, bias and norm of all layers and of the head once, and of the embeddings the rows of the
    step's tokens: a batch shares the weights. A tied head of floats reads the whole embedding.
    """
    total = 0
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if isinstance(module, nn.Embedding):
            total += batch_size * module.embedding_dim * module.weight.element_size()
        else:
            total += sum(tensor.nbytes for tensor in own)
    if model.lm_head.weight is None:
        total += model.transformer.wte.weight.nbytes
    return total
