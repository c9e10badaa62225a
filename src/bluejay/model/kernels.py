"""The kernels of `bluejay.ops` in the place of PyTorch's operators, put into a network from outside: for serving only.

PyTorch's threads and the kernels' would fight for the processors, between two of its operators tens of microseconds go
by, and a step of decoding that is nothing but kernels can be recorded and repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bluejay import ops
from bluejay.model.gpt_neo import GPTNeo
from bluejay.model.gptj import GPTJ
from bluejay.model.layers import ACTIVATION, Head, Linear, rotate
from bluejay.ops import reference
from bluejay.ops.memory import prefer_huge_pages

PACKED_AT_ONCE = 2**20  # weights; the copies of so many fit beside the model


class _PackedFloats(nn.Module):
    """The weights of a linear layer as `ops.linear_float32` reads them, as buffers: nothing here learns.

    Attributes (N outputs): weight float32, packed as in `ops.reference`; bias [N] float32 or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", pack_weight(weight.detach()))
        self.register_buffer("bias", None if bias is None else bias.detach())

    def multiply(self, x: Tensor) -> Tensor:
        """Shapes: x [..., K] float32 -> [..., N] float32."""
        return ops.linear_float32(x, self.weight, self.bias, out_features=self.out_features)


class KernelLinear(_PackedFloats):
    """A linear layer by the kernels, float32."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [..., in_features] -> [..., out_features]."""
        return self.multiply(x)


class KernelHead(_PackedFloats):
    """Hidden states to logits, as `layers.Head`; a tied one has packed weights of its own."""

    def forward(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        """hidden_states [..., n_embd] -> logits [..., vocab_size]; the embedding is not looked at."""
        return self.multiply(hidden_states)


class KernelLayerNorm(nn.LayerNorm):
    """A LayerNorm by the kernels, float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Shapes: input [..., n_embd] -> [..., n_embd]."""
        return ops.layer_norm(input, self.weight, self.bias, self.eps)


def work_by_kernels(model: GPTJ | GPTNeo) -> GPTJ | GPTNeo:
    """Let a float32 network be computed by the kernels alone, but for the embedding and what `attend` does.

    The network is changed in place and only serves from then on: its weights are packed, so that `state_dict()` is no
    longer Hugging Face's, and nothing asks for a gradient. Layer by layer the old weights are freed at once; only a
    tied head takes more memory, packed weights of its own, as the embedding is read as it is. Each row's result
    depends on that row alone.

    Left as it is: a network that trains, is not float32 on the CPU, or has an activation without a kernel, and any
    network where there are no kernels (`ops.voice()` is "reference").
    Returns: the same network.
    """
    if not _is_for_kernels(model):
        return model
    # Names only: a list of the layers would keep all of them until its end.
    for name in [name for name, module in model.named_modules() if isinstance(module, Linear | Head)]:
        old: Any = model.get_submodule(name)
        weight = model.transformer.wte.weight if old.weight is None else old.weight
        kind = KernelHead if isinstance(old, Head) else KernelLinear
        model.set_submodule(name, kind(weight, old.bias))
    elementwise_by_kernels(model)
    return model.requires_grad_(False)


def works_by_kernels(model: object) -> bool:
    """Whether `work_by_kernels` has changed a network."""
    return isinstance(getattr(model, "lm_head", None), KernelHead)


def _is_for_kernels(model: GPTJ | GPTNeo) -> bool:
    kinds = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
    has_kernel = model.config.activation_function == "gelu_new"
    return not model.training and kinds == {("cpu", torch.float32)} and has_kernel and ops.voice() != ops.REFERENCE


def elementwise_by_kernels(model: GPTJ | GPTNeo) -> None:
    """Let what lies between the linear layers run on the kernels' threads: PyTorch has one, and took a tenth.

    With gelu_new, which both families have, a step of decoding is then nothing but kernels, which can be recorded.
    """
    for name, module in list(model.named_modules()):
        given: Any = module  # a network's type knows nothing of its modules'
        if getattr(module, "activation", None) is ACTIVATION["gelu_new"]:
            given.activation = ops.gelu_new_
        if getattr(module, "rotate", None) is rotate:
            given.rotate = ops.rotate_
        if getattr(module, "add", None) is torch.add:
            given.add = ops.add_
        if isinstance(module, nn.LayerNorm):
            norm = KernelLayerNorm(module.normalized_shape, module.eps, device="meta")
            norm.weight, norm.bias = module.weight, module.bias
            model.set_submodule(name, norm)


def pack_weight(weight: Tensor) -> Tensor:
    """`reference.pack_float32` into huge pages, on all of the pool's threads: weight [N, K] -> [tiles, K, 16]."""
    N, K = weight.shape
    packed = prefer_huge_pages(torch.empty(-(-N // reference.TILE), K, reference.TILE))
    at_once = max(1, PACKED_AT_ONCE // K // reference.TILE)

    def pack(tile: int) -> None:
        rows = weight[tile * reference.TILE : (tile + at_once) * reference.TILE]
        packed[tile : tile + at_once] = reference.pack_float32(rows)

    in_parts(pack, len(packed), at_once)
    return packed


def in_parts(work: Callable[[int], None], count: int, at_once: int) -> None:
    """Call work(first) for each part of `count`, `at_once` long, on all of the pool's threads."""
    firsts = range(0, count, at_once)
    inference = torch.is_inference_mode_enabled()  # which each thread has for itself

    def work_as_here(first: int) -> None:
        with torch.inference_mode(inference):
            work(first)

    with _one_torch_thread():
        if len(firsts) == 1:
            work(0)
            return
        with ThreadPoolExecutor(ops.num_threads()) as threads:
            for _ in threads.map(work_as_here, firsts):
                pass


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Operators of a few thousand numbers are slower with several threads, and here each has a thread already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
