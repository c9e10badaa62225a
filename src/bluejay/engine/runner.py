"""One model and its paged cache: readings in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bluejay.engine.batch import ForwardBatch, Reading
from bluejay.engine.kv_cache import KVCache
from bluejay.engine.network import Network
from bluejay.engine.paged_attention import PagedAttention
from bluejay.engine.recorded_step import decode


class Runner:
    """Runs a network over the paged cache.

    Args:
        cache: its keys and values; the blocks are numbered by the engine's pool.
    """

    def __init__(self, network: Network, cache: KVCache) -> None:
        self.network = network
        self.cache = cache
        self._attention = PagedAttention(cache)

    def forward(self, readings: Sequence[Reading]) -> Tensor:
        """Read tokens and keep their K and V: [T, n_embd], the readings one behind the other."""
        batch = self._begin(readings)
        return self.network.model(batch.input_ids, batch.positions, self._attention)

    def decode(self, readings: Sequence[Reading]) -> Tensor:
        """Read one token of each sequence; the logits behind them, [sequences, V] float32.

        What kernels alone compute is recorded and repeated, without Python in between.
        """
        if not self.network.by_kernels:
            return self.network.logits(self.forward(readings))
        batch = self._begin(readings)
        ids, positions = batch.input_ids[:, None], batch.positions[:, None]
        return self.network.allowed(decode(self.network.model, ids, positions, self._attention))

    def logits(self, hidden_states: Tensor, rows: Sequence[int]) -> Tensor:
        """The logits behind some of the tokens that were read: [len(rows), V] float32."""
        if len(rows) < len(hidden_states):
            hidden_states = hidden_states[torch.tensor(rows, device=hidden_states.device)]
        return self.network.logits(hidden_states)

    def _begin(self, readings: Sequence[Reading]) -> ForwardBatch:
        batch = ForwardBatch.of(readings, self.cache.block_size, self.network.device)
        self._attention.begin(batch)
        return batch
