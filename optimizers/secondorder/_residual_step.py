"""One step by residuals, without parameters' groups and state: evaluations, the damped system, and the step size.

    straight   L(θ + α δ)
    geodesic   L(θ + α δ + α² a),  a = -½ (Jᵀ J + λ I)^-1 Jᵀ r_δδ,  r_δδ = d²r/dα² (θ + α δ) at α = 0

The second is the parabola that follows r(θ) + α J δ to second order, wherever J can: a Gauss-Newton direction at tiny
damping is long in directions that r hardly depends on, and it is their curvature that limits a straight step. r_δδ is
a finite difference of one more evaluation, and the system is solved as it stands. Transtrum, Machta and Sethna, *Why
are nonlinear fits so challenging?* (2010, arXiv:0909.3884); Transtrum and Sethna, *Improvements to the
Levenberg-Marquardt algorithm for nonlinear least-squares minimization* (2012, arXiv:1201.5885).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.curvature.capture import all_reduced
from secondorder.residuals.line_search import START, Found, bracket, grid
from secondorder.residuals.linearization import Linearization
from secondorder.residuals.nystrom import gaussian, nystrom, preconditioned, rank_for
from secondorder.residuals.solve import Factor, conjugate_gradients, damping_of, factorize
from secondorder.residuals.terms import Terms, residual_terms
from secondorder.sharding.samples import Spread, unsynchronized

Form = Literal["auto", "primal", "dual", "layerwise"]
Solver = Literal["cholesky", "nystrom", "cg"]
FORMS, SOLVERS = get_args(Form), get_args(Solver)
SEARCHES = ("geodesic", "bracket", "grid")
ITERATIONS, TOLERANCE, DECREASE = 100, 1e-6, 5e-4  # of conjugate gradients
_PART = 0.1  # of the last step size: where r_δδ is measured


class Replay:
    """A closure that draws the same random numbers in all its evaluations: points drawn inside it stay where they are.

    They are those of torch's global generators, which are afterwards where one evaluation leaves them. An ambient
    autocast, that of the construction, is the same as well.

    Args:
        closure: What is evaluated.
        devices: Of the parameters.

    Attributes:
        group: Processes whose samples make one loss; None: this one alone.
    """

    group: Any = None

    def __init__(self, closure: Callable[[], Any], devices: set[torch.device]) -> None:
        self._closure = closure
        self._devices = [d for d in devices if d.type == "cuda"]
        self._device = next(iter([*self._devices, *devices]), None)
        self._states: list[Tensor] | None = None
        kinds = [kind for kind in {d.type for d in devices} if torch.amp.is_autocast_available(kind)]
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in sorted(kinds)
        ]

    def __call__(self) -> Any:
        """What the closure returns."""
        if self._states is None:
            self._states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]
        else:
            torch.set_rng_state(self._states[0])
            for device, state in zip(self._devices, self._states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            return self._closure()

    def terms(self) -> Terms:
        """The residuals at the parameters as they are, with their graph; of a group, every process must ask.

        Raises:
            TypeError: If this time the closure returns a loss.
            Exception: What the closure raises.
            RuntimeError: If it raises on another process.
        """
        if self.group is None:
            return self._terms()
        terms, fault = None, None
        try:
            terms = self._terms()
        except Exception as error:
            fault = error
        (failed,) = all_reduced([torch.tensor(float(terms is None), device=self._device)], self.group)
        if fault is not None:
            raise fault
        if terms is None or failed > 0:
            raise RuntimeError("the closure raised on another process while a step size was searched")
        return Spread.of(terms, self.group)

    def _terms(self) -> Terms:
        # Residuals contain derivatives by inputs; and a compiled graph rounds differently from the one that J is of.
        with torch.enable_grad(), unsynchronized(), torch.compiler.set_stance("force_eager"):
            terms = residual_terms(self())
        if terms is None:
            raise TypeError("closure must return residuals in all evaluations of a step, got a loss")
        return terms


@dataclass(frozen=True)
class Evaluation:
    """A residual closure at the parameters before the step.

    Attributes:
        closure: To evaluate it again.
        linear: r and J.
        loss: ½ |r|², 0-dim, computed as those that it is compared with.
    """

    closure: Replay
    linear: Linearization
    loss: Tensor


@dataclass(frozen=True)
class System:
    """`(Jᵀ J + λ I)^-1 Jᵀ`, or an approximation.

    Attributes:
        solve: u `(N,)` and a guess of the product -> the product, one tensor a parameter.
        damping: λ, 0-dim; of layers' systems the largest.
        ok: 0-dim boolean: it could be decomposed.
        factors: What was decomposed.
        rank: Columns of the sketch; 0: it was not sketched.
    """

    solve: Callable[[Tensor, Sequence[Tensor] | None], list[Tensor]]
    damping: Tensor
    ok: Tensor
    factors: Sequence[Factor] = ()
    rank: int = 0

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
    N = len(linear.residual)
    if form == "layerwise":
        return _by_layers(linear, params, damping, kind)
    if solver == "nystrom" and rank is None:
        rank = max(1, N // 10) if dimension is None else rank_for(dimension, N)
    if solver == "cholesky" or (solver == "nystrom" and (rank is None or 3 * rank > N)):
        return _exact(linear, params, damping, kind, form)
    shift = damping_of(kind, damping, linear.trace(), N)
    if rank is None:
        return System(_primal_gradients(linear, params, shift), shift, torch.isfinite(shift))
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
    )


def _exact(linear: Linearization, params: Sequence[Tensor], damping: float, kind: str, form: Form) -> System:
    n, sizes = len(linear.residual), [p.numel() for p in params]
    primal = form == "primal" or (form == "auto" and sum(sizes) < n)
    dtype = linalg.wide(linear.residual[:0]).dtype
    matrix = linear.normal(dtype) if primal else linear.kernel(dtype)
    shift = damping_of(kind, damping, matrix.trace(), n)
    factor = factorize(matrix, shift)

    def dual(u: Tensor, start: Any) -> list[Tensor]:
        return _like(_flat(linear.vjp(factor.solve(linalg.wide(u)))), params)

    def through_parameters(u: Tensor, start: Any) -> list[Tensor]:
        # In float64 from the first product on: what rounding adds outside of the range of Jᵀ is divided by λ.
        return _like(factor.solve(_flat(linear.vjp(linalg.wide(u)))), params)

    return System(through_parameters if primal else dual, shift, factor.ok, [factor])


def _by_layers(linear: Linearization, params: Sequence[Tensor], damping: float, kind: str) -> System:
    own = [[params[i] for i in layer] for layer in linear.groups]
    systems = [
        _exact(linear.restricted(layer), some, damping, kind, "auto")
        for layer, some in zip(linear.groups, own, strict=True)
    ]

    def solve(u: Tensor, start: Any) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for layer, one in zip(linear.groups, systems, strict=True):
            found.update(zip(layer, one.apply(u), strict=True))
        return [found[i] for i in range(len(params))]

    shifts, oks = torch.stack([one.damping for one in systems]), torch.stack([one.ok for one in systems])
    return System(solve, shifts.amax(), oks.all(), [factor for one in systems for factor in one.factors])


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


class Path:
    """`θ + α δ`, or `θ + α δ + α² a`, in the parameters' own storage.

    Args:
        params: They are θ now.
        increment: δ, one tensor a parameter.
    """

    def __init__(self, params: Sequence[Tensor], increment: Sequence[Tensor]) -> None:
        self._params, self._increment = params, increment
        self._start = [p.detach().clone() for p in params]
        self._acceleration: Sequence[Tensor] | None = None

    def place(self, alpha: float | Tensor, keep: Sequence[float] | None = None) -> None:
        """Put the parameters at α; `keep`: θ is first multiplied by these, one a parameter."""
        for i, (p, start) in enumerate(zip(self._params, self._start, strict=True)):
            # A linearisation that holds a graph is used on, at θ: autograd must not take notice of a visit.
            stored = p.data
            stored.copy_(start)
            if keep is not None and keep[i] != 1:
                stored.mul_(keep[i])
            _add(stored, self._increment[i], alpha)
            if self._acceleration is not None:
                _add(stored, self._acceleration[i], alpha * alpha)

    def leave(self) -> None:
        """Back to θ, bit for bit."""
        for p, start in zip(self._params, self._start, strict=True):
            p.data.copy_(start)

    def bend(self, found: Evaluation, solved: System, last: float, shares: Sequence[float]) -> None:
        """Follow the curvature of r along δ; one evaluation.

        Args:
            found: At θ.
            solved: The system there.
            last: Step size of the last step, 0.0: none.
            shares: What a is multiplied by, one number a parameter.
        """
        h = _PART * (last if last > 0 else START)
        straight = found.linear.jvp(self._increment)
        self.place(h)
        try:
            ahead = found.closure.terms().vector().detach()
        finally:
            self.leave()
        curvature = (2 / h**2) * (ahead - found.linear.residual - h * straight)
        parts = solved.apply(curvature)
        if bool(torch.isfinite(norm(parts))):
            self._acceleration = [part.mul(-0.5 * share) for part, share in zip(parts, shares, strict=True)]

    def search(self, found: Evaluation, kind: str, last: float, lr: float) -> tuple[Found, float]:
        """The step size that a search finds, and the one to be taken.

        Args:
            found: At θ.
            kind: "grid", or another: a bracket.
            last: Step size of the last step, 0.0: none.
            lr: What the step size is multiplied by; not if that raises the loss.

        Returns:
            What was found, its loss that of the step to be taken; and that step.
        """

        def loss_at(alpha: float) -> Tensor:
            self.place(alpha)
            return found.closure.terms().loss().detach()

        try:
            best = grid(loss_at, found.loss) if kind == "grid" else bracket(loss_at, found.loss, last)
            if lr == 1 or best.alpha == 0:
                return best, best.alpha
            loss = loss_at(lr * best.alpha)
        finally:
            self.leave()
        best = best._replace(evaluations=best.evaluations + 1)
        return (best._replace(loss=loss), lr * best.alpha) if bool(loss < found.loss) else (best, best.alpha)


def norm(parts: Sequence[Tensor]) -> Tensor:
    """Euclidean length of all parts together, 0-dim, in float64."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(linalg.wide(part)) for part in parts]))


def _add(p: Tensor, part: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        p.add_((factor * part).to(p.dtype))
    else:
        p.add_(part, alpha=factor)
