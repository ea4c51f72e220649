"""Vectors that true Fisher statistics back-propagate: roots of the loss's Hessian with respect to the model's outputs.

A loss term ℓ is one row of C outputs f; H = ∇²ℓ = S Sᵀ, c = 1/C for the reduction "mean" and 1 for "sum":

    cross_entropy    p = softmax(f)    H = diag(p) - p pᵀ      S = diag(√p) - p √pᵀ
    mse              no factor 1/2     H = 2c I                S = √(2c) I
    bce              σ = sigmoid(f)    H = c diag(σ(1-σ))      S = √c diag(√(σ(1-σ)))

The vectors Δ of every kind have Σ Δ Δᵀ = H per term. The G of a layer is ρ Σ g gᵀ over terms and Δ, with ρ = 1/terms
for "mean" and 1 for "sum".

    type-2           the C columns of S: exact
    mc               for each of m labels y drawn from the model, over √m: p - e_y, a draw of N(0, 2c I), √c (σ - y);
                     in expectation
    curvature_prop   S ε / √m, ε Rademacher per output of each term; in expectation, without labels

None depends on the labels of the data (nor, for cross_entropy, on label smoothing). Class weights are not covered.
Martens & Grosse 2015 (arXiv:1503.05671) for `mc`, Botev et al. 2017 (arXiv:1706.03662) for the columns, Martens et al.
2012 (arXiv:1206.6464) for `curvature_prop`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral
from typing import Literal, get_args

import torch
from torch import Tensor

Loss = Literal["cross_entropy", "mse", "bce"]
Kind = Literal["type-2", "mc", "curvature_prop"]
Reduction = Literal["mean", "sum"]


def fisher_vectors(
    f: Tensor,  # (..., C)
    loss: Loss,
    kind: Kind,
    samples: int = 1,
    reduction: Reduction = "mean",
    mask: Tensor | None = None,  # (...)
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the vectors Δ, one for every backward pass, none of which carries ρ.

    Args:
        f: Logits, or predictions for `"mse"`: `(..., C)`, one loss term per row. A binary target per row is `(..., 1)`.
        loss: What the model is trained with, as torch's functional of the name defines it; `"bce"` takes logits.
        kind: `"type-2"` yields C vectors, `"mc"` and `"curvature_prop"` yield `samples`.
        samples: m of the module's formulas; `"type-2"` needs none and ignores it.
        reduction: Of the loss; decides c.
        mask: True for terms that count (for `ignore_index`: `target != ignore_index`); the others get zero vectors,
            whatever their outputs.
        generator: Source of randomness on the device of `f`; default: torch's global one.

    Returns:
        Iterator over tensors of the shape of `f` and its dtype, but at least float32. They have no graph. A random
        vector is drawn when it is asked for.

    Raises:
        ValueError: If an argument is not one of those allowed, at once and not at the first vector.
    """
    _check_choice("kind", kind, get_args(Kind))
    if not isinstance(samples, Integral) or isinstance(samples, bool) or samples < 1:
        raise ValueError(f"samples must be a positive int, got {samples!r}")
    f, term = _term(f, loss, reduction, mask)
    scale = 1.0 if kind == "type-2" else 1 / math.sqrt(samples)
    weight = scale if mask is None else scale * mask[..., None].to(f.dtype)
    if kind == "type-2":
        outputs = torch.arange(f.shape[-1], device=f.device)
        draws = (term.root((outputs == j).to(f.dtype).expand(f.shape)) for j in range(f.shape[-1]))
    elif kind == "mc":
        draws = (term.sample(generator) for _ in range(samples))
    else:
        draws = (term.root(_rademacher(f, generator)) for _ in range(samples))
    return (draw.mul_(weight) for draw in draws)


def hessian_product(
    f: Tensor,  # (..., C)
    loss: Loss,
    v: Tensor,  # (..., C)
    reduction: Reduction = "mean",
    mask: Tensor | None = None,  # (...)
) -> Tensor:
    """Multiply the Hessian of the whole loss, ρ included, with respect to `f` by a vector.

    Args:
        f: As for `fisher_vectors`.
        loss: As for `fisher_vectors`.
        v: The vector, of the shape of `f`.
        reduction: Of the loss.
        mask: As for `fisher_vectors`; where no term counts the product is zero.

    Returns:
        `H v`, of the shape of `f` and its dtype, but at least float32. It has no graph.

    Raises:
        ValueError: If an argument is not one of those allowed or `v` has another shape.
    """
    if v.shape != f.shape:
        raise ValueError(f"v must have the shape of f, {tuple(f.shape)}, got {tuple(v.shape)}")
    f, term = _term(f, loss, reduction, mask)
    v = v.detach().to(f.dtype)
    product = term.hessian(v if mask is None else v.where(mask[..., None], 0))
    return product / terms(f, mask).clamp(min=1) if reduction == "mean" else product


