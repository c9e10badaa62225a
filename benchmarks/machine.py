"""What the figures come from: processor, memory, system, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.contest import ROOT

_INSTRUCTIONS = {"avx2": "AVX2", "fma": "FMA", "f16c": "F16C", "avx512f": "AVX-512", "avx512_vnni": "AVX-512 VNNI",
                 "avx_vnni": "AVX-VNNI", "amx_int8": "AMX-INT8", "amx_bf16": "AMX-BF16"}  # fmt: skip


def describe() -> dict[str, Any]:
    """The machine and the moment; Linux only, as the driver is."""
    cpu = dict(_fields(Path("/proc/cpuinfo")))
    flags = cpu.get("flags", "").split()
    memory_kb = int(dict(_fields(Path("/proc/meminfo")))["MemTotal"].split()[0])
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--", "src", "csrc", "benchmarks").splitlines()),
        "machine": {
            "processor": cpu.get("model name", platform.processor()),
            "family_model_stepping": "/".join(cpu.get(key, "?") for key in ("cpu family", "model", "stepping")),
            "cores": os.cpu_count(),
            "instruction_sets": [name for flag, name in _INSTRUCTIONS.items() if flag in flags],
            "cache_per_core_chip": _caches(),
            "memory_gib": round(memory_kb / 2**20, 1),
            "kernel": f"{platform.system()} {platform.release()}",
            "virtual": "hypervisor" in flags,
        },
    }


def _fields(file: Path) -> list[tuple[str, str]]:
    pairs = [line.partition(":") for line in file.read_text().splitlines()]
    return [(key.strip(), value.strip()) for key, colon, value in pairs if colon]


def _caches() -> list[str]:
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    read = [{key: (folder / key).read_text().strip() for key in ("level", "type", "size")} for folder in folders]
    return [f"L{cache['level']} {cache['size']}" for cache in read if cache["type"] != "Instruction"]


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
