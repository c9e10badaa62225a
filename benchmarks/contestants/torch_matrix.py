"""PyTorch multiplies one matrix: floats, and the operators that it has for quantised weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarks.contestants.matrix import GROUP_SIZE, INPUTS, OUTPUTS, num_copies, timed
from benchmarks.contestants.protocol import Answer, arguments, serve
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def float_product(dtype: torch.dtype) -> Product:
    """`linear` with weights and activations of one dtype."""
    weight = torch.randn(OUTPUTS, INPUTS, dtype=dtype)
    return lambda x: torch.nn.functional.linear(x, weight)


def int8pack_product() -> Product:
    """`_weight_int8pack_mm`: a scale for each output, activations in bfloat16."""
    weight = torch.randint(-127, 128, (OUTPUTS, INPUTS), dtype=torch.int8)
    scales = torch.full((OUTPUTS,), 0.001, dtype=torch.bfloat16)
    return lambda x: torch._weight_int8pack_mm(x, weight, scales)


def int4pack_product() -> Product:
    """`_weight_int4pack_mm_for_cpu`: a scale and an offset for 32 inputs, activations in bfloat16."""
    weight = torch.randint(0, 16, (OUTPUTS, INPUTS), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight, 1)
    scales_and_zeros = torch.full((INPUTS // GROUP_SIZE, OUTPUTS, 2), 0.001, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP_SIZE, scales_and_zeros)


def dynamic_product() -> Product:
    """`quantized.linear_dynamic`: a scale for each output, activations in float32, 8 bits with one scale for all."""
    quantized = torch.quantize_per_channel(
        torch.randn(OUTPUTS, INPUTS) * 0.02,
        torch.full((OUTPUTS,), 0.001),
        torch.zeros(OUTPUTS, dtype=torch.int64),
        axis=0,
        dtype=torch.qint8,
    )
    packed: Any = torch.ops.quantized.linear_prepack(quantized, None)
    # PyTorch itself asks for this on processors without VNNI, where sums of 8-bit products can overflow 16 bits.
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, True)


# By variant: what makes a product, the activations' dtype, bytes of a weight.
VARIANTS: dict[str, tuple[Callable[[], Product], torch.dtype, float]] = {
    "float32": (partial(float_product, torch.float32), torch.float32, 4),
    "bfloat16": (partial(float_product, torch.bfloat16), torch.bfloat16, 2),
    "int8pack": (int8pack_product, torch.bfloat16, 1),
    "int4pack": (int4pack_product, torch.bfloat16, 0.5),
    "int8dynamic": (dynamic_product, torch.float32, 1),
}


class Contestant:
    """Copies of one matrix of a variant."""

    def __init__(self, variant: str, threads: int) -> None:
        self.make, self.dtype, self.bytes_per_weight = VARIANTS[variant]
        self.threads = threads

    def prepare(self) -> Answer:
        torch.set_num_threads(self.threads)
        self.products = [self.make() for _ in range(num_copies(self.bytes_per_weight))]
        return {"version": torch.__version__, "threads": torch.get_num_threads()}

    @torch.inference_mode()
    def multiply(self, rows: int) -> Answer:
        x = torch.randn(rows, INPUTS, dtype=self.dtype)
        return timed([partial(product, x) for product in self.products])


if __name__ == "__main__":
    contestant = Contestant(**arguments())
    serve({"prepare": contestant.prepare, "multiply": contestant.multiply})
