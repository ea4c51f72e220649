"""Damped Gauss-Newton systems of a residual r with the Jacobian J = dr/dθ `(N, D)`: solved in float64.

    dual:     δ = Jᵀ w,  (K + λ I) w = r,   K = J Jᵀ (N, N)       for N < D
    primal:   (G + λ I) δ = Jᵀ r,           G = Jᵀ J (D, D)       for D < N
    gradient: δ = (g - Jᵀ (K + λ I)^-1 J g) / λ                   any g, also one outside the range of Jᵀ
    SPRING:   φ = μ φ' + Jᵀ (K + λ I)^-1 (-r - μ J φ')            the part of the last step that new samples don't see

All are one δ = (G + λ I)^-1 g (the push-through identity). Both matrices come in as they are; `factorize` adds the
damping. The condition number of K is that of J squared, and dampings of use are 1e-8 to 1e-12 of its trace: hence
float64 whatever the network computes in.

Failures are data, as in `secondorder.linalg`: nothing raises, `Factor.ok` is False, a solution is then zero, and the
caller keeps its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from secondorder import linalg

DAMPING_KINDS = ("absolute", "relative", "adaptive")


@dataclass(frozen=True)
class Factor:
    """A + λ I of a symmetric positive semidefinite A `(n, n)`, decomposed.

    Attributes:
        triangle: L with `L Lᵀ = A + λ I`, lower, float64 `(n, n)`; None where Cholesky failed.
        eigenvalues: Of A, clamped at 0, `(n,)`; None where Cholesky succeeded.
        basis: Its eigenvectors as columns `(n, n)`; None where Cholesky succeeded.
        damping: λ, a 0-dim float64 tensor.
        ok: 0-dim boolean tensor on the device: A is finite and was decomposed.
    """

    triangle: Tensor | None
    eigenvalues: Tensor | None
    basis: Tensor | None
    damping: Tensor
    ok: Tensor

    def solve(self, v: Tensor) -> Tensor:
        """`(A + λ I)^-1 v`.

        Without damping a singular A is inverted on its range: the shortest least-squares solution (the G⁺ of Müller and
        Zeinhofer 2023, arXiv:2302.13163).

        Args:
            v: One vector `(n,)` or columns `(n, k)`, any floating dtype.

        Returns:
            The same shape in the dtype of `v`, computed in float64; zeros where the factor is not ok.
        """
        columns = linalg.wide(v if v.ndim == 2 else v[:, None])
        if self.triangle is not None:
            x = torch.cholesky_solve(columns, self.triangle)
        else:
            assert self.basis is not None
            x = self.basis @ (self._inverse()[:, None] * (self.basis.mT @ columns))
        return torch.where(self.ok, x, 0.0).reshape(v.shape).to(v.dtype)

    def effective_dimension(self) -> Tensor:
        """`tr A (A + λ I)^-1`: how many directions the data determine against the damping, from 0 to rank A.

        From a Cholesky factor it is `n - λ |L^-1|²`, of relative accuracy eps · |A| / λ.

        Returns:
            A 0-dim float64 tensor; 0 where the factor is not ok.
        """
        if self.triangle is not None:
            identity = torch.eye(len(self.triangle), dtype=self.triangle.dtype, device=self.triangle.device)
            inverse = torch.linalg.solve_triangular(self.triangle, identity, upper=False)
            dimension = (len(inverse) - self.damping * inverse.square().sum()).clamp_min(0.0)
        else:
            assert self.eigenvalues is not None
            dimension = (self.eigenvalues * self._inverse()).sum()
        return torch.where(self.ok, dimension, 0.0)

    def _inverse(self) -> Tensor:
        """Eigenvalues of the inverse; without damping 0 for those that are rounding errors."""
        assert self.eigenvalues is not None
        eps = torch.finfo(self.eigenvalues.dtype).eps
        noise = torch.where(self.damping > 0, 0.0, len(self.eigenvalues) * eps * self.eigenvalues.amax())
        damped = self.eigenvalues + self.damping
        return torch.where(damped > noise, damped.reciprocal(), 0.0)


def factorize(A: Tensor, damping: Tensor | float) -> Factor:
    """Decompose A + λ I by Cholesky, or by eigenvalues clamped at 0 where that fails.

    Clamping is what makes a kernel usable whose smallest eigenvalues are rounding errors below -λ (Goldshlager,
    Abrahamsen and Lin 2024, arXiv:2401.10190, needed it on GPUs). Whether Cholesky failed is the one value read on the
    host: an eigendecomposition costs tens of times more, and is not computed in case.

    Args:
        A: Symmetric positive semidefinite `(n, n)`, float32 or float64, the damping not added: the kernel `J Jᵀ` or the
            Gramian `Jᵀ J`. Not changed.
        damping: λ >= 0.

    Returns:
        The factor, in float64 where the device has it.

    Raises:
        ValueError: If `A` is not a square matrix.
    """
    if A.ndim != 2 or A.shape[0] != A.shape[1] or not len(A):
        raise ValueError(f"factorize takes a non-empty square matrix (n, n), got shape {tuple(A.shape)}")
    A = linalg.wide(A)
    shift = torch.as_tensor(damping, dtype=A.dtype, device=A.device)
    diagonal = A.diagonal().clone()
    A.diagonal().add_(shift)  # for a moment: N² numbers less than a copy
    triangle, info = torch.linalg.cholesky_ex(A)
    A.diagonal().copy_(diagonal)
    if int(info) == 0:
        return Factor(triangle, None, None, shift, torch.isfinite(triangle).all())
    eigenvalues, basis, ok = linalg.eigh(A[None])
    return Factor(None, eigenvalues[0].clamp_min(0.0), basis[0], shift, ok[0] & torch.isfinite(shift))


def damping_of(kind: str, damping: float, trace: Tensor, n: int) -> Tensor:
    """λ of one step.

        absolute:            λ = damping
        relative, adaptive:  λ = damping · tr(K) / N

    The trace of the kernel grows by factors of 70 to 10⁴ while a PINN trains, so an absolute damping that suits the
    first steps is none in the last. An adaptive damping is a relative one of a ladder (`residuals.ladder`).

    Args:
        kind: "absolute", "relative" or "adaptive".
        damping: The factor; >= 0.
        trace: tr(J Jᵀ) = tr(Jᵀ J), 0-dim.
        n: N, the number of residuals, also in the primal form.

    Returns:
        λ, a 0-dim float64 tensor on the device of the trace.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in DAMPING_KINDS:
        raise ValueError(f"damping kind must be one of {', '.join(DAMPING_KINDS)}, got {kind!r}")
    trace = linalg.wide(trace)
    return torch.full_like(trace, damping) if kind == "absolute" else damping / n * trace