def terms(f: Tensor, mask: Tensor | None = None) -> Tensor:  # f (..., C), mask (...)
    """Count the loss terms that count, as a scalar tensor on the device of `f`, without waiting for it.

    Raises:
        ValueError: If `f` has no outputs or `mask` is no bool tensor of shape `f.shape[:-1]`.
    """
    _check_outputs(f, mask)
    dtype = torch.promote_types(f.dtype, torch.float32)
    if mask is None:
        return torch.full((), math.prod(f.shape[:-1]), dtype=dtype, device=f.device)
    return mask.sum().to(dtype)


class _CrossEntropy:
    """One of C classes with probabilities softmax(f)."""

    def __init__(self, f: Tensor, reduction: str) -> None:
        del reduction  # torch divides by the number of terms, not by that of the classes
        self.p = f.softmax(-1)

    def root(self, x: Tensor) -> Tensor:
        """`S x`."""
        x = self.p.sqrt() * x
        return x - self.p * x.sum(-1, keepdim=True)

    def hessian(self, v: Tensor) -> Tensor:
        """`H v`."""
        return self.p * (v - (self.p * v).sum(-1, keepdim=True))

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """`p - e_y` with y drawn from p."""
        # The first of C exponential clocks of rates p to ring. `multinomial` would wait for the device.
        label = torch.empty_like(self.p).exponential_(generator=generator).div_(self.p).argmin(-1, keepdim=True)
        return self.p.scatter_add(-1, label, torch.full_like(label, -1, dtype=self.p.dtype))


class _MeanSquaredError:
    """C Gaussian variables of mean f and variance 1/(2c)."""

    def __init__(self, f: Tensor, reduction: str) -> None:
        self.f, self.curvature = f, 2 * _within_term(f, reduction)

    def root(self, x: Tensor) -> Tensor:
        """`S x`."""
        return math.sqrt(self.curvature) * x

    def hessian(self, v: Tensor) -> Tensor:
        """`H v`."""
        return self.curvature * v

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """`2c (f - y)` with y drawn from N(f, I/(2c)): a draw of N(0, 2c I)."""
        return self.root(torch.empty_like(self.f).normal_(generator=generator))


class _BinaryCrossEntropy:
    """C independent binary variables that are 1 with probability sigmoid(f)."""

    def __init__(self, f: Tensor, reduction: str) -> None:
        self.f, self.c = f, _within_term(f, reduction)

    def root(self, x: Tensor) -> Tensor:
        """`S x`."""
        return (self.c * self._variance()).sqrt() * x

    def hessian(self, v: Tensor) -> Tensor:
        """`H v`."""
        return self.c * self._variance() * v

    def sample(self, generator: torch.Generator | None) -> Tensor:
        """`√c (σ - y)` with y drawn from σ."""
        probability = self.f.sigmoid()
        label = torch.empty_like(self.f).uniform_(generator=generator) < probability
        return math.sqrt(self.c) * (probability - label.to(self.f.dtype))

    def _variance(self) -> Tensor:
        # 1 - σ(f) would cancel where σ is near 1.
        return self.f.sigmoid() * (-self.f).sigmoid()


_Term = _CrossEntropy | _MeanSquaredError | _BinaryCrossEntropy
_TERMS: dict[str, type[_Term]] = {
    "cross_entropy": _CrossEntropy,
    "mse": _MeanSquaredError,
    "bce": _BinaryCrossEntropy,
}


def _term(f: Tensor, loss: str, reduction: str, mask: Tensor | None) -> tuple[Tensor, _Term]:
    """Check what both public functions take; return the outputs to compute with, and their loss."""
    _check_choice("loss", loss, get_args(Loss))
    _check_choice("reduction", reduction, get_args(Reduction))
    _check_outputs(f, mask)
    f = f.detach().to(torch.promote_types(f.dtype, torch.float32))
    if mask is not None:
        f = f.where(mask[..., None], 0)  # padding may hold anything, and 0 · NaN is no zero
    return f, _TERMS[loss](f, reduction)


def _within_term(f: Tensor, reduction: str) -> float:
    """`c`: what the reduction of mse and bce divides by within a term."""
    return 1 / f.shape[-1] if reduction == "mean" else 1.0


def _rademacher(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


def _check_outputs(f: Tensor, mask: Tensor | None) -> None:
    if f.ndim < 1 or f.shape[-1] < 1:
        raise ValueError(f"f must have shape (..., C) with at least one output C, got {tuple(f.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != f.shape[:-1]):
        raise ValueError(
            f"mask must be a bool tensor of shape {tuple(f.shape[:-1])}, one entry per loss term, "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
