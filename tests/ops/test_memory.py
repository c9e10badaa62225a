"""Huge pages: asked for, and harmless where there are none."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from bluejay.ops.memory import HUGE_PAGE, prefer_huge_pages


@pytest.mark.parametrize("num_bytes", [0, 1, HUGE_PAGE, 5 * HUGE_PAGE + 12345])
def test_a_tensor_is_as_good_as_before(num_bytes: int) -> None:
    given = torch.empty(num_bytes, dtype=torch.uint8)
    pointer = given.data_ptr()
    assert prefer_huge_pages(given) is given
    assert given.data_ptr() == pointer
    assert given.fill_(7).sum() == 7 * num_bytes


def test_what_takes_no_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: pytest.fail("asked for pages of a tensor without memory"))
    prefer_huge_pages(torch.empty(2**40, dtype=torch.uint8, device="meta"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give large pages unasked, or not at all")
def test_the_system_was_asked() -> None:
    given = prefer_huge_pages(torch.empty(8 * HUGE_PAGE, dtype=torch.uint8))
    middle = given.data_ptr() + given.nbytes // 2
    flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= middle < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            flags = line
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no transparent huge pages")
    assert "hg" in flags.split()
