"""Keys and values of a batch in one block of memory for each layer: slot == position.

row 0   k0 k1 k2 k3 k4 .  .  .     length 5
row 1   k0 k1 .  .  .  .  .  .     length 2; what stands behind it is never seen
        └ slots ──────────────┘    capacity, more when it is full
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from bluejay.model import CausalAttention
from bluejay.model.attention import window_mask

MOST_GROWTH = 256  # slots: a row doubles until then. A copy each 256 tokens costs nothing; half empty, 6B waste 200 MB


class ContiguousCache:
    """An `Attend` that remembers: each row sees its own earlier tokens, within the layer's window.

    Before each forward pass, `begin` says where the tokens of this step stand. A pass is either a prompt, all rows from
    position 0, or one token for each row.

    Args:
        n_positions: the longest row.
        capacity: slots to begin with.
    """

    def __init__(self, n_positions: int, capacity: int = 64) -> None:
        self._n_positions = n_positions
        self._capacity = min(capacity, n_positions)
        # For each layer [B, capacity, H, K], made when the layer is first run.
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._starts: list[int] = []
        self._end = 0  # slots in use by the longest row
        self._uniform = True
        self._masks: dict[int | None, Tensor] = {}
        self._prompt = CausalAttention()

    def begin(self, starts: Sequence[int], num_tokens: int) -> None:
        """Make room for `num_tokens` tokens of each row, from the row's start on."""
        self._starts = list(starts)
        self._end = max(starts) + num_tokens
        self._uniform = min(starts) == max(starts)
        self._masks = {}
        if self._end > self._capacity:
            grown = self._capacity + min(self._capacity, MOST_GROWTH)
            self._capacity = min(max(self._end, grown), self._n_positions)
            for tensors in (self._keys, self._values):
                for layer, old in enumerate(tensors):
                    tensors[layer] = self._room(old, old.shape[0])
                    tensors[layer][:, : old.shape[1]] = old

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; a row may be taken several times (it forks) or not at all."""
        if list(rows) == list(range(len(self._starts))):
            return
        self._starts = [self._starts[row] for row in rows]
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                tensors[layer] = self._room(old, len(rows))
                kept = old[:, : self._end].index_select(0, torch.tensor(rows, device=old.device))
                tensors[layer][:, : self._end] = kept

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """Write k and v, then attend; see `Attend`. Shapes: q, k, v [B, T, H, K]."""
        if layer == len(self._keys):
            self._keys.append(self._room(k, k.shape[0]))
            self._values.append(self._room(v, v.shape[0]))
        keys, values = self._keys[layer], self._values[layer]
        if self._uniform:
            start = self._starts[0]
            keys[:, start : self._end] = k
            values[:, start : self._end] = v
            if start == 0:
                return self._prompt(layer, q, k, v, scale=scale, window=window)
            # One token behind rows of equal length sees a plain slice: no mask to build.
            first = 0 if window is None else max(0, self._end - window)
            mask = None
        else:
            rows = torch.arange(len(self._starts), device=k.device)
            places = torch.tensor(self._starts, device=k.device)
            keys[rows, places] = k[:, 0]
            values[rows, places] = v[:, 0]
            first = 0
            mask = self._mask(places, window)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys[:, first : self._end].transpose(1, 2),
            values[:, first : self._end].transpose(1, 2),
            attn_mask=mask,
            scale=scale,
        )
        return out.transpose(1, 2)

    def _mask(self, places: Tensor, window: int | None) -> Tensor:
        """[B, 1, 1, slots]: True where a row's token sees a slot; built once a step for each window."""
        if window not in self._masks:
            self._masks[window] = window_mask(places[:, None, None], self._end, window)
        return self._masks[window]

    def _room(self, like: Tensor, num_rows: int) -> Tensor:
        """[num_rows, capacity, H, K] of zeros: an unseen slot has weight 0, and 0 times what memory held may be NaN."""
        return like.new_zeros(num_rows, self._capacity, *like.shape[2:])
