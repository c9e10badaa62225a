from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bluejay import ops
from bluejay.errors import KernelError
from bluejay.ops import reference

NATIVE = [name for name in ops.available_voices() if name != ops.REFERENCE]


@pytest.fixture(autouse=True)
def as_before():
    """Leave the process's choice as it was."""
    voice, threads = ops.voice(), ops.num_threads()
    yield
    ops.choose(voice)
    ops.set_num_threads(threads)


@pytest.mark.parametrize("name", NATIVE)
def test_gelu_new_is_nearer_to_the_truth_than_torchs(name):
    ops.choose(name)
    x = torch.cat((torch.linspace(-20, 20, 100_001), torch.logspace(-30, 30, 1000), -torch.logspace(-30, 30, 1000)))
    exact = F.gelu(x.double(), approximate="tanh")
    given = x.clone()
    out = ops.gelu_new_(given)
    assert out.data_ptr() == given.data_ptr()

    def error(found):
        """Relative, but for what is nearly zero on the left."""
        return ((found - exact).abs() / exact.abs().clamp_min(1e-6)).max().item()

    assert error(out) < 3e-6
    assert error(F.gelu(x, approximate="tanh")) > 1e-3  # 1 + tanh, when tanh is nearly -1, has few digits


@pytest.mark.parametrize("name", NATIVE)
def test_gelu_new_takes_what_is_no_number(name):
    ops.choose(name)
    x = torch.tensor([float("nan"), float("inf"), 0.0, -0.0])
    assert torch.equal(ops.gelu_new_(x.clone()).nan_to_num(5.0), torch.tensor([5.0, float("inf"), 0, 0]).nan_to_num())


@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 3, 4096), (129, 257)])
def test_gelu_new_of_any_shape_and_nothing_beside_it(name, shape):
    ops.choose(name)
    memory = torch.randn(torch.Size(shape).numel() + 32)
    before = memory.clone()
    x = memory[16:-16].view(shape)
    expected = F.gelu(x, approximate="tanh")
    torch.testing.assert_close(ops.gelu_new_(x), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(memory[:16], before[:16])
    assert torch.equal(memory[-16:], before[-16:])


@pytest.mark.parametrize("name", NATIVE)
def test_gelu_new_does_not_depend_on_threads(name):
    ops.choose(name)
    x = torch.randn(12_345)
    outs = []
    for threads in (1, 2, 3):
        ops.set_num_threads(threads)
        outs.append(ops.gelu_new_(x.clone()))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
@pytest.mark.parametrize(
    "x", [torch.ones(4).double(), torch.ones(4).half(), torch.ones(4, 4).t()[1:], torch.ones(8)[::2]]
)
def test_gelu_new_names_what_it_does_not_take(name, x):
    ops.choose(name)
    before = x.clone()
    with pytest.raises(KernelError, match=r"x is float.* expected float32, contiguous"):
        ops.gelu_new_(x)
    assert torch.equal(x, before)


def turns_of(tokens, pairs):
    return torch.polar(torch.ones(*tokens, 1, pairs), torch.randn(*tokens, 1, pairs))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "pairs"),
    [((1, 1), 16, 256, 32), ((3,), 2, 5, 2), ((2, 70), 16, 64, 32), ((0,), 2, 8, 4)],
)
def test_rotate_is_the_reference_with_any_threads(name, tokens, heads, dim, pairs):
    x, turns = torch.randn(*tokens, heads, dim), turns_of(tokens, pairs)
    expected = reference.rotate_(x.clone(), turns)
    torch.testing.assert_close(expected[..., 2 * pairs :], x[..., 2 * pairs :], atol=0, rtol=0)
    ops.choose(name)
    for threads in (1, 2, 3):
        ops.set_num_threads(threads)
        given = x.clone()
        assert ops.rotate_(given, turns) is given
        torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
@pytest.mark.parametrize(
    ("x", "turns", "message"),
    [
        (torch.ones(2, 3, 8).double(), turns_of((2,), 4), "x is float64"),
        (torch.ones(2, 8, 3).mT, turns_of((2,), 1), "x is float32"),
        (torch.ones(8), turns_of((), 4), "x is float32"),
        (torch.ones(2, 3, 8), turns_of((3,), 4), "turns is complex64"),
        (torch.ones(2, 3, 8), turns_of((2,), 5), "turns is complex64"),
        (torch.ones(2, 3, 8), torch.ones(2, 1, 4), "turns is float32"),
        (torch.ones(2, 3, 8), turns_of((2,), 8)[..., ::2], "turns is complex64"),
    ],
)
def test_rotate_names_what_it_does_not_take(name, x, turns, message):
    ops.choose(name)
    with pytest.raises(KernelError, match=message):
        ops.rotate_(x, turns)


