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
