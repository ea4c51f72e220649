"""Batched eigendecomposition and orthogonalisation whose failures are data.

    eigh:            A = Q diag(λ) Qᵀ,  λ descending
    orthogonalize:   Y = Q R,           R upper triangular and never formed

Both take a stack of matrices `(n, …)` and return, beside their results, a boolean tensor `ok (n,)` on the same device.
A matrix that cannot be decomposed never raises and never disturbs its neighbours: its row of `ok` is False, its basis
the identity, its eigenvalues zero, and the caller keeps the last good value. Nothing here reads a device value on the
host (on a CPU such a read waits for nobody), but CUDA's own `eigh` synchronises.

Entries may lie anywhere in the range of their dtype. Matrices are divided by powers of two before they are decomposed,
so that no square over- or underflows; such a division is exact, and so independent of how an implementation rounds.

On a CPU every matrix is decomposed by itself: LAPACK is no slower that way, and results do not depend on the stack a
matrix happens to sit in (in a stack of 33x33 matrices every other one starts at an odd address, and the SIMD code for
odd addresses rounds differently). On other devices whole stacks are decomposed by one call.

Inverse roots without a decomposition, for devices on which those are slow: `newton_root`, `newton_schulz_root`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from secondorder_kernels import cholesky_qr as cholesky_qr
from secondorder_kernels import orthogonalize as orthogonalize
from secondorder_kernels import symmetric_product
from secondorder_kernels.reference.stacks import finite as finite
from secondorder_kernels.reference.stacks import known as known
from secondorder_kernels.reference.stacks import one_by_one, or_identity, scaled


def eigh(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # A (n, d, d)
    """Decompose symmetric matrices, largest eigenvalue first.

    A matrix that LAPACK cannot decompose in float32, or decomposes into something that is not finite, gets a second
    attempt in float64.

    Args:
        A: Symmetric matrices, shape `(n, d, d)`, float32 or float64. Only the lower triangles are decomposed; a
            non-finite entry anywhere makes the matrix a failed one.

    Returns:
        Eigenvalues `(n, d)` in descending order, eigenvectors `(n, d, d)` as columns, and `ok (n,)`.

    Raises:
        TypeError: If `A` is not float32 or float64.
        ValueError: If `A` is not a stack of square matrices.
    """
    _check("eigh", A, square=True)
    sound = finite(A)
    unit, scale = scaled(or_identity(sound, A), dim=(-2, -1))
    if A.device.type == "cpu":
        eigenvalues, Q = _eigh_one_by_one(unit)
    else:
        try:
            eigenvalues, Q = torch.linalg.eigh(unit)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # one matrix that does not converge fails the whole call
            eigenvalues, Q = _eigh_one_by_one(unit)
    eigenvalues, Q = eigenvalues.flip(-1) * scale[..., 0], Q.flip(-1)  # torch sorts ascending
    ok = sound & finite(eigenvalues) & finite(Q)
    return torch.where(ok[:, None], eigenvalues, 0.0), or_identity(ok, Q), ok


def wide(x: Tensor) -> Tensor:
    """`x` in float64, where the device has it: in float32 powers and logarithms round by the position in a vector."""
    return x if x.device.type == "mps" else x.double()


def power(x: Tensor, exponent: float) -> Tensor:
    """`x ** exponent`, `x >= 0`; by square roots where the exponent is ±2^-k: they scale exactly with powers of 4^k."""
    halvings = -math.log2(abs(exponent))
    if not (halvings >= 0 and halvings.is_integer()):
        return wide(x).pow(exponent).to(x.dtype)
    for _ in range(int(halvings)):
        x = x.sqrt()
    return x.reciprocal() if exponent < 0 else x


def largest_eigenvalue(A: Tensor, iterations: int = 16) -> Tensor:  # A (n, d, d)
    """Largest eigenvalues `(n,)` of symmetric positive semidefinite matrices, by power iterations: a lower bound.

    They start from each matrix's largest column. The worst case is an error of a few per cent, with many eigenvalues
    close to the largest; with isolated ones it is much smaller.
    """
    _check("largest_eigenvalue", A, square=True)
    unit, scale = scaled(A, dim=(-2, -1))
    column = torch.linalg.vector_norm(unit, dim=-2).argmax(-1)
    x = torch.gather(unit, 2, column[:, None, None].expand(-1, A.shape[-1], 1))
    tiny = torch.finfo(A.dtype).tiny
    for _ in range(iterations):
        x = unit @ (x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(tiny))
    return (torch.linalg.vector_norm(x, dim=-2, keepdim=True) * scale)[:, 0, 0]


def newton_root(
    A: Tensor, exponent: float, max_iterations: int = 100, tolerance: float = 1e-8
) -> tuple[Tensor, Tensor]:  # A (n, d, d)
    """`A^(-1/p)` of symmetric positive definite matrices by coupled Newton iterations, in float64.

        z = (p + 1) / (2 |A|_F),  X = z^(1/p) I,  M = z A
        T = (1 + 1/p) I - M / p,  X <- X T,  M <- T^p M       until max |M - I| <= tolerance

    Each matrix stops by itself; on a CPU the loop ends with the last of them. About `log(cond A) / (p log(1 + 1/p))`
    iterations and then a few. Guo and Higham, *A Schur-Newton Method for the Matrix pth Root and Its Inverse* (2006).

    Args:
        A: Symmetric positive definite matrices, shape `(n, d, d)`, float32 or float64.
        exponent: `1/p` with an integer p.
        max_iterations: After them a matrix is a failed one.
        tolerance: Largest entry of `|M - I|` at which to stop; the root is then right to about `tolerance / p`.

    Returns:
        Roots `(n, d, d)` in the dtype of `A` and `ok (n,)`, False where the iteration did not converge.

    Raises:
        TypeError: If `A` is not float32 or float64.
        ValueError: If `A` is not a stack of square matrices, or the exponent not `1/p`.
    """
    _check("newton_root", A, square=True)
    p = round(1 / exponent)
    if abs(p * exponent - 1) > 1e-9:
        raise ValueError(f"newton_root takes the exponent 1/p with an integer p, got {exponent}")
    B, identity, ok = _doubled(A)
    z = (p + 1) / (2 * torch.linalg.matrix_norm(B, keepdim=True))

    def step(X: Tensor, M: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        T = (1 + 1 / p) * identity - product / p
        return symmetric_product(X, T), symmetric_product(torch.linalg.matrix_power(T, p), M)

    pair = (z ** (1 / p) * identity, z * B)
    (X, _), done = _iterate(pair, step, lambda X, M: M, max_iterations, tolerance)
    return _root(A, X, ok & done)


def newton_schulz_root(
    A: Tensor, exponent: float, max_iterations: int = 100, tolerance: float = 1e-8
) -> tuple[Tensor, Tensor]:  # A (n, d, d)
    """`A^(-2^-k)` of symmetric positive definite matrices by coupled Newton-Schulz iterations, in float64.

        Y = A / |A|_F,  Z = I
        T = (3 I - Z Y) / 2,  Y <- Y T,  Z <- T Z             until max |Z Y - I| <= tolerance
        then Y = (A / |A|_F)^(1/2) and Z its inverse; again on Y for the next halving of the exponent

    Nothing but products. About `log_2.25(cond A)` iterations and then a few, half of them at the next level. Higham,
    *Stable iterations for the matrix square root* (1997).

    Args:
        A: Symmetric positive definite matrices, shape `(n, d, d)`, float32 or float64.
        exponent: `2^-k` with `k >= 1`.
        max_iterations: Of each level; after them a matrix is a failed one.
        tolerance: Largest entry of `|Z Y - I|` at which to stop.

    Returns:
        Roots `(n, d, d)` in the dtype of `A` and `ok (n,)`, False where the iteration did not converge.

    Raises:
        TypeError: If `A` is not float32 or float64.
        ValueError: If `A` is not a stack of square matrices, or the exponent not `2^-k`.
    """
    _check("newton_schulz_root", A, square=True)
    halvings = -math.log2(exponent)
    if not (halvings >= 1 and halvings.is_integer()):
        raise ValueError(f"newton_schulz_root takes the exponent 2^-k with k >= 1, got {exponent}")
    B, identity, ok = _doubled(A)
    norm = torch.linalg.matrix_norm(B, keepdim=True)

    def step(Y: Tensor, Z: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
        T = 1.5 * identity - 0.5 * product
        return symmetric_product(Y, T), symmetric_product(T, Z)

    def product(Y: Tensor, Z: Tensor) -> Tensor:
        return symmetric_product(Z, Y)

    Y, Z = B / norm, B
    for _ in range(int(halvings)):
        (Y, Z), done = _iterate((Y, identity.expand_as(Y)), step, product, max_iterations, tolerance)
        ok = ok & done
    return _root(A, Z * norm**-exponent, ok)


def _check(function: str, A: Tensor, square: bool = False) -> None:
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{function} takes float32 or float64, got {A.dtype}; convert lower precisions first")
    if A.ndim != 3 or A.shape[2] == 0 or A.shape[1] < A.shape[2] or (square and A.shape[1] != A.shape[2]):
        wanted = "(n, d, d)" if square else "(n, d, m) with d >= m"
        raise ValueError(f"{function} takes a stack of non-empty matrices {wanted}, got shape {tuple(A.shape)}")


def _doubled(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 copies with the identity in place of matrices that are not finite, the identity, and which are."""
    sound = finite(A)
    identity = torch.eye(A.shape[-1], dtype=torch.float64, device=A.device)
    return torch.where(sound[:, None, None], A.double(), identity), identity, sound


