"""From a schedule to tensors: the tokens of all parts in one row, without padding.

part 0  a chunk of a prompt    p0 p1 p2 p3          query_starts  0 4 5 8
part 1  one token              t9
part 2  a token and drafts     t5 d1 d2
input_ids                      p0 p1 p2 p3 t9 t5 d1 d2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TABLE_STEP = 16  # blocks: a table of another width ends a recorded step


@dataclass(frozen=True)
class Reading:
    """Tokens that the model reads next behind `start` earlier ones of the same sequence, and the blocks of all."""

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]


@dataclass(frozen=True)
class ForwardBatch:
    """What a step's forward pass reads, as `ops.paged_attention` and `ops.write_kv` want it.

    Shapes (T tokens, S sequences): input_ids, positions, slots [T] int64; block_tables [S, max_blocks],
        context_lens [S], query_starts [S + 1] int32.
    """

    input_ids: Tensor
    positions: Tensor
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    slots: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What attention is told; the tokens and their positions are the model's."""
        return (self.block_tables, self.context_lens, self.query_starts, self.slots)

    @classmethod
    def of(cls, readings: Sequence[Reading], block_size: int, device: torch.device) -> ForwardBatch:
        """Lay readings out one behind the other.

        Where several write the same slot, as draft models may that read what sequences share, the first one does.
        """
        counts = np.array([len(reading.token_ids) for reading in readings])
        starts = np.array([reading.start for reading in readings])
        longest = max(len(reading.block_table) for reading in readings)
        tables = np.full((len(readings), -(-longest // TABLE_STEP) * TABLE_STEP), -1, np.int32)
        for row, reading in enumerate(readings):
            tables[row, : len(reading.block_table)] = reading.block_table
        ends = counts.cumsum()
        rows = np.arange(len(readings)).repeat(counts)
        positions = np.arange(ends[-1]) + (starts - (ends - counts))[rows]
        slots = tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size
        _, first = np.unique(slots, return_index=True)
        if len(first) < len(slots):
            again = np.ones(len(slots), bool)
            again[first] = False
            slots[again] = -1
        input_ids = np.array([token for reading in readings for token in reading.token_ids], np.int64)
        query_starts = np.concatenate(([0], ends)).astype(np.int32)
        arrays = (input_ids, positions, tables, (starts + counts).astype(np.int32), query_starts, slots)
        return cls(*(torch.from_numpy(array).to(device) for array in arrays))
