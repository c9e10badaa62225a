"""OpenVINO runs GPT-J's shapes: the network built from its operations, as its own language models are.

Keys and values are the model's state (`ReadValue`, `Assign`), attention is `ScaledDotProductAttention`, which its CPU
plugin joins with the state; weights are integers and scales. The head sees the last position only. The likeliest token
is chosen outside. A step is the difference of two lengths.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino as ov
from benchmarks.contestants.openvino_weights import compiled, linear
from benchmarks.contestants.protocol import Answer, arguments, serve, step_seconds
from benchmarks.shape import Shape
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo


class Network:
    """GPT-J as a graph. Inputs: input_ids, positions [B, T], mask [B, 1, T, L], beam_idx [B]; output: logits [B, V]."""

    def __init__(self, shape: Shape, bits: int) -> None:
        self.shape, self.bits = shape, bits
        self.rng = np.random.default_rng(0)
        self.assigns: list[Any] = []
        self.head_size = shape.n_embd // shape.n_head

    def build(self) -> ov.Model:
        ids = _parameter("input_ids", [-1, -1], ov.Type.i64)
        positions = _parameter("positions", [-1, -1], ov.Type.i64)
        self.mask = _parameter("mask", [-1, 1, -1, -1], ov.Type.f32)
        self.beam_idx = _parameter("beam_idx", [-1], ov.Type.i32)
        self.batch = op.gather(op.shape_of(ids, "i64"), _ints([0]), _ints(0))
        table = self.rng.standard_normal((self.shape.vocab_size, self.shape.n_embd), dtype=np.float32) * 0.02
        embedding = op.convert(op.constant(table.astype(np.float16)), "f32")
        x = op.gather(embedding, ids, _ints(0))
        self.sin, self.cos = self._angles(positions)
        for layer in range(self.shape.n_layer):
            x = self._block(x, layer)
        last = op.gather(self._norm(x), _ints(-1), _ints(1))
        logits = linear(last, self.shape.vocab_size, self.shape.n_embd, self.bits, self.rng, bias=True)
        return ov.Model([op.result(logits)], self.assigns, [ids, positions, self.mask, self.beam_idx], "gptj")

    def _block(self, x: Any, layer: int) -> Any:
        """X + attention(h) + mlp(h), both reading the same h."""
        width, inner = self.shape.n_embd, self.shape.n_inner
        h = self._norm(x)
        q, k, v = (self._heads(linear(h, width, width, self.bits, self.rng)) for _ in range(3))
        k = self._remembered(self._rotated(k), f"key.{layer}")
        v = self._remembered(v, f"value.{layer}")
        mixed = op.scaled_dot_product_attention(self._rotated(q), k, v, self.mask, causal=False)
        flat = op.reshape(op.transpose(mixed, _ints([0, 2, 1, 3])), _ints([0, 0, -1]), special_zero=True)
        attention = linear(flat, width, width, self.bits, self.rng)
        up = op.gelu(linear(h, inner, width, self.bits, self.rng, bias=True), "TANH")
        mlp = linear(up, width, inner, self.bits, self.rng, bias=True)
        return op.add(op.add(x, attention), mlp)

    def _norm(self, x: Any) -> Any:
        normed = op.mvn(x, _ints([-1]), normalize_variance=True, eps=1e-5, eps_mode="inside_sqrt")
        ones = op.constant(np.ones(self.shape.n_embd, dtype=np.float32))
        return op.add(op.multiply(normed, ones), op.constant(np.zeros(self.shape.n_embd, dtype=np.float32)))

    def _heads(self, x: Any) -> Any:
        """[B, T, n_embd] -> [B, heads, T, head size]."""
        split = op.reshape(x, _ints([0, 0, self.shape.n_head, self.head_size]), special_zero=True)
        return op.transpose(split, _ints([0, 2, 1, 3]))

    def _angles(self, positions: Any) -> tuple[Any, Any]:
        """Sines and cosines, [B, 1, T, rotary_dim / 2]."""
        dims = np.arange(0, self.shape.rotary_dim, 2, dtype=np.float32)
        frequencies = op.constant((10000.0 ** (-dims / self.shape.rotary_dim)).reshape(1, 1, -1).astype(np.float32))
        angles = op.multiply(op.unsqueeze(op.convert(positions, "f32"), _ints([-1])), frequencies)
        angles = op.unsqueeze(angles, _ints([1]))
        return op.sin(angles), op.cos(angles)

    def _rotated(self, x: Any) -> Any:
        """Turn the first rotary_dim numbers of each head, neighbours being pairs."""
        half = self.shape.rotary_dim // 2
        turned = op.slice(x, _ints([0]), _ints([2 * half]), _ints([1]), _ints([3]))
        rest = op.slice(x, _ints([2 * half]), _ints([self.head_size]), _ints([1]), _ints([3]))
        pairs = op.reshape(turned, _ints([0, 0, 0, half, 2]), special_zero=True)
        even, odd = op.gather(pairs, _ints(0), _ints(4)), op.gather(pairs, _ints(1), _ints(4))
        first = op.subtract(op.multiply(even, self.cos), op.multiply(odd, self.sin))
        second = op.add(op.multiply(odd, self.cos), op.multiply(even, self.sin))
        joined = op.concat([op.unsqueeze(first, _ints([-1])), op.unsqueeze(second, _ints([-1]))], 4)
        return op.concat([op.reshape(joined, _ints([0, 0, 0, 2 * half]), special_zero=True), rest], 3)

    def _remembered(self, new: Any, name: str) -> Any:
        """What the state holds with this step's keys or values behind it."""
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, self.shape.n_head, -1, self.head_size])
        info.data_type, info.variable_id = ov.Type.f32, name
        variable = Variable(info)
        start = op.concat([self.batch, _ints([self.shape.n_head]), _ints([0]), _ints([self.head_size])], 0)
        nothing = op.broadcast(op.constant(np.float32(0)), start)
        past = op.gather(ov.opset6.read_value(nothing, variable), self.beam_idx, _ints(0))
        joined = op.concat([past, new], 2)
        self.assigns.append(ov.opset6.assign(joined, variable))
        return joined


