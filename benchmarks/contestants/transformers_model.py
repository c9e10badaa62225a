"""transformers runs GPT-J's shapes: its GPTJForCausalLM with random weights, `generate`, greedy.

Runs in the environment of the parity tests, .venvs/oracle. A step is the difference of two lengths.
"""

from __future__ import annotations

import time

import torch
import transformers
from benchmarks.contestants.protocol import Answer, arguments, serve, step_seconds
from benchmarks.shape import Shape
from transformers import GPTJConfig, GPTJForCausalLM
from transformers.modeling_utils import no_init_weights


class Contestant:
    """A model of one variant, "float32" or "bfloat16"."""

    def __init__(self, variant: str, n_layer: int, threads: int) -> None:
        self.dtype: torch.dtype = getattr(torch, variant)
        self.threads = threads
        self.shape = Shape(n_layer=n_layer)

    def prepare(self) -> Answer:
        torch.set_num_threads(self.threads)
        config = GPTJConfig(**vars(self.shape), attn_implementation="eager")  # the only one that GPT-J has
        torch.set_default_dtype(self.dtype)  # so that no float32 copy is made first
        with no_init_weights():
            self.model = GPTJForCausalLM(config).eval()
        for name, weight in self.model.named_parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.02)
            else:
                torch.nn.init.constant_(weight, 1 if ".ln_" in name and name.endswith("weight") else 0)
        self._generate(batch=1, prompt=8, new=2)
        return {"version": transformers.__version__, "torch": torch.__version__, "threads": torch.get_num_threads()}

    def decode(self, batch: int, prompt: int, steps: int) -> Answer:
        return {"seconds": step_seconds(self._generate, batch, prompt, steps)}

    def prefill(self, tokens: int) -> Answer:
        return {"seconds": self._generate(1, tokens, 1)}

    @torch.inference_mode()
    def _generate(self, batch: int, prompt: int, new: int) -> float:
        """Seconds for `new` tokens behind each of `batch` random prompts; no end token is set."""
        ids = torch.randint(self.shape.vocab_size, (batch, prompt))
        start = time.perf_counter()
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - start
        if out.shape != (batch, prompt + new):
            raise RuntimeError(f"asked for {new} tokens, got {tuple(out.shape)}")
        return seconds


if __name__ == "__main__":
    contestant = Contestant(**arguments())
    serve({"prepare": contestant.prepare, "decode": contestant.decode, "prefill": contestant.prefill})
