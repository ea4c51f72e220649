"""AdamW on many tensors. See `adamw.py` of the package above for arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    counts: list[Tensor],
    refused: Tensor,
    *,
    lr: float = 0.0,
    lr_tensor: Tensor | None = None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step of AdamW on many tensors.

    A fixed number of multi-tensor operations, and one per tensor that masks its gradient. (Of the former, those with a
    list of scalars launch one kernel per tensor on a GPU.)
    """
    rate = lr if lr_tensor is None else lr_tensor
    # Every rate is multiplied by `taken`. That is not enough for a gradient which is NaN, as 0 * NaN is NaN.
    refuse, zero = refused > 0, grads[0].new_zeros(())
    gradients = [torch.where(refuse, zero, g) for g in (torch._foreach_neg(grads) if maximize else grads)]
    t = torch.stack(counts).to(torch.promote_types(params[0].dtype, torch.float32))
    taken = (refused == 0).to(t.dtype)
    t = t.clamp(min=1)  # 0 before the first step that is taken; the corrections are then finite, and without effect
    step_sizes = taken * rate / _weight(beta1, t)
    roots = _weight(beta2, t).sqrt()

    torch._foreach_mul_(exp_avgs, 1 - taken * (1 - beta1))
    torch._foreach_add_(exp_avgs, gradients, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, 1 - taken * (1 - beta2))
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, value=1 - beta2)

    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, roots.unbind())
    torch._foreach_add_(denominators, [eps + (1 - taken)] * len(params))  # not 0 in a refused step, even if eps is
    updates = torch._foreach_div(exp_avgs, denominators)
    torch._foreach_mul_(updates, step_sizes.unbind())
    torch._foreach_mul_(params, 1 - taken * (rate * weight_decay))
    torch._foreach_sub_(params, updates)


def _weight(beta: float, t: Tensor) -> Tensor:
    """1 - beta^t, without cancellation where beta^t is close to 1."""
    return -torch.expm1(t * (math.log(beta) if beta > 0 else -math.inf))
