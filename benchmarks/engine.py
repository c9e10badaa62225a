"""What the engine is held to, measured in one process: `python -m benchmarks.engine` (or some of its measures by name).

    trace        64 requests of a conversation trace, against the plain loop one by one
    burst        32 requests that share a prefix of 400 tokens, with the prefix cache and without
    stall        the longest wait of a running stream while a prompt of 1,900 tokens is read
    python       scheduler and Python for a step of 16 sequences, on a model of no cost
    speculation  the default model with its draft and with n-grams, against without
    verify       what reading 2, 4 or 8 tokens of one sequence costs against 1, on GPT-J-6B's shapes
    cache        what keys and values of fewer bits cost in quality

Sides alternate; what is compared are medians of the rounds' ratios. Results go to docs/benchmarks/engine.json and are
drawn to docs/benchmarks/engine.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.contest import ROOT
from benchmarks.machine import describe

import bluejay
from bluejay import LLM, SamplingParams, ops
from bluejay.engine.batch import Reading
from bluejay.engine.engine import Engine
from bluejay.engine.kv_cache import KVCache, bytes_per_token
from bluejay.engine.network import Network
from bluejay.engine.options import EngineOptions
from bluejay.engine.plain import PlainEngine
from bluejay.engine.request import GenerationRequest
from bluejay.engine.runner import Runner
from bluejay.model.config import PRESETS
from bluejay.model.quantized import random_quantized

DATA = ROOT.parent / "shared" / "data"
TRACE = DATA / "traces" / "AzureLLMInferenceTrace_conv.csv"
STORIES = ("Once upon a time", "The little fox", "One day a girl named Lily", "Tom and his dog", "There was a big tree")

Found = dict[str, Any]


def trace(rounds: int) -> Found:
    """The default model, the first 64 rows of the trace; lengths scaled so that the longest fits into the context."""
    threads = torch.get_num_threads()
    llm = LLM()
    requests = _trace_requests(llm.config.n_positions, llm.config.vocab_size)
    plain = PlainEngine(bluejay.load(), llm.tokenizer, cache_dtype=torch.float16)

    def one_by_one() -> list[list[int]]:
        torch.set_num_threads(threads)
        return [plain.generate([request])[0].token_ids for request in requests]

    def together() -> list[list[int]]:
        torch.set_num_threads(1)  # as LLM does: the kernels have threads of their own
        return [output.token_ids for output in Engine(llm.engine.network).generate(requests)]

    differing = sum(one != other for one, other in zip(one_by_one(), together(), strict=True))
    alone_s, together_s = _alternate(rounds, one_by_one, together)
    num_tokens = sum(request.params.max_new_tokens or 0 for request in requests)
    num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
    return {
        "what": f"64 requests, {num_prompt_tokens} tokens of prompts and {num_tokens} new ones",
        "goal": "at least 6 times the plain loop",
        "plain_s": alone_s,
        "engine_s": together_s,
        "ratio": _ratio(alone_s, together_s),
        "differing_answers": differing,
    }


def _trace_requests(n_positions: int, vocab_size: int) -> list[GenerationRequest]:
    with TRACE.open(encoding="utf-8") as file:
        rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)][:64]
    scale, rng = n_positions / max(map(sum, rows)), random.Random(0)
    requests = []
    for context, generated in rows:
        prompt = rng.choices(range(1, vocab_size), k=max(1, int(context * scale)))
        params = SamplingParams(max_new_tokens=max(1, int(generated * scale)), ignore_eos=True)
        requests.append(GenerationRequest(prompt, params))
    return requests


def burst(rounds: int) -> Found:
    """The default model, 32 prompts of 400 tokens in common and 8 of their own, 8 new tokens each."""
    llm, rng = LLM(), random.Random(0)
    size = llm.config.vocab_size
    shared = rng.choices(range(1, size), k=400)
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    requests = [GenerationRequest([*shared, *rng.choices(range(1, size), k=8)], params) for _ in range(32)]

    def run(prefix_cache: bool) -> None:
        Engine(llm.engine.network, EngineOptions(prefix_cache=prefix_cache)).generate(requests)

    cold_s, cached_s = _alternate(rounds, lambda: run(False), lambda: run(True))
    return {
        "what": "32 requests with 400 tokens in common",
        "goal": "at most 0.35 of the time without the prefix cache",
        "without_s": cold_s,
        "with_s": cached_s,
        "ratio": _ratio(cached_s, cold_s),
    }


def stall(rounds: int) -> Found:
    """GPT-J-6B's shapes, four layers, int8: four streams decode while a prompt of 1,900 tokens comes."""
    network = _gptj()
    worst, typical, usual, calm, took = [], [], [], [], []
    for _ in range(rounds):
        engine = Engine(network)
        for number in range(4):
            engine.add(GenerationRequest([number, 2, 3], SamplingParams(max_new_tokens=1000, ignore_eos=True)))
        gaps = [_gap(engine) for _ in range(100)][5:]
        usual.append(median(gaps))
        calm.append(max(gaps))
        long = engine.add(GenerationRequest([5] * 1900, SamplingParams(max_new_tokens=1)))
        during, began = [], time.perf_counter()
        while any(request.id == long for request in (*engine._scheduler.waiting, *engine._scheduler.running)):
            during.append(_gap(engine))
        took.append(time.perf_counter() - began)
        worst.append(max(during))
        typical.append(median(during))
    return {
        "what": "4 streams, a prompt of 1,900 tokens; four layers of GPT-J-6B's shape, int8",
        "goal": "no gap longer than 3 times the usual one",
        "usual_gap_s": usual,
        "longest_usual_gap_s": calm,
        "gap_s": typical,
        "longest_gap_s": worst,
        "prompt_s": took,
        "typical_ratio": _ratio(typical, usual),
        "calm_ratio": _ratio(calm, usual),
        "ratio": _ratio(worst, usual),
    }


