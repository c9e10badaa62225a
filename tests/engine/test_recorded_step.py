"""Recorded steps against the same steps computed anew."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bluejay import SamplingParams, ops
from bluejay.engine import recorded_step
from bluejay.engine.engine import Engine
from bluejay.engine.kernel_cache import KernelCache
from bluejay.engine.network import Network
from bluejay.engine.plain import PlainEngine
from bluejay.engine.recorded_step import MOST_ROWS, RecordedStep, decode
from bluejay.engine.request import GenerationRequest
from bluejay.engine.speculation import Lengths, NgramSpeculation
from bluejay.model import ModelConfig, build
from bluejay.model.quantized import random_quantized

pytestmark = pytest.mark.skipif(bool(ops.why_missing()), reason=f"no compiled kernels: {ops.why_missing()}")

GPTJ_CONFIG = ModelConfig.from_dict(
    {
        "model_type": "gptj",
        "vocab_size": 300,
        "n_positions": 400,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "rotary_dim": 8,
    }
)
GPT_NEO_CONFIG = ModelConfig.from_dict(
    {
        "model_type": "gpt_neo",
        "vocab_size": 300,
        "max_position_embeddings": 400,
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "window_size": 16,
        "attention_types": [[["global", "local"], 2]],
    }
)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def steps(model, count: int, num_rows: int, *, recording: bool) -> tuple[list[Tensor], KernelCache, list[bool]]:
    """The logits of each step behind a prompt of 5 tokens, and whether each was repeated from a recording."""
    generator = torch.Generator().manual_seed(1)
    cache = KernelCache(400, capacity=16)
    cache.begin([0] * num_rows, 5)
    model(torch.randint(300, (num_rows, 5), generator=generator), torch.arange(5).expand(num_rows, 5), cache)
    found, repeated = [], []
    for step in range(count):
        starts = [5 + step - row % 3 for row in range(num_rows)]  # ragged
        ids = torch.randint(300, (num_rows, 1), generator=generator)
        positions = torch.tensor(starts)[:, None]
        cache.begin(starts, 1)
        repeated.append(isinstance(cache.recorded, RecordedStep) and cache.recorded.calls is not None)
        if recording:
            found.append(decode(model, ids, positions, cache))
        else:
            found.append(model.logits(model(ids, positions, cache)[:, 0]))
    return found, cache, repeated


@pytest.mark.parametrize("config", [GPTJ_CONFIG, GPT_NEO_CONFIG], ids=["gptj", "gpt_neo"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_repeated_step_is_the_step(config: ModelConfig, bits: int, num_rows: int) -> None:
    """Bit for bit, through the growth of the cache, and beyond a window."""
    model = random_quantized(config, bits)
    found, _, repeated = steps(model, 70, num_rows, recording=True)
    wanted, _, never = steps(model, 70, num_rows, recording=False)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    assert not any(never)
    # All but the first two, and two after each growth: 16 slots, 32, 64 and then 128.
    assert sum(repeated) == 70 - 2 - 2 * 3


def test_recording_imports_no_compiler() -> None:
    """PyTorch's takes 1.4 s to import: a pause before everybody's second token."""
    code = (
        "import sys, torch, bluejay\n"
        "from bluejay.engine.recorded_step import RecordedStep\n"
        "repeats = []\n"
        "repeat = RecordedStep.repeat\n"
        "RecordedStep.repeat = lambda *a: (repeats.append(1), repeat(*a))\n"
        "llm = bluejay.LLM(dtype='int8')\n"
        "llm.generate(['Once'], bluejay.SamplingParams(max_new_tokens=6, ignore_eos=True))\n"
        "assert repeats\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


def test_logits_are_the_callers() -> None:
    model = random_quantized(GPTJ_CONFIG, 8)
    found, cache, _ = steps(model, 6, 1, recording=True)
    found[-1].fill_(-1)
    assert not torch.equal(cache.recorded.logits, found[-1])


def test_what_moves_ends_a_recording() -> None:
    model = random_quantized(GPTJ_CONFIG, 8)
    _, cache, _ = steps(model, 4, 2, recording=True)
    cache.select([0, 1])
    assert cache.recorded is not None
    cache.select([1, 1])
    assert cache.recorded is None


@pytest.mark.parametrize("config", [GPTJ_CONFIG, GPT_NEO_CONFIG], ids=["gptj", "gpt_neo"])
@pytest.mark.parametrize("beams", [1, 3])
def test_an_engine_chooses_the_tokens_it_chose_without(
    config: ModelConfig, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that end one after the other, and beams that fork."""
    engine = PlainEngine(random_quantized(config, 8), max_rows=8)
    requests = [
        GenerationRequest([7, row, 9], SamplingParams(max_new_tokens=20 + 17 * row, num_beams=beams, ignore_eos=True))
        for row in range(3)
    ]
    replays = []
    monkeypatch.setattr(RecordedStep, "repeat", _counted(RecordedStep.repeat, replays))
    found = [answer.token_ids for answer in engine.generate(requests)]
    assert beams > 1 or len(replays) > 30
    monkeypatch.setattr(recorded_step, "MOST_ROWS", 0)
    assert [answer.token_ids for answer in engine.generate(requests)] == found


