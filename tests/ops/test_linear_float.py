"""Linear layers of floats against the reference, and against what they promise of themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bluejay import ops
from bluejay.errors import KernelError
from bluejay.ops import reference

VOICES = ops.available_voices()
NATIVE = [voice for voice in VOICES if voice != ops.REFERENCE]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    voice, threads = ops.voice(), ops.num_threads()
    yield
    ops.choose(voice)
    ops.set_num_threads(threads)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """What K products and sums may be off by, each rounded to half a unit: Higham 2002, section 3.1."""
    N, K = weight.shape
    found = ops.linear_float32(x, reference.pack_float32(weight), bias, out_features=N)
    plus = torch.zeros(N) if bias is None else bias
    exact = x.double() @ weight.double().T + plus.double()
    added = x.double().abs() @ weight.double().abs().T + plus.double().abs()
    terms, unit = K + 1, 2.0**-24
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    assert ((found - exact).abs() <= terms * unit / (1 - terms * unit) * added).all()


@pytest.mark.parametrize(("n", "k"), [(16, 8), (1, 1), (50, 100), (33, 512), (64, 1056), (300, 17)])
def test_packing_is_undone_and_ends_with_zeros(n: int, k: int) -> None:
    weight = numbers(n, k)
    packed = reference.pack_float32(weight)
    assert packed.shape == (-(-n // 16), k, 16)
    assert packed.is_contiguous()
    assert packed[0, k - 1, n % 16 - 1 if n < 16 else 15] == weight[min(n, 16) - 1, k - 1]
    assert torch.equal(reference.unpack_float32(packed, out_features=n), weight)
    assert not packed.transpose(1, 2).flatten(0, 1)[n:].any()


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 12, 13, 33])
def test_every_sum_is_as_exact_as_float32_can_promise(voice: str, rows: int) -> None:
    ops.choose(voice)
    # One block of inputs and several; outputs that fill their tiles, and that do not.
    for n, k in [(16, 32), (50, 100), (33, 512), (64, 256), (130, 257), (17, 2050)]:
        x, weight, bias = numbers(rows, k, seed=1), numbers(n, k, seed=2), numbers(n, seed=3)
        assert_exact(x, weight, bias)
        assert_exact(x, weight, None)


@given(rows=st.integers(1, 20), n=st.integers(1, 150), k=st.integers(1, 700), seed=st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_any_size_is_exact(rows: int, n: int, k: int, seed: int) -> None:
    x, weight, bias = numbers(rows, k, seed=seed), numbers(n, k, seed=seed + 1), numbers(n, seed=seed + 2)
    for voice in NATIVE:
        ops.choose(voice)
        assert_exact(x, weight, bias)


@pytest.mark.parametrize("voice", NATIVE)
@pytest.mark.parametrize(("n", "k"), [(250, 1100), (64, 256), (7, 3)])
def test_a_row_depends_on_nothing_else(voice: str, n: int, k: int) -> None:
    """Bit for bit the same: alone or among others, with one thread, two or three."""
    ops.choose(voice)
    weight, bias = reference.pack_float32(numbers(n, k)), numbers(n, seed=1)
    x = numbers(530, k, seed=2)  # more rows than are worked on at once
    ops.set_num_threads(1)
    alone = torch.cat([ops.linear_float32(row[None], weight, bias, out_features=n) for row in x])
    for threads in (1, 2, 3):
        ops.set_num_threads(threads)
        for rows in (1, 2, 3, 4, 5, 6, 7, 16, 241, 530):
            assert torch.equal(ops.linear_float32(x[:rows], weight, bias, out_features=n), alone[:rows])


@pytest.mark.parametrize("voice", NATIVE)
def test_an_output_depends_on_its_own_weights(voice: str) -> None:
    """Wherever it lies among the tiles that are worked on side by side."""
    ops.choose(voice)
    weight = numbers(100, 300)
    for rows in (1, 2, 6, 20):
        x = numbers(rows, 300, seed=1)
        whole = ops.linear_float32(x, reference.pack_float32(weight), None, out_features=100)
        for first in (1, 16, 50, 99):
            some = ops.linear_float32(x, reference.pack_float32(weight[first:]), None, out_features=100 - first)
            assert torch.equal(some, whole[:, first:])


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 3e38])
def test_what_is_no_number_stays_in_its_row(voice: str, broken: float) -> None:
    ops.choose(voice)
    weight = reference.pack_float32(numbers(20, 100))
    x = numbers(7, 100, seed=1)
    whole = ops.linear_float32(x, weight, None, out_features=20)
    x[1, 37:41] = broken
    out = ops.linear_float32(x, weight, None, out_features=20)
    assert not torch.equal(out[1], whole[1])
    others = [0, *range(2, 7)]
    assert torch.equal(out[others], whole[others])


@pytest.mark.parametrize("voice", VOICES)
def test_leading_dims_and_no_rows(voice: str) -> None:
    ops.choose(voice)
    weight = reference.pack_float32(numbers(20, 64))
    x = numbers(6, 64, seed=1)
    flat = ops.linear_float32(x, weight, None, out_features=20)
    assert torch.equal(ops.linear_float32(x.view(2, 3, 64), weight, None, out_features=20), flat.view(2, 3, 20))
    assert torch.equal(ops.linear_float32(x[0], weight, None, out_features=20), flat[0])
    assert ops.linear_float32(x[:0], weight, None, out_features=20).shape == (0, 20)
    spread = torch.zeros(6, 128)
    spread[:, ::2] = x
    assert torch.equal(ops.linear_float32(spread[:, ::2], weight, None, out_features=20), flat)


@pytest.mark.parametrize("voice", NATIVE)
def test_a_recording_repeats_it_with_what_memory_holds_now(voice: str) -> None:
    ops.choose(voice)
    weight, bias = reference.pack_float32(numbers(40, 64)), numbers(40, seed=1)
    x, other = numbers(3, 64, seed=2), numbers(3, 64, seed=3)
    with ops.Recording() as recording:
        out = ops.linear_float32(x, weight, bias, out_features=40)
    assert len(recording) == 1
    x.copy_(other)
    recording.replay()
    assert torch.equal(out, ops.linear_float32(other, weight, bias, out_features=40))


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a | {"x": a["x"].double()},
        lambda a: a | {"x": a["x"][:, :63]},
        lambda a: a | {"x": torch.zeros(2, 65)},
        lambda a: a | {"x": torch.tensor(1.0)},
        lambda a: a | {"x": torch.zeros(3, 0)},
        lambda a: a | {"x": torch.zeros(3, 0), "weight": torch.zeros(2, 0, 16)},
        lambda a: a | {"weight": a["weight"].double()},
        lambda a: a | {"weight": a["weight"].half()},
        lambda a: a | {"weight": a["weight"][0]},
        lambda a: a | {"weight": a["weight"][..., :8].contiguous()},
        lambda a: a | {"weight": a["weight"][:1].contiguous()},
        lambda a: a | {"weight": a["weight"][:, :63].contiguous()},
        lambda a: a | {"bias": torch.zeros(19)},
        lambda a: a | {"bias": torch.zeros(1, 20)},
        lambda a: a | {"bias": torch.zeros(20, dtype=torch.float64)},
        lambda a: a | {"out_features": 40},
        lambda a: a | {"out_features": 16},
        lambda a: a | {"out_features": 0},
        lambda a: a | {"out_features": -1},
    ],
)
def test_a_wrong_call_is_an_error(voice: str, change: Callable[[dict[str, object]], dict[str, object]]) -> None:
    ops.choose(voice)
    weight = reference.pack_float32(numbers(20, 64))
    call = {"x": torch.zeros(2, 64), "weight": weight, "bias": None, "out_features": 20}
    with pytest.raises(KernelError):
        ops.linear_float32(**change(call))


@pytest.mark.parametrize("voice", NATIVE)
def test_weights_that_are_spread_in_memory_or_ask_for_a_gradient_are_refused(voice: str) -> None:
    ops.choose(voice)
    weight = reference.pack_float32(numbers(20, 64))
    with pytest.raises(KernelError, match="dense, on the CPU"):
        ops.linear_float32(
            torch.zeros(2, 64), weight.transpose(0, 1).contiguous().transpose(0, 1), None, out_features=20
        )
    with pytest.raises(KernelError, match="weight asks for a gradient"):
        ops.linear_float32(torch.zeros(2, 64), weight.requires_grad_(), None, out_features=20)
