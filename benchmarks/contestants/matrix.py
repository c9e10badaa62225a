"""What the contestants of one matrix have in common: how a product is timed.

The matrix is GPT-J-6B's `fc_in`, 16384 outputs of 4096 inputs. In a network other weights come between two uses of one
matrix, so each side holds copies of it, together larger than any cache here, and goes through them in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from benchmarks.contestants.protocol import Answer

OUTPUTS, INPUTS = 16384, 4096
GROUP_SIZE = 32
_ALL_COPIES_BYTES = 256e6  # eight times the largest cache of the machine that the figures come from
_LEAST_SECONDS = 0.2


def num_copies(bytes_per_weight: float) -> int:
    """How many copies of a matrix leave the caches cold."""
    return max(2, round(_ALL_COPIES_BYTES / (OUTPUTS * INPUTS * bytes_per_weight)))


def timed(products: Sequence[Callable[[], object]]) -> Answer:
    """Mean seconds of a product: all copies in turn, once to warm up, then until it took long enough."""
    for product in products:
        product()
    done, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < _LEAST_SECONDS:
        for product in products:
            product()
        done += len(products)
    return {"seconds": seconds / done}
