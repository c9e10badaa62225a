"""The memory of the paged cache: for each layer the keys and values of all blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bluejay.model import ModelConfig
from bluejay.ops.reference import kv_width


class KVCache:
    """Keys and values by block and offset; which sequence holds which block is the `BlockPool`'s affair.

    block 0 [ k0 k1 … k15 ]   block 1 [ k16 k17 … ]      slot = block * block_size + offset

    Args:
        dtype: float32, float16, bfloat16, or int8 with a scale for each head of each token.

    Attributes:
        keys, values: for each layer [num_blocks, block_size, n_head, head_dim], of int8 [..., head_dim + 4]; see
            `ops.reference`. On the CPU memory is taken when it is first written.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_blocks, block_size, config.n_head, kv_width(config.head_dim, dtype))
        self.block_size = block_size
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the content of blocks, (from, to), all at once: a block may be read and written by different pairs."""
        if not pairs:
            return
        sources, targets = torch.tensor(pairs, device=self.keys[0].device).unbind(1)
        for tensors in (self.keys, self.values):
            for layer in tensors:
                layer[targets] = layer[sources]


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """What a token's keys and values take: 458,752 for GPT-J-6B in 16 bits, 232,960 as int8."""
    return 2 * config.n_layer * config.n_head * kv_width(config.head_dim, dtype) * dtype.itemsize
