"""What the network is: configs, attention, the two families."""

from bluejay.model.attention import Attend, CausalAttention
from bluejay.model.config import PRESETS, ModelConfig
from bluejay.model.registry import FAMILIES, LanguageModel, build, num_parameters

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Attend",
    "CausalAttention",
    "LanguageModel",
    "ModelConfig",
    "build",
    "num_parameters",
]
