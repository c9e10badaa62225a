"""Where a model runs, and in which dtype, when nobody says so."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bluejay.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Turn "auto", "cpu", "cuda", "cuda:1" or "mps" into a device that is there.

    Raises: ConfigError for another name, or a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}, expected auto, cpu, cuda, cuda:1 or mps") from None
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }.get(device.type, False)
    if not there:
        raise ConfigError(f"device is {name!r}, which this machine or this PyTorch does not have; use cpu or auto")
    return device


def choose_dtype(
    name: str, stored: set[torch.dtype], device: torch.device, num_parameters: int, memory_bytes: int
) -> torch.dtype:
    """The dtype to compute in.

    Args:
        name: "float32", "bfloat16", "float16" or "auto".
        stored: dtypes of the checkpoint's tensors.
        memory_bytes: what a CPU model may at most take.
    Raises: ConfigError for another name; "int8" and "int4" are no dtypes to compute in, and not for here.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"dtype is {name!r}, expected auto, {', '.join(DTYPES)}, int8, int4")
        return DTYPES[name]
    widest = max(stored, key=lambda dtype: dtype.itemsize)
    if device.type == "cuda":
        return widest if widest.itemsize == 2 else torch.bfloat16
    if device.type == "cpu" and widest == torch.float16:
        # float16 on a CPU is slow or missing in many operators.
        return torch.float32 if 4 * num_parameters < memory_bytes // 2 else torch.bfloat16
    return widest if widest in DTYPES.values() else torch.float32


def available_memory_bytes() -> int:
    """Physical memory of the machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses, in bytes; half of the machine's where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        [kibibytes] = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return 1024 * int(kibibytes)
    except (OSError, ValueError):
        return available_memory_bytes() // 2
