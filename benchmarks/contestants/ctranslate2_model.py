"""CTranslate2 runs GPT-J's shapes: the specification that its own converter of GPT-J fills, with random weights.

What is timed is `Generator.generate_batch`, greedy, prompts given as a whole (`include_prompt_in_result=False`): all
but the last token of a prompt are run at once and without the head, then there is one step, with the head, for each
new token. A step of decoding is the difference of two lengths, so that prompt and call drop out.
"""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import ctranslate2
import numpy as np
from benchmarks.contestants.protocol import Answer, arguments, serve, step_seconds
from benchmarks.shape import Shape
from ctranslate2.specs import TransformerDecoderModelSpec, common_spec

FOLDER = Path("runs/benchmarks")
VOCABULARY_START = ["<unk>", "<s>", "</s>"]


def write_model(folder: Path, shape: Shape, quantization: str) -> None:
    """Write a model directory: random weights through CTranslate2's own specification and quantisation."""
    rng = np.random.default_rng(0)
    spec = TransformerDecoderModelSpec.from_config(
        shape.n_layer,
        shape.n_head,
        pre_norm=True,
        activation=common_spec.Activation.GELUTanh,
        rotary_dim=shape.rotary_dim,
        # Its converter of GPT-J reorders the rows of q and k, then halves are rotated; random rows have no order.
        rotary_interleave=False,
        parallel_residual=True,
        shared_layer_norm=True,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = _matrix(rng, shape.vocab_size, shape.n_embd)
    _fill_norm(decoder.layer_norm, shape.n_embd)
    _fill(decoder.projection, rng, shape.vocab_size, shape.n_embd, bias=True)
    for layer in decoder.layer:
        _fill_norm(layer.shared_layer_norm, shape.n_embd)
        _fill(layer.self_attention.linear[0], rng, 3 * shape.n_embd, shape.n_embd, bias=False)
        _fill(layer.self_attention.linear[1], rng, shape.n_embd, shape.n_embd, bias=False)
        _fill(layer.ffn.linear_0, rng, shape.n_inner, shape.n_embd, bias=True)
        _fill(layer.ffn.linear_1, rng, shape.n_embd, shape.n_inner, bias=True)
    spec.register_vocabulary(vocabulary(shape))
    spec.config.unk_token, spec.config.bos_token, spec.config.eos_token = VOCABULARY_START
    spec.validate()
    spec.optimize(quantization)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    spec.save(str(part))
    part.rename(folder)


def vocabulary(shape: Shape) -> list[str]:
    """Tokens as strings; CTranslate2 wants the first three."""
    return VOCABULARY_START + [f"t{i}" for i in range(len(VOCABULARY_START), shape.vocab_size)]


def _matrix(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Normal with GPT-J's initial deviation, 0.02."""
    weights = rng.standard_normal((rows, columns), dtype=np.float32)
    weights *= np.float32(0.02)
    return weights


def _fill(linear: common_spec.LinearSpec, rng: np.random.Generator, rows: int, columns: int, *, bias: bool) -> None:
    linear.weight = _matrix(rng, rows, columns)
    if bias:
        linear.bias = np.zeros(rows, dtype=np.float32)


def _fill_norm(norm: common_spec.LayerNormSpec, width: int) -> None:
    norm.gamma, norm.beta = np.ones(width, dtype=np.float32), np.zeros(width, dtype=np.float32)


class Contestant:
    """A generator of one variant, "int8" or "float32"."""

    def __init__(self, variant: str, n_layer: int, threads: int) -> None:
        self.variant = variant
        self.threads = threads
        self.shape = Shape(n_layer=n_layer)
        self.folder = FOLDER / f"ctranslate2-{ctranslate2.__version__}-{variant}-{n_layer}"

    def prepare(self) -> Answer:
        if not self.folder.exists():
            write_model(self.folder, self.shape, self.variant)
        self.generator = ctranslate2.Generator(
            str(self.folder), device="cpu", compute_type=self.variant, inter_threads=1, intra_threads=self.threads
        )
        self.tokens = vocabulary(self.shape)[len(VOCABULARY_START) :]
        self._generate(batch=1, prompt=8, new=2)
        return {
            "version": ctranslate2.__version__,
            "threads": self.threads,
            "compute_type": self.generator.compute_type,
        }

    def decode(self, batch: int, prompt: int, steps: int) -> Answer:
        return {"seconds": step_seconds(self._generate, batch, prompt, steps)}

    def prefill(self, tokens: int) -> Answer:
        return {"seconds": self._generate(1, tokens, 1)}

    def generate(self, batch: int, prompt: int, new: int) -> Answer:
        return {"seconds": self._generate(batch, prompt, new)}

    def _generate(self, batch: int, prompt: int, new: int) -> float:
        """Seconds for `new` tokens behind each of `batch` random prompts; the end token cannot come."""
        prompts = [random.choices(self.tokens, k=prompt) for _ in range(batch)]
        start = time.perf_counter()
        results = self.generator.generate_batch(
            prompts,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            min_length=new,
            max_length=new,
        )
        seconds = time.perf_counter() - start
        lengths = {len(result.sequences_ids[0]) for result in results}
        if lengths != {new}:
            raise RuntimeError(f"asked for {new} tokens, got {lengths}")
        return seconds


if __name__ == "__main__":
    contestant = Contestant(**arguments())
    serve({name: getattr(contestant, name) for name in ("prepare", "decode", "prefill", "generate")})
