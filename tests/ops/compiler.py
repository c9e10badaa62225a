"""The C++ compiler of this machine, for tests that compile something."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def compiler() -> str | None:
    """The command that tools/build-kernels would use, None if there is none."""
    named = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    return next((found for name in named if (found := shutil.which(name))), None)


@cache
def library(name: str) -> str | None:
    """Where the compiler has a library, such as libasan.so; None if it has not."""
    command = [str(compiler()), f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip())
    return str(path.resolve()) if path.is_absolute() and path.exists() else None
