"""How a model's blocks meet the paged cache."""

from __future__ import annotations

from torch import Tensor

from bluejay import ops
from bluejay.engine.batch import ForwardBatch
from bluejay.engine.kv_cache import KVCache


class PagedAttention:
    """An `Attend` over the paged cache, for one step. Shapes (T tokens, H heads, K head dim): q, k, v [T, H, K]."""

    def __init__(self, cache: KVCache, batch: ForwardBatch) -> None:
        self._cache = cache
        self._batch = batch

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """Write k and v into their slots, then attend; see `Attend`."""
        keys, values, batch = self._cache.keys[layer], self._cache.values[layer], self._batch
        ops.write_kv(k.float(), v.float(), keys, values, batch.slots)
        tables = (batch.block_tables, batch.context_lens, batch.query_starts)
        return ops.paged_attention(q.float(), keys, values, *tables, scale=scale, window=window).to(q.dtype)
