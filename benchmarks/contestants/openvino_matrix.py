"""OpenVINO multiplies one matrix with compressed weights, float32 in and out."""

from __future__ import annotations

from functools import partial

import numpy as np
import openvino as ov
from benchmarks.contestants.matrix import INPUTS, OUTPUTS, num_copies, timed
from benchmarks.contestants.openvino_weights import compiled, linear
from benchmarks.contestants.protocol import Answer, arguments, serve
from openvino import opset13 as op


class Contestant:
    """Copies of one matrix of a variant, "int8" or "int4"."""

    def __init__(self, variant: str, threads: int) -> None:
        self.bits = int(variant.removeprefix("int"))
        self.threads = threads

    def prepare(self) -> Answer:
        self.requests = []
        for seed in range(num_copies(self.bits / 8)):
            x = op.parameter([-1, INPUTS], ov.Type.f32)
            product = linear(x, OUTPUTS, INPUTS, self.bits, np.random.default_rng(seed))
            self.requests.append(compiled(ov.Model([product], [x]), self.threads).create_infer_request())
        return {"version": ov.__version__, "threads": self.threads}

    def multiply(self, rows: int) -> Answer:
        x = ov.Tensor(np.random.default_rng(0).standard_normal((rows, INPUTS), dtype=np.float32))
        for request in self.requests:
            request.set_input_tensor(x)
        return timed([partial(request.infer) for request in self.requests])


if __name__ == "__main__":
    contestant = Contestant(**arguments())
    serve({"prepare": contestant.prepare, "multiply": contestant.multiply})