@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 0, 8), (2, 3, 64), (9, 4096), (1, 1, 70)])
def test_layer_norm_is_the_formula(name, shape):
    ops.choose(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * 3 + 50  # far from 0: a difference of squares would lose its digits
    weight, bias = torch.randn(2, shape[-1], generator=generator)
    given = x.clone()
    found = ops.layer_norm(x, weight, bias, 1e-5)
    exact = F.layer_norm(x.double(), shape[-1:], weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(found.double(), exact, atol=3e-5, rtol=1e-5)
    assert torch.equal(x, given)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("size", [0.0, 0.1, 1e4, 1e10])
def test_layer_norm_of_equal_numbers_is_a_number(name, size):
    ops.choose(name)
    assert ops.layer_norm(torch.full((2, 4099), size), torch.ones(4099), torch.zeros(4099), 1e-5).isfinite().all()


@pytest.mark.parametrize("name", NATIVE)
def test_layer_norm_of_what_is_no_number_stays_in_its_row(name):
    ops.choose(name)
    x = torch.randn(3, 70)
    x[1, 5] = float("nan")
    out = ops.layer_norm(x, torch.ones(70), torch.zeros(70), 1e-5)
    assert out[1].isnan().all()
    assert out[::2].isfinite().all()


@pytest.mark.parametrize("name", NATIVE)
def test_layer_norm_and_add_do_not_depend_on_threads(name):
    ops.choose(name)
    x, y, weight, bias = torch.randn(70, 1000), torch.randn(70, 1000), torch.randn(1000), torch.randn(1000)
    outs = []
    for threads in (1, 2, 3):
        ops.set_num_threads(threads)
        outs.append(ops.layer_norm(ops.add_(x.clone(), y), weight, bias, 1e-5))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (2, 3, 4096)])
def test_add_adds_in_place(name, shape):
    ops.choose(name)
    x, y = torch.randn(shape), torch.randn(shape)
    expected = x + y
    assert ops.add_(x, y) is x
    assert torch.equal(x, expected)


@pytest.mark.parametrize("name", [*NATIVE, ops.REFERENCE])
@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.layer_norm(torch.ones(2, 8), torch.ones(7), torch.ones(7), 1e-5),
        lambda: ops.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(7), 1e-5),
        lambda: ops.layer_norm(torch.ones(2, 8).double(), torch.ones(8), torch.ones(8), 1e-5),
        lambda: ops.layer_norm(torch.ones(2, 8), torch.ones(8).half(), torch.ones(8), 1e-5),
        lambda: ops.add_(torch.ones(2, 8), torch.ones(8)),
        lambda: ops.add_(torch.ones(2, 8), torch.ones(2, 8).double()),
        lambda: ops.add_(torch.ones(8, 2).t(), torch.ones(2, 8)),
    ],
)
def test_layer_norm_and_add_refuse_what_does_not_fit(name, call):
    ops.choose(name)
    with pytest.raises(KernelError):
        call()


@pytest.mark.skipif(not NATIVE, reason="no compiled kernels")
def test_a_recording_repeats_its_kernels_with_what_memory_holds_now():
    x, y = torch.ones(4), torch.full((4,), 2.0)
    with ops.Recording() as recording:
        total = ops.add_(x, y)
        normed = ops.layer_norm(total, torch.ones(4), torch.zeros(4), 1e-5)
    assert len(recording) == 2
    y.copy_(torch.arange(4.0))
    recording.replay()
    assert x.tolist() == [3.0, 4.0, 5.0, 6.0]
    torch.testing.assert_close(normed, F.layer_norm(x, (4,)))
    ops.add_(x, y)  # the recording is closed
    assert len(recording) == 2


@pytest.mark.skipif(not NATIVE, reason="no compiled kernels")
def test_a_repeated_call_checks_what_memory_holds_now():
    k, cache, slots = torch.ones(1, 1, 4), torch.zeros(1, 8, 1, 4), torch.tensor([3])
    with ops.Recording() as recording:
        ops.write_kv(k, k, cache, cache.clone(), slots)
    slots.fill_(5)
    recording.replay()
    assert cache[0, :, 0, 0].tolist() == [0, 0, 0, 1, 0, 1, 0, 0]
    slots.fill_(8)
    with pytest.raises(KernelError, match="slots holds 8, expected -1 or 0 to 7"):
        recording.replay()


@pytest.mark.skipif(not NATIVE, reason="no compiled kernels")
def test_a_recording_ends_with_an_error_and_one_is_open_at_a_time():
    x = torch.ones(4)
    with pytest.raises(KernelError), ops.Recording() as broken:
        ops.add_(x, torch.ones(5))
    assert len(broken) == 0
    with ops.Recording(), pytest.raises(KernelError, match="a recording is open"), ops.Recording():
        pass
