"""The parts that both families share: rotary positions, the MLP's activation, the head."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Hugging Face's names. gelu_new is the tanh approximation that GPT-2 and both of our families were trained with.
ACTIVATION: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def rotary_angles(positions: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine of each position's angles, in float32.

    Shapes: positions [...] -> two of [..., 1, rotary_dim / 2]; the 1 broadcasts over heads.
    Source: Su et al. 2021 (arXiv:2104.09864), section 3.4.2, base 10,000.
    """
    steps = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None, None].float() * (1.0 / 10000.0 ** (steps / rotary_dim))
    return angles.sin(), angles.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turn the first dims of each head by its position's angles; dims 2i and 2i+1 are one pair.

    Shapes: x [..., H, K]; sin, cos [..., 1, rotary_dim / 2].
    Returns: [..., H, K] in x.dtype, computed in float32; dims past rotary_dim pass through.
    Source: mesh-transformer-jax `rotate_every_two` (interleaved pairs, unlike GPT-NeoX's halves).
    """
    rotary_dim = 2 * sin.shape[-1]
    pairs = x[..., :rotary_dim].float().reshape(*x.shape[:-1], rotary_dim // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
    if rotary_dim == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., rotary_dim:]), dim=-1)


class Linear(nn.Linear):
    """A linear layer whose weights are whatever memory holds until a checkpoint or a recipe fills them."""

    def reset_parameters(self) -> None:
        """Do nothing: numbers drawn here would be thrown away, and drawing them on "meta" imports half of PyTorch."""


class Embedding(nn.Embedding):
    """An embedding without numbers of its own; see `Linear`."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class Head(nn.Module):
    """Hidden states to logits. Tied, it has no weight of its own and borrows the embedding's."""

    def __init__(self, n_embd: int, vocab_size: int, *, bias: bool, tied: bool) -> None:
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, n_embd))
        self.bias = nn.Parameter(torch.empty(vocab_size)) if bias else None

    def forward(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        """hidden_states [..., n_embd], embedding [vocab_size, n_embd] -> logits [..., vocab_size] in float32."""
        weight = embedding if self.weight is None else self.weight
        return F.linear(hidden_states, weight, self.bias).float()
