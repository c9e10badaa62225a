"""Bluejay multiplies one matrix: `ops.linear_int8` and `ops.linear_int4`, float32 in and out."""

from __future__ import annotations

from functools import partial

import torch
from benchmarks.contestants.matrix import GROUP_SIZE, INPUTS, OUTPUTS, num_copies, timed
from benchmarks.contestants.protocol import Answer, arguments, serve

import bluejay
from bluejay import ops
from bluejay.model.quantized import QUANTIZED_DTYPES, Int4Linear, Int8Linear
from bluejay.ops.reference import GROUP_SIZES


class Contestant:
    """Copies of one matrix of a variant, "int8" or "int4"."""

    def __init__(self, variant: str, threads: int) -> None:
        self.bits = QUANTIZED_DTYPES[variant]
        self.threads = threads

    def prepare(self) -> Answer:
        torch.set_num_threads(1)  # its threads and the kernels' would wait for each other
        ops.set_num_threads(self.threads)
        if GROUP_SIZE not in GROUP_SIZES:
            raise ValueError(f"group size {GROUP_SIZE} is none of {GROUP_SIZES}")
        kind = Int8Linear if self.bits == 8 else Int4Linear
        self.layers = []
        for _ in range(num_copies(self.bits / 8)):
            layer = kind(INPUTS, OUTPUTS, bias=False, group_size=GROUP_SIZE)
            # Any byte of two 4-bit weights is valid; 8-bit ones go to 224.
            layer.weight.copy_(torch.randint(225 if self.bits == 8 else 256, layer.weight.shape, dtype=torch.uint8))
            layer.scales.fill_(0.001)
            self.layers.append(layer)
        return {
            "version": bluejay.__version__,
            "torch": torch.__version__,
            "threads": self.threads,
            "kernels": ops.voice(),
        }

    @torch.inference_mode()
    def multiply(self, rows: int) -> Answer:
        x = torch.randn(rows, INPUTS)
        return timed([partial(layer, x) for layer in self.layers])


if __name__ == "__main__":
    contestant = Contestant(**arguments())
    serve({"prepare": contestant.prepare, "multiply": contestant.multiply})
