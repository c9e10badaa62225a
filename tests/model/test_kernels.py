"""Networks of floats whose layers are kernels, against the same networks by PyTorch."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bluejay import SamplingParams, ops
from bluejay.engine.kernel_cache import KernelCache
from bluejay.engine.plain import PlainEngine
from bluejay.engine.recorded_step import RecordedStep, decode
from bluejay.engine.request import GenerationRequest
from bluejay.model import CausalAttention, LanguageModel, ModelConfig, kernels
from bluejay.model.kernels import KernelHead, KernelLayerNorm, KernelLinear, pack_weight, work_by_kernels
from bluejay.model.layers import Linear
from bluejay.model.quantized import quantize
from bluejay.ops import reference

pytestmark = pytest.mark.skipif(bool(ops.why_missing()), reason=f"no compiled kernels: {ops.why_missing()}")

# Sizes that fill no tiles.
ODD = ModelConfig("gptj", vocab_size=307, n_positions=32, n_embd=24, n_layer=2, n_head=3, n_inner=50, rotary_dim=4)

MakeModel = Callable[..., LanguageModel]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    voice = ops.voice()
    ops.choose("auto")
    yield
    ops.choose(voice)


def logits_of(model: LanguageModel, rows: int = 1, length: int = 20) -> Tensor:
    ids = torch.arange(rows * length).view(rows, length) * 7 % 300
    with torch.inference_mode():
        return model.logits(model(ids, torch.arange(length).expand(rows, length), CausalAttention()))


def assert_near_the_truth(model: LanguageModel) -> None:
    """Rounding differs, but is not worse: the same network in float64 is as far from PyTorch's logits as from ours."""
    exact = logits_of(copy.deepcopy(model).double()).double()
    by_torch = (logits_of(model) - exact).norm()
    assert work_by_kernels(model) is model
    found = logits_of(model)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).norm() <= 2 * by_torch
    assert by_torch < 1e-5 * exact.norm()


def test_logits_are_as_exact_as_pytorchs(tiny_model: LanguageModel) -> None:
    assert_near_the_truth(tiny_model)


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_that_fill_no_tiles_and_a_tied_head(make_model: MakeModel, tied: bool) -> None:
    model = make_model(replace(ODD, tie_word_embeddings=tied))
    embedding = model.transformer.wte.weight.clone()
    assert_near_the_truth(model)
    assert logits_of(model).shape == (1, 20, 307)
    assert torch.equal(model.transformer.wte.weight, embedding)


def test_a_row_depends_on_nothing_else(tiny_model: LanguageModel) -> None:
    """Bit for bit: the rows of a batch, and the first of them in smaller ones."""
    model = work_by_kernels(tiny_model)
    whole = logits_of(model, rows=9)
    for rows in (1, 2, 5):
        assert torch.equal(logits_of(model, rows=rows), whole[:rows])


def test_an_engine_says_the_same_tokens(make_model: MakeModel, tiny_model: LanguageModel) -> None:
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    requests = [GenerationRequest([5, 17 * row, 9][: row + 1], params) for row in range(3)]
    wanted = [answer.token_ids for answer in PlainEngine(tiny_model).generate(requests)]
    found = [answer.token_ids for answer in PlainEngine(work_by_kernels(tiny_model)).generate(requests)]
    assert found == wanted


def test_nothing_but_kernels_holds_weights(tiny_model: LanguageModel) -> None:
    model = work_by_kernels(tiny_model)
    kinds = {type(module) for module in model.modules() if not list(module.children())}
    assert kinds == {KernelLinear, KernelHead, KernelLayerNorm, type(model.transformer.wte)}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    logits = logits_of(model)
    assert torch.equal(logits_of(work_by_kernels(model)), logits)  # once more changes nothing
    with torch.enable_grad():
        hidden = model(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), CausalAttention())
    assert not hidden.requires_grad


def test_a_step_of_decoding_can_be_recorded(tiny_model: LanguageModel) -> None:
    """Nothing is computed by PyTorch, and what is repeated is what would be computed anew."""
    model = work_by_kernels(tiny_model)
    found: dict[bool, list[Tensor]] = {True: [], False: []}
    for recording, logits in found.items():
        cache = KernelCache(128, dtype=torch.float32)
        with torch.inference_mode():
            for position in range(12):
                ids, positions = torch.tensor([[position * 7 % 300]] * 2), torch.tensor([[position]] * 2)
                cache.begin([position] * 2, 1)
                if recording:
                    logits.append(decode(model, ids, positions, cache))
                else:
                    logits.append(model.logits(model(ids, positions, cache)[:, 0]))
        assert isinstance(cache.recorded, RecordedStep) == recording
        assert not recording or cache.recorded.calls is not None
    assert all(torch.equal(one, other) for one, other in zip(found[True], found[False], strict=True))


def test_weights_are_freed_as_they_are_packed(tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    old = [weakref.ref(module.weight) for module in tiny_model.modules() if isinstance(module, Linear)]
    alive = []

    def counting(weight: Tensor) -> Tensor:
        alive.append(sum(weight() is not None for weight in old))
        return pack_weight(weight)

    monkeypatch.setattr(kernels, "pack_weight", counting)
    work_by_kernels(tiny_model)
    assert alive == [*range(len(old), 0, -1), 0]


def test_weights_are_held_once(make_model: MakeModel) -> None:
    config = replace(ODD, n_embd=32, n_head=2, n_inner=64, vocab_size=320)
    size = sum(tensor.nbytes for tensor in make_model(config).state_dict().values())
    packed = work_by_kernels(make_model(config))
    assert sum(tensor.nbytes for tensor in packed.state_dict().values()) == size


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.train(),
        lambda model: model.double(),
        lambda model: model.bfloat16(),
        lambda model: model.to("meta"),
        lambda model: quantize(model, 8),
    ],
)
def test_what_kernels_do_not_serve_is_left_as_it_is(
    tiny_model: LanguageModel, change: Callable[[LanguageModel], LanguageModel]
) -> None:
    model = change(tiny_model)
    before = dict(model.named_modules())
    assert work_by_kernels(model) is model
    assert dict(model.named_modules()) == before


def test_without_kernels_all_is_left_as_it_is(make_model: MakeModel, tiny_model: LanguageModel) -> None:
    odd = make_model(replace(ODD, activation_function="relu"))
    assert not any(isinstance(module, KernelLinear) for module in work_by_kernels(odd).modules())
    ops.choose(ops.REFERENCE)
    before = dict(tiny_model.named_modules())
    assert dict(work_by_kernels(tiny_model).named_modules()) == before


@pytest.mark.parametrize("shape", [(3, 5), (64, 32), (1000, 2048)])
def test_packing_in_parts_is_packing(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack_weight(weight), reference.pack_float32(weight))
    with torch.inference_mode():
        assert torch.equal(pack_weight(weight), reference.pack_float32(weight))