def solve_grad(
    g: Sequence[Tensor],
    factor: Factor,
    jvp: Callable[[Sequence[Tensor]], Tensor],
    vjp: Callable[[Tensor], Sequence[Tensor]],
) -> list[Tensor]:
    """`(Jᵀ J + λ I)^-1 g` of any gradient by a factor of the kernel: `(g - Jᵀ (J Jᵀ + λ I)^-1 J g) / λ`.

    For losses that are not least squares: with the Hessian `Λ = L Lᵀ` of a convex loss in the network's outputs the
    rows are `J̃ = Lᵀ J`, and g need not lie in their range. The difference cancels, to a relative error of
    eps · |J|² / λ in the precision of the products: a g that is `Jᵀ r` is better solved as `Jᵀ (J Jᵀ + λ I)^-1 r`.

    Args:
        g: Gradient, one tensor a parameter.
        factor: Of the kernel J Jᵀ `(N, N)`, with positive damping.
        jvp: One tensor a parameter -> J x `(N,)`.
        vjp: u `(N,)` -> Jᵀ u, one tensor a parameter.

    Returns:
        One tensor a parameter, in the dtypes of g; zeros where the factor is not ok.
    """
    inside = vjp(factor.solve(jvp(g)))
    return [
        torch.where(factor.ok, (linalg.wide(part) - linalg.wide(seen)) / factor.damping, 0.0).to(part.dtype)
        for part, seen in zip(g, inside, strict=True)
    ]


def spring(
    r: Tensor,
    direction: Callable[[Tensor], Sequence[Tensor]],
    momentum: float,
    phi: Sequence[Tensor] | None = None,
    J_phi: Tensor | None = None,
) -> list[Tensor]:
    """SPRING's increment: the minimiser of `|J φ + r|² + λ |φ - μ φ'|²`.

        φ = μ φ' + Jᵀ (J Jᵀ + λ I)^-1 (-r - μ J φ')

    With μ = 0 it is the energy natural gradient step. Goldshlager, Abrahamsen and Lin, *A Kaczmarz-inspired approach to
    accelerate the optimization of neural network wavefunctions* (2024, arXiv:2401.10190); for PINNs
    Guzmán-Cordero et al. (2025, arXiv:2505.12149).

    Args:
        r: Residual `(N,)`.
        direction: u `(N,)` -> `Jᵀ (J Jᵀ + λ I)^-1 u = (Jᵀ J + λ I)^-1 Jᵀ u`, one tensor a parameter: in the dual form
            `vjp(factor.solve(u))`.
        momentum: μ, 0 <= μ < 1.
        phi: The last increment φ', one tensor a parameter; None: 0.
        J_phi: J φ' `(N,)`, at this step's samples; needed with `phi`.

    Returns:
        φ: to be added to the parameters, and to be kept as it is, without learning rate, cap and bias correction.

    Raises:
        ValueError: If only one of `phi` and `J_phi` is given.
    """
    if (phi is None) != (J_phi is None):
        raise ValueError("spring needs both of phi and J_phi, or neither")
    if phi is None or J_phi is None:
        return list(direction(-r))
    return [part + momentum * last for part, last in zip(direction(-r - momentum * J_phi), phi, strict=True)]


