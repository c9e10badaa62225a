import pytest
import torch

from bluejay.model import CausalAttention
from bluejay.model.attention import window_mask


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_window_mask_is_the_definition(window):
    mask = window_mask(torch.arange(4, 10), 10, window)
    expected = [[j <= i and (window is None or j > i - window) for j in range(10)] for i in range(4, 10)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("window", [None, 2, 5, 6])
def test_causal_attention_is_the_definition(window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, 3, 4, generator=generator)  # 2 rows, 6 tokens, 3 heads of 4 dims
    out = CausalAttention()(0, q, k, v, scale=0.7, window=window)
    for i in range(6):
        first = 0 if window is None else max(0, i - window + 1)
        scores = 0.7 * torch.einsum("bhk,bjhk->bhj", q[:, i], k[:, first : i + 1])
        expected = torch.einsum("bhj,bjhk->bhk", scores.softmax(-1), v[:, first : i + 1])
        torch.testing.assert_close(out[:, i], expected, atol=1e-5, rtol=1e-5)
