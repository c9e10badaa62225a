"""The walls of the house: who may import whom, what is public, what a start may cost."""

import subprocess
import sys
from pathlib import Path

import bluejay

ROOT = Path(__file__).parents[2]


def test_rooms_know_only_the_rooms_below() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_public_surface_is_what_it_says() -> None:
    assert sorted(bluejay.__all__) == [
        "BluejayError",
        "CheckpointError",
        "ConfigError",
        "ContextLengthExceeded",
        "EngineError",
        "InvalidRequest",
        "KernelError",
        "LLM",
        "ModelNotFound",
        "Overloaded",
        "RequestError",
        "SamplingParams",
        "Stopped",
        "UnsupportedOption",
        "load",
    ]
    assert all(getattr(bluejay, name).__doc__ for name in bluejay.__all__)


def test_help_does_without_torch() -> None:
    code = "import sys; import bluejay, bluejay.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_opening_a_model_does_without_the_compiler() -> None:
    code = (
        "import sys; from bluejay.model import *; build(PRESETS['gpt-neo-125m'], device='meta'); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