def _parameter(name: str, dims: list[int], dtype: ov.Type) -> Any:
    parameter = op.parameter(dims, dtype, name=name)
    parameter.output(0).set_names({name})
    return parameter


def _ints(values: Any) -> Any:
    return op.constant(np.array(values, dtype=np.int64))


class Contestant:
    """A model of one variant, "int8" or "int4"."""

    def __init__(self, variant: str, n_layer: int, threads: int) -> None:
        self.bits = int(variant.removeprefix("int"))
        self.threads = threads
        self.shape = Shape(n_layer=n_layer)

    def prepare(self) -> Answer:
        self.rng = np.random.default_rng(0)
        self.request = compiled(Network(self.shape, self.bits).build(), self.threads).create_infer_request()
        self._generate(batch=1, prompt=8, new=2)
        return {"version": ov.__version__, "threads": self.threads}

    def decode(self, batch: int, prompt: int, steps: int) -> Answer:
        return {"seconds": step_seconds(self._generate, batch, prompt, steps)}

    def prefill(self, tokens: int) -> Answer:
        return {"seconds": self._generate(1, tokens, 1)}

    def _generate(self, batch: int, prompt: int, new: int) -> float:
        """Seconds for `new` tokens behind each of `batch` random prompts."""
        ids = self.rng.integers(0, self.shape.vocab_size, (batch, prompt))
        start = time.perf_counter()
        self.request.reset_state()
        for seen in range(prompt, prompt + new):
            ids = self._step(ids, seen)
        return time.perf_counter() - start

    def _step(self, ids: np.ndarray, seen: int) -> np.ndarray:
        """The likeliest token behind each row, [B, 1]; `seen` tokens are there, these included."""
        batch, tokens = ids.shape
        positions = np.arange(seen - tokens, seen)
        mask = np.where(np.arange(seen) <= positions[:, None], 0, -np.inf).astype(np.float32)
        inputs = {
            "input_ids": ids,
            "positions": np.broadcast_to(positions, ids.shape).copy(),
            "mask": np.broadcast_to(mask, (batch, 1, tokens, seen)).copy(),
            "beam_idx": np.arange(batch, dtype=np.int32),
        }
        logits: np.ndarray = self.request.infer(inputs, share_inputs=True)[0]
        if not np.isfinite(logits).all():
            raise RuntimeError("logits are not numbers")
        chosen: np.ndarray = np.argmax(logits, axis=-1, keepdims=True)
        return chosen


if __name__ == "__main__":
    contestant = Contestant(**arguments())
    serve({"prepare": contestant.prepare, "decode": contestant.decode, "prefill": contestant.prefill})
