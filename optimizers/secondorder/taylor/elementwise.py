"""Rules of element-wise functions: `s(u)` from s, s' and s''.

    first    D_r s(u) = s'(u) D_r u
    second   s'(u) L u + s''(u) Σ_rs C_rs D_r u D_s u

Each function is a `Series`; s'' may be None. Where it has jumps in a derivative, one-sided derivatives count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from secondorder.taylor.jet import Jet, Part, Space, added, refuse, rule

Series: TypeAlias = tuple[Part, Part, Part]
"""`(s(u), s'(u), s''(u))`; s'' None where it is zero."""


def compose(jet: Jet, series: Series) -> Jet:
    """Jet of `s(u)`."""
    value, slope, bend = series
    first, second = jet.first * slope.unsqueeze(1), None
    if jet.space.order == 2:
        if jet.second is not None:
            second = slope * jet.second
        if bend is not None:
            second = added(second, bend * jet.space.squares(jet.first))
    return Jet(value, first, second, jet.space)


def elementwise(*names: str) -> Callable[[Callable[..., Series]], Callable[..., Series]]:
    """Register a function that gives `(s, s', s'')` of a value."""

    def register(series: Callable[..., Series]) -> Callable[..., Series]:
        @rule(*names)
        @functools.wraps(series)
        def apply(space: Space, jet: Any, *args: Any, **kwargs: Any) -> Jet:
            if not space.owns(jet) or any(isinstance(arg, Jet) for arg in (*args, *kwargs.values())):
                refuse(f"no rule for {names[0]} with a jet as a parameter")
            return compose(jet, series(jet.value, *args, **kwargs))

        return series

    return register


def base(u: Part) -> Tensor:
    """The innermost value, for what is constant between jumps."""
    while isinstance(u, Jet):
        u = u.value
    return u


@elementwise("tanh")
def _tanh(u: Part) -> Series:
    t = torch.tanh(u)
    slope = 1 - t.square()
    return t, slope, -2 * t * slope


@elementwise("sigmoid", "special_expit")
def _sigmoid(u: Part) -> Series:
    s = torch.sigmoid(u)
    slope = s * (1 - s)
    return s, slope, slope * (1 - 2 * s)


@elementwise("logsigmoid", "log_sigmoid")
def _logsigmoid(u: Part) -> Series:
    s = torch.sigmoid(u)
    return F.logsigmoid(u), 1 - s, -s * (1 - s)


@elementwise("silu")
def _silu(u: Part) -> Series:
    s = torch.sigmoid(u)
    value, rest = u * s, 1 - s
    return value, s + value * rest, s * rest * (2 + u * (1 - 2 * s))


@elementwise("softplus")
def _softplus(u: Part, beta: float = 1.0, threshold: float = 20.0) -> Series:
    # Beyond the threshold torch's value is linear; the derivatives here are those of the function itself.
    slope = torch.sigmoid(beta * u)
    return F.softplus(u, beta, threshold), slope, beta * slope * (1 - slope)


@elementwise("sin")
def _sin(u: Part) -> Series:
    s = torch.sin(u)
    return s, torch.cos(u), -s


@elementwise("cos")
def _cos(u: Part) -> Series:
    c = torch.cos(u)
    return c, -torch.sin(u), -c


@elementwise("sinh")
def _sinh(u: Part) -> Series:
    s = torch.sinh(u)
    return s, torch.cosh(u), s


@elementwise("cosh")
def _cosh(u: Part) -> Series:
    c = torch.cosh(u)
    return c, torch.sinh(u), c


@elementwise("atan", "arctan")
def _atan(u: Part) -> Series:
    slope = 1 / (1 + u.square())
    return torch.atan(u), slope, -2 * u * slope.square()


@elementwise("erf", "special_erf")
def _erf(u: Part) -> Series:
    slope = 2 / math.sqrt(math.pi) * torch.exp(-u.square())
    return torch.erf(u), slope, -2 * u * slope


@elementwise("exp")
def _exp(u: Part) -> Series:
    e = torch.exp(u)
    return e, e, e


@elementwise("log")
def _log(u: Part) -> Series:
    slope = 1 / u
    return torch.log(u), slope, -slope.square()


@elementwise("log1p")
def _log1p(u: Part) -> Series:
    slope = 1 / (1 + u)
    return torch.log1p(u), slope, -slope.square()


@elementwise("sqrt")
def _sqrt(u: Part) -> Series:
    root = torch.sqrt(u)
    slope = 0.5 / root
    return root, slope, -0.5 * slope / u


@elementwise("rsqrt")
def _rsqrt(u: Part) -> Series:
    value = torch.rsqrt(u)
    slope = -0.5 * value / u
    return value, slope, -1.5 * slope / u


@elementwise("reciprocal")
def _reciprocal(u: Part) -> Series:
    value = torch.reciprocal(u)
    square = value.square()
    return value, -square, 2 * value * square


@elementwise("square")
def _square(u: Part) -> Series:
    return u * u, 2 * u, torch.full((), 2.0, dtype=u.dtype, device=u.device)


@elementwise("relu")
def _relu(u: Part) -> Series:
    step = (base(u) > 0).to(u.dtype)
    return torch.relu(u), step, None


@elementwise("leaky_relu")
def _leaky_relu(u: Part, negative_slope: float = 0.01) -> Series:
    step = (base(u) > 0).to(u.dtype)
    step = step + negative_slope * (1 - step)
    return u * step, step, None


@elementwise("elu")
def _elu(u: Part, alpha: float = 1.0) -> Series:
    step = (base(u) > 0).to(u.dtype)
    below = (1 - step) * alpha * torch.exp(-torch.relu(-u))  # the exponential of what is positive may overflow
    return F.elu(u, alpha), step + below, below


@elementwise("abs", "absolute")
def _abs(u: Part) -> Series:
    sign = torch.sign(base(u))
    return u * sign, sign, None


@rule("gelu")
def _gelu(space: Space, u: Any, approximate: str = "none") -> Any:
    if approximate == "tanh":
        return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    v = u.value
    density = torch.exp(-0.5 * v.square()) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + torch.erf(v / math.sqrt(2)))
    return compose(u, (v * below, below + v * density, density * (2 - v.square())))


@rule("mish")
def _mish(space: Space, u: Any) -> Any:
    return u * torch.tanh(F.softplus(u))


@rule("pow")
def _pow(space: Space, u: Any, exponent: Any) -> Any:
    if not space.owns(u) or not isinstance(exponent, (int, float)):
        refuse("no rule for pow but of a jet to a power that is a number")
    if exponent == 0:
        return torch.ones_like(u)
    if exponent == 1:
        return u
    if exponent == 2:
        return torch.square(u)
    v = u.value
    lower = v ** (exponent - 2)  # not divided out of the value: v may be zero
    return compose(u, (v**exponent, exponent * v ** (exponent - 1), exponent * (exponent - 1) * lower))
