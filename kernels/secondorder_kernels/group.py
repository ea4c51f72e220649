"""Factors that are moved inside a matrix group, by products alone: K ← K (I - s M), and towards their polar factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secondorder_kernels import kinds, policy
from secondorder_kernels.dispatch import Operation
from secondorder_kernels.launch import Shape, triton_path
from secondorder_kernels.reference import group as reference


def _matrices(device: torch.device, count: int) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(2, 64, 64, device=device) for _ in range(count))


def _update_tensors(K: Tensor, M: Tensor, step: Tensor, **options: Any) -> list[Tensor | None]:
    return [K, M, step, options.get("keep"), options.get("keys")]


def _update_shape(K: Tensor, M: Tensor, step: Tensor, *, lower: bool = False, **options: Any) -> Shape:
    form = "lower" if lower else "dense"
    return f"{kinds.dtypes(K)}/{policy.precision(M.dtype)}/{kinds.layout(K, M)}/{form}", tuple(K.shape[:2])


def _update_refuses(K: Tensor, M: Tensor, step: Tensor, **options: Any) -> str | None:
    return None if M.dtype == torch.float32 else f"there is no kernel for M of {M.dtype}"


def _update_fake(K: Tensor, M: Tensor, step: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return K.new_empty(K.shape), step.new_empty(step.shape)


_multiply_update = Operation(
    reference.multiply_update,
    lambda device: (*_matrices(device, 2), torch.zeros(2, device=device)),
    (
        triton_path(
            "multiply_update",
            "group_update:multiply_update",
            tensors=_update_tensors,
            shape=_update_shape,
            refuses=_update_refuses,
            dtypes=(torch.float32, torch.bfloat16, torch.int64),
        ),
    ),
    schema="(Tensor K, Tensor M, Tensor step, *, Tensor? keep=None, bool lower=False, Tensor? keys=None) "
    "-> (Tensor, Tensor)",
    fake=_update_fake,
)


def multiply_update(
    K: Tensor,
    M: Tensor,
    step: Tensor,
    *,
    keep: Tensor | None = None,
    lower: bool = False,
    keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Move factors by products: keep K - step K M, and how large they are then.

    The update of inverse-free methods (Lin et al. 2023, arXiv:2302.09738, figure 1; 2024, arXiv:2312.05705, figure 3).
    The precision of float32 products follows `torch.get_float32_matmul_precision()`; on a GPU "high" is three products
    of TF32: one alone truncates its operands, and over many steps the bias adds up.

    Args:
        K: Factors, shape `(n, d, d)` with any strides; float32 or float64, or bfloat16 where M is float32.
        M: Directions, shape of `K`, float32 or float64.
        step: One per matrix, shape `(n,)`, in the dtype of `M`.
        keep: One per matrix, shape `(n,)`, in the dtype of `M`; None: 1.
        lower: K and M are lower triangular, with zeros stored above the diagonal; so is the result.
        keys: One per matrix, shape `(n,)`, int64 in [0, 2^32), for the stochastic rounding of a bfloat16 result; given
            if and only if K is bfloat16.

    Returns:
        The moved factors in the dtype of `K`, a new contiguous tensor, and their squared Frobenius norms `(n,)` in
        the dtype of `M`.

    Raises:
        ValueError: If shapes do not fit together.
        TypeError: If dtypes do not, or keys are missing or superfluous.
    """
    n = K.shape[0] if K.ndim else 0
    rows = {"step": step, **({} if keep is None else {"keep": keep}), **({} if keys is None else {"keys": keys})}
    if K.ndim != 3 or K.shape[1] != K.shape[2] or M.shape != K.shape or any(r.shape != (n,) for r in rows.values()):
        shapes = ", ".join(f"{name} {tuple(A.shape)}" for name, A in {"K": K, "M": M, **rows}.items())
        raise ValueError(f"multiply_update takes K and M (n, d, d) and step, keep and keys (n,), got {shapes}")
    half = K.dtype == torch.bfloat16
    if M.dtype not in (torch.float32, torch.float64) or (M.dtype != torch.float32 if half else M.dtype != K.dtype):
        raise TypeError(
            "multiply_update takes K and M of one dtype, float32 or float64, or K of bfloat16 and M of float32, "
            f"got {K.dtype} and {M.dtype}"
        )
    if step.dtype != M.dtype or (keep is not None and keep.dtype != M.dtype):
        others = f"{step.dtype} and {None if keep is None else keep.dtype}"
        raise TypeError(f"multiply_update takes step and keep in the dtype of M, {M.dtype}, got {others}")
    if half != (keys is not None) or (keys is not None and keys.dtype != torch.int64):
        given = "none" if keys is None else str(keys.dtype)
        raise TypeError(f"multiply_update takes int64 keys if and only if K is bfloat16, got {given} for {K.dtype}")
    new, squares = _multiply_update(K, M, step, keep=keep, lower=lower, keys=keys)
    return new, squares


_symmetrise = Operation(
    reference.symmetrise,
    lambda device: _matrices(device, 1),
    (
        triton_path(
            "symmetrise",
            "symmetrise:symmetrise",
            tensors=lambda K: [K],
            shape=lambda K: (f"float32/{policy.precision(torch.float32)}/{kinds.layout(K)}", tuple(K.shape[:2])),
            dtypes=(torch.float32,),
        ),
    ),
    schema="(Tensor K) -> Tensor",
    fake=lambda K: K.new_empty(K.shape),
)


def symmetrise(K: Tensor) -> Tensor:
    """Rotate factors a little towards their symmetric polar factors: K Kᵀ stays to third order, tr K grows.

        R = (Kᵀ - K) / ‖Kᵀ - K‖_F,   t = min(1/2, -tr(K R) / tr(K R R)), 1/2 where tr(K R R) >= 0
        K + t K R + t²/2 K R R

    One step of Newton's method along the geodesic exp(t R) of the orthogonal Procrustes problem, max tr(K exp(t R)).
    Factors that are symmetric to single precision stay as they are. The precision of float32 products follows
    `torch.get_float32_matmul_precision()`.

    Args:
        K: Factors, shape `(n, d, d)` with any strides, float32 or float64.

    Returns:
        The rotated factors, a new contiguous tensor.

    Raises:
        ValueError: If `K` is not a stack of square matrices.
        TypeError: If `K` is not float32 or float64.
    """
    if K.ndim != 3 or K.shape[1] != K.shape[2]:
        raise ValueError(f"symmetrise takes a stack of square matrices (n, d, d), got shape {tuple(K.shape)}")
    if K.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"symmetrise takes float32 or float64, got {K.dtype}")
    rotated: Tensor = _symmetrise(K)
    return rotated
