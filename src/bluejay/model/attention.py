"""How queries meet keys: the `Attend` protocol, and the causal attention that training uses.

A model never knows where keys and values are kept. Each block computes q, k and v for the tokens of this step and calls
`attend`; training hands in `CausalAttention()`, serving hands in one that reads and writes a cache.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Attend(Protocol):
    """Mix the values of earlier tokens for each query.

    Shapes (leading dims as in the model's input_ids, H heads, K head dim):
        q, k, v  [..., H, K]   this step's tokens only
    Returns: [..., H, K] in q.dtype. Scores and softmax are computed in float32.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor: ...


class CausalAttention:
    """Each token sees itself and what came before in its own row: training and scoring, no cache.

    Shapes (B rows, T tokens, H heads, K head dim): q, k, v [B, T, H, K].
    Rows shorter than T are padded on the right; a causal row never sees its padding.
    """

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        T = q.shape[1]
        mask = None
        if window is not None and window < T:
            mask = window_mask(torch.arange(T, device=q.device), T, window)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
        return out.transpose(1, 2)


def window_mask(query_positions: Tensor, num_keys: int, window: int | None) -> Tensor:
    """True where a query may see a key: key j for query i when i - window < j <= i.

    Shapes: query_positions [..., T] -> [..., T, num_keys] bool.
    Source: GPT-Neo's local attention; 256 keys, the query's own included, for window_size 256.
    """
    keys = torch.arange(num_keys, device=query_positions.device)
    queries = query_positions.unsqueeze(-1)
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)
