"""AdamW's whole step on many tensors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder_kernels import addresses, kinds, policy
from secondorder_kernels.dispatch import Operation, Path
from secondorder_kernels.launch import Shape, triton_path
from secondorder_kernels.reference import adamw as reference


def _fused_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    counts: list[Tensor],
    refused: Tensor,
    *,
    lr: float = 0.0,
    lr_tensor: Tensor | None = None,
    **options: Any,
) -> None:
    options["lr"] = lr if lr_tensor is None else lr_tensor
    torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], counts, amsgrad=False, found_inf=refused, **options)


@functools.cache
def _fused_adamw_fails(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why torch's fused kernel, a private function, cannot be used for a device and dtype; None if it works."""
    param, grad, exp_avg, exp_avg_sq = ([torch.ones(2, device=device, dtype=dtype)] for _ in range(4))
    zero = torch.zeros((), device=device)
    options: dict[str, Any] = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "maximize": False}
    try:
        for lr in ({"lr": 0.1}, {"lr_tensor": zero}):
            _fused_adamw_(param, grad, exp_avg, exp_avg_sq, [zero + 1], zero, **lr, **options)
    except (AttributeError, RuntimeError, TypeError) as error:  # no such function, device or dtype, or other arguments
        return f"torch._fused_adamw_ does not work for {dtype} on {device}: {str(error).splitlines()[0]}"
    return None


def _fused_adamw_refuses(*arguments: Any, **options: Any) -> str | None:
    if torch.compiler.is_compiling():
        return "a compiler traces the call"
    lists: tuple[list[Tensor], ...] = arguments[:5]
    failure = _fused_adamw_fails(lists[0][0].device, lists[0][0].dtype)
    if failure is not None:
        return failure
    # Seen in torch 2.13: on a CPU, strides are ignored without a word, and the wrong elements are read and written.
    if not all(tensor.is_contiguous() for tensor in itertools.chain(*lists)):
        return "torch._fused_adamw_ needs contiguous tensors"
    return None


def _first_tensors(*args: Any, lr_tensor: Tensor | None = None, **options: Any) -> tuple[Tensor | None, ...]:
    return args[0][0], *args[5:], lr_tensor


def _triton_refuses(*args: Any, **options: Any) -> str | None:
    *lists, counts = args[:5]
    # Of the many tensors only one was looked at before, which on most machines is enough.
    return policy.refuses(itertools.chain(*lists, counts)) or addresses.refuses(lists, counts)


def _shape(params: list[Tensor], *args: Any, **options: Any) -> Shape:
    return kinds.dtypes(params[0]), (len(params), sum(p.numel() for p in params))


def _adamw_example(device: torch.device) -> tuple[Any, ...]:
    tensors = [[torch.zeros(64, device=device)] for _ in range(4)]
    return (*tensors, [torch.ones((), device=device)], torch.zeros((), device=device))


_adamw = Operation(
    reference.adamw_,
    _adamw_example,
    (
        triton_path(
            "adamw_",
            "multi_tensor:adamw_",
            tensors=_first_tensors,
            shape=_shape,
            refuses=_triton_refuses,
            dtypes=(*policy.FLOATS, torch.float64),  # of a rate
        ),
        Path("torch fused", run=_fused_adamw_, refuses=_fused_adamw_refuses),
    ),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor[] counts, "
    "Tensor refused, *, float lr=0.0, Tensor? lr_tensor=None, float beta1, float beta2, float eps, "
    "float weight_decay, bool maximize) -> ()",
)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    counts: Sequence[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    refused: Tensor,
) -> None:
    """Take one step of AdamW on many tensors, in place.

        m ← beta1 m + (1 - beta1) g,   v ← beta2 v + (1 - beta2) g²
        p ← (1 - lr weight_decay) p - lr m̂ / (√v̂ + eps),   m̂ = m / (1 - beta1^t),   v̂ = v / (1 - beta2^t)

    (Loshchilov and Hutter 2019, algorithm 2, as `torch.optim.AdamW` has it: the averages are not bias-corrected.)
    To be called without gradient tracking.

    Args:
        params: Parameters p, not none, of one dtype and on one device; changed in place.
        grads: Gradients g; like all further lists in dtype, device and shapes that of the parameters.
        exp_avgs: Averages m; changed in place.
        exp_avg_sqs: Averages v; changed in place.
        counts: Steps t taken, this one included, as 0-d float32 tensors on the device.
        lr: Learning rate; a tensor must be 0-d.
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Added to √v̂.
        weight_decay: Decoupled weight decay.
        maximize: Whether to ascend.
        refused: 0-d float32 tensor on the device. If it is 1, nothing changes, whatever the gradients are.

    What is float16 or bfloat16 is computed in float32 and rounded to nearest once, by torch's kernel and by ours.

    Raises:
        ValueError: If the lists are empty, of different lengths, or their tensors of different shapes.
        TypeError: If dtypes differ.
    """
    if not params or len(counts) != len(params):
        raise ValueError(f"adamw_ takes as many counts as parameters, and some, got {len(counts)} and {len(params)}")
    shapes, dtypes = [p.shape for p in params], {p.dtype for p in params}
    for name, tensors in {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}.items():
        others = [t.shape for t in tensors]
        if others != shapes:
            wrong = next(pair for pair in itertools.zip_longest(shapes, others) if pair[0] != pair[1])
            raise ValueError(
                f"adamw_ takes {name} of the parameters' shapes, got a parameter and one of {name} of {wrong}"
            )
        dtypes.update(t.dtype for t in tensors)
    if len(dtypes) != 1:
        raise TypeError(f"adamw_ takes parameters, gradients and averages of one dtype, got {dtypes}")
    _adamw(
        list(params),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(counts),
        refused,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        **({"lr_tensor": lr} if isinstance(lr, Tensor) else {"lr": lr}),
    )
