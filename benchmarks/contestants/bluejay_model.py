"""Bluejay runs GPT-J's shapes: random weights drawn straight into the quantised form, and the engine's own loop.

What is timed is the engine from token ids to token ids, greedy choice included. The first token comes out of the pass
over the prompt; each other one takes a step. A step is the difference of two lengths, as for the rivals.
"""

from __future__ import annotations

import random
import time
from dataclasses import replace

import torch
from benchmarks.contestants.protocol import Answer, arguments, serve, step_seconds
from benchmarks.shape import Shape

import bluejay
from bluejay import SamplingParams, ops
from bluejay.engine.engine import Engine
from bluejay.engine.plain import PlainEngine
from bluejay.engine.request import GenerationRequest
from bluejay.model.config import PRESETS
from bluejay.model.quantized import QUANTIZED_DTYPES, random_quantized


class Contestant:
    """An engine of one variant, "int8" or "int4"."""

    def __init__(self, variant: str, n_layer: int, threads: int) -> None:
        self.bits = QUANTIZED_DTYPES[variant]
        self.threads = threads
        self.shape = Shape(n_layer=n_layer)

    def prepare(self) -> Answer:
        # As LLM does for quantised models: its threads and the kernels' would wait for each other.
        torch.set_num_threads(1)
        ops.set_num_threads(self.threads)
        self.model = random_quantized(replace(PRESETS["gpt-j-6b"], n_layer=self.shape.n_layer), self.bits)
        for key, value in vars(self.shape).items():
            if getattr(self.model.config, key) not in (value, None):
                raise ValueError(f"{key} is {getattr(self.model.config, key)}, expected {value}")
        self._generate(batch=1, prompt=8, new=2)
        return {
            "version": bluejay.__version__,
            "torch": torch.__version__,
            "threads": self.threads,
            "kernels": ops.voice(),
        }

    def decode(self, batch: int, prompt: int, steps: int) -> Answer:
        return {"seconds": step_seconds(self._generate, batch, prompt, steps)}

    def prefill(self, tokens: int) -> Answer:
        return {"seconds": self._generate(1, tokens, 1)}

    def generate(self, batch: int, prompt: int, new: int) -> Answer:
        return {"seconds": self._generate(batch, prompt, new)}

    def _engine(self, batch: int) -> PlainEngine | Engine:
        return PlainEngine(self.model, max_rows=batch)

    def _generate(self, batch: int, prompt: int, new: int) -> float:
        """Seconds for `new` tokens behind each of `batch` random prompts; the end token does not stop."""
        params = SamplingParams(max_new_tokens=new, ignore_eos=True)
        tokens = range(self.shape.vocab_size)
        requests = [GenerationRequest(random.choices(tokens, k=prompt), params) for _ in range(batch)]
        engine = self._engine(batch)
        start = time.perf_counter()
        num_tokens = sum(len(event.token_ids) for event in engine.stream(requests))
        seconds = time.perf_counter() - start
        if num_tokens != batch * new:
            raise RuntimeError(f"asked for {batch} x {new} tokens, got {num_tokens}")
        return seconds


if __name__ == "__main__":
    contestant = Contestant(**arguments())
    serve({name: getattr(contestant, name) for name in ("prepare", "decode", "prefill", "generate")})
