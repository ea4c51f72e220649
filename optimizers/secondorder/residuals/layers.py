"""Linear layers in a residual closure: their inputs and output gradients, from the backward passes that J takes anyway.

    Y_n = Z̄_n [W b]ᵀ        Z̄ (N, S, i + 1),  Y (N, S, o)        G_n = ∂r_n/∂Y_n (N, S, o)
    ∂r_n/∂[W b] = Σ_s G_ns Z̄_nsᵀ

A plain evaluation has S = 1. A Taylor jet (`secondorder.taylor`) passes through a layer as S stacked columns: the
value, first derivatives, and the sum of second ones. The bias belongs to the value alone, so Z̄ ends with 1 there and
with 0 in the other columns. To a layer its jet is one input that shares weights over S columns: from which Dangel,
Müller and Zeinhofer (2024, arXiv:2405.15603) make Kronecker factors of differential operators.

With nested autograd a weight is used by the transposed layer as well, and nobody sees such (Z, G): `nested` says in
which terms, and `columns` finds them in J.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secondorder.residuals.terms import residual_terms
from secondorder.taylor.jet import Jet, Part

Sharing = Literal["expand", "reduce"]
Pass = tuple[int, range]  # a backward pass: the number of a term, and the rows of J that are one equation's


class Use(NamedTuple):
    """A layer in one backward pass.

    Attributes:
        term: Number of the term.
        weight: Of its samples in the loss, summed: w, 0-dim.
        jet: Some columns are derivatives.
        inputs: Z̄ `(n, S, i + 1)`, without a bias Z `(n, S, i)`.
        gradients: G `(n, S, o)`, of residuals as they are scaled in r.
        found: In J (`columns`), where columns have no sign.
    """

    term: int
    weight: Tensor
    jet: bool
    inputs: Tensor
    gradients: Tensor
    found: bool = False


@dataclass(frozen=True)
class Layer:
    """A weight in `F.linear`.

    Attributes:
        weight: Number of the parameter.
        bias: That of its bias; None: it has none that is trained.
        uses: By all terms and their equations; a layer that is called several times has the columns of all calls.
    """

    weight: int
    bias: int | None
    uses: list[Use] = field(default_factory=list)

    def sums(self, terms: set[int], like: Tensor, sharing: Sharing = "expand") -> tuple[Tensor, Tensor, Tensor]:
        """Kronecker factors of the layer's block of JᵀJ over some terms together, `Σ_t A_t ⊗ B_t ≈ (A / w) ⊗ B`.

            expand:   A / w = mean over n and s of z̄ z̄ᵀ,                      B = Σ_n Σ_s g gᵀ
            reduce:   A / w = mean over n of ẑ ẑᵀ, ẑ = mean over s of z̄,      B = Σ_n ĝ ĝᵀ, ĝ = Σ_s g

        The mean gives samples the weights that they have in the loss. All three are sums, over processes too.

        Args:
            terms: Their numbers; of terms that don't use the layer all is zero.
            like: The weight `(o, i)`.
            sharing: How columns count; those that were found in J always as "expand".

        Returns:
            A `(i + 1, i + 1)`, or `(i, i)` without a bias, B `(o, o)` and w, 0-dim.
        """
        o, i = like.shape
        width = i + (self.bias is not None)
        A, B, total = like.new_zeros(width, width), like.new_zeros(o, o), like.new_zeros(())
        for use in self.uses:
            if use.term not in terms:
                continue
            z, g = use.inputs, use.gradients
            n, S, _ = z.shape
            if sharing == "reduce" and not use.found:
                z, g, S = z.mean(1, keepdim=True), g.sum(1, keepdim=True), 1
            A += z.flatten(0, 1).mT @ z.flatten(0, 1) * (use.weight / (n * S))
            B += g.flatten(0, 1).mT @ g.flatten(0, 1)
            total += use.weight
        return A, B, total

    def trace(self, terms: set[int], like: Tensor) -> Tensor:
        """That of the layer's block of JᵀJ over some terms, `Σ_n |Σ_s g_ns z̄_nsᵀ|²`, 0-dim."""
        total = like.new_zeros(())
        for use in self.uses:
            if use.term in terms:
                total += ((use.gradients @ use.gradients.mT) * (use.inputs @ use.inputs.mT)).sum()
        return total


@dataclass
class _Call:
    """One call of a layer: parameters, inputs `(n, S, i)`, how many columns are values, and G by pass."""

    weight: int
    bias: int | None
    z: Tensor
    values: int
    gradients: dict[Pass, Tensor] = field(default_factory=dict)