@pytest.mark.parametrize("config", [GPTJ_CONFIG, GPT_NEO_CONFIG], ids=["gptj", "gpt_neo"])
def test_guesses_and_prompts_leave_a_recording(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the plain steps behind each would be slow, and guesses look cheap beside them."""
    network, places = Network(random_quantized(config, 8)), itertools.count(1)
    request = GenerationRequest([7, 8, 9, 7, 8, 9], SamplingParams(max_new_tokens=60, ignore_eos=True))
    late = GenerationRequest([5] * 20, SamplingParams(max_new_tokens=1))
    wanted = Engine(network).generate([request])[0].token_ids
    monkeypatch.setattr(Lengths, "best", lambda *_: 2 if next(places) % 4 == 0 else 0)
    monkeypatch.setattr(NgramSpeculation, "_follower", lambda *_: 0)  # it guesses what the prompt begins with
    recorded: list[int] = []
    monkeypatch.setattr(RecordedStep, "__init__", _counted(RecordedStep.__init__, recorded))
    engine = Engine(network, draft="ngram")
    engine.add(request)
    found: list[int] = []
    while engine.has_work:
        if len(found) == 30:
            engine.add(late)
        found += [token for event in engine.step() if event.request == 0 for token in event.token_ids]
    assert engine.statistics().drafted_tokens > 5
    assert found == wanted
    assert len(recorded) == 1


def _counted(function: Callable[..., None], calls: list[int]) -> Callable[..., None]:
    def counting(*args: object) -> None:
        calls.append(1)
        function(*args)

    return counting


def test_a_chosen_voice_is_heard_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_quantized(GPTJ_CONFIG, 8)
    _, cache, _ = steps(model, 4, 1, recording=True)
    cache.begin([9], 1)
    assert cache.recorded is not None
    monkeypatch.setattr(RecordedStep, "repeat", lambda *_: pytest.fail("kernels ran"))
    before = ops.voice()
    try:
        ops.choose(ops.REFERENCE)
        decode(model, torch.tensor([[5]]), torch.tensor([[9]]), cache)
    finally:
        ops.choose(before)


def test_many_rows_are_not_recorded() -> None:
    model = random_quantized(GPTJ_CONFIG, 8)
    _, cache, repeated = steps(model, 6, MOST_ROWS + 1, recording=True)
    assert cache.recorded is None
    assert not any(repeated)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_what_pytorch_computes_is_seen(activation: str) -> None:
    """An activation without a kernel: the step is not repeated, and right all the same."""
    model = random_quantized(replace(GPTJ_CONFIG, activation_function=activation), 8)
    found, _, repeated = steps(model, 8, 2, recording=True)
    wanted, _, _ = steps(model, 8, 2, recording=False)
    assert not any(repeated)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_floats_are_not_repeated() -> None:
    model = build(GPTJ_CONFIG, device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    found, _, repeated = steps(model, 6, 1, recording=True)
    wanted, _, _ = steps(model, 6, 1, recording=False)
    assert not any(repeated)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
