"""Initial weights, AdamW and the learning rate, as mesh-transformer-jax had them."""

from __future__ import annotations

import math

import torch
from torch import nn

from bluejay.model import ModelConfig
from bluejay.train.config import Recipe


def initialise(model: nn.Module, config: ModelConfig, generator: torch.Generator) -> None:
    """Fill the weights of a new network, in place.

    GPT-J: truncated normal of 1 / sqrt(fan_in), embeddings of 1 / sqrt(vocab_size), the two projections back into the
    residual stream of 2 / n_layer / sqrt(n_embd). GPT-Neo: normal of initializer_range everywhere.
    Biases are 0, LayerNorm scales 1.
    Source: mesh-transformer-jax layers.py (haiku's defaults); transformers GPTNeoPreTrainedModel.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.constant_(parameter, 1.0 if _is_scale(name) else 0.0)
        elif config.model_type == "gpt_neo":
            nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
        else:
            std = _gptj_std(name, parameter.shape[1], config)
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=generator)


def _is_scale(name: str) -> bool:
    return name.endswith(".weight")  # the only 1-dim weights are LayerNorm's


def _gptj_std(name: str, fan_in: int, config: ModelConfig) -> float:
    if name.endswith("wte.weight"):
        return 1 / math.sqrt(config.vocab_size)
    if name.endswith(("out_proj.weight", "fc_out.weight")):
        return 2 / config.n_layer / math.sqrt(config.n_embd)
    return 1 / math.sqrt(fan_in)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; only parameters with more than one dim decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True)


def learning_rate(step: int, recipe: Recipe) -> float:
    """The rate of step `step`, counted from 0: linear warm-up, half a cosine, then flat.

    Source: mesh-transformer-jax util.py, gpt3_schedule. There step 0 has rate 0; here the first step counts as 1.
    """
    done = step + 1
    warm = min(done, recipe.warmup_steps) / recipe.warmup_steps if recipe.warmup_steps else 1.0
    annealed = min(max(done - recipe.warmup_steps, 0), recipe.annealing) / recipe.annealing
    return warm * recipe.lr - (recipe.lr - recipe.end_lr) * (1 - math.cos(math.pi * annealed)) / 2
