"""ResidualKFAC: Kronecker-factored Gauss-Newton steps of a residual with differential operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from secondorder._options import Option, is_beta, is_count, is_number, one_of, optional
from secondorder._reports import Coverage, MemoryReport
from secondorder._residual_optimizer import ResidualOptimizer, ResidualOptions
from secondorder.preconditioner.layer_curvature import FACTORS, KEPT, Inverse, agreed, averaged, observed
from secondorder.residuals.columns import by_columns
from secondorder.residuals.layers import Layer, LayerCapture
from secondorder.residuals.linearization import Linearization
from secondorder.residuals.quadratic import best_combination, combined
from secondorder.residuals.system import System

# Not ENGDW's "geodesic": for the curvature of r along a step this inverse is too rough (no progress where measured).
SEARCHES = one_of("bracket", "grid")


class ResidualKFAC(ResidualOptimizer):
    """KFAC for physics-informed networks: a layer's block of JᵀJ as a sum of two Kronecker products, inverted exactly.

    Terms with differential operators (Ω) and all others (∂Ω: boundary, initial values, data) have factors of their own.
    For a layer with inputs Z̄ `(N, S, i + 1)`, whose S columns are the value, its derivatives and the Laplacian, bias as
    last entry, and gradients G `(N, S, o)` of the scaled residuals in its outputs:

        A <- average of mean_n,s z̄ z̄ᵀ       B <- average of Σ_n,s g gᵀ              for Ω and ∂Ω each (ema, debiased)
        Δ  = -(A_Ω ⊗ B_Ω + A_∂Ω ⊗ B_∂Ω)^-1 ∇                                        with damping λ in each factor
        δ  = a Δ + m δ'                                                              δ': the last step
        p <- (1 - lr · weight_decay) p
        p <- p + α δ                                                                 α by looking at the loss

    a and m are those of the exact Gauss-Newton model, ½ |r + J δ|², for two products with J (KFAC*); with a number as
    `momentum`, a = 1 and m is that number. On a fixed batch, without weight decay, a step with a line search never
    increases the loss.

    The closure writes its operators with `secondorder.taylor`, which shows a layer its columns, or as nested
    derivatives by `torch.autograd.grad`:

        def closure():
            u, laplacian = taylor.laplacian(model, x)
            return {"pde": laplacian + f, "boundary": model(x_b) - g}

        optimizer.step(closure)

    Factors of nested derivatives are made of the columns that J has (`residuals.columns`): the same ones, without those
    that the residual does not depend on, but their scales are not known. z̄ and g are made equally long there, A has
    mean eigenvalue 1, and A ⊗ B the trace of the layer's block of JᵀJ. Rows of J by samples are needed; where "expand"
    has none, a ValueError in the first step says why, and ENGDW takes any closure.

    Terms in which no layer has columns of derivatives are of ∂Ω, all others of Ω: a sum of more than two Kronecker
    products has no such inverse. Parameters of no linear layer (coefficients of an inverse problem, slopes of
    activations) have the diagonal of JᵀJ for their block; `coverage()` tells which, after the first step.

    Source: Dangel, Müller and Zeinhofer, *Kronecker-Factored Approximate Curvature for Physics-Informed Neural
    Networks* (2024, arXiv:2405.15603); a and m: Martens and Grosse (2015, arXiv:1503.05671), section 7. Deviations,
    each with the way back: averages are debiased (`init="identity"`), damping is relative (`damping_kind="absolute"`),
    KFAC* has a search behind it (`line_search=None`) and its model no damping. KFAC without star searches 31 step sizes
    there (`momentum=0.0, line_search="grid"`).

    On their Poisson problem (900 + 120 points) the defaults reach a relative L2 error of 1e-2 in 67 to 100 steps with
    9873 parameters (seeds 1 to 4; KFAC* as tuned there: 86 with seed 1), in 109 to 123 with 257 (223); with nested
    derivatives in 83 to 102, and in 106 to 133. A smaller `ema` is faster there, and comes to rest on a plateau of the
    heat equation.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: By what the step size is multiplied, unless that raises the loss; for schedules. Default: 1.0.
        betas: Decay rates of AdamW, where the closure returns a loss. Default: (0.9, 0.999).
        line_search: How α is found: `"bracket"` (from the last one, about three evaluations), `"grid"` (31), or None:
            α = lr. Default: `"bracket"`.
        momentum: `"model"`: a and m as above; or a number in [0, 1). Default: `"model"`.
        damping: λ, or by what a factor's mean eigenvalue is multiplied. Default: 1e-4.
        damping_kind: `"relative"`: λ = damping · mean eigenvalue, of each factor its own; `"absolute"`: λ = damping.
            Default: `"relative"`.
        ema: Decay rate of the factors. Default: 0.95.
        init: From what they start: `"debiased"` (the first step's), `"identity"` or `"zero"`. Default: `"debiased"`.
        sharing: How the columns of a sample count: `"expand"` (each for itself, as above) or `"reduce"` (their mean as
            input, the sum of their gradients; not of nested derivatives). Default: `"expand"`.
        refresh_every: Steps between two looks at factors, and decompositions of them. Default: 1.
        weight_decay: Strength of decoupled weight decay. Default: 0.
        eps: Epsilon of AdamW. Default: 1e-8.
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    own_options = {
        "line_search": Option("bracket", f"None, {SEARCHES[0]}", optional(SEARCHES[1]), ""),
        "damping": Option(1e-4, "a number >= 0", lambda v: is_number(v) and v >= 0, ""),
        "damping_kind": Option("relative", *one_of("relative", "absolute"), ""),
        "momentum": Option(
            "model",
            "'model' or a number in [0, 1)",
            lambda v: v == "model" or (not isinstance(v, str) and is_beta(v)),
            "",
        ),
        "ema": Option(0.95, "a number in [0, 1)", is_beta, ""),
        "init": Option("debiased", *one_of("debiased", "identity", "zero"), ""),
        "sharing": Option("expand", *one_of("expand", "reduce"), ""),
        "refresh_every": Option(1, "an int >= 1", is_count, ""),
    }
    memory = "increment"
    _capture: LayerCapture | None = None  # of the step that is being taken
    _fresh: Mapping[int, dict[str, Tensor]] = {}  # averages that it keeps, if it takes place
    _last: tuple[Inverse, Any, Any, list[Tensor | None]] | None = None  # decomposed, and of what
    _told: Mapping[int, str] = {}

    def __init__(
        self,
        params: Any,
        lr: Any = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        line_search: Literal["bracket", "grid"] | None = "bracket",
        momentum: float | Literal["model"] = "model",
        damping: float = 1e-4,
        damping_kind: Literal["relative", "absolute"] = "relative",
        ema: float = 0.95,
        init: Literal["debiased", "identity", "zero"] = "debiased",
        sharing: Literal["expand", "reduce"] = "expand",
        refresh_every: int = 1,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
        **options: Unpack[ResidualOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, line_search=line_search, momentum=momentum)
        own |= dict(damping=damping, damping_kind=damping_kind, ema=ema, init=init, sharing=sharing)
        super().__init__(params, {**own, "refresh_every": refresh_every}, options)

    # ------------------------------------------------------------------ the increment

    def _increment(self, linear: Linearization, system: System, step: int) -> Sequence[Tensor]:
        new, momentum = system.apply(-linear.residual), self.param_groups[0]["momentum"]
        directions = [new]
        if step > 1 and momentum != 0:
            directions.append([self.state[p]["increment"] for p in self._layout.params])
        if momentum == "model":
            # Of the last step only the direction counts: the model gives it its length.
            c = best_combination([linear.jvp(d) for d in directions], linear.residual)
        else:
            c = torch.tensor([1.0, momentum])[: len(directions)]
        return [combined(c, parts) for parts in zip(*directions, strict=True)]

    def _keep(self, increment: Sequence[Tensor], params: Sequence[Tensor]) -> None:
        for p, part in zip(params, increment, strict=True):
            self.state[p]["increment"].copy_(part)
        for i, entries in self._fresh.items():
            self.state[params[i]].update(entries)
        self._fresh = {}

    # ------------------------------------------------------------------ the curvature

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        with torch.no_grad():
            self._capture = capture = LayerCapture(self._current().params)
        try:
            return super()._evaluate(capture.around(closure))
        finally:
            capture.active = False

    def _system(self, linear: Linearization, params: Sequence[Tensor], hp: dict[str, Any]) -> System:
        assert self._evaluation is not None and self._capture is not None
        capture, self._capture = self._capture, None
        if linear.backend != "expand":
            raise ValueError(f"ResidualKFAC needs rows of J by samples, and {linear.reason}: ENGDW takes any closure")
        group = self._evaluation.closure.group
        layers = agreed(capture.layers(), params, group)
        states: list[Mapping[str, Tensor]] = [self.state[p] for p in params]
        self._fresh = {}
        if hp["residual_steps"] % hp["refresh_every"] == 0:
            layers = by_columns(layers, linear.recorded, capture)
            new = observed(layers, linear, params, hp["sharing"], group)
            self._fresh = {i: averaged(states[i], entries, hp["ema"], hp["init"]) for i, entries in new.items()}
            states = [{**state, **self._fresh.get(i, {})} for i, state in enumerate(states)]
        layers = [layer for layer in layers if FACTORS[0] in states[layer.weight]]
        inverse = self._inverse_of(layers, states, hp)
        self._told = _told(layers, params)
        damping = torch.tensor(hp["damping"], dtype=torch.float64)
        return System(lambda u, start: inverse(linear.vjp(u)), damping, inverse.ok)

    def _inverse_of(
        self, layers: Sequence[Layer], states: Sequence[Mapping[str, Tensor]], hp: dict[str, Any]
    ) -> Inverse:
        """The last step's, if it is of the same averages, as they are when none was due."""
        damping = hp["damping"], hp["damping_kind"] == "relative"
        blocks = [replace(layer, uses=[]) for layer in layers]  # inputs and gradients are not to stay in memory
        averages = [state.get(name) for state in states for name in KEPT]
        if self._last is not None:
            inverse, *known, same = self._last
            if known == [damping, blocks] and all(map(is_, averages, same)):
                return inverse
        inverse = Inverse(blocks, states, *damping)
        self._last = inverse, damping, blocks, averages
        return inverse

    # ------------------------------------------------------------------ what is said

    def coverage(self) -> Coverage:
        """Which parameter is in which block; after the first step by residuals."""
        params = [p for g in self.param_groups for p in g["params"]]
        rows = zip(super().coverage(), params, strict=True)
        return Coverage([replace(row, reason=self._told.get(id(p), row.reason)) for row, p in rows])

    def memory_report(self) -> MemoryReport:
        """As of every optimizer; factors count from the first step by residuals on."""
        report = super().memory_report()
        kept = [[self.state[p][name] for name in KEPT if name in self.state[p]] for p in self._layout.params]
        own = [sum(x.numel() * x.element_size() for x in entries) for entries in kept] or [0] * len(report.rows)
        rows = zip(report.rows, own, strict=True)
        return replace(report, rows=[replace(row, bytes=row.bytes + extra) for row, extra in rows])


def _told(layers: Sequence[Layer], params: Sequence[Tensor]) -> dict[int, str]:
    """By id of the parameter, for `coverage`."""
    told = {id(p): "diagonal of JᵀJ: in no linear layer" for p in params}
    for layer in layers:
        bias = layer.bias is not None
        o, i = params[layer.weight].shape
        sides = f"({i + bias}, {i + bias}) and ({o}, {o})"
        told[id(params[layer.weight])] = f"linear layer: two Kronecker products, {sides}"
        if layer.bias is not None:
            told[id(params[layer.bias])] = "linear layer: last column of its weight's block"
    return told
