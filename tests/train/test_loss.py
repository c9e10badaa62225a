import pytest
import torch
from torch import Tensor

from bluejay.train.loss import CHUNK_ROWS, cross_entropy, cross_entropy_reference


def _case(rows: int, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 8, generator=generator, requires_grad=True)
    weight = torch.randn(40, 8, generator=generator, requires_grad=True)
    biases = torch.randn(40, generator=generator, requires_grad=True) if bias else None
    return hidden, weight, biases, torch.randint(0, 40, (rows,), generator=generator)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, CHUNK_ROWS["cpu"], 2 * CHUNK_ROWS["cpu"] + 3])
def test_value_and_gradients_equal_the_reference(rows: int, bias: bool, z_loss: float) -> None:
    ours, reference = _case(rows, bias), _case(rows, bias)
    loss, plain = cross_entropy(*ours, z_loss=z_loss)
    expected, expected_plain = cross_entropy_reference(*reference, z_loss=z_loss)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(plain, expected_plain)
    (3 * loss).backward()
    (3 * expected).backward()
    for mine, theirs in zip(ours[:3], reference[:3], strict=True):
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1e4, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    loss, _ = cross_entropy(hidden, weight, None, torch.tensor([1]))
    assert float(loss) == pytest.approx(1e4)


def test_the_plain_loss_carries_no_gradient() -> None:
    loss, plain = cross_entropy(*_case(4, True))
    assert loss.requires_grad
    assert not plain.requires_grad


def test_bfloat16_stays_near_float32() -> None:
    hidden, weight, bias, targets = _case(300, True)
    half = [t.detach().bfloat16().requires_grad_() if t is not None else None for t in (hidden, weight, bias)]
    loss, _ = cross_entropy(half[0], half[1], half[2], targets)  # type: ignore[arg-type]
    loss.backward()
    expected, _ = cross_entropy(hidden, weight, bias, targets)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=0.02)
    assert half[1] is not None and half[1].grad is not None and half[1].grad.dtype == torch.bfloat16
