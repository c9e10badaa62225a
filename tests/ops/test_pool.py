"""The kernels' pool of threads: pool_check.cpp says what it promises, here it is compiled and run."""

import shutil
import subprocess
from pathlib import Path

import pytest

from .compiler import ROOT, compiler, library

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


@pytest.mark.parametrize("sanitizer", [None, "thread", "address,undefined"])
def test_the_pool_holds_what_it_promises(sanitizer: str | None, tmp_path: Path) -> None:
    first = "" if sanitizer is None else sanitizer[0]
    if sanitizer and library({"t": "libtsan.so", "a": "libasan.so"}[first]) is None:
        pytest.skip(f"the compiler has no library for -fsanitize={sanitizer}")
    options = ["-O1", "-g", "-pthread", "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    if sanitizer:
        options += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    sources = [str(ROOT / "csrc" / "pool.cpp"), str(ROOT / "tests" / "ops" / "pool_check.cpp")]
    subprocess.run([str(compiler()), *options, *sources, "-o", tmp_path / "check"], timeout=300, check=True)
    command = [str(tmp_path / "check")]
    if sanitizer == "thread":
        # ThreadSanitizer places its own memory: that needs an unshuffled address space.
        without_shuffling = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
        command = [*map(str, without_shuffling), *command, "no fork"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.returncode) == ("all held\n", 0), done.stdout + done.stderr
