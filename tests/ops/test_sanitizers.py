"""The kernels' own tests once more, on kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import re
import subprocess
import sys

import pytest

from .compiler import ROOT, compiler, library

RUN = """
import importlib.util, sys, pytest
spec = importlib.util.spec_from_file_location("bluejay.ops._native", sys.argv[1])
sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # in the place of the installed ones
spec.loader.exec_module(sys.modules[spec.name])
sys.exit(pytest.main(sys.argv[2:]))
"""
# What compiles or starts something of its own, what calls no kernel, and large layers that show how exact kernels are.
LEFT_OUT = ["test_sanitizers.py", "test_pool.py", "test_reference.py", "test_threads.py"]
LEFT_OUT_BY_NAME = "not outliers and not environment"


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_the_kernels_tests_pass_under_sanitizers() -> None:
    if (asan := library("libasan.so")) is None or (stdcxx := library("libstdc++.so.6")) is None:
        pytest.skip("the compiler has no AddressSanitizer that can be loaded first")
    folder = ROOT / "build" / "sanitizers"
    build = ["tools/build-kernels", sys.executable, str(folder), "-DBLUEJAY_SANITIZE=ON"]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (extension,) = folder.glob("_native*.so")
    environ = {
        **os.environ,
        # The interpreter was not compiled so: the sanitizer comes first by this, with what it looks up at its start.
        "LD_PRELOAD": f"{asan} {stdcxx}",
        # What torch and the interpreter keep until their end is not ours to report.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    ignored = [f"--ignore=tests/ops/{name}" for name in LEFT_OUT]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "-m",
        "not slow",
        "-k",
        LEFT_OUT_BY_NAME,
        "tests/ops",
        *ignored,
    ]
    command = [sys.executable, "-c", RUN, str(extension), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environ, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 20
