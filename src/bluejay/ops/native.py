"""The compiled kernels (csrc/), called with tensors: float32 on the CPU, as `reference` otherwise.

The extension checks dtypes, shapes, strides and numbers itself: what it refuses is a KernelError and reaches no kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bluejay.errors import KernelError
from bluejay.ops.memory import HUGE_PAGE, prefer_huge_pages
from bluejay.ops.reference import check_rotate


class Missing(ImportError):
    """The extension is not there, or does not load, and why."""


@cache
def extension() -> ModuleType:
    """The compiled module. Raises: Missing."""
    try:
        from bluejay.ops import _native
    except ModuleNotFoundError:
        raise Missing("they were not compiled when Bluejay was installed") from None
    except ImportError as error:
        raise Missing(f"they do not load: {error}") from None
    return _native


def supported() -> list[str]:
    """The instruction sets of this processor that there are kernels for, best first."""
    return list(extension().supported())


def set_active(name: str) -> None:
    """Use the kernels of one of the `supported` instruction sets, from now on and for all threads."""
    _call(extension().set_active, name)


def set_num_threads(count: int, available: int) -> None:
    """Let so many threads work on a kernel. More than are available sleep when they wait, for others to get on."""
    _call(extension().set_num_threads, count, count <= available)


def linear_int8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *, out_features: int) -> Tensor:
    """As `reference.linear_int8`."""
    return _linear(8, x, weight, scales, bias, out_features)


def linear_int4(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, *, out_features: int) -> Tensor:
    """As `reference.linear_int4`."""
    return _linear(4, x, weight, scales, bias, out_features)


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None, *, out_features: int) -> Tensor:
    """As `reference.linear_float32`."""
    x, out = _rows_and_room(x, out_features)
    weight, bias = _plain(weight, "weight"), None if bias is None else _plain(bias, "bias")
    _call(extension().linear_float32, out, x, weight, bias)
    return out


def _linear(bits: int, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    x, out = _rows_and_room(x, out_features)
    _call(extension().linear, bits, out, x, weight, scales, bias)
    return out


def _rows_and_room(x: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    """What a linear layer reads, as the kernels want it, and where it writes to."""
    x = _plain(x, "x").resolve_neg().contiguous()
    if out_features < 1:
        raise KernelError(f"out_features is {out_features}, expected at least 1")
    out = torch.empty(*x.shape[:-1], out_features, dtype=torch.float32, device="cpu")
    if out.nbytes >= 2 * HUGE_PAGE:  # a prompt's: fresh from the system each time
        prefer_huge_pages(out)
    return x, out


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
    """As `reference.paged_attention`."""
    q = _plain(q, "q").resolve_neg().contiguous()
    out = torch.empty_like(q)
    batch = (block_tables.contiguous(), context_lens.contiguous(), query_starts.contiguous())
    _call(extension().paged_attention, out, q, k_cache, v_cache, *batch, scale, window)
    return out


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """As `reference.write_kv`."""
    k, v = (_plain(x, name).resolve_neg().contiguous() for x, name in ((k, "k"), (v, "v")))
    _call(extension().write_kv, k, v, k_cache, v_cache, slots.contiguous())


def gelu_new_(x: Tensor) -> Tensor:
    """As `reference.gelu_new_`."""
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise KernelError(f"x is {_described(x)} with strides {list(x.stride())}, expected float32, contiguous")
    _call(extension().gelu_new_, _plain(x, "x"))
    return x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """As `reference.layer_norm`."""
    x = _plain(x, "x").resolve_neg().contiguous()
    out = torch.empty_like(x)
    _call(extension().layer_norm, out, x, _plain(weight, "weight"), _plain(bias, "bias"), eps)
    return out


def add_(x: Tensor, y: Tensor) -> Tensor:
    """As `reference.add_`."""
    if x.shape != y.shape:
        raise KernelError(f"x is {_described(x)} and y {_described(y)}, expected one shape")
    _call(extension().add_, _plain(x, "x"), _plain(y, "y"))
    return x


def rotate_(x: Tensor, turns: Tensor) -> Tensor:
    """As `reference.rotate_`."""
    check_rotate(x, turns)
    tokens = turns.shape[:-2].numel()
    heads = _plain(x, "x").view(tokens, *x.shape[-2:])
    _call(extension().rotate_, heads, torch.view_as_real(turns).view(tokens, turns.shape[-1], 2))
    return x


def read_sum(buffer: Tensor) -> int:
    """As `reference.read_sum`."""
    return int(_call(extension().read_sum, buffer))


class Recording:
    """Calls of kernels that can be repeated, without Python and PyTorch in between.

    What a step of decoding does is the same each time, only numbers in memory change: those of the tensors that went
    into the calls, which stay where they are and are kept alive. Only kernels are recorded; what PyTorch computes in
    between is not computed again, nor a replay within a recording. One recording at a time for each thread.

        with Recording() as recording:
            y = linear_int8(x, ...)
        x.copy_(other)
        recording.replay()  # y holds what belongs to `other`
    """

    def __init__(self) -> None:
        self._calls = extension().Recording()
        self._kept: list[Any] = []

    def __len__(self) -> int:
        return len(self._calls)

    def __enter__(self) -> Recording:
        if getattr(_recording, "kept", None) is not None:
            raise KernelError("a recording is open in this thread; end it first")
        _recording.kept = self._kept
        self._calls.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._calls.stop()
        _recording.kept = None

    def replay(self) -> None:
        """Call all kernels again, in order. Raises: KernelError as the calls do."""
        try:
            self._calls.replay()
        except ValueError as error:
            raise KernelError(str(error)) from None


_recording = threading.local()  # kept: the tensors of the open recording


def _plain(x: Tensor, name: str) -> Tensor:
    """The tensor without its history: kernels have no gradient."""
    if x.requires_grad and torch.is_grad_enabled():
        raise KernelError(f"{name} asks for a gradient, which these kernels do not have; use torch.inference_mode()")
    return x.detach() if x.requires_grad else x


def _call(function: Callable[..., Any], *args: Any) -> Any:
    try:
        result = function(*map(_handed_over, args))
    except ValueError as error:
        raise KernelError(str(error)) from None
    except (TypeError, BufferError):  # nanobind's message lists C++ types, which say nothing to who calls
        given = ", ".join(_described(arg) for arg in args)
        raise KernelError(
            f"{function.__name__}: no kernel takes ({given}); tensors must be dense, on the CPU"
        ) from None
    if (kept := getattr(_recording, "kept", None)) is not None:
        kept.append(args)
    return result


def _handed_over(arg: Any) -> Any:
    """A tensor as a DLPack capsule. Asked by the extension, it would make one too, but in ten times as long."""
    if not isinstance(arg, Tensor):
        return arg
    if arg.layout != torch.strided or arg.is_neg():  # neither is in the capsule
        raise TypeError
    return torch.to_dlpack(arg)  # type: ignore[attr-defined]  # documented, but not in __all__


def _described(arg: Any) -> str:
    if isinstance(arg, Tensor):
        return f"{str(arg.dtype).removeprefix('torch.')} {list(arg.shape)} on {arg.device}"
    return repr(arg)
