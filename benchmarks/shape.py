"""The network that all sides run: GPT-J-6B's blocks with random weights, some of its layers, and its head."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """GPT-J's measures by Hugging Face's names; the whole GPT-J-6B has 28 layers.

    Every side has the same work to do for a token: `parameters_per_token` weights, each multiplied once.
    """

    n_layer: int = 4
    n_embd: int = 4096
    n_head: int = 16
    rotary_dim: int = 64
    n_inner: int = 16384
    vocab_size: int = 50400
    n_positions: int = 2048

    @property
    def parameters_per_token(self) -> int:
        """Weights of the matrices that one token meets: the layers' and the head's; the embedding is looked up."""
        return self.n_layer * self.parameters_per_layer + self.n_embd * self.vocab_size

    @property
    def parameters_per_layer(self) -> int:
        """Four square projections, and the two of the MLP."""
        return 4 * self.n_embd**2 + 2 * self.n_embd * self.n_inner
