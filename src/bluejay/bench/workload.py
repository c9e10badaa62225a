"""What is run: a network and a number of prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bluejay.errors import ContextLengthExceeded, InvalidRequest
from bluejay.model.config import PRESETS, ModelConfig


@dataclass(frozen=True)
class Workload:
    """Prompts of random tokens, read together and gone on from together.

    Attributes:
        batch_size: prompts that run at once.
        prompt_tokens: tokens of each prompt.
        max_new_tokens: tokens behind each prompt. The first one comes out of the prompt, each other takes a step.
        repeats: timed runs.
        seed: of the prompts' tokens.

    Raises: InvalidRequest, with everything that is wrong at once; its `param` is the first.
    """

    batch_size: int = 1
    prompt_tokens: int = 128
    max_new_tokens: int = 32
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "prompt_tokens": 1, "max_new_tokens": 2, "repeats": 1, "seed": 0}
        wrong = [name for name, at_least in least.items() if getattr(self, name) < at_least]
        if wrong:
            told = (f"{name} is {getattr(self, name)}, expected at least {least[name]}" for name in wrong)
            raise InvalidRequest("; ".join(told), param=wrong[0])

    @property
    def num_steps(self) -> int:
        """Decoding steps of a run."""
        return self.max_new_tokens - 1

    def check_context(self, config: ModelConfig) -> None:
        """Raises: ContextLengthExceeded if the network cannot hold a prompt and what comes behind it."""
        if (tokens := self.prompt_tokens + self.max_new_tokens) > config.n_positions:
            raise ContextLengthExceeded(
                f"prompt_tokens {self.prompt_tokens} and max_new_tokens {self.max_new_tokens} are {tokens} together, "
                f"and the model's context (n_positions) holds {config.n_positions}; ask for fewer",
                param="prompt_tokens",
            )

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids, [batch_size][prompt_tokens], the same for the same seed."""
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(vocab_size, (self.batch_size, self.prompt_tokens), generator=generator)
        return [[int(token) for token in row] for row in ids]


def shape(name: str, layers: int | None = None) -> ModelConfig:
    """The config of a known model, cut to its first `layers` blocks.

    Raises: InvalidRequest for another name, or more layers than it has.
    """
    if name not in PRESETS:
        raise InvalidRequest(f"shape is {name!r}, expected one of {', '.join(PRESETS)}", param="shape")
    config = PRESETS[name]
    if layers is None:
        return config
    if not 1 <= layers <= config.n_layer:
        raise InvalidRequest(f"layers is {layers}, {name} has 1 to {config.n_layer} to run", param="layers")
    return replace(config, n_layer=layers, attention_layers=config.attention_layers[:layers])
