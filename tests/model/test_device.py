import pytest
import torch

from bluejay.errors import ConfigError
from bluejay.model.device import choose_device, choose_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("stored", "device", "memory", "expected"),
    [
        ({F32}, CPU, 1000, F32),
        ({BF16}, CPU, 1000, BF16),
        ({F16}, CPU, 1000, F32),
        ({F16}, CPU, 100, BF16),  # float32 would take more than half of the memory
        ({F32}, GPU, 1000, BF16),
        ({F16}, GPU, 1000, F16),
        ({BF16, F32}, CPU, 1000, F32),
        ({torch.float64}, CPU, 1000, F32),
    ],
)
def test_auto_suits_device_and_memory(
    stored: set[torch.dtype], device: torch.device, memory: int, expected: torch.dtype
) -> None:
    assert choose_dtype("auto", stored, device, num_parameters=20, memory_bytes=memory) == expected


def test_a_name_is_taken_at_its_word() -> None:
    assert choose_dtype("float16", {F32}, CPU, 20, 0) == F16
    with pytest.raises(ConfigError, match="int9"):
        choose_dtype("int9", {F32}, CPU, 20, 0)


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        choose_device(name)


def test_auto_is_there() -> None:
    assert choose_device("auto").type in ("cpu", "cuda")
