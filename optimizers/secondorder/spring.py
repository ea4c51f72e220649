"""SPRING: energy natural gradients that remember the last step where this step's samples say nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from secondorder._options import Option, is_beta, is_bool, is_positive, one_of, optional
from secondorder._residual_optimizer import RESIDUAL, SYSTEM, ResidualOptimizer, ResidualOptions
from secondorder._residual_step import norm
from secondorder.linalg import wide
from secondorder.residuals.linearization import Linearization
from secondorder.residuals.solve import bias_correction, capped, spring
from secondorder.residuals.system import System

MOST = 0.999  # of an adaptive μ


class SPRING(ResidualOptimizer):
    """SPRING: damped Gauss-Newton steps on small fresh batches, with momentum in the directions they do not see.

    With all residuals r `(N,)` of the batch and their Jacobian J `(N, D)`, at the k-th step:

        μ  = <a, φ> / <b, φ>,  a = -P r,  b = P J φ,  P = Jᵀ (J Jᵀ + λ I)^-1
        φ <- μ φ + P (-r - μ J φ)                               minimizes |J φ + r|² + λ |φ - μ φ'|², φ' the last one
        η  = min(lr, √norm_constraint |p| / |φ|)
        p <- (1 - lr · weight_decay) p
        p <- p + η φ

    μ, between 0 and 0.999, is the multiple of φ that fits the new samples best, in the metric (J Jᵀ + λ I)^-1: the part
    of φ that they see decides how much is kept of the part that they do not. It costs one more product by P. With a
    number as `momentum`, the papers' bias correction is applied: p <- p + η φ / √(1 - μ^2k).

    The closure returns residuals, and calls no backward: see `ENGDW`. Batches are to be drawn afresh for every step,
    outside of the closure or in it (by torch's global generator, which repeats itself within a step).

    Source: Goldshlager, Abrahamsen and Lin, *A Kaczmarz-inspired approach to accelerate the optimization of neural
    network wavefunctions* (2024, arXiv:2401.10190); for PINNs, with the bias correction, Guzmán-Cordero et al. (2025,
    arXiv:2505.12149). Deviations: μ, a cap relative to |p|, a relative damping. The papers' defaults: lr=0.05,
    momentum=0.99, damping=1e-3, damping_kind="absolute", norm_constraint=1e-3, norm_constraint_kind="absolute".

    On 150 + 50 fresh points a step (Poisson, 2-64-64-48-48-1) the defaults reach a relative L2 error of 1e-4 in 115 and
    119 steps (two initializations); with the papers' kinds and values tuned (lr=0.1, momentum=0.9, damping=1e-6,
    norm_constraint=1e-2) it takes 143 and 159, with their defaults the error is still 0.6 after 240.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs. All groups share one system: they
            may differ in `lr` and `weight_decay`.
        lr: Step size; with a line search it multiplies what that finds. A number or a 1-element tensor. Default: 0.1.
        line_search: None, or as of `ENGDW`: then nothing is capped. Default: None.
        damping: λ, or what it is made of. None: 1e-8 where all parameters are float64, else 1e-6. Default: None.
        damping_kind: "absolute": λ = damping; "relative": λ = damping · tr(J Jᵀ) / N; "adaptive": the same, and with a
            search two dampings compete in every step, as of `ENGDW`. Default: "relative".
        momentum: μ, in [0, 1), or "adaptive". Default: "adaptive".
        norm_constraint: Greatest squared length of a step, before its bias correction; None: no limit. Default: 1e-3.
        norm_constraint_kind: "absolute", or "relative": in units of |p|², all parameters together. Default: "relative".
        bias_correction: Whether φ is divided by √(1 - μ^2k), where μ is a number. Default: True.
        form: "primal": JᵀJ (D, D); "dual": J Jᵀ (N, N); "auto": the smaller one; "layerwise": JᵀJ without what
            couples different layers. Default: "auto".
        solver: "cholesky": exact; "nystrom": with a sketch of J Jᵀ, which is then not formed; "cg": conjugate gradients
            with products by J alone. The last two need form "auto". Default: "cholesky".
        rank: Columns of the sketch; from N / 3 on, the solution is exact. None: twice the effective dimension of the
            last step; for "cg" no sketch, else the one that preconditions it. Default: None.
        weight_decay: Strength of decoupled weight decay. Default: 0.
        betas: Decay rates of AdamW, where the closure returns a loss. Default: (0.9, 0.999).
        eps: Its epsilon. Default: 1e-8.
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    shared_options = {**RESIDUAL, "fallback_lr_scale": RESIDUAL["fallback_lr_scale"]._replace(default=0.01)}
    own_options = {
        **SYSTEM,
        "momentum": Option(0.99, "'adaptive' or a number in [0, 1)", lambda v: v == "adaptive" or is_beta(v), ""),
        "norm_constraint": Option(1e-3, "None or a number > 0", optional(is_positive), ""),
        "norm_constraint_kind": Option("relative", *one_of("absolute", "relative"), ""),
        "bias_correction": Option(True, "True or False", is_bool, ""),
    }
    memory = "phi"
    exact_damping = 1e-8

    def __init__(
        self,
        params: Any,
        lr: Any = 0.1,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        line_search: Literal["geodesic", "bracket", "grid"] | None = None,
        damping: float | None = None,
        damping_kind: Literal["absolute", "relative", "adaptive"] = "relative",
        momentum: float | Literal["adaptive"] = "adaptive",
        norm_constraint: float | None = 1e-3,
        norm_constraint_kind: Literal["absolute", "relative"] = "relative",
        bias_correction: bool = True,
        form: Literal["auto", "primal", "dual", "layerwise"] = "auto",
        solver: Literal["cholesky", "nystrom", "cg"] = "cholesky",
        rank: int | None = None,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        **options: Unpack[ResidualOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, line_search=line_search, damping=damping)
        own |= dict(damping_kind=damping_kind, momentum=momentum, norm_constraint=norm_constraint, form=form)
        own |= dict(
            solver=solver, rank=rank, norm_constraint_kind=norm_constraint_kind, bias_correction=bias_correction
        )
        super().__init__(params, own, options)

    def _increment(self, linear: Linearization, system: System, step: int) -> Sequence[Tensor]:
        momentum = self.param_groups[0]["momentum"]
        if step == 1 or momentum == 0:
            return system.apply(-linear.residual)
        phi = [self.state[p]["phi"] for p in self._layout.params]
        J_phi = linear.jvp(phi)
        if momentum != "adaptive":
            return spring(linear.residual, system.apply, momentum, phi, J_phi)
        new, seen = system.apply(-linear.residual), system.apply(J_phi)
        kept = _agreement(new, seen, phi)
        return [a + kept.to(a.dtype) * (last - b) for a, b, last in zip(new, seen, phi, strict=True)]

    def _keep(self, increment: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        for p, part in zip(params, increment, strict=True):
            self.state[p]["phi"].copy_(part)

    def _factor(self, lr: float, length: Tensor, step: int) -> Tensor | float:
        hp = self.param_groups[0]
        factor: Tensor | float = lr
        if hp["norm_constraint"] is not None:
            limit: Tensor | float = math.sqrt(hp["norm_constraint"])
            if hp["norm_constraint_kind"] == "relative":
                limit = limit * norm(self._layout.params)
            factor = capped(lr, length, limit)
        corrected = hp["bias_correction"] and hp["momentum"] != "adaptive"
        return factor * bias_correction(hp["momentum"], step) if corrected else factor


def _agreement(new: Sequence[Tensor], seen: Sequence[Tensor], phi: Sequence[Tensor]) -> Tensor:
    """`<a, φ> / <b, φ>`, at most `MOST`; 0 where the samples see nothing of φ, or contradict it."""

    def product(parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([(wide(x) * wide(f)).sum() for x, f in zip(parts, phi, strict=True)]).sum()

    a, b = product(new), product(seen)
    return torch.where(b > 0, a / b, 0.0).clamp(0.0, MOST)
