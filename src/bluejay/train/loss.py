"""Next-token cross entropy, without ever holding the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Rows of logits at a time: 256 x 8,192 float32 is 8 MiB, which stays in a CPU's cache; on a GPU more is better.
CHUNK_ROWS = {"cpu": 256, "cuda": 4096}


def cross_entropy(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean loss over all targets, computed in chunks of rows; gradients are made in the same pass.

    Shapes (N tokens, D width, V vocabulary): hidden_states [N, D], weight [V, D], bias [V], targets [N] int64.

    Args:
        z_loss: weight of mean(log(sum exp(logits - max))^2), which keeps logits from drifting; mesh-transformer-jax
            trained with 1e-4 and, like here, took the sum after the maximum was subtracted.
    Returns: the loss to differentiate (z_loss included) and the plain cross entropy, both scalars in nats per token.
    Source: mesh-transformer-jax layers.py (ProjectionShard.loss); chunks as in Liger Kernel (arXiv:2410.10989).
    """
    loss, plain = _ChunkedCrossEntropy.apply(hidden_states, weight, bias, targets, z_loss)  # type: ignore[no-untyped-call]
    return loss, plain


def cross_entropy_reference(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The obvious version, all logits at once: the slow twin that tests `cross_entropy`."""
    logits = F.linear(hidden_states, weight, bias).float()
    plain = F.cross_entropy(logits, targets)
    shifted = logits - logits.amax(-1, keepdim=True).detach()
    return plain + z_loss * shifted.logsumexp(-1).square().mean(), plain


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        N = hidden_states.shape[0]
        rows = CHUNK_ROWS.get(hidden_states.device.type, 1024)
        needs_grad = any(ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden_states) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_grad and bias is not None else None
        nll = hidden_states.new_zeros((), dtype=torch.float32)
        z = torch.zeros_like(nll)
        for start in range(0, N, rows):
            h, target = hidden_states[start : start + rows], targets[start : start + rows, None]
            logits = F.linear(h, weight, bias).float()
            logits -= logits.amax(-1, keepdim=True)
            picked = logits.gather(1, target)
            total = logits.exp_().sum(-1, keepdim=True)  # logits now holds exp(logits - max)
            log_total = total.log()
            nll += (log_total - picked).sum()
            z += log_total.square().sum()
            if grad_hidden is None or grad_weight is None:
                continue
            # d loss / d logits = softmax * (1 + 2 z_loss log_total) - one_hot(target), over N
            logits *= (1 + 2 * z_loss * log_total) / (total * N)
            logits.scatter_add_(1, target, torch.full_like(picked, -1 / N))
            grad = logits.to(weight.dtype)
            torch.mm(grad, weight, out=grad_hidden[start : start + rows])
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), h)
            else:
                grad_weight += grad.t() @ h
            if grad_bias is not None:
                grad_bias += logits.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        plain = nll / N
        ctx.mark_non_differentiable(plain)
        return plain + z_loss * z / N, plain

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            grad_hidden.mul_(grad_loss.to(grad_hidden.dtype)),
            grad_weight.mul_(grad_loss).to(ctx.dtype),
            None if grad_bias is None else grad_bias.mul_(grad_loss).to(ctx.dtype),
            None,
            None,
        )
