"""ENGDW: energy natural gradient descent by the Woodbury identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from typing_extensions import Unpack

from secondorder._optimizer import Group
from secondorder._residual_optimizer import Remembering, ResidualOptimizer, ResidualOptions
from secondorder.preconditioner.protocol import Method
from secondorder.residuals.linearization import Linearization
from secondorder.residuals.system import System


class ENGDW(ResidualOptimizer):
    """ENGD-W: damped Gauss-Newton steps of a least-squares loss, exact, with a line search.

    With all residuals r `(N,)` of the batch and their Jacobian J `(N, D)`, loss ½ |r|²:

        δ = -(Jᵀ J + λ I)^-1 Jᵀ r = -Jᵀ (J Jᵀ + λ I)^-1 r        the first where D < N, else the second
        p <- (1 - lr · weight_decay) p
        p <- p + α δ + α² a                                       α by looking at the loss along this parabola

    where a = -½ (Jᵀ J + λ I)^-1 Jᵀ r_δδ follows the curvature of r along δ, from one more evaluation.

    The closure returns residuals, and calls no backward:

        def closure():
            return {"pde": u_xx + u_yy + f, "boundary": u_b - g}

        optimizer.step(closure)

    For physics-informed networks Jᵀ J is the Gram matrix of the energy's tangent functions, and δ a natural gradient in
    function space. An exact step costs about N² D or N D², and min(N, D)³. On a fixed batch, without weight decay, a
    step with a line search never increases the loss.

    Source: Guzmán-Cordero et al., *Improving Energy Natural Gradient Descent through Woodbury, Momentum, and
    Randomization* (2025, arXiv:2505.12149); Müller and Zeinhofer, *Achieving High Accuracy with PINNs via Energy
    Natural Gradient Descent* (2023, arXiv:2302.13163). a: Transtrum and Sethna, *Improvements to the
    Levenberg-Marquardt algorithm for nonlinear least-squares minimization* (2012, arXiv:1201.5885). Deviations: in the
    papers on natural gradients a = 0, λ is absolute, and α the best of 31 (`line_search="grid"`).

    On their Poisson problem (2-64-1, 900 + 120 points) the defaults reach a relative L2 error of 1e-4 in 24 steps and
    1e-6 in 26: medians of four initializations; of four others 26 and 56. With `damping_kind="relative"` it is 30 and
    53, with `line_search="bracket"` 24.5 and, from two of the four, 28 (`recipes/benchmark_pinn.py`).

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs. All groups share one system: they
            may differ in `lr` and `weight_decay`.
        lr: Multiplies the step size that the search finds (a multiple that increases the loss is taken as 1); without a
            search it is the step size. A number or a 1-element tensor. Default: 1.
        line_search: "geodesic": halve or double the last step's α while the loss falls along the parabola, about four
            evaluations; "bracket": the same with a = 0; "grid": a = 0 and the best of 2^-30, …, 1; None: a = 0, α = 1.
            Default: "geodesic".
        damping: λ, or what it is made of; of an adaptive one the first. None: relative 1e-10 where all parameters are
            float64, else 1e-6, below which the rounding of float32 products decides the direction; adaptive 1e-6 or
            1e-4. Default: None.
        damping_kind: "absolute": λ = damping; "relative": λ = damping · tr(J Jᵀ) / N; "adaptive": the same, and where
            there is a search two dampings compete in every step, see `residuals.ladder`: one more decomposition and
            search, and the damping goes where it has to, between 1e-11 (float32: 1e-7) and 1e-2, or a first above that.
            Default: "adaptive".
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

    def __init__(
        self,
        params: Any,
        lr: Any = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        line_search: Literal["geodesic", "bracket", "grid"] | None = "geodesic",
        damping: float | None = None,
        damping_kind: Literal["absolute", "relative", "adaptive"] = "adaptive",
        form: Literal["auto", "primal", "dual", "layerwise"] = "auto",
        solver: Literal["cholesky", "nystrom", "cg"] = "cholesky",
        rank: int | None = None,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        **options: Unpack[ResidualOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, line_search=line_search, damping=damping)
        own |= dict(damping_kind=damping_kind, form=form, solver=solver, rank=rank)
        super().__init__(params, own, options)

    def _method(self, group: Group) -> Method:
        return Remembering("increment" if group["solver"] == "cg" else None)

    def _increment(self, linear: Linearization, system: System, step: int) -> Sequence[Tensor]:
        entries = [self.state[p] for p in self._layout.params]
        last = [entry["increment"] for entry in entries] if "increment" in entries[0] else None
        return system.apply(-linear.residual, last)

    def _keep(self, increment: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        for p, part in zip(params, increment, strict=True):
            if "increment" in self.state[p]:
                self.state[p]["increment"].copy_(part)
