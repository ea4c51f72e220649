"""Updates of many parameters, with decay: the end of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder_kernels import addresses, kinds, policy
from secondorder_kernels.dispatch import Operation
from secondorder_kernels.launch import Shape, triton_path
from secondorder_kernels.reference import updates as reference


def _example(device: torch.device) -> tuple[list[Tensor], ...]:
    return [torch.zeros(64, 64, device=device)], [torch.zeros(64, 64, device=device)]


def _first_tensors(params: list[Tensor], updates: list[Tensor], **options: Any) -> tuple[Tensor | None, ...]:
    return params[0], updates[0], *(options.get(name) for name in ("lr_tensor", "keep", "keys"))


def _refuses(params: list[Tensor], updates: list[Tensor], **options: Any) -> str | None:
    # Of the many tensors only two were looked at before, which on most machines is enough.
    return policy.refuses([*params, *updates]) or addresses.refuses((params, updates))


def _shape(params: list[Tensor], updates: list[Tensor], *, keys: Tensor | None = None, **options: Any) -> Shape:
    kind = kinds.dtypes(params[0], updates[0])
    return kind if keys is None else f"{kind}/stochastic", (len(params), sum(p.numel() for p in params))


_apply_update = Operation(
    reference.apply_update_,
    _example,
    (
        triton_path(
            "apply_update_",
            "multi_tensor:apply_update_",
            tensors=_first_tensors,
            shape=_shape,
            refuses=_refuses,
            dtypes=(*policy.FLOATS, torch.float64, torch.int64),  # of a rate, of `keep` and of keys
        ),
    ),
    schema="(Tensor(a!)[] params, Tensor[] updates, *, float lr=0.0, Tensor? lr_tensor=None, Tensor? keep=None, "
    "bool decay_after=False, Tensor? keys=None) -> ()",
)


def apply_update_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    lr: float | Tensor,
    keep: Tensor | None = None,
    decay_after: bool = False,
    keys: Tensor | None = None,
) -> None:
    """Decay parameters and subtract their updates, in place.

        p ← keep p - lr u,   or with `decay_after`   p ← keep (p - lr u)

    Args:
        params: Parameters p or parts of them, of one floating-point dtype and on one device; changed in place. They
            may have any strides, but must share no memory.
        updates: Updates u, of one floating-point dtype; like the parameters in device and shapes.
        lr: Learning rate; a tensor must be 0-d.
        keep: What decay leaves of a parameter, 0-d; None: all of it.
        decay_after: Whether the updates decay too.
        keys: int64 in [0, 2^32), one for each parameter: parameters, which must be bfloat16, and updates, which must be
            float32, are combined in float32 and rounded stochastically (see `stochastic_round`). Without keys, what is
            of half precision is rounded to nearest: once or, in plain tensor operations, once for every multiplication.

    Raises:
        ValueError: If the lists have different lengths, or shapes differ.
        TypeError: If dtypes do not fit together.
    """
    shapes, others = [p.shape for p in params], [u.shape for u in updates]
    if shapes != others:
        pairs = zip(shapes, others, strict=False)
        wrong = next((f"{tuple(a)} and {tuple(b)}" for a, b in pairs if a != b), f"{len(shapes)} and {len(others)}")
        raise ValueError(f"apply_update_ takes as many updates as parameters, in their shapes, got {wrong}")
    dtypes, update_dtypes = {p.dtype for p in params}, {u.dtype for u in updates}
    if max(len(dtypes), len(update_dtypes)) > 1:
        raise TypeError(f"apply_update_ takes parameters of one dtype, and updates, got {dtypes} and {update_dtypes}")
    for name, scalar in {"lr": lr, "keep": keep}.items():
        if isinstance(scalar, Tensor) and scalar.ndim:
            raise ValueError(f"apply_update_ takes {name} that is 0-d, got {tuple(scalar.shape)}")
    if keys is not None:
        if keys.dtype != torch.int64 or dtypes - {torch.bfloat16} or update_dtypes - {torch.float32}:
            raise TypeError(
                "apply_update_ takes keys of int64 with parameters of bfloat16 and updates of float32, "
                f"got {keys.dtype}, {dtypes} and {update_dtypes}"
            )
        if keys.shape != (len(params),):
            raise ValueError(f"apply_update_ takes {len(params)} keys, one for each parameter, got {tuple(keys.shape)}")
    if not params:
        return
    either = {"lr_tensor": lr} if isinstance(lr, Tensor) else {"lr": lr}
    _apply_update(list(params), list(updates), keep=keep, decay_after=decay_after, keys=keys, **either)
