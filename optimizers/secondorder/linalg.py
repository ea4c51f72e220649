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

# Added once to a Gram matrix of unit diagonal, so that its Cholesky factor exists however rank deficient the matrix is.
# The Gram matrix's own rounding error is about sqrt(d) eps, that is 2e-14 at d = 10 000.
_CHOLESKY_SHIFT = 1e-13

# Largest entry of |QᵀQ - I| allowed before the last pass. That pass takes an error δ to about δ² + eps: no tight bound.
_CHOLESKY_MAX_DEFECT = 1e-3


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
    scaled, scale = _scaled(_or_identity(sound, A), dim=(-2, -1))
    if A.device.type == "cpu":
        eigenvalues, Q = _eigh_one_by_one(scaled)
    else:
        try:
            eigenvalues, Q = torch.linalg.eigh(scaled)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # one matrix that does not converge fails the whole call
            eigenvalues, Q = _eigh_one_by_one(scaled)
    eigenvalues, Q = eigenvalues.flip(-1) * scale[..., 0], Q.flip(-1)  # torch sorts ascending
    ok = sound & finite(eigenvalues) & finite(Q)
    return torch.where(ok[:, None], eigenvalues, 0.0), _or_identity(ok, Q), ok


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
    if Y.device.type != "cpu":
        return cholesky_qr(Y)
    _check("orthogonalize", Y)
    sound = finite(Y)
    scaled, _ = _scaled(_or_identity(sound, Y), dim=(-2,))
    Q = torch.empty_like(scaled)
    ok = sound & _one_by_one(_householder_q, scaled, Q)
    return _or_identity(ok, Q), ok


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
    Q, _ = _scaled(torch.where(ok[:, None, None], Y, identity).double(), dim=(-2,))
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
    scaled, scale = _scaled(A, dim=(-2, -1))
    column = torch.linalg.vector_norm(scaled, dim=-2).argmax(-1)
    x = torch.gather(scaled, 2, column[:, None, None].expand(-1, A.shape[-1], 1))
    tiny = torch.finfo(A.dtype).tiny
    for _ in range(iterations):
        x = scaled @ (x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(tiny))
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
        return X @ T, torch.linalg.matrix_power(T, p) @ M

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
        return Y @ T, T @ Z

    Y, Z = B / norm, B
    for _ in range(int(halvings)):
        (Y, Z), done = _iterate((Y, identity.expand_as(Y)), step, lambda Y, Z: Z @ Y, max_iterations, tolerance)
        ok = ok & done
    return _root(A, Z * norm**-exponent, ok)


def _check(function: str, A: Tensor, square: bool = False) -> None:
    if A.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{function} takes float32 or float64, got {A.dtype}; convert lower precisions first")
    if A.ndim != 3 or A.shape[2] == 0 or A.shape[1] < A.shape[2] or (square and A.shape[1] != A.shape[2]):
        wanted = "(n, d, d)" if square else "(n, d, m) with d >= m"
        raise ValueError(f"{function} takes a stack of non-empty matrices {wanted}, got shape {tuple(A.shape)}")


def finite(A: Tensor) -> Tensor:  # (n, ...) -> (n,)
    """Which matrices have no entry that is infinite or NaN."""
    # The extremes are NaN if any entry is; on a CPU they cost a tenth of A.isfinite().
    rows = A.flatten(1)
    return torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)).isfinite()


def known(flags: Tensor) -> bool:
    """Whether all flags are set, as far as can be told without waiting: off the CPU, or to a compiler, nothing is."""
    return flags.device.type == "cpu" and not torch.compiler.is_compiling() and bool(flags.all())


def _or_identity(ok: Tensor, A: Tensor) -> Tensor:
    """`A` with the identity in place of matrices that are not `ok`."""
    if known(ok):
        return A
    return torch.where(ok[:, None, None], A, torch.eye(*A.shape[1:], dtype=A.dtype, device=A.device))


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


def _scaled(A: Tensor, dim: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Divide by the power of two that brings the largest absolute entry along `dim` into [1, 2)."""
    largest = torch.maximum(A.amax(dim=dim, keepdim=True), -A.amin(dim=dim, keepdim=True))
    mantissa, _ = torch.frexp(largest)  # largest = mantissa · 2^e with mantissa in [1/2, 1)
    scale = torch.where(largest > 0, largest / (2 * mantissa), 1.0)
    return A / scale, scale


def _householder_q(Y: Tensor) -> tuple[Tensor]:
    # Without R this takes 0.8 of the time of torch.linalg.qr at d = 256 and 512, and the same at 64 (one CPU core).
    reflectors, tau = torch.geqrf(Y)
    return (torch.linalg.householder_product(reflectors, tau),)


def _eigh_one_by_one(A: Tensor) -> tuple[Tensor, Tensor]:
    eigenvalues, Q = torch.empty_like(A[..., 0]), torch.empty_like(A)
    _one_by_one(torch.linalg.eigh, A, eigenvalues, Q)
    return eigenvalues, Q


def _one_by_one(decompose: Callable[[Tensor], tuple[Tensor, ...]], A: Tensor, *results: Tensor) -> Tensor:
    """Decompose each matrix by itself into its row of `results`; again in float64, and then NaN, where that fails.

    torch hands LAPACK a copy of a single matrix, in an allocation of its own: that is what makes the result
    independent of the stack. Returns which rows are finite, `(n,)`.
    """
    ok, rows = torch.zeros(len(A), dtype=torch.bool, device=A.device), list(range(len(A)))
    for dtype in dict.fromkeys((A.dtype, torch.float64)):
        for row in rows:
            try:
                parts: tuple[Tensor | float, ...] = decompose(A[row].to(dtype))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                parts = (torch.nan,) * len(results)
            for result, part in zip(results, parts, strict=True):
                result[row] = part
        ok = torch.stack([finite(result) for result in results]).all(dim=0)
        rows = (~ok).nonzero().flatten().tolist()
    return ok
