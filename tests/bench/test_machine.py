import os
from pathlib import Path

import pytest
import torch

from bluejay.bench import machine
from bluejay.bench.machine import BandwidthMeter, check_memory, free_memory_bytes, peak_memory_bytes
from bluejay.errors import ConfigError
from bluejay.model.device import available_memory_bytes


def test_a_reading_is_a_speed_that_memory_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BUFFER_BYTES", 2**26)
    monkeypatch.setattr(machine, "LEAST_BUFFER_BYTES", 2**26)
    meter = BandwidthMeter()
    assert 0.1 < meter.read() < 2000


def test_every_page_of_the_buffer_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BUFFER_BYTES", 2**26)
    monkeypatch.setattr(machine, "LEAST_BUFFER_BYTES", 2**26)
    peak = peak_memory_bytes()
    meters = [BandwidthMeter()]
    while peak_memory_bytes() == peak and len(meters) < 40:  # the process may have held more once
        meters.append(BandwidthMeter())
    assert peak_memory_bytes() > peak


def test_the_buffer_leaves_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def empty(num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
        asked.append(num_bytes)
        return torch.zeros(64, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    for free in (100 * 2**30, 2**30 + 1000, 0):
        monkeypatch.setattr(machine, "free_memory_bytes", lambda free=free: free)
        BandwidthMeter()
    assert asked == [2**30, 2**29 + 448, 2**28]  # whole cache lines


def test_free_memory_is_a_part_of_the_machines() -> None:
    assert 0 < free_memory_bytes() < available_memory_bytes()


def test_a_container_has_what_its_limit_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal:       9000 kB\nMemAvailable:    5000 kB\n",
        "/sys/fs/cgroup/memory.max": "3000000\n",
        "/sys/fs/cgroup/memory.current": "1000000\n",
    }
    monkeypatch.setattr(machine, "_text", lambda path: files.get(path, ""))
    assert free_memory_bytes() == 2_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_memory_bytes() == 5000 * 1024
    files["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = "4000000"
    files["/sys/fs/cgroup/memory/memory.usage_in_bytes"] = "4500000"
    assert free_memory_bytes() == 0


def test_where_the_kernel_tells_nothing_the_machine_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_text", lambda path: "")
    assert free_memory_bytes() == available_memory_bytes()
    assert peak_memory_bytes() > 2**20


def test_the_peak_is_what_the_kernel_says() -> None:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    assert peak_memory_bytes() > 0.9 * resident


def test_memory_that_does_not_suffice_is_told_with_the_remedy() -> None:
    check_memory(10**9, 10**9, 2 * 10**9)
    with pytest.raises(ConfigError, match=r"weights take 24\.2 GB, keys and values 0\.5 GB, and 22\.0 GB .*--layers"):
        check_memory(24_200_000_000, 500_000_000, 22_000_000_000)
