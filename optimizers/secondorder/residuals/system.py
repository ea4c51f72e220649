"""The damped system of a step, decomposed in float64: which matrix, how it is solved, the same with another damping.

(Jᵀ J + λ I)^-1 Jᵀ u = Jᵀ (J Jᵀ + λ I)^-1 u
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.residuals.linearization import Linearization
from secondorder.residuals.nystrom import gaussian, nystrom, preconditioned, rank_for
from secondorder.residuals.solve import Factor, conjugate_gradients, damping_of, factorize

Form = Literal["auto", "primal", "dual", "layerwise"]
Solver = Literal["cholesky", "nystrom", "cg"]
FORMS, SOLVERS = get_args(Form), get_args(Solver)
ITERATIONS, TOLERANCE, DECREASE = 100, 1e-6, 5e-4  # of conjugate gradients


@dataclass(frozen=True)
class System:
    """`(Jᵀ J + λ I)^-1 Jᵀ`, or an approximation.

    Attributes:
        solve: u `(N,)` and a guess of the product -> the product, one tensor a parameter.
        damping: λ, 0-dim; of layers' systems the largest.
        ok: 0-dim boolean: it could be decomposed.
        factors: What was decomposed.
        rank: Columns of the sketch; 0: it was not sketched.
        again: Factor of another λ -> the same system with that; None: there is no other.
    """

    solve: Callable[[Tensor, Sequence[Tensor] | None], list[Tensor]]
    damping: Tensor
    ok: Tensor
    factors: Sequence[Factor] = ()
    rank: int = 0
    again: Callable[[float], System] | None = None

    def apply(self, u: Tensor, start: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The product with u `(N,)`, one tensor a parameter.

        Args:
            u: Vector.
            start: A guess, the last step's say, where conjugate gradients begin; others need none.
        """
        return self.solve(u, start)

    def effective_dimension(self) -> Tensor | None:
        """`tr K (K + λ I)^-1`, 0-dim, of layers' systems their sum; of a sketch a lower bound. A triangular inverse.

        None where nothing was decomposed.
        """
        return torch.stack([factor.effective_dimension() for factor in self.factors]).sum() if self.factors else None


