"""What the machine has: the speed of its memory, how much of it is free, how much was taken."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import torch

from bluejay import ops
from bluejay.errors import ConfigError
from bluejay.model.device import available_memory_bytes
from bluejay.ops.memory import prefer_huge_pages

BUFFER_BYTES = 2**30  # beyond any cache
LEAST_BUFFER_BYTES = 2**28  # the largest third-level caches of one processor come near this


class BandwidthMeter:
    """Reads a buffer that no cache holds, with the threads that read the weights.

    The buffer comes from PyTorch's allocator, in huge pages, as weights do that are not mapped, and is filled: pages
    that nobody wrote to are all one page of zeros, which a cache holds.
    It takes 1 GiB, or half of the free memory if that is less, but 256 MiB at least.
    """

    def __init__(self) -> None:
        num_bytes = max(LEAST_BUFFER_BYTES, min(BUFFER_BYTES, free_memory_bytes() // 2))
        self._buffer = prefer_huge_pages(torch.empty(num_bytes // 64 * 64, dtype=torch.uint8)).fill_(1)
        self.read()  # the system may still be putting pages together

    def read(self) -> float:
        """Read the whole buffer once; 10^9 bytes a second."""
        began = time.perf_counter()
        ops.read_sum(self._buffer)
        return self._buffer.nbytes / (time.perf_counter() - began) / 1e9


def free_memory_bytes() -> int:
    """Memory that this process may still take without swapping, as the kernel or the container's limit has it."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.M)
    free = int(found[1]) * 1024 if found else available_memory_bytes()
    # A container sees its own group as the root: version 2 of control groups, then version 1.
    for limit, usage in [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ]:
        numbers = [_text(f"/sys/fs/cgroup/{name}").strip() for name in (limit, usage)]
        if all(number.isdigit() for number in numbers):
            free = min(free, int(numbers[0]) - int(numbers[1]))
    return max(0, free)


def peak_memory_bytes() -> int:
    """The most physical memory that this process has held at once, pages of mapped weights that it read included.

    Source: VmHWM in /proc/self/status. `getrusage` is not the same: a process inherits there what its parent held.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB", _text("/proc/self/status"), re.M)
    if found:
        return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_memory(weight_bytes: int, kv_bytes: int, free_bytes: int) -> None:
    """Raises: ConfigError if weights, keys and values will not fit."""
    weights, kv, free = (f"{num_bytes / 1e9:.1f} GB" for num_bytes in (weight_bytes, kv_bytes, free_bytes))
    if weight_bytes + kv_bytes > free_bytes:
        raise ConfigError(
            f"weights take {weights}, keys and values {kv}, and {free} of memory are free; ask for fewer layers of "
            "a shape (--layers), fewer bits (--quantize int4) or fewer tokens"
        )


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
