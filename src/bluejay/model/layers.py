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


def rotary_turns(positions: Tensor, rotary_dim: int) -> Tensor:
    """For each position and pair of dims, cosine + i sine of the angle to turn by: complex64.

    Shapes: positions [...] -> [..., 1, rotary_dim / 2]; the 1 broadcasts over heads.
    Source: Su et al. 2021 (arXiv:2104.09864), section 3.4.2, base 10,000.
    """
    steps = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None, None].float() * (1.0 / 10000.0 ** (steps / rotary_dim))
    return torch.complex(angles.cos(), angles.sin())


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the first dims of each head by its position's angles; dims 2i and 2i+1 are one pair.

    A pair is a complex number and turning it is one multiplication: a third of the operators that sines and cosines
    on their own would take.

    Shapes: x [..., H, K]; turns [..., 1, rotary_dim / 2] complex64.
    Returns: [..., H, K] in x.dtype, computed in float32; dims past rotary_dim pass through.
    Source: mesh-transformer-jax `rotate_every_two` (interleaved pairs, unlike GPT-NeoX's halves).
    """
    rotary_dim = 2 * turns.shape[-1]
    first = x[..., :rotary_dim].float()
    if x.shape[-1] % 2:  # heads of an odd size would tear pairs of the next head apart
        first = first.contiguous()
    pairs = torch.view_as_complex(first.reshape(*first.shape[:-1], -1, 2))
    turned = torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
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
