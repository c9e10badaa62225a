"""Numerics with several voices: compiled kernels for the CPU, and the reference in plain torch for everything else.

The voice is chosen once, when it is first needed: the best kernels that this processor has, or what the environment's
BLUEJAY_KERNELS says: auto, reference, portable, avx2 or avx512_vnni. Tensors on other devices go to the reference.
Each function's shapes and errors are told where it is specified, in `bluejay.ops.reference`.
"""

from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor

from bluejay.errors import KernelError
from bluejay.ops import native, reference
from bluejay.ops.native import Recording as Recording
from bluejay.ops.threads import processors

ENVIRONMENT = "BLUEJAY_KERNELS"
REFERENCE = "reference"
_INSTRUCTION_SETS = ("avx512_vnni", "avx2", "portable")

# What the process has settled on; None until then.
_voice: str | None = None
_threads: int | None = None


def voice() -> str:
    """Who computes on the CPU: "avx512_vnni", "avx2", "portable" or "reference".

    Raises: KernelError if BLUEJAY_KERNELS asks for what is not there.
    """
    return _voice if _voice is not None else choose(os.environ.get(ENVIRONMENT) or "auto")


def choose(name: str) -> str:
    """Choose the voice: one of those above, or "auto" for the best there is; returns which.

    Without compiled kernels "auto" warns, once, and takes the reference.
    Raises: KernelError for a name that is unknown or not to be had here; nothing changes then.
    """
    global _voice
    if name not in ("auto", REFERENCE, *_INSTRUCTION_SETS):
        raise KernelError(f"{ENVIRONMENT} is {name!r}, expected auto or one of {', '.join(available_voices())}")
    found = REFERENCE if name == REFERENCE else _choose_native(name)
    _voice = found
    _tell_threads()
    return found


def _choose_native(name: str) -> str:
    try:
        there = native.supported()
    except native.Missing as missing:
        remedy = "install a C++ compiler, then Bluejay again"
        if name != "auto":
            raise KernelError(f"{ENVIRONMENT} is {name!r}, but there are no kernels: {missing}; {remedy}") from None
        warnings.warn(f"int8 and int4 run slowly, without kernels: {missing}; {remedy}", RuntimeWarning, stacklevel=4)
        return REFERENCE
    found = there[0] if name == "auto" else name
    if found not in there:
        raise KernelError(
            f"{ENVIRONMENT} is {name!r}, which this processor lacks; it has {', '.join(available_voices())}"
        )
    native.set_active(found)
    return found


def available_voices() -> list[str]:
    """What can be chosen here, best first; the last is always "reference"."""
    try:
        return [*native.supported(), REFERENCE]
    except native.Missing:
        return [REFERENCE]


def why_missing() -> str | None:
    """Why there are no compiled kernels here; None where there are."""
    try:
        native.extension()
    except native.Missing as missing:
        return str(missing)
    return None


def num_threads() -> int:
    """The threads that work on one call: what was set, or as many as the machine or the container is good for."""
    return _threads if _threads is not None else processors().threads


def set_num_threads(count: int) -> None:
    """Change the number of threads, 1 to 1024; 0 is automatic. Results do not depend on it."""
    global _threads
    if not 0 <= count <= 1024:
        raise KernelError(f"threads is {count}, expected 1 to 1024, or 0 for as many as this machine is good for")
    _threads = count or None
    if _voice is not None:
        _tell_threads()


def _tell_threads() -> None:
    if _voice != REFERENCE:
        native.set_num_threads(num_threads(), processors().threads)
    elif _threads is not None:
        torch.set_num_threads(_threads)


def linear_int8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *, out_features: int) -> Tensor:
    """Multiply with packed 8-bit weights: x [..., K] float32, bias [N] float32 -> [..., N] float32."""
    multiply = native.linear_int8 if _is_native(x) else reference.linear_int8
    return multiply(x, weight, scales, bias, out_features=out_features)


def linear_int4(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *, out_features: int) -> Tensor:
    """Multiply with packed 4-bit weights; see `linear_int8`."""
    multiply = native.linear_int4 if _is_native(x) else reference.linear_int4
    return multiply(x, weight, scales, bias, out_features=out_features)


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None, *, out_features: int) -> Tensor:
    """Multiply with packed float32 weights: x [..., K] float32, bias [N] float32 -> [..., N] float32."""
    multiply = native.linear_float32 if _is_native(x) else reference.linear_float32
    return multiply(x, weight, bias, out_features=out_features)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    query_starts: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attend each query of a ragged batch to the cached keys and values of its own sequence: [T, H, K] float32."""
    attend = native.paged_attention if _is_native(q) else reference.paged_attention
    return attend(q, k_cache, v_cache, block_tables, context_lens, query_starts, scale=scale, window=window)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write each token's key and value, [T, H, K] float32, into its slot of the paged cache."""
    write = native.write_kv if _is_native(k) else reference.write_kv
    write(k, v, k_cache, v_cache, slots)


def gelu_new_(x: Tensor) -> Tensor:
    """GELU in its tanh form, in place: fresh memory for a prompt takes longer to find than the numbers do."""
    return native.gelu_new_(x) if _is_native(x) else reference.gelu_new_(x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalise the last dim: x [..., W] float32, weight and bias [W] -> [..., W]."""
    norm = native.layer_norm if _is_native(x) else reference.layer_norm
    return norm(x, weight, bias, eps)


def add_(x: Tensor, y: Tensor) -> Tensor:
    """Add y to x in place, both float32 and of one shape."""
    return native.add_(x, y) if _is_native(x) else reference.add_(x, y)


def rotate_(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs of each head by their positions' angles, in place: x [..., H, K], turns [..., 1, P] complex64."""
    return native.rotate_(x, turns) if _is_native(x) else reference.rotate_(x, turns)


def read_sum(buffer: Tensor) -> int:
    """Read a buffer of bytes once, with all threads, and add its 64-bit words up: what a memory's speed is told by."""
    return native.read_sum(buffer) if _is_native(buffer) else reference.read_sum(buffer)


def _is_native(x: Tensor) -> bool:
    return x.device.type == "cpu" and voice() != REFERENCE
