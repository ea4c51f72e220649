"""One step by residuals, without parameters' groups and state: evaluations, and how far to go.

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
from typing import Any

import torch
from torch import Tensor

from secondorder import linalg
from secondorder.curvature.capture import all_reduced
from secondorder.residuals.line_search import START, Found, bracket, grid
from secondorder.residuals.linearization import Linearization
from secondorder.residuals.system import System
from secondorder.residuals.terms import Terms, residual_terms
from secondorder.sharding.samples import Spread, unsynchronized

SEARCHES = ("geodesic", "bracket", "grid")
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


@dataclass(frozen=True)
class Attempt:
    """A step that could be taken.

    Attributes:
        damping: λ that it was solved with.
        dimension: Its effective dimension, if that was measured.
        increment: δ, one tensor a parameter.
        length: Of all of δ, 0-dim.
        possible: The system was solved, and δ is finite.
        path: Along δ.
        factor: How far to go along it.
        found: By a search; None: there was none.
        evaluations: Of the closure.
    """

    damping: Tensor
    dimension: Tensor | None
    increment: Sequence[Tensor]
    length: Tensor
    possible: bool
    path: Path
    factor: float | Tensor
    found: Found | None
    evaluations: int


def norm(parts: Sequence[Tensor]) -> Tensor:
    """Euclidean length of all parts together, 0-dim, in float64."""
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(linalg.wide(part)) for part in parts]))


def _add(p: Tensor, part: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        p.add_((factor * part).to(p.dtype))
    else:
        p.add_(part, alpha=factor)
