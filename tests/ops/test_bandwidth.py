from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bluejay import ops
from bluejay.errors import KernelError

PART = 4 * 2**20  # bytes that one thread reads at a time


@pytest.fixture(autouse=True, params=ops.available_voices())
def voice(request: pytest.FixtureRequest) -> Iterator[None]:
    ops.choose(request.param)
    yield
    ops.choose("auto")


@pytest.mark.parametrize("num_bytes", [0, 64, 128, 192, PART - 64, PART, PART + 64, 2 * PART + 192])
def test_each_word_is_added_once(num_bytes: int) -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (num_bytes // 8,))
    assert ops.read_sum(words.view(torch.uint8)) == words.sum().item()  # both wrap around at 2^64


def test_a_buffer_may_begin_anywhere() -> None:
    buffer = torch.randint(256, (64 * 33 + 8,), dtype=torch.uint8)
    whole = buffer[8:].clone().view(torch.int64).sum().item()
    assert ops.read_sum(buffer[8:]) == whole


@pytest.mark.parametrize("buffer", [torch.zeros(64), torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(65).byte()])
def test_what_is_no_buffer_of_whole_lines_is_refused(buffer: torch.Tensor) -> None:
    with pytest.raises(KernelError):
        ops.read_sum(buffer)
