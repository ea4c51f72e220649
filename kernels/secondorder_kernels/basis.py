"""Adam in the basis of a factor: the last rotation into it and the averages in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secondorder_kernels import kinds, policy
from secondorder_kernels.dispatch import Operation, Path
from secondorder_kernels.elementwise import adam_direction_
from secondorder_kernels.launch import Shape, triton_path
from secondorder_kernels.reference import basis as reference


def _example(device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(2, 64, 64, device=device) for _ in range(5))


def _tensors(
    m: Tensor,
    v: Tensor,
    X: Tensor,
    Q: Tensor,
    out: Tensor,
    *,
    beta1_rate: Tensor | None = None,
    beta2_rate: Tensor | None = None,
    eps_tensor: Tensor | None = None,
    **options: Any,
) -> list[Tensor | None]:
    return [m, v, X, Q, out, beta1_rate, beta2_rate, eps_tensor]


def _shape(m: Tensor, v: Tensor, X: Tensor, Q: Tensor, out: Tensor, **options: Any) -> Shape:
    return f"float32/{policy.precision(torch.float32)}/{kinds.layout(X, Q)}", tuple(X.shape)


def _refuses(*tensors: Tensor, eps_tensor: Tensor | None = None, **options: Any) -> str | None:
    if eps_tensor is not None and eps_tensor.numel() != 1 and eps_tensor.shape != (len(tensors[0]), 1, 1):
        return f"eps has an entry for every element, shape {tuple(eps_tensor.shape)}, not one per matrix"
    return None


def _apart(
    m: Tensor,
    v: Tensor,
    X: Tensor,
    Q: Tensor,
    out: Tensor,
    *,
    beta1_rate: Tensor,
    beta2_rate: Tensor,
    eps: float = 0.0,
    eps_tensor: Tensor | None = None,
    **options: Any,
) -> None:
    """A product of torch, then Adam by its own fastest path."""
    options["eps"] = eps if eps_tensor is None else eps_tensor
    rate1, rate2 = beta1_rate[:, None, None], beta2_rate[:, None, None]
    adam_direction_(m, v, X @ Q, beta1_rate=rate1, beta2_rate=rate2, out=out, **options)


_adam_in_basis = Operation(
    reference.adam_in_basis_,
    _example,
    (
        triton_path(
            "adam_in_basis_",
            "gemm_adam:adam_in_basis_",
            tensors=_tensors,
            shape=_shape,
            refuses=_refuses,
            dtypes=(torch.float32,),
        ),
        Path("product, then Adam", run=_apart),
    ),
    schema="(Tensor(a!) m, Tensor(b!) v, Tensor X, Tensor Q, Tensor(c!) out, *, Tensor beta1_rate, Tensor beta2_rate, "
    "float beta1, float eps=0.0, Tensor? eps_tensor=None, bool nesterov=False) -> ()",
)


def adam_in_basis_(
    m: Tensor,
    v: Tensor,
    X: Tensor,
    Q: Tensor,
    *,
    beta1_rate: Tensor,
    beta2_rate: Tensor,
    beta1: float,
    eps: float | Tensor,
    nesterov: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate a gradient, update Adam's two averages of the result and return its direction.

        g = X Q,   m ← m + r₁ (g - m),   v ← v + r₂ (g² - v)
        u = m̃ / (√v + eps),   m̃ = m, or with Nesterov's look-ahead beta1 m + (1 - beta1) g

    Lines 3 to 8 of SOAP's algorithm 3 (Vyas et al. 2024, arXiv:2409.11321), with averages that are bias-corrected as
    they are stored; otherwise `adam_direction_` of g, which is never stored by a kernel. Where a rate is 0 the average
    keeps its bits, as long as g and g² are finite. The precision of float32 products follows
    `torch.get_float32_matmul_precision()`.

    Args:
        m: Average of rotated gradients, shape `(n, d1, d2)`, float32 or float64; changed in place.
        v: Average of their squares, shape of `m`; changed in place.
        X: Gradients, shape of `m`, rotated on all axes but the last.
        Q: Bases, shape `(n, d2, d2)`, eigenvectors in columns.
        beta1_rate: r₁, one per matrix, shape `(n,)`.
        beta2_rate: r₂, one per matrix, shape `(n,)`.
        beta1: Weight of `m` in the look-ahead.
        eps: Added to √v; a tensor must be broadcastable to `v`.
        nesterov: Whether to look ahead.
        out: Where the direction is to be left, shape of `m`; must share no memory with the other tensors.

    Returns:
        The direction u: `out`, or a new tensor.

    Raises:
        ValueError: If shapes do not fit together.
        TypeError: If dtypes differ.
    """
    n, d = X.shape[0] if X.ndim else 0, X.shape[-1] if X.ndim else 0
    direction = torch.empty_like(m) if out is None else out
    blocks = (m, v, X, direction)
    if X.ndim != 3 or any(A.shape != X.shape for A in blocks) or Q.shape != (n, d, d):
        shapes = ", ".join(str(tuple(A.shape)) for A in (m, v, X, Q, direction))
        raise ValueError(
            f"adam_in_basis_ takes m, v, X and out (n, d1, d2) and Q (n, d2, d2), got m, v, X, Q, out of {shapes}"
        )
    if beta1_rate.shape != (n,) or beta2_rate.shape != (n,):
        rates = f"{tuple(beta1_rate.shape)} and {tuple(beta2_rate.shape)}"
        raise ValueError(f"adam_in_basis_ takes rates (n,), got {rates} for n = {n}")
    dtypes = {A.dtype for A in (*blocks, Q, beta1_rate, beta2_rate)}
    if len(dtypes) != 1 or X.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"adam_in_basis_ takes tensors of one dtype, float32 or float64, got {dtypes}")
    either = {"eps_tensor": eps} if isinstance(eps, Tensor) else {"eps": eps}
    _adam_in_basis(
        m, v, X, Q, direction, beta1_rate=beta1_rate, beta2_rate=beta2_rate, beta1=beta1, nesterov=nesterov, **either
    )
    return direction