class LayerCapture(TorchFunctionMode):
    """Watches one evaluation of a closure, and the backward passes of "expand" that follow.

    These are one for every equation of a term, in their order; a mark on each residual counts them, and passes that
    come after them (of checks, say) are none of ours.

    Args:
        params: All parameters.

    Attributes:
        active: Evaluations are watched, each in place of the last one; else the closure is called as it is.
        passes: The weight of each in the loss: of its samples w, 0-dim.
        nested: Numbers of terms that differentiate by `torch.autograd` what depends on parameters.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self.active = True
        self.passes: dict[Pass, Tensor] = {}
        self.nested: set[int] = set()
        self._index = {id(p): i for i, p in enumerate(params) if p.requires_grad}
        self._calls: list[_Call] = []
        self._now: Pass | None = None

    def around(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, watched; its residuals come by name, as `Term`."""

        def watched() -> Any:
            if not self.active:
                return closure()
            self._calls, self.passes, self._now, self.nested = [], {}, None, set()
            with self:
                returned = closure()
            terms = residual_terms(returned)
            if terms is None:
                return returned
            ends = itertools.accumulate(r.numel() for r in terms.residuals)
            marked = [
                replace(e, residual=self._marked(t, e.residual, end))
                for (t, e), end in zip(enumerate(terms.entries), ends, strict=True)
            ]
            return dict(zip(terms.names, marked, strict=True))

        return watched

    def layers(self) -> list[Layer]:
        """Layers that were called, in the order of their first calls."""
        found: dict[int, Layer] = {}
        for call in self._calls:
            layer = found.get(call.weight)
            if layer is None or (layer.bias is None and call.bias is not None):
                found[call.weight] = Layer(call.weight, call.bias)
        for layer in found.values():
            for at, weight in self.passes.items():
                layer.uses.extend(self._uses(layer, at, weight))
        return list(found.values())

    def _uses(self, layer: Layer, at: Pass, weight: Tensor) -> Iterator[Use]:
        """One, or one for every number of samples: a term of few residuals may see others' (an integral, say)."""
        seen = [call for call in self._calls if call.weight == layer.weight and at in call.gradients]
        for n in dict.fromkeys(len(call.z) for call in seen):
            calls = [call for call in seen if len(call.z) == n]
            inputs = [call.z if layer.bias is None else _augmented(call) for call in calls]
            jet = any(call.z.shape[1] > call.values for call in calls)
            gradients = torch.cat([call.gradients[at] for call in calls], 1)
            yield Use(at[0], weight, jet, torch.cat(inputs, 1), gradients)

    def _marked(self, term: int, r: Tensor, end: int) -> Tensor:
        if not r.requires_grad or not r.numel():
            return r
        first, equations, passes = end - r.numel(), r.numel() // len(r), itertools.count()

        def begin(g: Tensor) -> None:
            m = next(passes)
            self._now = (term, range(first + m, end, equations)) if m < equations else None
            if self._now is not None:
                self.passes[self._now] = g.detach().square().sum()  # one equation's entries, its scale √(w / n)

        r = r.view_as(r)  # what other terms may make of r does not pass here
        r.register_hook(begin)
        return r

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Layers with what they are given, and derivatives by autograd."""
        kwargs = kwargs or {}
        if func is F.linear and torch.is_grad_enabled():
            return self._linear(*args, **kwargs)
        found = func(*args, **kwargs)
        if func is torch.autograd.grad:
            for derivative in found:
                if derivative is not None and derivative.requires_grad:
                    derivative.register_hook(self._differentiated)
        return found

    def _differentiated(self, g: Tensor) -> None:
        if self._now is not None:
            self.nested.add(self._now[0])

    def _linear(self, input: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
        index = self._index.get(id(weight))
        if index is None or weight.ndim != 2 or input.ndim < 2:
            return F.linear(input, weight, bias)
        if not isinstance(input, Jet):
            y = F.linear(input, weight, bias)
            z, values = _rows(input), math.prod(input.shape[1:-1])
        else:
            z, values = torch.cat(list(_columns(input)), 1), math.prod(_value(input).shape[1:-1])
            y = F.linear(z, weight)
        call = _Call(index, self._index.get(id(bias)), z.detach(), values)
        self._calls.append(call)

        def note(g: Tensor) -> None:
            if self._now is not None:
                call.gradients[self._now] = _rows(g).detach()

        y.register_hook(note)
        return _like(input, y, bias)[0] if isinstance(input, Jet) else y


def _rows(x: Tensor) -> Tensor:
    """`(n, …, d)` -> `(n, S, d)`."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def _augmented(call: _Call) -> Tensor:
    ones = call.z.new_zeros(*call.z.shape[:2], 1)
    ones[:, : call.values] = 1
    return torch.cat([call.z, ones], 2)


def _columns(x: Part) -> Iterator[Tensor]:
    """The parts of a jet `(N, k, i)`, values first; jets of jets have columns for all pairs."""
    if isinstance(x, Jet):
        yield from _columns(x.value)
        yield from _columns(x.first)
        if x.second is not None:
            yield from _columns(x.second)
        elif x.space.order == 2:
            yield from map(torch.zeros_like, _columns(x.value))
    else:
        yield _rows(x)


def _value(x: Part) -> Tensor:
    return _value(x.value) if isinstance(x, Jet) else x


def _like(x: Part, y: Tensor, bias: Tensor | None) -> tuple[Part, Tensor]:
    """Columns `(N, S, o)` as a jet of the same parts, the bias added to the value; and the columns that are left."""
    if isinstance(x, Jet):
        value, y = _like(x.value, y, bias)
        first, y = _like(x.first, y, None)
        second = None
        if x.space.order == 2:
            second, y = _like(x.value if x.second is None else x.second, y, None)
        return Jet(value, first, second, x.space), y
    middle = x.shape[1:-1]
    k = math.prod(middle)
    own = y[:, :k].unflatten(1, middle) if middle else y[:, 0]
    return (own if bias is None else own + bias), y[:, k:]
