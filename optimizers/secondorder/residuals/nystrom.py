"""Low-rank kernels from products with a test matrix: `K ≈ B Bᵀ`, B `(N, l)`.

    Y = K Ω + ν Ω,  C = chol(Ωᵀ Y),  B = Y C^-1                    no QR, no SVD: two products and two solves
    (K + λ I)^-1 v ≈ (v - B (Bᵀ B + λ I)^-1 Bᵀ v) / λ

What of v lies outside the sketch is multiplied by 1/λ, so a rank below the effective dimension `tr K (K + λ I)^-1`
forces a large damping. Hence `rank_for`, and the approximation as a preconditioner of the exact system, where a rank
too small costs iterations and no accuracy.

Guzmán-Cordero et al., *Improving Energy Natural Gradient Descent through Woodbury, Momentum, and Randomization* (2025,
arXiv:2505.12149); Frangella, Tropp and Udell, *Randomized Nyström Preconditioning* (2021,
arXiv:2110.02820).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.residuals.solve import Factor, Solution, conjugate_gradients, factorize, solve_grad


@dataclass(frozen=True)
class Nystrom:
    """`(B Bᵀ + λ I)^-1`.

    Attributes:
        B: `(N, l)`, float64, `B Bᵀ` at most K + ν I.
        factor: Of `Bᵀ B + λ I` `(l, l)`; its `effective_dimension()` is that of `B Bᵀ`, a lower bound on that of
            K + ν I, and what the next step's `rank_for` takes.
        ok: 0-dim boolean tensor: all of it is finite.
    """

    B: Tensor
    factor: Factor
    ok: Tensor

    def solve(self, v: Tensor) -> Tensor:
        """`(B Bᵀ + λ I)^-1 v` `(N,)`, in the dtype of v; zeros where not ok."""
        (x,) = solve_grad([linalg.wide(v)], self.factor, lambda parts: self.B.mT @ parts[0], lambda u: [self.B @ u])
        return torch.where(self.ok, x, 0.0).to(v.dtype)


def gaussian(n: int, rank: int, generator: torch.Generator) -> Tensor:
    """Gaussian Ω `(n, rank)` in float64 on the generator's device; its state makes a sketch repeatable."""
    return torch.randn(n, rank, dtype=torch.float64, device=generator.device, generator=generator)


def nystrom(
    K: Tensor | Callable[[Tensor], Tensor], omega: Tensor, damping: Tensor | float, shift: Tensor | float = 1e-7
) -> Nystrom:
    """Sketch a kernel.

    Args:
        K: Symmetric positive semidefinite `(N, N)`, or its products X `(N, l)` -> K X: `J (Jᵀ X)`, l products each way
            and no kernel.
        omega: Test matrix `(N, l)`, l <= N.
        damping: λ > 0.
        shift: ν, added to K: it keeps the small Cholesky factorisation clear of rounding errors. Where that fails
            nevertheless, the eigenvalues of `Ωᵀ Y` that are not rounding errors give B.

    Returns:
        The approximate inverse.

    Raises:
        ValueError: If `omega` has more columns than rows.
    """
    if omega.ndim != 2 or not 0 < omega.shape[1] <= omega.shape[0]:
        raise ValueError(f"omega must be a matrix (N, l) with 0 < l <= N, got shape {tuple(omega.shape)}")
    omega = linalg.wide(omega)
    products = linalg.wide(K) @ omega if isinstance(K, Tensor) else linalg.wide(K(omega))
    Y = products + shift * omega
    small = omega.mT @ Y
    small = (small + small.mT) / 2
    C, info = torch.linalg.cholesky_ex(small)
    if int(info) == 0:
        B = torch.linalg.solve_triangular(C.mT, Y, upper=True, left=False)
    else:
        eigenvalues, Q, _ = linalg.eigh(small[None])
        noise = len(small) * torch.finfo(small.dtype).eps * eigenvalues.amax()
        B = (Y @ Q[0]) * torch.where(eigenvalues[0] > noise, eigenvalues[0].clamp_min(noise).rsqrt(), 0.0)
    factor = factorize(B.mT @ B, damping)
    return Nystrom(B, factor, factor.ok & torch.isfinite(B).all())


def rank_for(effective_dimension: float, n: int) -> int | None:
    """Rank of a sketch by the last step's effective dimension d: `2 ⌈1.5 d⌉ + 1`, or None: solve exactly.

    With that rank the preconditioned system's expected condition number is below 28 (Frangella, Tropp and Udell 2021,
    theorem 5.1; it rests on a bound of |K - B Bᵀ| / λ, which holds here too). Beyond a third of n the sketch is no
    cheaper than Cholesky. A d measured on a sketch is at most its rank: where it was too small, ranks grow up to
    threefold a step until they meet the true one.

    Args:
        effective_dimension: `tr K (K + λ I)^-1`, at this or the last step.
        n: N, the number of residuals.
    """
    if not math.isfinite(effective_dimension):
        return None
    rank = 2 * math.ceil(1.5 * effective_dimension) + 1
    return rank if rank <= n / 3 else None


def preconditioned(
    matvec: Callable[[Tensor], Tensor],
    v: Tensor,
    sketch: Nystrom,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
) -> Solution:
    """Solve `(K + λ I) w = v` by conjugate gradients with the sketch as preconditioner, λ that of the sketch.

    The damped system: the peers give conjugate gradients the undamped K, which has no bounded condition number.

    Args:
        matvec: x `(N,)` -> K x, the damping not added.
        v: Right-hand side `(N,)`.
        sketch: Of K.
        tolerance: Of the relative residual.
        max_iterations: At most.

    Returns:
        w, its relative residual and the iterations.
    """

    def damped(x: Tensor) -> Tensor:
        return linalg.wide(matvec(x.to(v.dtype))) + sketch.factor.damping * x

    found = conjugate_gradients(damped, linalg.wide(v), sketch.solve, tolerance, max_iterations)
    return Solution(found.x.to(v.dtype), found.residual, found.iterations)
