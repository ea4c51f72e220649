"""Orthonormal columns: Householder reflections, and Cholesky factors where those do not batch."""

from __future__ import annotations

import torch
from torch import Tensor

from secondorder_kernels.dispatch import Operation, Path
from secondorder_kernels.reference import orthogonal as reference
from secondorder_kernels.reference.stacks import finite, scaled

# Added once to a Gram matrix of unit diagonal, so that its Cholesky factor exists however rank deficient the matrix is.
# The Gram matrix's own rounding error is about sqrt(d) eps, that is 2e-14 at d = 10 000.
_CHOLESKY_SHIFT = 1e-13

# Largest entry of |QᵀQ - I| allowed before the last pass. That pass takes an error δ to about δ² + eps: no tight bound.
_CHOLESKY_MAX_DEFECT = 1e-3


def cholesky_qr(Y: Tensor) -> tuple[Tensor, Tensor]:  # Y (n, d, m), d >= m
    """`orthogonalize` by matrix products and Cholesky factors, which batch on a GPU where Householder QR does not.

    Shifted CholeskyQR3 (Fukaya et al., 2020) on normalised columns: three times G = QᵀQ (+ shift·I the first time),
    G = L Lᵀ, Q ← Q L⁻ᵀ, and that in float64 whatever the dtype of `Y`. A Gram matrix squares the condition number;
    in float32 it would moreover be at the mercy of the TF32 setting of the training script, whose 10 bits leave no
    definite matrix. In float64 conditions up to 1e12 succeed.

    Args:
        Y: Matrices, shape `(n, d, m)` with `d >= m`, float32 or float64.

    Returns:
        Q `(n, d, m)` in the dtype of `Y`, the sign of each column such that R has a positive diagonal, and `ok (n,)`,
        False where a Cholesky factor does not exist or Q is not orthonormal.

    Raises:
        TypeError: If `Y` is not float32 or float64.
        ValueError: If `Y` is not a stack of matrices with at least as many rows as columns.
    """
    _check("cholesky_qr", Y)
    identity = torch.eye(*Y.shape[1:], dtype=Y.dtype, device=Y.device)
    ok = finite(Y)
    Q, _ = scaled(torch.where(ok[:, None, None], Y, identity).double(), dim=(-2,))
    # After scaling, the norm of a column is at least 1, or 0: a zero column stays zero and fails below.
    Q = Q / torch.linalg.vector_norm(Q, dim=-2, keepdim=True).clamp(min=1.0)
    unit = torch.eye(Y.shape[-1], dtype=Q.dtype, device=Y.device)
    defect = torch.zeros_like(ok, dtype=Q.dtype)
    for shift in (_CHOLESKY_SHIFT, 0.0, 0.0):
        gram = Q.mT @ Q
        defect = (gram - unit).abs().amax(dim=(-2, -1))
        L, info = torch.linalg.cholesky_ex(gram + shift * unit)
        ok = ok & (info == 0)
        Q = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
    ok = ok & (defect < _CHOLESKY_MAX_DEFECT) & finite(Q)
    Q = Q.to(Y.dtype).contiguous()  # triangular solves leave columns contiguous
    return torch.where(ok[:, None, None], Q, identity), ok


def _cholesky_refuses(Y: Tensor) -> str | None:
    return "on a CPU Householder reflections are as fast, and take every rank" if Y.device.type == "cpu" else None


def _fake(Y: Tensor) -> tuple[Tensor, Tensor]:
    return Y.new_empty(Y.shape), Y.new_empty(Y.shape[:1], dtype=torch.bool)


_orthogonalize = Operation(
    reference.orthogonalize,
    lambda device: (torch.zeros(2, 64, 64, device=device),),
    (Path("cholesky", run=cholesky_qr, refuses=_cholesky_refuses),),
    schema="(Tensor Y) -> (Tensor, Tensor)",
    fake=_fake,
)


def orthogonalize(Y: Tensor) -> tuple[Tensor, Tensor]:  # Y (n, d, m), d >= m
    """Return the Q factors of `Y = Q R`: orthonormal columns that span, one after the other, those of `Y`.

    Householder reflections on a CPU, `cholesky_qr` elsewhere. Signs of columns are the algorithm's own. Columns of a
    rank deficient `Y` are completed to an orthonormal set by Householder reflections, but `cholesky_qr` may fail.

    Args:
        Y: Matrices, shape `(n, d, m)` with `d >= m`, float32 or float64.

    Returns:
        Q `(n, d, m)` and `ok (n,)`.

    Raises:
        TypeError: If `Y` is not float32 or float64.
        ValueError: If `Y` is not a stack of matrices with at least as many rows as columns.
    """
    _check("orthogonalize", Y)
    Q, ok = _orthogonalize(Y)
    return Q, ok


def _check(function: str, Y: Tensor) -> None:
    if Y.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{function} takes float32 or float64, got {Y.dtype}; convert lower precisions first")
    if Y.ndim != 3 or Y.shape[2] == 0 or Y.shape[1] < Y.shape[2]:
        raise ValueError(
            f"{function} takes a stack of non-empty matrices (n, d, m) with d >= m, got shape {tuple(Y.shape)}"
        )
