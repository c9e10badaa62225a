"""How a model's blocks meet the paged cache."""

from __future__ import annotations

from torch import Tensor

from bluejay import ops
from bluejay.engine.batch import ForwardBatch
from bluejay.engine.kv_cache import KVCache


class PagedAttention:
    """An `Attend` over the paged cache. Shapes (T tokens, H heads, K head dim): q, k, v [T, H, K] or [T, 1, H, K].

    Attributes:
        settled: whether this step's tables lie where the last step's did: only the numbers in them are new.
        recorded: a step that was recorded with them; None once they have moved.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._tensors: tuple[Tensor, ...] = ()
        self.settled = False
        self.recorded: object | None = None  # of recorded_step.py, which knows this file

    def begin(self, batch: ForwardBatch) -> None:
        """Say where the tokens of the next step stand."""
        self.settled = [t.shape for t in self._tensors] == [t.shape for t in batch.tensors]
        if not self.settled:
            self._tensors, self.recorded = batch.tensors, None
            return
        for mine, new in zip(self._tensors, batch.tensors, strict=True):
            mine.copy_(new)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """Write k and v into their slots, then attend; see `Attend`."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        tables, lens, starts, slots = self._tensors
        ops.write_kv(k.flatten(0, -3).float(), v.flatten(0, -3).float(), keys, values, slots)
        queries = q.flatten(0, -3).float()
        out = ops.paged_attention(queries, keys, values, tables, lens, starts, scale=scale, window=window)
        return out.view(q.shape).to(q.dtype)
