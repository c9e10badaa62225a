import math

import pytest
import torch
from torch.nn import functional as F

from bluejay.model.config import ACTIVATIONS
from bluejay.model.layers import ACTIVATION, Head, rotary_turns, rotate


def rotate_slowly(x, position, rotary_dim):
    """One head's vector, dim by dim, as mesh-transformer-jax's `fixed_pos_embedding` and `rotate_every_two` have it."""
    out = list(x)
    for i in range(rotary_dim):
        angle = position / 10000 ** (2 * (i // 2) / rotary_dim)
        other = -x[i + 1] if i % 2 == 0 else x[i - 1]
        out[i] = x[i] * math.cos(angle) + other * math.sin(angle)
    return out


@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 8), (8, 4), (16, 2), (12, 6), (5, 4)])
def test_rotate_is_the_definition(head_dim, rotary_dim):
    x = torch.randn(3, 2, head_dim, generator=torch.Generator().manual_seed(0))
    positions = [0, 7, 2047]
    turned = rotate(x, rotary_turns(torch.tensor(positions), rotary_dim))
    expected = [
        [rotate_slowly(head, position, rotary_dim) for head in heads]
        for position, heads in zip(positions, x.tolist(), strict=True)
    ]
    torch.testing.assert_close(turned, torch.tensor(expected), atol=1e-4, rtol=0)


def test_rotated_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(query_position, key_position):
        turned_q = rotate(q, rotary_turns(torch.tensor([query_position]), 16))
        turned_k = rotate(k, rotary_turns(torch.tensor([key_position]), 16))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(40, 37), score(1040, 1037), atol=1e-4, rtol=0)
    assert abs(score(40, 37) - score(40, 30)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotate_keeps_the_dtype_and_computes_in_float32(dtype):
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    turns = rotary_turns(torch.tensor([1000]), 8)
    turned = rotate(x, turns)
    assert turned.dtype == dtype
    assert torch.equal(turned, rotate(x.float(), turns).to(dtype))


def test_gelu_new_is_the_tanh_form():
    x = torch.linspace(-5, 5, 101)
    expected = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(ACTIVATION["gelu_new"](x), expected)
    assert not torch.allclose(ACTIVATION["gelu"](x), expected, atol=1e-5)


def test_a_tied_head_has_no_weight_of_its_own():
    embedding = torch.randn(5, 4)
    hidden_states = torch.randn(2, 3, 4)
    tied = Head(4, 5, bias=False, tied=True)
    assert not tied.state_dict()
    torch.testing.assert_close(tied(hidden_states, embedding), hidden_states @ embedding.T)
    untied = Head(4, 5, bias=True, tied=False)
    for weight in untied.parameters():
        torch.nn.init.normal_(weight)
    torch.testing.assert_close(
        untied(hidden_states, embedding), F.linear(hidden_states, untied.weight, untied.bias), atol=1e-6, rtol=0
    )


def test_logits_are_float32():
    head = Head(4, 5, bias=True, tied=False).to(torch.bfloat16)
    assert head(torch.randn(2, 4, dtype=torch.bfloat16), torch.empty(0)).dtype == torch.float32


def test_every_activation_that_a_config_may_name_is_there() -> None:
    assert tuple(ACTIVATION) == ACTIVATIONS
