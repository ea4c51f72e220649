"""Stochastic rounding to bfloat16, and keys for it."""

from __future__ import annotations

import torch
from torch import Tensor

from secondorder_kernels import kinds, policy, strides
from secondorder_kernels.dispatch import Operation
from secondorder_kernels.launch import Shape, triton_path
from secondorder_kernels.reference import rounding as reference
from secondorder_kernels.reference.rounding import mix as mix
from secondorder_kernels.reference.rounding import row_keys as row_keys


def _example(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 64, 64, device=device), torch.zeros(2, dtype=torch.int64, device=device)


def _tensors(x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    return x, keys


def _refuses(x: Tensor, keys: Tensor) -> str | None:
    out = strides.row_major(x.shape)
    if strides.of_strides(x.shape, (out, x.stride()), keys) is None:
        return f"strides {x.stride()} are not those of a stack of matrices"
    return None


def _shape(x: Tensor, keys: Tensor) -> Shape:
    return kinds.dtypes(x), (x.numel(),)


def _fake(x: Tensor, keys: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)


_stochastic_round = Operation(
    reference.stochastic_round,
    _example,
    (
        triton_path(
            "stochastic_round",
            "rounding:stochastic_round",
            tensors=_tensors,
            shape=_shape,
            refuses=_refuses,
            dtypes=(*policy.FLOATS, torch.int64),
        ),
    ),
    schema="(Tensor x, Tensor keys) -> Tensor",
    fake=_fake,
)


def stochastic_round(x: Tensor, keys: Tensor) -> Tensor:
    """Round to bfloat16 so that the mean over keys is `x`.

    Numbers that bfloat16 represents stay as they are, and what is not finite stays so. Results are the same bits on
    every path and device: they depend on `x`, the row's key and the entry's place in the row alone.

    Args:
        x: Shape `(n, ...)`, float32; other floating-point numbers are rounded to float32 first.
        keys: int64 in [0, 2^32), shape `(n,)` (see `row_keys`). Equal rows with equal keys are rounded equally.

    Returns:
        bfloat16, the shape of `x`, contiguous.

    Raises:
        ValueError: If shapes do not fit together.
        TypeError: If `x` is not floating-point, or keys are not int64.
    """
    if not x.is_floating_point() or keys.dtype != torch.int64:
        raise TypeError(f"stochastic_round takes a floating-point x and keys of int64, got {x.dtype} and {keys.dtype}")
    if not x.ndim or keys.shape != x.shape[:1]:
        raise ValueError(f"stochastic_round takes x (n, ...) and keys (n,), got {tuple(x.shape)}, {tuple(keys.shape)}")
    return _stochastic_round(x, keys)
