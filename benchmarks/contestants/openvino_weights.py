"""Weights as OpenVINO's own compressed models hold them: integers and scales in the graph, widened by its kernels.

8 bits: a scale for each output, as its model optimiser writes them. 4 bits: a scale for each 32 inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from benchmarks.contestants.matrix import GROUP_SIZE
from openvino import opset13 as op


def linear(x: Any, outputs: int, inputs: int, bits: int, rng: np.random.Generator, bias: bool = False) -> Any:
    """A node that multiplies x [..., inputs] with random weights of a deviation of about 0.02: [..., outputs]."""
    weight = _int8(outputs, inputs, rng) if bits == 8 else _int4(outputs, inputs, rng)
    product = op.matmul(x, op.convert(weight, "f32"), transpose_a=False, transpose_b=True)
    return op.add(product, op.constant(np.zeros(outputs, dtype=np.float32))) if bias else product


def _int8(outputs: int, inputs: int, rng: np.random.Generator) -> Any:
    integers = rng.integers(-127, 128, (outputs, inputs), dtype=np.int8)
    scales = np.full((outputs, 1), 0.02 / 73, dtype=np.float16)  # 73: the deviation of the integers
    return op.multiply(op.convert(op.constant(integers), "f16"), op.constant(scales))


def _int4(outputs: int, inputs: int, rng: np.random.Generator) -> Any:
    shape = [outputs, inputs // GROUP_SIZE, GROUP_SIZE]
    packed = ov.Tensor(ov.Type.i4, shape)  # with memory of its own: OpenVINO would not keep an array alive
    packed.data[:] = rng.integers(0, 256, packed.data.shape, dtype=np.uint8)
    integers = op.constant(packed)
    scales = np.full((*shape[:2], 1), 0.02 / 4.6, dtype=np.float16)  # 4.6: the deviation of the integers
    weight = op.multiply(op.convert(integers, "f16"), op.constant(scales))
    return op.reshape(weight, op.constant(np.array([outputs, inputs], dtype=np.int64)), special_zero=False)


def compiled(model: ov.Model, threads: int) -> ov.CompiledModel:
    """For the CPU, as its documentation asks for speed: latency first, activations quantised in groups of 32."""
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": GROUP_SIZE,
    }
    return ov.Core().compile_model(model, "CPU", options)