def _iterate(
    pair: tuple[Tensor, Tensor],
    step: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    product: Callable[[Tensor, Tensor], Tensor],
    max_iterations: int,
    tolerance: float,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Repeat `step` until `product` of the pair is the identity, each matrix by itself; the pair, and who got there."""
    identity = torch.eye(pair[0].shape[-1], dtype=pair[0].dtype, device=pair[0].device)
    for _ in range(max_iterations):
        P = product(*pair)
        active = ((P - identity).abs().amax((-2, -1)) > tolerance)[:, None, None]
        if P.device.type == "cpu" and not active.any():
            break
        first, second = step(*pair, P)
        pair = torch.where(active, first, pair[0]), torch.where(active, second, pair[1])
    return pair, (product(*pair) - identity).abs().amax((-2, -1)) <= tolerance


def _root(A: Tensor, X: Tensor, ok: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric roots in the dtype of `A`, the identity where they failed."""
    X = ((X + X.mT) / 2).to(A.dtype)
    ok = ok & finite(X)
    return torch.where(ok[:, None, None], X, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)), ok


def _eigh_one_by_one(A: Tensor) -> tuple[Tensor, Tensor]:
    eigenvalues, Q = torch.empty_like(A[..., 0]), torch.empty_like(A)
    one_by_one(torch.linalg.eigh, A, eigenvalues, Q)
    return eigenvalues, Q
