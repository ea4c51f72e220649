"""Residual closures: a least-squares loss given by its terms.

    loss = ½ ‖r‖² = ½ Σ_t (w_t / N_t) ‖r_t‖²        r = [√(w_t / N_t) r_t]_t

    def closure():
        return {"pde": laplacian(u, x) + f(x), "boundary": u(x_b) - g(x_b)}

    optimizer.step(closure)                             p.grad is Jᵀ r afterwards, J = ∂r/∂p

A term is a floating-point tensor whose first axis are its N_t samples: `(N,)`, `(N, M)` for M equations per sample, or
with more axes. Its squares are summed over equations and averaged over samples, `"sum"` sums over these too. A term
without samples (a sub-domain that no point fell into) counts as zero: its N_t in the denominator is then 1.

A centred term has r_n - mean_n r in place of r_n, each equation by itself: what is known up to a constant, or the
energies of variational Monte Carlo. A term whose rows are not the derivatives of its residual (`generalized`) gives
steps, but ½ ‖r_t‖² is not what they lower.

The order of r: terms as they were given, in each of them samples first, then its other axes, as `flatten` has them.

Half the mean squares, and not the mean squares, so that the gradient is Jᵀ r: the convention of Gauss-Newton methods
(Müller and Zeinhofer, *Achieving High Accuracy with PINNs via Energy Natural Gradient Descent*, 2023, arXiv:2302.13163;
Guzmán-Cordero et al., *Improving Energy Natural Gradient Descent through Woodbury, Momentum, and Randomization*, 2025,
arXiv:2505.12149).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["mean", "sum"]

_REDUCTIONS = get_args(Reduction)


@dataclass(frozen=True)
class Term:
    """One term of a least-squares loss; made by `term`.

    Attributes:
        residual: `(N, ...)`, with its graph.
        weight: w_t, at least 0.
        reduction: `"mean"` over samples, or `"sum"`.
        center: Whether the mean over samples is subtracted, of each equation by itself.
        exact: Whether the term is ½ |r|² of a residual whose rows of J are its derivatives.
        losses: What another loss has for each sample `(N,)`, with its graph; None: there is ½ |r|² alone.
    """

    residual: Tensor
    weight: float
    reduction: Reduction
    center: bool = False
    exact: bool = True
    losses: Tensor | None = None

    @property
    def count(self) -> int:
        """By what the sum of squares is divided: N_t, or 1."""
        return max(self.residual.shape[0], 1) if self.reduction == "mean" else 1

    @property
    def scale(self) -> float:
        """By what the residual is multiplied in r: √(w_t / N_t), or √w_t."""
        return math.sqrt(self.weight / self.count)

    @property
    def values(self) -> Tensor:
        """The residual with its graph, centred if the term is, in float32 at least; not scaled."""
        r = _wide(self.residual)
        return r - r.mean(0) if self.center else r

    def loss(self) -> Tensor:
        """The term's part of the loss, 0-d, in float32 at least."""
        if self.losses is not None:
            return _wide(self.losses).sum() / self.count * self.weight
        r = self.values
        # Divided before it is multiplied: bit for bit what `0.5 * weight * r.square().mean()` gives for a vector.
        return r.square().sum() / self.count * (0.5 * self.weight)


def term(r: Tensor, weight: float = 1.0, reduction: Reduction = "mean", center: bool = False) -> Term:
    """A residual with its weight, as an entry of what a closure returns.

    Args:
        r: Residual `(N, ...)`, floating point; the first axis are samples.
        weight: Multiplies the term in the loss (so r by its root), finite and at least 0. Default: 1.
        reduction: Whether squares are averaged over samples (`"mean"`, default) or summed (`"sum"`).
        center: Whether r_n - mean_n r takes the place of r_n, each of its equations by itself; the mean is over all
            samples, over those of all processes too. The derivative is that of the difference. Default: False.

    Raises:
        TypeError: If r is no floating-point tensor, the weight no number, or center no bool.
        ValueError: If r has no axis of samples, or weight or reduction are not allowed.
    """
    return checked("r", r, weight, reduction, center)