def _gap(engine: Engine) -> float:
    began = time.perf_counter()
    engine.step()
    return time.perf_counter() - began


def python(rounds: int) -> Found:
    """A forward pass that costs nothing, 16 sequences, with the default model's tokenizer."""
    llm = LLM()

    class Costless:
        config = llm.config
        hidden, row = torch.zeros(2048, llm.config.n_embd), torch.zeros(64, llm.config.vocab_size)

        def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, attend: object) -> torch.Tensor:
            return self.hidden[: len(input_ids)]

        def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.row[: len(hidden_states)]

    Costless.row[:, 300] = 1
    times = []
    for _ in range(rounds):
        engine = Engine(Network(Costless(), llm.tokenizer))
        for number in range(16):
            engine.add(GenerationRequest([number] * 100, SamplingParams(max_new_tokens=200, ignore_eos=True)))
        times.append(median([_gap(engine) for _ in range(150)][20:]))
    return {
        "what": "a step of 16 sequences that decode, text included",
        "goal": "at most 1.0 ms",
        "step_s": times,
        "best_ms": 1e3 * min(times),
    }


def speculation(rounds: int) -> Found:
    """The default model, greedy, one sequence: stories with its draft, and prompts that repeat with n-grams."""
    plain, drafted, ngram = LLM(), LLM(draft="auto"), LLM(draft="ngram")
    params = SamplingParams(max_new_tokens=128, ignore_eos=True)
    line = "The cat sat on the mat and the dog sat on the log. "
    found: Found = {"what": "128 tokens, batch 1, greedy", "goal": "at least 1.3 times as fast with its draft"}
    for name, llm, prompts in (
        ("draft_stories", drafted, STORIES),
        ("ngram_stories", ngram, STORIES),
        ("ngram_repeating", ngram, [line * 6, line * 4 + "The cat"]),
    ):
        encoded = [GenerationRequest(llm.encode(prompt), params) for prompt in prompts]

        without_s, with_s = _alternate(
            rounds, partial(_one_by_one, plain.engine, encoded), partial(_one_by_one, llm.engine, encoded)
        )
        statistics = llm.engine.statistics()
        found[name] = {
            "without_s": without_s,
            "with_s": with_s,
            "ratio": _ratio(without_s, with_s),
            "acceptance": statistics.accepted_tokens / max(1, statistics.drafted_tokens),
            "drafted": statistics.drafted_tokens,
        }
    network = _gptj()
    prompt = GenerationRequest([*range(100, 130), *range(100, 130)], SamplingParams(max_new_tokens=64, ignore_eos=True))
    plainly, guessing = Engine(network), Engine(network, draft="ngram")
    without_s, with_s = _alternate(
        max(2, rounds // 2), partial(_one_by_one, plainly, [prompt]), partial(_one_by_one, guessing, [prompt])
    )
    statistics = guessing.statistics()
    found["ngram_gptj_shape"] = {
        "without_s": without_s,
        "with_s": with_s,
        "ratio": _ratio(without_s, with_s),
        "acceptance": statistics.accepted_tokens / max(1, statistics.drafted_tokens),
        "drafted": statistics.drafted_tokens,
    }
    return found


def _one_by_one(engine: Engine, requests: list[GenerationRequest]) -> None:
    for request in requests:
        engine.generate([request])


def verify(rounds: int) -> Found:
    """Four layers of GPT-J-6B's shape and its head: reading 1, 2, 4 and 8 tokens behind 512, int8 and int4."""
    found: Found = {"what": "time of reading so many tokens of one sequence, against one"}
    for bits in (8, 4):
        network = _gptj(bits)
        cache = KVCache(network.model.config, 64, 16, torch.float16, network.device)
        for tensor in (*cache.keys, *cache.values):
            tensor.zero_()
        runner = Runner(network, cache)
        times: dict[int, list[float]] = {1: [], 2: [], 4: [], 8: []}
        for _ in range(4 * rounds):
            for count, seconds in times.items():
                reading = Reading([7] * count, 512, list(range(64)))
                began = time.perf_counter()
                with torch.inference_mode():
                    runner.logits(runner.forward([reading]), range(count))
                seconds.append(time.perf_counter() - began)
        found[f"int{bits}"] = {
            count: {"ms": 1e3 * median(seconds), "times_one": _ratio(seconds, times[1])}
            for count, seconds in times.items()
        }
    return found


def cache(rounds: int) -> Found:
    """The default model on held-out stories: bits per byte with keys and values in each dtype, and what they take."""
    text = (DATA / "stories" / "children_valid.txt").read_text(encoding="utf-8")
    found: Found = {"what": "bits per byte of the default model, windows of 1,000 tokens read through the cache"}
    for dtype in ("float32", "float16", "bfloat16", "int8"):
        llm = LLM(options=EngineOptions(cache_dtype=dtype, prefix_cache=False))
        ids = llm.encode(text)[: 20_000 * rounds]
        windows = [ids[first : first + 1000] for first in range(0, len(ids) - 999, 1000)]
        params = SamplingParams(max_new_tokens=1, prompt_logprobs=0)
        nats = num_bytes = 0.0
        for output in llm.generate(windows, params):
            assert output.prompt_logprobs is not None
            nats -= sum(one.logprob for one in output.prompt_logprobs if one is not None)
            num_bytes += len(llm.tokenizer.decode(output.prompt_token_ids[1:]).encode())
        found[dtype] = {
            "bits_per_byte": nats / num_bytes / math.log(2),
            "bytes_per_token": bytes_per_token(llm.config, getattr(torch, dtype)),
            "gpt_j_6b_bytes_per_token": bytes_per_token(PRESETS["gpt-j-6b"], getattr(torch, dtype)),
        }
    return found


def _gptj(bits: int = 8) -> Network:
    torch.set_num_threads(1)
    return Network(random_quantized(replace(PRESETS["gpt-j-6b"], n_layer=4), bits))


def _alternate(rounds: int, one: Callable[[], object], other: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Seconds of both, turn by turn, after each has run once."""
    one()
    other()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, seconds in zip((one, other), times, strict=True):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    return times


def _ratio(these: Sequence[float], those: Sequence[float]) -> float:
    return median(this / that for this, that in zip(these, those, strict=True))


MEASURES: dict[str, Callable[[int], Found]] = {
    measure.__name__: measure for measure in (trace, burst, stall, python, speculation, verify, cache)
}


def page(found: Found) -> str:
    """docs/benchmarks/engine.md: what was measured, beside its goal and its command."""
    lines = [
        "# The engine's figures",
        "*Written by `python -m benchmarks.engine`; do not edit. Readings of every round: [engine.json](engine.json). "
        "Sides alternate in one run; ratios are medians of the rounds' ratios, on a machine that others use too.*",
    ]
    for name, own in found.items():
        lines += table(name, own)
    return "\n\n".join(lines) + "\n"


def table(name: str, own: Found) -> list[str]:
    """One measure: its heading, its figures, its command and machine."""
    machine = own["machine"]
    where = f"{machine['processor']}, {machine['cores']} cores, commit {own['commit']}, {own['date']}"
    rows = [
        "| | |",
        "|---|---|",
        f"| what | {own['what']} |",
        *([f"| goal | {own['goal']} |"] if "goal" in own else []),
    ]
    rows += [f"| {key} | {_cell(value)} |" for key, value in own.items() if key not in _ABOUT]
    return [f"## {name}", "\n".join(rows), f"`{own['command']}`: {where}."]


_ABOUT = ("what", "goal", "command", "date", "commit", "changed_files", "machine", "threads")


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(one)}" for key, one in value.items())
    if isinstance(value, list):
        return f"{median(value):.4g} ({min(value):.4g} to {max(value):.4g})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the measures that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", nargs="*", choices=[*MEASURES, []], default=list(MEASURES))
    parser.add_argument("--rounds", type=int, default=5, help="of each side (default: 5)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="where results are written")
    asked = parser.parse_args()
    file = asked.out / "engine.json"
    found: Found = json.loads(file.read_text()) if file.exists() else {}
    for name in asked.measures:
        command = f"python -m benchmarks.engine {name} --rounds {asked.rounds}"
        found[name] = {"command": command, **describe(), "threads": ops.num_threads(), **MEASURES[name](asked.rounds)}
        file.write_text(json.dumps(found, indent=1) + "\n")
        (asked.out / "engine.md").write_text(page(found))
        print(name, json.dumps({key: value for key, value in found[name].items() if key != "machine"}, indent=1))


if __name__ == "__main__":
    main()