def bias_correction(momentum: float, step: int) -> float:
    """`1 / √(1 - μ^2k)`, by which the k-th increment (from 1) is multiplied, never what is kept of it.

    As the PINN variant of SPRING has it (Guzmán-Cordero et al. 2025, arXiv:2505.12149).
    """
    return 1 / math.sqrt(1 - momentum ** (2 * step))


def capped(lr: float | Tensor, norm: Tensor, limit: float | Tensor) -> Tensor:
    """The learning rate with which a step of length `norm` stays within the limit: `min(lr, limit / norm)`.

    Args:
        lr: Learning rate.
        norm: |φ|, 0-dim. The papers take φ before its bias correction.
        limit: Greatest length: √C in the papers, or a share of |θ|, which does not depend on the network's size.

    Returns:
        0-dim, in the dtype of `norm`; `lr` for a step of length 0.
    """
    within = limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    return torch.minimum(torch.as_tensor(lr, dtype=norm.dtype, device=norm.device), within)


class Solution(NamedTuple):
    """What conjugate gradients reached.

    Attributes:
        x: The iterate with which they stopped `(n,)`.
        residual: `|b - A x| / |b|` by the recursion, 0-dim; the caller compares it with its tolerance.
        iterations: Those that changed x, a 0-dim integer tensor.
    """

    x: Tensor
    residual: Tensor
    iterations: Tensor


def conjugate_gradients(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    precondition: Callable[[Tensor], Tensor] | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 100,
    start: Tensor | None = None,
    decrease: float = 0.0,
) -> Solution:
    """Solve `A x = b` for a symmetric positive definite A that is known by its products.

    A damping is part of `matvec`. They also stop, with what they have, at a direction of no curvature. On a CPU the
    loop ends there; other devices run all iterations, which change nothing any more, and are not read.

    Args:
        matvec: x `(n,)` -> A x.
        b: Right-hand side `(n,)`; all is computed in its dtype.
        precondition: Approximately x -> A^-1 x, symmetric positive definite and the same in all iterations; None: x.
        tolerance: Of `|b - A x| / |b|`.
        max_iterations: After them x is what it is.
        start: A guess x' `(n,)`, of which the best multiple is taken: one product more. None: from x = 0.
        decrease: They stop as well when over k = max(10, i / 10) iterations the model ½ xᵀ A x - bᵀ x fell by less than
            k times this, relative to itself: Martens, *Deep learning via Hessian-free optimization* (2010), has 5e-4.

    Returns:
        x, its relative residual and the iterations.
    """
    tiny = torch.finfo(b.dtype).tiny
    apply = precondition if precondition is not None else torch.clone
    size = torch.linalg.vector_norm(b).clamp_min(tiny)
    x, rest = torch.zeros_like(b), b.clone()
    if start is not None:
        As = matvec(start)
        share = (b @ start) / (start @ As)
        share = torch.where(torch.isfinite(share), share, 0.0)
        x, rest = share * start.nan_to_num(), b - share * As.nan_to_num()
    z = apply(rest)
    p, rz = z, rest @ z
    iterations = torch.zeros((), dtype=torch.int64, device=b.device)
    active = torch.linalg.vector_norm(rest) > tolerance * size
    model = [-0.5 * (x @ (b + rest))]
    for i in range(1, max_iterations + 1):
        if _readable(active) and not active:
            break
        Ap = matvec(p)
        curvature = p @ Ap
        active = active & (curvature > 0) & torch.isfinite(curvature)
        alpha = torch.where(active, rz / curvature, 0.0)
        x, rest = torch.where(active, x + alpha * p, x), torch.where(active, rest - alpha * Ap, rest)
        iterations = iterations + active
        z = apply(rest)
        rz, last = torch.where(active, rest @ z, rz), rz
        p = torch.where(active, z + rz / last * p, p)
        active = active & (torch.linalg.vector_norm(rest) > tolerance * size)
        if decrease:
            model.append(-0.5 * (x @ (b + rest)))
            k = max(10, i // 10)
            if i >= k:
                active = active & (model[i - k] - model[i] > -k * decrease * model[i])
    return Solution(x, torch.linalg.vector_norm(rest) / size, iterations)


def _readable(flag: Tensor) -> bool:
    """Whether the host reads a value without waiting for the device."""
    return flag.device.type == "cpu"
