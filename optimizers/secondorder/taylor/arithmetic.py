"""Rules of linear maps, sums and products, and of what is made of them.

    L(a b) = (L a) b + a (L b) + 2 Σ_rs C_rs D_r a D_s b

Whatever has no jet in it is a constant: a number, a tensor of features, or one whose first axis is the samples'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secondorder.taylor.jet import Jet, Part, Space, added, each, per_sample, refuse, rule


@rule("linear")
def _linear(space: Space, input: Any, weight: Any, bias: Any = None) -> Jet:
    if not space.owns(input) or space.owns(weight) or space.owns(bias):
        refuse("no rule for linear with weights that are jets")
    second = None if input.second is None else F.linear(input.second, weight)
    first = per_sample(input.first, lambda part: F.linear(part, weight))
    return Jet(F.linear(input.value, weight, bias), first, second, space)


@rule("neg", "negative")
def _neg(space: Space, a: Jet) -> Jet:
    return each(a, torch.neg)


@rule("add")
def _add(space: Space, a: Any, b: Any, *, alpha: float = 1) -> Jet:
    if alpha != 1:
        b = alpha * b
    if not space.owns(a):
        a, b = b, a
    if not space.owns(b):
        lifted(a, b)
        return broadcast(Jet(a.value + b, a.first, a.second, space))
    same_axes(a, b)
    return broadcast(Jet(a.value + b.value, a.first + b.first, added(a.second, b.second), space))


@rule("sub", "subtract")
def _sub(space: Space, a: Any, b: Any, *, alpha: float = 1) -> Any:
    return a + (-alpha) * b if alpha != 1 else a + (-b)


@rule("mul", "multiply")
def _mul(space: Space, a: Any, b: Any) -> Jet:
    if not space.owns(a):
        a, b = b, a
    if space.owns(b):
        same_axes(a, b)
        return product(torch.mul, a, b)
    over = lifted(a, b)
    return broadcast(Jet(a.value * b, a.first * over, None if a.second is None else a.second * b, space))


@rule("div", "divide", "true_divide")
def _div(space: Space, a: Any, b: Any, *, rounding_mode: None = None) -> Any:
    if rounding_mode is not None:
        refuse("no rule for div with a rounding mode")
    if space.owns(b):
        return a * torch.reciprocal(b)
    over = lifted(a, b)
    return broadcast(Jet(a.value / b, a.first / over, None if a.second is None else a.second / b, space))


@rule("matmul", "mm", "bmm", "mv")
def _matmul(space: Space, a: Any, b: Any) -> Jet:
    jets = [x for x in (a, b) if space.owns(x)]
    if len(jets) == 2:
        same_axes(a, b)
        if a.dim() < 3:
            refuse("matmul of two jets without a batch axis mixes samples")
        return product(torch.matmul, a, b)
    (jet,) = jets
    constant = b if jet is a else a
    if constant.dim() > 2 and constant.dim() != jet.dim():
        refuse(f"matmul of a jet with {jet.dim()} axes and a constant with {constant.dim()}")
    over = constant.unsqueeze(1) if constant.dim() > 2 else constant
    if jet is a:
        if a.dim() < 2 or (constant.dim() > 2 and a.dim() < 3):
            refuse("matmul of a jet without features mixes samples")
        second = None if a.second is None else torch.matmul(a.second, b)
        return Jet(torch.matmul(a.value, b), torch.matmul(a.first, over), second, space)
    if b.dim() < 3 or a.dim() < 2:
        refuse("matmul of a constant and a jet mixes samples; write jet @ constant.mT")
    second = None if b.second is None else torch.matmul(a, b.second)
    return Jet(torch.matmul(a, b.value), torch.matmul(over, b.first), second, space)


@rule("norm", "linalg_norm", "linalg_vector_norm", "vector_norm")
def _norm(space: Space, a: Jet, *args: Any, dim: Any = None, keepdim: bool = False, **more: Any) -> Any:
    # torch.norm(a, p, dim, keepdim), linalg.norm(a, ord, dim, keepdim)
    explicit = bool(args) or "p" in more or "ord" in more
    order = args[0] if args else more.pop("p", more.pop("ord", 2))
    dim = args[1] if len(args) > 1 else dim
    keepdim = args[2] if len(args) > 2 else keepdim
    if order not in (2, 2.0, "fro", None) or any(value is not None for value in more.values()):
        refuse(f"no rule for a norm but the Euclidean one, got order {order!r} {more or ''}")
    if isinstance(dim, Sequence) and len(dim) > 1 and order == 2 and explicit:
        refuse("no rule for the spectral norm; the Euclidean one of one axis")
    return torch.sqrt(a.square().sum(dim, keepdim))


@rule("layer_norm")
def _layer_norm(
    space: Space, a: Jet, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    # Written out, so it has the third derivatives that torch's own gets wrong (pytorch issue 175754, up to 2.13).
    axes = tuple(range(-len(normalized_shape), 0))
    centred = a - a.mean(axes, True)
    out = centred * torch.rsqrt(centred.square().mean(axes, True) + eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


@rule("batch_norm")
def _batch_norm(
    space: Space,
    a: Jet,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training:
        refuse("batch_norm in training mode couples samples: derivatives in one sample's inputs are not all there is")
    scale = torch.rsqrt(running_var + eps) * (1 if weight is None else weight)
    shift = -running_mean * scale + (0 if bias is None else bias)
    trailing = (-1, *(1,) * (a.dim() - 2))
    return a * scale.reshape(trailing) + shift.reshape(trailing)


@rule("dropout")
def _dropout(space: Space, a: Jet, p: float = 0.5, training: bool = True) -> Jet:
    if training and p:
        refuse("dropout in training mode is random")
    return a


def product(bilinear: Callable[[Part, Part], Part], a: Jet, b: Jet) -> Jet:
    """Jet of a product of two jets with equally many axes."""
    space, second = a.space, None
    first = bilinear(a.first, b.value.unsqueeze(1)) + bilinear(a.value.unsqueeze(1), b.first)
    if space.order == 2:
        second = 2 * space.products(a.first, b.first, bilinear)
        second = second if a.second is None else second + bilinear(a.second, b.value)
        second = second if b.second is None else second + bilinear(a.value, b.second)
    return Jet(bilinear(a.value, b.value), first, second, space)


def same_axes(a: Jet, b: Jet) -> None:
    """Refuse jets that torch would broadcast with samples against features."""
    if a.dim() != b.dim():
        refuse(f"jets of shapes {tuple(a.shape)} and {tuple(b.shape)}: they need equally many axes, samples first")


def lifted(a: Jet, constant: Any) -> Any:
    """A constant as it meets first-order parts: with an axis for the directions where it has one for the samples."""
    if isinstance(constant, (int, float)):
        return constant
    if not isinstance(constant, (Tensor, Jet)):
        refuse(f"no rule for a jet and a {type(constant).__name__}")
    if constant.dim() > a.dim() or (isinstance(constant, Jet) and constant.dim() != a.dim()):
        refuse(f"a jet of shape {tuple(a.shape)} with a constant of shape {tuple(constant.shape)}")
    return constant.unsqueeze(1) if constant.dim() == a.dim() else constant


def broadcast(jet: Jet) -> Jet:
    """Expand the derivatives to the shape of the value."""
    n, *rest = jet.value.shape
    shape = (n, jet.first.shape[1], *rest)
    if jet.first.shape != shape:
        jet.first = jet.first.expand(shape)
    if jet.second is not None and jet.second.shape != jet.value.shape:
        jet.second = jet.second.expand(jet.value.shape)
    return jet