@dataclass(frozen=True)
class Terms:
    """The terms of a least-squares loss at one point, with their graph; made by `residual_terms`.

    Attributes:
        names: Of the terms, in their order; of a sequence `"0"`, `"1"`, ...
        entries: The terms in the same order, at least one, all on one device.
    """

    names: tuple[str, ...]
    entries: tuple[Term, ...]

    @property
    def residuals(self) -> tuple[Tensor, ...]:
        """r_t as the closure returned them, `(N_t, ...)`, not scaled."""
        return tuple(t.residual for t in self.entries)

    @property
    def weights(self) -> tuple[float, ...]:
        """w_t."""
        return tuple(t.weight for t in self.entries)

    @property
    def scales(self) -> tuple[float, ...]:
        """√(w_t / N_t) of means, √w_t of sums."""
        return tuple(t.scale for t in self.entries)

    @property
    def centred_rows(self) -> list[tuple[slice, int]]:
        """Of every centred term with samples, where it is in r, and how many equations a sample has."""
        found, at = list[tuple[slice, int]](), 0
        for t in self.entries:
            r = t.residual
            if t.center and r.numel():
                found.append((slice(at, at + r.numel()), r.numel() // len(r)))
            at += r.numel()
        return found

    def uncentred(self) -> Terms:
        """The same terms as they are before their means are subtracted: a sample's residual depends on it alone."""
        return Terms(self.names, tuple(replace(t, center=False) for t in self.entries))

    def check_search(self, line_search: str | None) -> None:
        """Raise where a search would compare what the steps do not lower, or bend along what r does not do.

        Args:
            line_search: "geodesic", which needs residuals and their derivatives; another search, which needs a loss; or
                None.

        Raises:
            ValueError: If a term has not what is needed.
        """
        inexact = {name: t for name, t in zip(self.names, self.entries, strict=True) if not t.exact}
        blind = [name for name, t in inexact.items() if t.losses is None]
        if line_search is not None and blind:
            why = "½ |r|² is not what its steps lower"
            raise ValueError(f"line_search must be None for the term {blind[0]!r}, {why}; got {line_search!r}")
        if line_search == "geodesic" and inexact:
            why = "its rows are not the derivatives of its residual"
            raise ValueError(f"line_search must be None, 'bracket' or 'grid' for the term {[*inexact][0]!r}, {why}")

    def vector(self) -> Tensor:
        """The scaled residual r `(Σ_t N_t M_t,)` with its graph, in the order that the file's docstring gives."""
        return torch.cat([t.values.flatten() * t.scale for t in self.entries])

    def loss(self) -> Tensor:
        """½ ‖r‖² with its graph, or what terms have in its place, 0-d; added up term by term."""
        first, *others = (t.loss() for t in self.entries)
        return sum(others, start=first)

    def by_term(self) -> dict[str, Tensor]:
        """Every term's part of the loss by its name, 0-d, without a graph."""
        return {name: t.loss().detach() for name, t in zip(self.names, self.entries, strict=True)}

    def backward(self) -> Tensor:
        """Add Jᵀ r to `.grad` of all leaves.

        Returns:
            The loss, 0-d, without its graph.

        Raises:
            RuntimeError: If no residual depends on anything that is trained.
        """
        loss = self.loss()
        if not loss.requires_grad:
            raise RuntimeError(
                f"the residuals {', '.join(map(repr, self.names))} have no graph: compute them from the parameters, "
                "with gradients enabled and without detach()"
            )
        loss.backward()
        return loss.detach()


def residual_terms(returned: Any) -> Terms | None:
    """The terms of what a closure returned.

    Args:
        returned: Residuals: a mapping of names, or a list or tuple, of tensors `(N, ...)` or what `term` makes of
            them. Or a loss: a tensor of one element, anything that is neither tensor nor container, or a tuple that
            begins with a loss (`quadratic_model` wants one).

    Returns:
        The terms; None for a loss.

    Raises:
        TypeError: For entries that are no floating-point tensors, and for a residual outside of a container.
        ValueError: For no entries, one without an axis of samples, or entries on several devices.
    """
    if isinstance(returned, Mapping):
        return _terms(returned.items())
    if isinstance(returned, (list, tuple)) and not _begins_with_loss(returned):
        return _terms((str(i), r) for i, r in enumerate(returned))
    if isinstance(returned, Term) or (isinstance(returned, Tensor) and returned.numel() != 1):
        what = "a term" if isinstance(returned, Term) else f"a tensor of shape {tuple(returned.shape)}"
        raise TypeError(
            f"a closure returns a 0-d loss, or residuals in a mapping or list; got {what}: return {{'name': residual}}"
        )
    return None


def least_squares(reduction: Reduction = "mean", weights: Mapping[str, float] | None = None, **terms: Tensor) -> Tensor:
    """The loss of residuals, for loops with `loss.backward(); optimizer.step()`: ½ Σ_t (w_t / N_t) ‖r_t‖².

    Args:
        reduction: Whether squares are averaged over samples (`"mean"`, default) or summed (`"sum"`).
        weights: w_t of some terms by name, finite and at least 0. Default: 1.
        terms: Residuals `(N, ...)` by name, floating point; the first axis are samples.

    Returns:
        The loss, 0-d, with its graph.

    Raises:
        TypeError: If a residual is no floating-point tensor, or a weight no number.
        ValueError: For no residuals, one without an axis of samples, residuals on several devices, weights or a
            reduction that are not allowed, or a weight for a name that no residual has.
    """
    weights = {} if weights is None else weights
    if unknown := [name for name in weights if name not in terms]:
        raise ValueError(f"weights must have names of terms, {list(terms)}, got {unknown}")
    return _terms((name, checked(name, r, weights.get(name, 1.0), reduction)) for name, r in terms.items()).loss()


def _begins_with_loss(returned: list[Any] | tuple[Any, ...]) -> bool:
    """`(loss, outputs)`, and what else users return beside the loss."""
    if not isinstance(returned, tuple) or not returned:
        return False
    first = returned[0]
    return first.ndim == 0 if isinstance(first, Tensor) else isinstance(first, Real)


def _terms(entries: Iterable[tuple[Any, Any]]) -> Terms:
    found: dict[str, Term] = {}
    for name, r in entries:
        if not isinstance(name, str):
            raise TypeError(f"names of residuals must be strings, got {name!r}")
        found[name] = r if isinstance(r, Term) else checked(name, r, 1.0, "mean")
    if not found:
        raise ValueError("residuals must have at least one term, got none")
    devices = {str(t.residual.device): name for name, t in found.items()}
    if len(devices) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ValueError(f"residuals must be on one device, got {where}")
    return Terms(tuple(found), tuple(found.values()))


def checked(name: str, r: Any, weight: Any, reduction: Any, center: Any = False) -> Term:
    """A term of arguments that were checked; see `term` for what is raised."""
    if not isinstance(r, Tensor):
        raise TypeError(f"residual {name!r} must be a tensor of shape (N, ...), got {type(r).__name__}")
    if not r.is_floating_point():
        hint = ": give torch.view_as_real of it" if r.is_complex() else ""
        raise TypeError(f"residual {name!r} must be of a floating-point dtype, got {r.dtype}{hint}")
    if r.ndim == 0:
        raise ValueError(
            f"residual {name!r} must have samples as its first axis, got a 0-d tensor: leave the mean and the square "
            "to the optimizer, or return one loss alone after its backward()"
        )
    if not isinstance(weight, Real) or isinstance(weight, bool):
        raise TypeError(f"weight of residual {name!r} must be a number, got {type(weight).__name__}")
    if not 0 <= float(weight) < math.inf:
        raise ValueError(f"weight of residual {name!r} must be finite and >= 0, got {weight!r}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")
    if not isinstance(center, bool):
        raise TypeError(f"center of residual {name!r} must be True or False, got {center!r}")
    return Term(r, float(weight), reduction, center)


def _wide(r: Tensor) -> Tensor:
    """At least float32: squares of half-precision numbers overflow, and their sums round."""
    return r.to(torch.promote_types(r.dtype, torch.float32))
