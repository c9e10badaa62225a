"""Attention by the kernels of `bluejay.ops`, for models whose linear layers run on the kernels' threads.

PyTorch has one thread then, so that its own and the kernels' do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bluejay import ops
from bluejay.engine.contiguous_cache import ContiguousCache

# Half of float32's memory, 448 KiB a token for GPT-J-6B. It rounds eight times finer than bfloat16, and keys and values
# stay within its 65,504: both families are served in float16 as a whole.
CACHE_DTYPE = torch.float16


@dataclass(frozen=True)
class _Rows:
    """A padded batch as `ops.paged_attention` wants it: each row of the cache is one block of `capacity` slots.

    Shapes (B rows, T tokens of each): block_tables [B, 1], context_lens [B], query_starts [B + 1], slots [B * T].
    """

    capacity: int
    num_tokens: int
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    slots: Tensor

    @classmethod
    def of(cls, starts: Sequence[int], num_tokens: int, capacity: int, device: torch.device) -> _Rows:
        rows = torch.arange(len(starts) + 1, device=device)
        lens = torch.empty(len(starts), dtype=torch.int32, device=device)
        slots = torch.empty(len(starts) * num_tokens, dtype=torch.int64, device=device)
        made = cls(capacity, num_tokens, rows[:-1, None].int(), lens, (rows * num_tokens).int(), slots)
        made.move(starts)
        return made

    def move(self, starts: Sequence[int]) -> None:
        """Let the same rows go on from other places; the tensors stay where they are."""
        first = torch.tensor(starts, device=self.slots.device)
        self.context_lens.copy_(first + self.num_tokens)
        slots = self.block_tables * self.capacity + first[:, None] + torch.arange(self.num_tokens, device=first.device)
        self.slots.copy_(slots.flatten())


class KernelCache(ContiguousCache):
    """A `ContiguousCache` whose keys and values may have a dtype of their own, read and written by the kernels.

    Args:
        n_positions, capacity: as `ContiguousCache`.
        dtype: float32, float16 or bfloat16.

    Attributes:
        settled: whether this step's keys, values and tables lie where the last step's did.
        recorded: a step that was recorded with them; None once one of them has moved.
    """

    def __init__(self, n_positions: int, capacity: int = 64, *, dtype: torch.dtype = CACHE_DTYPE) -> None:
        super().__init__(n_positions, capacity)
        self._dtype = dtype
        self._rows: _Rows | None = None
        self.settled = False
        self.recorded: object | None = None  # of recorded_step.py, which knows this file

    def begin(self, starts: Sequence[int], num_tokens: int) -> None:
        rows = self._rows
        same = rows is not None and (len(rows.context_lens), rows.num_tokens) == (len(starts), num_tokens)
        self.settled = same and max(starts) + num_tokens <= self._capacity
        if not self.settled:
            self._forget()  # before new memory is taken: a recording holds the old
        super().begin(starts, num_tokens)
        if rows is not None and self.settled:
            rows.move(starts)

    def select(self, rows: Sequence[int]) -> None:
        if list(rows) != list(range(len(self._starts))):
            self._forget()
        super().select(rows)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """Write k and v, then attend; see `Attend`. Shapes: q, k, v [B, T, H, K]."""
        if layer == len(self._keys):
            self._keys.append(self._room(k, k.shape[0]))
            self._values.append(self._room(v, v.shape[0]))
        if self._rows is None:
            self._rows = _Rows.of(self._starts, q.shape[1], self._capacity, q.device)
        rows, cache = self._rows, (self._keys[layer], self._values[layer])
        ops.write_kv(k.flatten(0, 1).float(), v.flatten(0, 1).float(), *cache, rows.slots)
        return _attend(q, *cache, rows, scale, window)

    def _room(self, like: Tensor, num_rows: int) -> Tensor:
        """Whatever memory holds: the kernels read no slot that was not written."""
        return like.new_empty(num_rows, self._capacity, *like.shape[2:], dtype=self._dtype)

    def _forget(self) -> None:
        self._rows = self.recorded = None


class KernelAttention:
    """`CausalAttention` by the kernels: this step's keys and values are the cache. Shapes: q, k, v [B, T, H, K]."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        rows = _Rows.of([0] * q.shape[0], q.shape[1], q.shape[1], q.device)
        return _attend(q, k.float().contiguous(), v.float().contiguous(), rows, scale, window)


def _attend(q: Tensor, keys: Tensor, values: Tensor, rows: _Rows, scale: float, window: int | None) -> Tensor:
    batch = (rows.block_tables, rows.context_lens, rows.query_starts)
    out = ops.paged_attention(q.flatten(0, 1).float(), keys, values, *batch, scale=scale, window=window)
    return out.view(q.shape).to(q.dtype)
