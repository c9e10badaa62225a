"""Bluejay: GPT-J and GPT-Neo on hardware you own.

llm = bluejay.LLM()                                   # the default model; or a path, or a pulled model's name
outs = llm.generate(["Once upon a time"], bluejay.SamplingParams(max_new_tokens=50, do_sample=True, seed=1))
print(outs[0].text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bluejay.errors import (
    BluejayError,
    CheckpointError,
    ConfigError,
    ContextLengthExceeded,
    EngineError,
    InvalidRequest,
    KernelError,
    ModelNotFound,
    Overloaded,
    RequestError,
    Stopped,
    UnsupportedOption,
)

if TYPE_CHECKING:
    from bluejay.decoding.params import SamplingParams
    from bluejay.engine import LLM, load

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "BluejayError",
    "CheckpointError",
    "ConfigError",
    "ContextLengthExceeded",
    "EngineError",
    "InvalidRequest",
    "KernelError",
    "ModelNotFound",
    "Overloaded",
    "RequestError",
    "SamplingParams",
    "Stopped",
    "UnsupportedOption",
    "load",
]

_LAZY = {"LLM": "bluejay.engine", "load": "bluejay.engine", "SamplingParams": "bluejay.decoding.params"}


def __getattr__(name: str) -> Any:
    # Torch takes a second to import: `bluejay --help` and `import bluejay` do without.
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
