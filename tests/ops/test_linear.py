"""The compiled linear layers against the reference, and against what they promise of themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bluejay import ops
from bluejay.errors import KernelError
from bluejay.ops import native, reference

VOICES = [voice for voice in ops.available_voices() if voice != ops.REFERENCE]
Linear = Callable[..., Tensor]

pytestmark = pytest.mark.skipif(not VOICES, reason=f"no compiled kernels: {ops.why_missing()}")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    voice, threads = ops.voice(), ops.num_threads()
    yield
    ops.choose(voice)
    ops.set_num_threads(threads)


def a_layer(bits: int, n: int, k: int, group_size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02
    integers, scales = (reference.quantize_int8 if bits == 8 else reference.quantize_int4)(weight, group_size)
    return reference.pack(integers, scales, bits=bits, group_size=group_size)


def an_input(rows: int, k: int, *, outliers: int = 0, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    x[:, torch.randperm(k, generator=generator)[:outliers]] *= 40
    return x


def voices_of(bits: int) -> tuple[Linear, Linear]:
    if bits == 8:
        return native.linear_int8, reference.linear_int8
    return native.linear_int4, reference.linear_int4


def assert_near(given: Tensor, wanted: Tensor) -> None:
    assert given.shape == wanted.shape
    # Sums of either sign may cancel: what is lost is measured on what was added.
    assert (given - wanted).norm() <= 2e-6 * wanted.norm() + 1e-6


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 33])
def test_native_is_the_reference(voice: str, bits: int, group_size: int, rows: int) -> None:
    ops.choose(voice)
    fast, slow = voices_of(bits)
    # One block of inputs and several; outputs and inputs that fill their tiles and groups, and that do not.
    for n, k in [(16, 32), (50, 100), (33, 512), (64, 1056), (17, 2050)]:
        weight, scales = a_layer(bits, n, k, group_size)
        x = an_input(rows, k, outliers=3)
        bias = torch.linspace(-1, 1, n)
        assert_near(fast(x, weight, scales, bias, out_features=n), slow(x, weight, scales, bias, out_features=n))
        assert_near(fast(x, weight, scales, None, out_features=n), slow(x, weight, scales, None, out_features=n))


@given(
    bits=st.sampled_from([8, 4]),
    group_size=st.sampled_from([32, 64]),
    rows=st.integers(1, 12),
    n=st.integers(1, 80),
    k=st.integers(1, 700),
    outliers=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_any_size_is_the_reference(
    bits: int, group_size: int, rows: int, n: int, k: int, outliers: int, seed: int
) -> None:
    fast, slow = voices_of(bits)
    weight, scales = a_layer(bits, n, k, group_size, seed)
    x = an_input(rows, k, outliers=min(outliers, k), seed=seed + 1)
    for voice in VOICES:
        ops.choose(voice)
        assert_near(fast(x, weight, scales, None, out_features=n), slow(x, weight, scales, None, out_features=n))


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_integers_do_not_overflow(voice: str, bits: int) -> None:
    """The largest weights meet the largest digits, by four whose products are summed in 16 bits."""
    ops.choose(voice)
    fast, slow = voices_of(bits)
    largest, smallest = (90, -90) if bits == 8 else (7, -8)
    k = 1024
    fours = [(1.0, 1, 1, 1), (1, 1, 0, 0), (1, 0, 0, 1), (0, 0, 1, 0), (1, -1, 1, -1), (45.5, 45.5, 45.5, 43.5)]
    x = torch.tensor([(a, b, a, b, c, d, c, d) for a, b, c, d in fours]).repeat(1, k // 8)  # inputs 0, 1, 4, 5 meet
    x = torch.cat([x, -x])
    x = torch.cat([x, x * torch.where(torch.arange(k) < 32, 1000.0, 1.0)])  # the first group wide
    integers = torch.full((32, k), largest, dtype=torch.int8)
    integers[1::2] = smallest
    integers[2, ::2] = smallest
    scales = torch.ones(32, k // 32, dtype=torch.float16)
    weight, packed_scales = reference.pack(integers, scales, bits=bits)
    assert_near(
        fast(x, weight, packed_scales, None, out_features=32), slow(x, weight, packed_scales, None, out_features=32)
    )


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_depends_on_nothing_else(voice: str, bits: int) -> None:
    """Bit for bit the same: alone or among others, with one thread, two or three."""
    ops.choose(voice)
    fast, _ = voices_of(bits)
    weight, scales = a_layer(bits, 250, 1100)
    x = an_input(530, 1100, outliers=2)  # more rows than are worked on at once
    ops.set_num_threads(1)
    alone = torch.cat([fast(row[None], weight, scales, None, out_features=250) for row in x])
    for threads in (1, 2, 3):
        ops.set_num_threads(threads)
        for rows in (2, 3, 4, 7, 16, 530):
            assert torch.equal(fast(x[:rows], weight, scales, None, out_features=250), alone[:rows])


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "k"), [(515, 96), (300, 16384)])
def test_rows_that_are_worked_on_in_parts(voice: str, bits: int, rows: int, k: int) -> None:
    """A last part of few rows behind a large one, and rows so long that fewer are worked on at once."""
    ops.choose(voice)
    fast, _ = voices_of(bits)
    weight, scales = a_layer(bits, 20, k)
    x = an_input(rows, k, outliers=2)
    whole = fast(x, weight, scales, None, out_features=20)
    for row in (0, 255, 256, rows - 4, rows - 1):
        assert torch.equal(fast(x[row : row + 1], weight, scales, None, out_features=20)[0], whole[row])


@pytest.mark.parametrize("voice", [*VOICES, ops.REFERENCE])
@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_at_the_end_of_float32_harm_no_other_row(voice: str, bits: int) -> None:
    ops.choose(voice)
    linear = ops.linear_int8 if bits == 8 else ops.linear_int4
    weight, scales = a_layer(bits, 20, 64)
    x = an_input(3, 64)
    whole = linear(x, weight, scales, None, out_features=20)
    x[1] = 3e38
    out = linear(x, weight, scales, None, out_features=20)
    assert out[1].isnan().all() == (bits == 8)  # four that meet add up to more than there is
    assert torch.equal(out[::2], whole[::2])


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize("bits", [8, 4])
def test_leading_dims_and_no_rows(voice: str, bits: int) -> None:
    ops.choose(voice)
    fast, _ = voices_of(bits)
    weight, scales = a_layer(bits, 20, 64)
    x = an_input(6, 64)
    flat = fast(x, weight, scales, None, out_features=20)
    assert torch.equal(fast(x.view(2, 3, 64), weight, scales, None, out_features=20), flat.view(2, 3, 20))
    assert torch.equal(fast(x[0], weight, scales, None, out_features=20), flat[0])
    assert fast(x[:0], weight, scales, None, out_features=20).shape == (0, 20)
    spread = torch.zeros(6, 128)
    spread[:, ::2] = x
    assert torch.equal(fast(spread[:, ::2], weight, scales, None, out_features=20), flat)


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_stays_in_its_row(voice: str, bits: int, broken: float) -> None:
    ops.choose(voice)
    fast, _ = voices_of(bits)
    weight, scales = a_layer(bits, 20, 100)
    x = an_input(3, 100)
    whole = fast(x, weight, scales, None, out_features=20)
    x[1, 37] = broken
    out = fast(x, weight, scales, None, out_features=20)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], whole[::2])


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30, 1e30])
def test_very_small_and_large_inputs(voice: str, bits: int, size: float) -> None:
    ops.choose(voice)
    fast, _ = voices_of(bits)
    weight, scales = a_layer(bits, 20, 100)
    x = an_input(2, 100)
    out = fast(x * size, weight, scales, None, out_features=20)
    wanted = fast(x, weight, scales, None, out_features=20) * size
    assert torch.allclose(out, wanted, rtol=1e-5, atol=max(1e-29, 1e-5 * size))


@pytest.mark.parametrize("voice", VOICES)
def test_outliers_cost_nothing(voice: str) -> None:
    """A layer as wide as GPT-J-6B's, six features twenty times as large as the others: at most 1 % of error."""
    ops.choose(voice)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4096, 4096, generator=generator) * 0.02
    x = torch.randn(4, 4096, generator=generator)
    x[:, torch.randperm(4096, generator=generator)[:6]] *= 20
    packed, scales = reference.pack(*reference.quantize_int8(weight), bits=8)
    out = native.linear_int8(x, packed, scales, None, out_features=4096)
    exact = x.double() @ weight.double().T
    assert (out - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"x": a["x"].double()}, "no kernel takes"),
        (lambda a: a | {"x": a["x"][:, :31]}, "features"),
        (lambda a: a | {"x": torch.zeros(2, 65)}, "features"),
        (lambda a: a | {"x": torch.tensor(1.0)}, "dim"),
        (lambda a: a | {"x": torch.zeros(3, 0)}, "features"),
        (lambda a: a | {"weight": a["weight"].to(torch.int16)}, "no kernel takes"),
        (lambda a: a | {"weight": a["weight"][0]}, "no kernel takes"),
        (lambda a: a | {"weight": a["weight"][..., :32].contiguous()}, "64"),
        (lambda a: a | {"weight": a["weight"][..., ::2]}, "no kernel takes"),
        (lambda a: a | {"weight": a["weight"][:1].contiguous()}, "tiles"),
        (lambda a: a | {"scales": a["scales"].float()}, "float16"),
        (lambda a: a | {"scales": a["scales"].view(torch.bfloat16)}, "float16"),
        (lambda a: a | {"scales": a["scales"][:1].contiguous()}, "scales"),
        (lambda a: a | {"scales": a["scales"].repeat(1, 3, 1)}, "groups of 32 or 64"),
        (lambda a: a | {"scales": a["scales"][:, :0].contiguous()}, "scales"),
        (lambda a: a | {"bias": torch.zeros(19)}, "bias"),
        (lambda a: a | {"bias": torch.zeros(20, dtype=torch.float64)}, "no kernel takes"),
        (lambda a: a | {"out_features": 40}, "tiles"),
        (lambda a: a | {"out_features": 0}, "out_features"),
    ],
)
def test_a_wrong_call_is_an_error(
    bits: int, change: Callable[[dict[str, object]], dict[str, object]], message: str
) -> None:
    fast, _ = voices_of(bits)
    weight, scales = a_layer(bits, 20, 64)
    call = {"x": torch.zeros(2, 64), "weight": weight, "scales": scales, "bias": None, "out_features": 20}
    with pytest.raises(KernelError, match=message):
        fast(**change(call))