def system(
    linear: Linearization,
    params: Sequence[Tensor],
    damping: float,
    kind: str,
    form: Form = "auto",
    solver: Solver = "cholesky",
    rank: int | None = None,
    *,
    dimension: float | None = None,
    step: int = 0,
) -> System:
    """Build and decompose what a step solves with, in float64.

    Args:
        linear: r and J.
        params: What J is with respect to.
        damping: Factor of λ.
        kind: See `solve.damping_of`.
        form: "primal": JᵀJ `(D, D)`; "dual": J Jᵀ `(N, N)`; "auto": the smaller one; "layerwise": the block diagonal of
            JᵀJ by layers, each of them in the smaller form.
        solver: "cholesky": exact; "nystrom": with a sketch of J Jᵀ, which is not formed; "cg": with products alone, by
            conjugate gradients. The last two take form "auto".
        rank: "nystrom": columns of the sketch; more than N / 3 are no cheaper than "cholesky", which takes their place.
            None: by `dimension`. "cg": of the sketch that preconditions the dual system; None: the primal system as it
            is, from a guess, until its model of the loss hardly falls.
        dimension: Effective dimension of the last step; None: unknown, then a sketch has N / 10 columns.
        step: Seed of the sketch.

    Raises:
        ValueError: If form or solver are not allowed, alone or together.
    """
    if form not in FORMS or solver not in SOLVERS or (solver != "cholesky" and form != "auto"):
        raise ValueError(
            f"form must be one of {', '.join(FORMS)}, and 'auto' unless solver is 'cholesky'; solver one of "
            f"{', '.join(SOLVERS)}; got form={form!r}, solver={solver!r}"
        )

    def again(damping: float) -> System:
        return system(linear, params, damping, kind, form, solver, rank, dimension=dimension, step=step)

    N = len(linear.residual)
    if form == "layerwise":
        return _by_layers(linear, params, damping, kind)
    if solver == "nystrom" and rank is None:
        rank = max(1, N // 10) if dimension is None else rank_for(dimension, N)
    if solver == "cholesky" or (solver == "nystrom" and (rank is None or 3 * rank > N)):
        return _exact(linear, params, damping, kind, form)
    shift = damping_of(kind, damping, linear.trace(), N)
    if rank is None:
        return System(_primal_gradients(linear, params, shift), shift, torch.isfinite(shift), again=again)
    omega = gaussian(N, min(rank, N), torch.Generator().manual_seed(step)).to(linear.residual.device)
    sketch = nystrom(linear.apply_kernel, omega, shift, shift / 10)

    def preconditioned_gradients(u: Tensor) -> Tensor:
        return preconditioned(lambda x: linear.jvp(linear.vjp(x)), u, sketch, TOLERANCE, ITERATIONS).x

    inverse = sketch.solve if solver == "nystrom" else preconditioned_gradients
    return System(
        lambda u, start: _like(_flat(linear.vjp(inverse(linalg.wide(u)))), params),
        shift,
        sketch.ok,
        [sketch.factor],
        rank if solver == "nystrom" else 0,
        again,
    )


def _exact(linear: Linearization, params: Sequence[Tensor], damping: float, kind: str, form: Form) -> System:
    n, sizes = len(linear.residual), [p.numel() for p in params]
    primal = form == "primal" or (form == "auto" and sum(sizes) < n)
    dtype = linalg.wide(linear.residual[:0]).dtype
    matrix = linear.normal(dtype) if primal else linear.kernel(dtype)

    def damped(damping: float) -> System:
        shift = damping_of(kind, damping, matrix.trace(), n)
        factor = factorize(matrix, shift)

        def dual(u: Tensor, start: Any) -> list[Tensor]:
            return _like(_flat(linear.vjp(factor.solve(linalg.wide(u)))), params)

        def through_parameters(u: Tensor, start: Any) -> list[Tensor]:
            # In float64 from the first product on: what rounding adds outside of the range of Jᵀ is divided by λ.
            return _like(factor.solve(_flat(linear.vjp(linalg.wide(u)))), params)

        return System(through_parameters if primal else dual, shift, factor.ok, [factor], again=damped)

    return damped(damping)


def _by_layers(linear: Linearization, params: Sequence[Tensor], damping: float, kind: str) -> System:
    def together(systems: Sequence[System]) -> System:
        def solve(u: Tensor, start: Any) -> list[Tensor]:
            found: dict[int, Tensor] = {}
            for layer, one in zip(linear.groups, systems, strict=True):
                found.update(zip(layer, one.apply(u), strict=True))
            return [found[i] for i in range(len(params))]

        def again(damping: float) -> System:
            return together([one.again(damping) for one in systems if one.again is not None])

        shifts, oks = torch.stack([one.damping for one in systems]), torch.stack([one.ok for one in systems])
        factors = [factor for one in systems for factor in one.factors]
        return System(solve, shifts.amax(), oks.all(), factors, again=again)

    own = [[params[i] for i in layer] for layer in linear.groups]
    pairs = zip(linear.groups, own, strict=True)
    return together([_exact(linear.restricted(layer), some, damping, kind, "auto") for layer, some in pairs])


def _primal_gradients(
    linear: Linearization, params: Sequence[Tensor], shift: Tensor
) -> Callable[[Tensor, Sequence[Tensor] | None], list[Tensor]]:
    """Conjugate gradients for `(Jᵀ J + λ I) x = Jᵀ u`: two products an iteration."""

    def damped(x: Tensor) -> Tensor:
        return _flat(linear.vjp(linear.jvp(_like(x, params)))) + shift * x

    def solve(u: Tensor, start: Sequence[Tensor] | None) -> list[Tensor]:
        guess = None if start is None else _flat(start)
        found = conjugate_gradients(
            damped, _flat(linear.vjp(linalg.wide(u))), None, TOLERANCE, ITERATIONS, start=guess, decrease=DECREASE
        )
        return _like(found.x, params)

    return solve


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([linalg.wide(part).flatten() for part in parts])


def _like(x: Tensor, params: Sequence[Tensor]) -> list[Tensor]:
    """`(D,)` as one tensor a parameter, in its shape and dtype."""
    parts = x.split([p.numel() for p in params])
    return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, params, strict=True)]
