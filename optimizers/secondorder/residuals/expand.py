"""Back-end "expand": rows of the Jacobian of an unmodified residual closure, from one backward pass a residual.

    y_n = W_n x_n,  W_n = W for all n            ∂(Σ_n r_n)/∂W_n = ∂r_n/∂W, if sample n of r sees sample n of x alone

Every sample gets its own copy of a parameter, and one backward pass of Σ_n r_n yields all rows. The copies exist in the
algebra only: a linear map is recorded as it is differentiated, and ∂r_n/∂W_n is a sum of outer products, one a use.
With nested autograd a weight is used again by every derivative that the closure takes (g_n -> W_nᵀ g_n), so a linear
map and its transpose are each other's derivative, and both record.

What is understood, by the parameters' identity in the torch functions that the closure calls:

* `F.linear(x, W, b)` with x `(N, …, i)`, and so every `nn.Linear`; `x @ W`, `x @ W.T`;
* arithmetic with broadcasting over the samples, `a * x`, `x + b`: adaptive activations, coefficients of inverse
  problems;
* other uses of up to `COLUMNS` entries (`log_nu.exp()`), by J e_i for each of them;
* terms of up to `ROWS` residuals that depend on other samples than their own (an integral over the domain), by a
  backward pass each.

Otherwise `CannotExpand`: another use of a larger parameter, samples that are not the first axis. Whether samples are
coupled (batch norm, a mean over the batch) nothing of this can tell: Jᵀ u is compared with autograd's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secondorder.residuals.factored import Factored, Part, dense, units_of
from secondorder.residuals.matvec import Products
from secondorder.residuals.terms import Terms
from secondorder.taylor.jet import separate_samples

COLUMNS = 64  # largest number of entries whose columns are computed one by one
ROWS = 8  # largest number of residuals in a term whose rows are
TOLERANCE = {torch.float64: 1e-8}  # of Jᵀ u against autograd, relative; of other dtypes 1e-3
MATMUL = {"matmul", "mm"}
ELEMENTWISE = {"add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "pow", "atan2"}
ELEMENTWISE |= {"maximum", "minimum", "__rsub__", "__rdiv__", "__rtruediv__", "__pow__", "__rpow__"}
TRANSPOSED = (torch.Tensor.T.__get__, torch.Tensor.mT.__get__)  # type: ignore[attr-defined]


class CannotExpand(Exception):
    """Says what the closure does that has no rows by copies of parameters."""


@dataclass
class Memory:
    """What linearisations of one closure learned about it: later ones do no more than they have to.

    Attributes:
        excluded: Indices of parameters whose columns are computed one by one.
        checked: Terms (names, shapes, dtypes) for which "expand" agreed with autograd.
        reason: Why "expand" is not tried again; empty: it is.
    """

    excluded: set[int] = field(default_factory=set)
    checked: set[tuple[Any, ...]] = field(default_factory=set)
    reason: str = ""


class Recorder:
    """What the maps of a closure do when they are differentiated.

    Attributes:
        phase: "closure": parameters get no gradient, as the closure asks for none; "record": they record; "plain": they
            are ordinary autograd, to which records are compared.
        uses: While recording, by parameter: a `(n, s, o)` and z `(n, s, i)` of every use.
        n: Samples of the term that is recorded.
        strangers: Parameters in uses of another number of samples.
    """

    def __init__(self) -> None:
        self.phase: Literal["closure", "record", "plain"] = "closure"
        self.uses: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.n = 0
        self.strangers: set[int] = set()

    def add(self, index: int | None, a: Tensor, z: Tensor) -> None:
        """Record a use of a parameter by this term: `(n, …, o)` and `(n, …, i)`."""
        if index is None:
            return
        if len(a) != self.n:
            self.strangers.add(index)
            return
        self.uses.setdefault(index, []).append((_rows(a).detach(), _rows(z).detach()))


class _LinearMap(torch.autograd.Function):
    """`y_n = W x_n + b`, or `y_n = Wᵀ x_n`, closed under differentiation in x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        recorder: Recorder,
        indices: tuple[int | None, int | None],
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, W)
        ctx.recorder, ctx.indices, ctx.transposed = recorder, indices, transposed
        return F.linear(x, W.mT if transposed else W, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W = ctx.saved_tensors
        recorder: Recorder = ctx.recorder
        gx = gW = gb = None
        if ctx.needs_input_grad[0]:
            gx = _LinearMap.apply(g, W, None, recorder, (ctx.indices[0], None), not ctx.transposed)
        a, z = (x, g) if ctx.transposed else (g, x)
        if recorder.phase == "record":
            recorder.add(ctx.indices[0], a, z)
            recorder.add(ctx.indices[1], *dense(g.flatten(1, -2).sum(1) if g.ndim > 2 else g, (g.shape[-1], 1)))
        elif recorder.phase == "plain":
            if ctx.needs_input_grad[1]:
                gW = a.flatten(0, -2).mT @ z.flatten(0, -2)
            if ctx.needs_input_grad[2]:
                gb = g.flatten(0, -2).sum(0)
        return gx, gW, gb, None, None, None


class _Copies(torch.autograd.Function):
    """A parameter as `(N, …)`, one view a sample."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, shape: tuple[int, ...], recorder: Recorder, index: int) -> Tensor:
        ctx.recorder, ctx.index, ctx.shape, ctx.units = recorder, index, p.shape, units_of(p)
        return p.expand(shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        recorder: Recorder = ctx.recorder
        if recorder.phase == "record":
            recorder.add(ctx.index, *dense(g.reshape(len(g), -1), ctx.units))
        return (g.sum(0).reshape(ctx.shape) if recorder.phase == "plain" else None), None, None, None


class Expansion(TorchFunctionMode):
    """Gives every sample its own copies of parameters in the torch functions that are called inside.

    Args:
        params: All parameters.
        excluded: Indices of those that are left alone.
        recorder: Gets the records.

    Attributes:
        opaque: Parameters in uses that are not understood, with the name of the function.
        together: Weight and bias of every linear map that has both.
    """

    def __init__(self, params: Sequence[Tensor], excluded: Iterable[int], recorder: Recorder) -> None:
        super().__init__()
        excluded = set(excluded)
        self._index = {id(p): i for i, p in enumerate(params) if i not in excluded and p.requires_grad}
        self._transposes: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the transpose, kept alive, and the parameter
        self._recorder = recorder
        self.opaque: dict[int, str] = {}
        self.together: set[tuple[int, int]] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace uses that are understood, note the others."""
        kwargs = kwargs or {}
        own = next((kind for kind in types if not issubclass(kind, Tensor)), None)
        if own is not None:  # a jet: its rules call torch's functions with its parts, which come here again
            with self, separate_samples():
                return own.__torch_function__(func, types, args, kwargs)
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if func is torch.autograd.grad:  # of the closure: in its inputs, or in parameters too
            return self._differentiated(args, kwargs)
        found = {self._parameter(x) for x in _tensors((args, kwargs))} - {None}
        if not found:
            return func(*args, **kwargs)
        result = self._replaced(func, args, kwargs)
        if result is not None:
            return result
        result = func(*args, **kwargs)
        if any(x.requires_grad for x in _tensors(result) if self._parameter(x) is None):
            name = getattr(func, "__name__", str(func))
            p = args[0] if args else None
            if isinstance(p, Tensor) and id(p) in self._index and p.ndim == 2 and (name == "t" or func in TRANSPOSED):
                self._transposes[id(result)] = (result, p)
            else:
                self.opaque |= {i: name for i in found if i is not None}
        return result

    def _differentiated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`torch.autograd.grad` as the closure calls it."""
        if any(self._parameter(x) is not None for x in _tensors((args, kwargs))):
            self._recorder.phase = "plain"
        try:
            return (
                _one_by_one(*args, **kwargs) if kwargs.get("is_grads_batched") else torch.autograd.grad(*args, **kwargs)
            )
        finally:
            self._recorder.phase = "closure"

    def _parameter(self, x: Tensor) -> int | None:
        if id(x) in self._transposes:
            x = self._transposes[id(x)][1]
        return self._index.get(id(x))

    def _replaced(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The result with a copy of each parameter a sample; None: this use is not understood."""
        name = getattr(func, "__name__", "")
        if func is F.linear:
            return self._linear(*_linear_arguments(*args, **kwargs))
        if kwargs or len(args) != 2 or not all(isinstance(x, Tensor) for x in args):
            return None
        x, y = args
        if name in MATMUL and self._parameter(x) is None:
            return self._linear(x, y, None, transposed=True)
        if name in ELEMENTWISE and not {id(x), id(y)} & set(self._transposes):
            left, right = self._copies(x, y), self._copies(y, x)
            return func(left, right) if left is not None and right is not None else None
        return None

    def _linear(self, x: Tensor, W: Tensor, b: Tensor | None, transposed: bool = False) -> Tensor | None:
        if id(W) in self._transposes:
            W, transposed = self._transposes[id(W)][1], not transposed
        indices = self._index.get(id(W)), self._index.get(id(b))
        dtypes = {t.dtype for t in (x, W, b) if t is not None}
        if x.ndim < 2 or W.ndim != 2 or len(dtypes) > 1 or torch.is_autocast_enabled(x.device.type):
            return None
        if self._parameter(x) is not None or (b is not None and b.ndim != 1):
            return None
        if indices[0] is not None and indices[1] is not None:
            self.together.add((indices[0], indices[1]))
        return _LinearMap.apply(x, W, b, self._recorder, indices, transposed)

    def _copies(self, p: Tensor, x: Tensor) -> Tensor | None:
        """One operand, as copies if it is a parameter; None if they would not be one a sample of the other."""
        index = self._parameter(p)
        if index is None:
            return p
        if self._parameter(x) is not None or x.ndim == 0 or p.ndim > x.ndim or (p.ndim == x.ndim and len(p) != 1):
            return None
        own = p.shape[1:] if p.ndim == x.ndim else (*[1] * (x.ndim - p.ndim - 1), *p.shape)
        return _Copies.apply(p, (len(x), *own), self._recorder, index)


def expand(
    evaluate: Callable[[], Terms], params: Sequence[Tensor], memory: Memory, chunk: int | None = None
) -> Factored:
    """Rows of J from one backward pass for every equation of a term.

    Args:
        evaluate: Calls the closure.
        params: That J is with respect to.
        memory: What is known; what is found is added. Terms that are new in it are checked: one more backward pass.
        chunk: Columns of J that are held at once.

    Returns:
        J by its uses.

    Raises:
        CannotExpand: If it cannot be had this way.
    """
    while True:
        found = _attempt(evaluate, params, memory, chunk)
        if isinstance(found, Factored):
            return found
        memory.excluded |= set(found)
        entries = sum(params[i].numel() for i in memory.excluded)
        if entries > COLUMNS:
            uses = ", ".join(f"parameter {i} {tuple(params[i].shape)} in {use}" for i, use in found.items())
            raise CannotExpand(f"the closure uses {uses}")


def _attempt(
    evaluate: Callable[[], Terms], params: Sequence[Tensor], memory: Memory, chunk: int | None
) -> Factored | dict[int, str]:
    """J, or the parameters that have to be excluded and where they were used."""
    recorder, excluded = Recorder(), memory.excluded
    # A compiled graph does not show the calls that are recorded: J would be zero, and autograd's is, too.
    with Expansion(params, excluded, recorder) as expansion:
        terms = evaluate()
    if expansion.opaque:
        return expansion.opaque
    vector = terms.vector()
    parts: list[list[Part]] = [[] for _ in params]
    inputs = [p for i, p in enumerate(params) if i not in excluded and p.requires_grad]
    at = 0
    for r, scale in zip(terms.residuals, terms.scales, strict=True):
        found = _record(recorder, r * scale, at, inputs)
        if recorder.strangers and r.numel() <= ROWS:
            recorder.phase, recorder.strangers = "plain", set()
            found = _row_by_row(r * scale, at, params, excluded)
        elif recorder.strangers:
            return {i: f"a function of inputs whose first axis is not the {len(r)} samples" for i in recorder.strangers}
        for i, part in found:
            parts[i].append(part)
        at += r.numel()
    recorder.phase = "plain"
    for i in sorted(excluded):
        parts[i] = [_columns(vector, params[i])]
    J = Factored(vector.detach(), params, parts, chunk, _layers(len(params), expansion.together))
    structure = tuple((name, r.shape, r.dtype) for name, r in zip(terms.names, terms.residuals, strict=True))
    if structure in memory.checked:
        return J
    difference = _disagreement(J, vector, params)
    if math.isnan(difference):  # says nothing of the closure; the next call checks
        return J
    if difference > TOLERANCE.get(vector.dtype, 1e-3):
        raise CannotExpand(
            f"rows do not give Jᵀ u (relative difference {difference:.1e}): residuals of a sample depend on other "
            "samples (batch norm, a mean over the batch), or on parameters that torch functions do not show"
        )
    memory.checked.add(structure)
    return J


def _layers(n: int, together: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Parameters by layers: those that are linked by pairs, in the order of their first ones."""
    layer = [{i} for i in range(n)]
    for i, j in together:
        union = layer[i] | layer[j]
        for k in union:
            layer[k] = union
    return [sorted(layer[i]) for i in range(n) if i == min(layer[i])]


def _record(recorder: Recorder, r: Tensor, at: int, inputs: Sequence[Tensor]) -> list[tuple[int, Part]]:
    """J of a term whose first row is `at`, by parameter: one backward pass for every equation.

    Of the term itself and not of the whole vector: its derivative sends zeros through the graphs of all other terms.
    """
    found: list[tuple[int, Part]] = []
    n = len(r)
    equations = r.numel() // max(n, 1)
    recorder.phase, recorder.n = "record", n
    for m in range(equations if inputs and r.requires_grad else 0):
        recorder.uses = {}
        torch.autograd.grad(r.reshape(n, equations)[:, m].sum(), inputs, retain_graph=True, allow_unused=True)
        rows = slice(at + m, at + r.numel(), equations)
        found += [(i, Part(rows, [a for a, _ in uses], [z for _, z in uses])) for i, uses in recorder.uses.items()]
    return found


def _row_by_row(r: Tensor, at: int, params: Sequence[Tensor], excluded: set[int]) -> list[tuple[int, Part]]:
    """J of a small term, by one backward pass a row."""
    live = [i for i, p in enumerate(params) if i not in excluded and p.requires_grad]
    inputs = [params[i] for i in live]
    rows = [
        torch.autograd.grad(entry, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for entry in r.flatten()
    ]
    found = []
    for k, i in enumerate(live):
        a, z = dense(torch.stack([row[k].flatten() for row in rows]), units_of(params[i]))
        found.append((i, Part(slice(at, at + r.numel()), [a], [z])))
    return found


def _columns(vector: Tensor, p: Tensor) -> Part:
    """J of one small parameter, by J e_i for each of its entries."""
    J = Products(vector, [p])
    units = torch.eye(p.numel(), dtype=p.dtype, device=p.device).reshape(-1, *p.shape)
    columns = torch.stack([J.jvp([unit]) for unit in units], -1)
    a, z = dense(columns, units_of(p))
    return Part(slice(0, len(vector)), [a], [z])


def _disagreement(J: Factored, vector: Tensor, params: Sequence[Tensor]) -> float:
    """|Jᵀ u - Jᵀ u by autograd| / |Jᵀ u| for a random u: root mean square over the parameters.

    Relative to every parameter's own size, but for those that are rounding errors of the whole.
    """
    generator = torch.Generator(vector.device).manual_seed(0)  # not the user's
    u = torch.randn(vector.shape, dtype=vector.dtype, device=vector.device, generator=generator)
    true, own = Products(vector, params).vjp(u), J.vjp(u)
    sizes = torch.stack([torch.linalg.vector_norm(x) for x in true])
    errors = torch.stack([torch.linalg.vector_norm(y - x) for x, y in zip(true, own, strict=True)])
    least = torch.linalg.vector_norm(sizes) * torch.finfo(vector.dtype).eps ** 0.4
    relative = torch.where(errors == 0, 0.0, errors / torch.maximum(sizes, least))
    return math.inf if bool((relative == math.inf).any()) else float(relative.square().mean().sqrt())


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _one_by_one(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = True,
    materialize_grads: bool = False,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of batched gradients without vmap, under which the recording maps lose their graph."""
    batches = grad_outputs if isinstance(grad_outputs, (tuple, list)) else [grad_outputs]
    size = next(len(g) for g in batches if g is not None)
    found = [
        torch.autograd.grad(
            outputs,
            inputs,
            [None if g is None else g[i] for g in batches],
            retain_graph=True,  # for the next of them
            create_graph=create_graph,
            allow_unused=allow_unused,
            materialize_grads=materialize_grads,
        )
        for i in range(size)
    ]
    return tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True))


def _rows(x: Tensor) -> Tensor:
    """`(n, …, d)` -> `(n, s, d)`."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            yield from _tensors(x)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))
