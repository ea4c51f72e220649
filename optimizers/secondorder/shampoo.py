"""Shampoo: inverse roots of Kronecker factors, with the length of a grafted step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from typing_extensions import Unpack

from secondorder._optimizer import PreconditionedOptimizer
from secondorder._options import (
    FACTOR_BETA,
    KRONECKER,
    KroneckerOptions,
    Option,
    is_count,
    is_number,
    one_of,
    optional,
)
from secondorder.curvature.gradient import GradientStatistic
from secondorder.layout.blocks import Treatment, matrix_blocks
from secondorder.preconditioner.grafts import GRAFTS
from secondorder.preconditioner.inverse_root import InverseRoot, RootKronecker
from secondorder.preconditioner.protocol import Method


def _is_exponent(v: Any) -> bool:
    if isinstance(v, (tuple, list)):
        return len(v) == 2 and all(is_number(e) and 0 <= e <= 1 for e in v) and any(v)
    return is_number(v) and 0 < v <= 1


class Shampoo(PreconditionedOptimizer):
    """Shampoo: The gradient between inverse roots of its row and column covariances.

    For every block `G (d_0, d_1)` of a gradient, with one covariance `C_i` and root `R_i` per mode:

        C_0 <- average of G G^T,  C_1 <- average of G^T G      (factor_beta, debiased)
        every refresh_every calls, for each mode:     R_i <- (C_i + damping · λ_max(C_i) · I)^(-e_i)
        m <- average of G   (β1, debiased)            momentum
        m̃  = β1 m + (1 - β1) G                        nesterov=True; else m
        V <- average of G²  (β2, debiased),  D = m̃ / (√V + eps)          the graft, here Adam
        U  = R_0 m̃ R_1,  U <- U · |D|_F / |U|_F;  U = D as long as a root is missing
        W <- (1 - lr · weight_decay) W - lr U

    `e_i` is 1/4 for matrices with two factors and 1/2 for one-sided ones. Roots contain the gradient they are applied
    to. Refreshes are spread over the period, so that each block has its roots within `refresh_every` calls. Parameters
    that are no matrices, and large vocabularies, go to AdamW in the same optimizer; `coverage()` tells which, and why.

    Source: Gupta, Koren and Singer, *Shampoo* (2018, arXiv:1802.09568), algorithm 1; blocks and grafting as in Anil et
    al., *Scalable Second Order Optimization for Deep Learning* (2020, arXiv:2002.09018). Deviations, each with the way
    back: averages instead of sums (`factor_average="sum"`); a ridge relative to the largest eigenvalue; Adam's step
    length (`graft=None`); momentum before the roots, with Nesterov's look-ahead (`nesterov=False`, `betas=(0, β2)`);
    blocks of at most 512 and one-sided factors for matrices of aspect 4 or more (`max_block_size=None,
    one_sided_aspect=None`).

    With Adam's graft a step is as long as AdamW's: AdamW's learning rate is a safe start, and on small models up to 3
    times as much is better. With `graft=None` an update has singular values of about 1, and before the first roots it
    is the plain gradient; choose the learning rate anew.

    Args:
        params: Parameters, dicts of parameter groups, or `(name, parameter)` pairs.
        lr: Learning rate, a number or a 1-element tensor. Default: 3e-3.
        betas: Decay rates (β1, β2) of the momentum and of the graft's second moment. Default: (0.9, 0.95).
        eps: Added to the root of the graft's (and the fallback's) second moment. Default: 1e-8.
        weight_decay: Strength of weight decay. Default: 0.01.
        factor_beta: Decay rate of the covariances; None: β2. Default: None.
        factor_average: `"ema"` (debiased), or `"sum"`: of all gradients, so that steps without a graft shrink like
            AdaGrad's. Default: `"ema"`.
        damping: Ridge of the covariances relative to their largest eigenvalue. Default: 1e-6.
        exponent: `e_i` of all modes, or a pair with one for each side of a matrix, where 0 is a side without a factor
            (`one_sided_aspect` then says nothing); None: 1/(2k) for k factors. Default: None.
        root_by: How roots are made: `"eigh"`; `"tracked"` (one power iteration of the last basis); `"newton"` (coupled
            Newton iterations, for exponents 1/p) or `"newton_schulz"` (for exponents 2^-k), which need nothing but
            float64 products and lose to `eigh` on a CPU. Default: `"eigh"`.
        graft: Whose step length a block takes: `"adam"`, `"rmsprop"`, `"adagrad"`, `"sgd"` or None. Default: `"adam"`.
        start_step: The call before which there is no refresh; None: as soon as the schedule says. Default: None.
        **options: See below.

    Raises:
        TypeError: For an unknown option, or parameters that are complex.
        ValueError: For a value that is not allowed.
    """

    own_options = {
        "factor_beta": FACTOR_BETA,
        "factor_average": Option("ema", *one_of("ema", "sum"), "average or sum."),
        "damping": Option(1e-6, "a number >= 0", lambda v: is_number(v) and v >= 0, "relative ridge."),
        "exponent": Option(
            None, "None, a number in (0, 1], or a pair of numbers in [0, 1]", optional(_is_exponent), "of the roots."
        ),
        "root_by": Option("eigh", *one_of("eigh", "tracked", "newton", "newton_schulz"), "how roots are made."),
        "graft": Option(
            "adam",
            f"None or {one_of(*GRAFTS)[0]}",
            optional(one_of(*GRAFTS)[1]),
            "whose step length a block takes.",
        ),
        "start_step": Option(None, "None or an int >= 1", optional(is_count), "the call before which none refreshes."),
    }
    shared_options = KRONECKER

    def __init__(
        self,
        params: Any,
        lr: Any = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        factor_beta: float | None = None,
        factor_average: Literal["ema", "sum"] = "ema",
        damping: float = 1e-6,
        exponent: float | tuple[float, float] | None = None,
        root_by: Literal["eigh", "tracked", "newton", "newton_schulz"] = "eigh",
        graft: Literal["adam", "rmsprop", "adagrad", "sgd"] | None = "adam",
        start_step: int | None = None,
        **options: Unpack[KroneckerOptions],
    ) -> None:
        own = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, factor_beta=factor_beta)
        own.update(factor_average=factor_average, damping=damping, exponent=exponent, root_by=root_by, graft=graft)
        super().__init__(params, {**own, "start_step": start_step}, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See the base class; a way to make roots must fit the exponents."""
        if isinstance(param_group, dict):
            _check_exponents({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _method(self, group: dict[str, Any]) -> Method:
        graft = None if group["graft"] is None else GRAFTS[group["graft"]]()
        factor = InverseRoot(by=group["root_by"], missing=0.0 if graft else "eye")
        return RootKronecker(GradientStatistic(), factor, graft=graft, start=group["start_step"] or 1)

    def _blocks(self, shape: tuple[int, ...], group: Mapping[str, Any], role: str | None) -> Treatment:
        exponent = group["exponent"]
        if not isinstance(exponent, (tuple, list)):
            return matrix_blocks(shape, group, role)
        found = matrix_blocks(shape, {**group, "one_sided_aspect": None}, role)
        modes = tuple(i for i in found.modes if exponent[i])
        if found.modes == modes:
            return found
        cuts = tuple(found.cuts[i] if i in modes else (d,) for i, d in enumerate(found.view))
        return replace(found, modes=modes, cuts=cuts, reason=f"{found.reason}, a factor on side {modes[0]} only")


def _check_exponents(group: Mapping[str, Any]) -> None:
    """Raise ValueError where an iteration cannot make the roots."""
    by, given = group["root_by"], group["exponent"]
    if by not in ("newton", "newton_schulz") or not optional(_is_exponent)(given):
        return  # anything goes, or will be refused by name
    for e in given if isinstance(given, (tuple, list)) else (given,):
        if e and not (abs(round(1 / e) * e - 1) < 1e-9 if by == "newton" else e < 1 and math.log2(e).is_integer()):
            allowed = "1/p with an integer p" if by == "newton" else "2^-k with k >= 1"
            raise ValueError(f"Invalid exponent: {given!r} (root_by={by!r} takes {allowed})")
