"""Which file builds which family, and what every family offers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from bluejay.model.attention import Attend
from bluejay.model.config import ModelConfig
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ

FAMILIES: dict[str, type[GPTJ] | type[GPTNeo]] = {"gptj": GPTJ, "gpt_neo": GPTNeo}


class LanguageModel(Protocol):
    """What the rest of Bluejay knows of a network."""

    config: ModelConfig

    def __call__(self, input_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor: ...

    def logits(self, hidden_states: Tensor) -> Tensor: ...


def build(
    config: ModelConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> GPTJ | GPTNeo:
    """Make the network of a config, its weights not yet filled; on device "meta" it takes no memory either."""
    with torch.device(device):
        model = FAMILIES[config.model_type](config)
    return model.to(dtype)


def num_parameters(config: ModelConfig) -> int:
    """Parameters, counted without allocating them: 6,050,882,784 for GPT-J-6B."""
    model: nn.Module = build(config, device="meta")
    return sum(parameter.numel() for parameter in model.parameters())
