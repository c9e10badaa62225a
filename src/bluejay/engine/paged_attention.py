"""How a model's blocks meet the paged cache."""

from __future__ import annotations

from torch import Tensor

from bluejay import ops
from bluejay.engine.batch import ForwardBatch
from bluejay.engine.kv_cache import KVCache


class PagedAttention:
    """An `Attend` over the paged cache. Shapes (T tokens, H heads, K head dim): q, k, v [T, H, K] or [T, 1, H, K].

    Attributes:
        settled: whether this step's tables lie where the last step's did, or a recorded one's: only the numbers in them
            are new.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._tensors: tuple[Tensor, ...] = ()
        self.settled = False
        self._recorded: object | None = None  # of recorded_step.py, which knows this file
        self._recorded_tensors: tuple[Tensor, ...] = ()

    @property
    def recorded(self) -> object | None:
        """The step that was recorded with this step's tables; None if there is none.

        The last one is kept while steps of other shapes come in between, as guesses and chunks of prompts do.
        """
        return self._recorded if self._tensors is self._recorded_tensors else None

    @recorded.setter
    def recorded(self, step: object | None) -> None:
        self._recorded, self._recorded_tensors = step, self._tensors

    def begin(self, batch: ForwardBatch) -> None:
        """Say where the tokens of the next step stand."""
        shapes = [t.shape for t in batch.tensors]
        for tensors in (self._recorded_tensors, self._tensors):
            if [t.shape for t in tensors] == shapes:
                self._tensors, self.settled = tensors, True
                for mine, new in zip(tensors, batch.tensors, strict=True):
                    mine.copy_(new)
                return
        self._tensors, self.settled = batch.tensors, False

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None) -> Tensor:
        """Write k and v into their slots, then attend; see `Attend`."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        tables, lens, starts, slots = self._tensors
        ops.write_kv(k.flatten(0, -3).float(), v.flatten(0, -3).float(), keys, values, slots)
        queries = q.flatten(0, -3).float()
        out = ops.paged_attention(queries, keys, values, tables, lens, starts, scale=scale, window=window)
        return out.view(q.shape).to(q.dtype)
