"""Truncated Taylor series that an unmodified model is called with.

    value       u                                  (N, *S)
    first       D_r u = <v_r, grad u>              (N, R, *S), one per direction v_r
    second      Σ_rs C_rs D_r D_s u                (N, *S), collapsed: the sum alone is propagated, never its terms

A `Jet` takes part in torch functions through `__torch_function__`. Rules, found by the function's name, say how the
three parts go through it; a function without a rule is refused with the name of the module that called it. The first
axis is always that of the samples, and no rule mixes samples.

Parts are tensors or, when operators are nested, jets of the operator outside: rules therefore use nothing but torch
functions that have rules themselves.

Dangel et al., *Collapsing Taylor Mode Automatic Differentiation* (2025, arXiv:2505.13644); Li et al., *A computational
framework for neural network-based variational Monte Carlo with Forward Laplacian* (2023, arXiv:2307.08214).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

Part: TypeAlias = Any
"""A tensor, or a jet of the operator outside; where it may be None, zero."""

Rule: TypeAlias = Callable[..., Any]

RULES: dict[str, Rule] = {}
"""Torch functions by name; a rule takes the space and then what the function takes."""

_created = itertools.count()
_separate: contextvars.ContextVar[bool] = contextvars.ContextVar("separate_samples", default=False)


class Space:
    """What the jets of one call of an operator share.

    Args:
        order: 1: without `second`; 2: with it.
        weights: C of the sum over directions: None for the identity, `(R,)` or `(N, R)` for a diagonal, `(R, R)` or
            `(N, R, R)` symmetric.
        matrix: `weights` holds matrices.
    """

    def __init__(self, order: int, weights: Part = None, matrix: bool = False) -> None:
        self.order = order
        self.weights = weights
        self.matrix = matrix
        # An operator inside another one begins later; to its jets those of the operator outside are constants.
        self.level = next(_created)

    def owns(self, x: object) -> bool:
        """Whether `x` is a jet of this call."""
        return isinstance(x, Jet) and x.space is self

    def squares(self, f: Part) -> Part:
        """`Σ_rs C_rs f_r f_s` of first-order parts `(N, R, *S)`."""
        if self.weights is not None:
            return self.products(f, f)
        return per_sample(f, lambda f: f.square().sum(1))

    def products(self, f: Part, g: Part, product: Callable[[Part, Part], Part] = torch.mul) -> Part:
        """`Σ_rs C_rs product(f_r, g_s)`."""
        return product(self._weighted(f), g).sum(1)

    def _weighted(self, f: Part) -> Part:
        if self.weights is None:
            return f
        if self.matrix:
            return torch.matmul(self.weights, f.reshape(*f.shape[:2], math.prod(f.shape[2:]))).reshape(f.shape)
        rows = self.weights if self.weights.dim() == 2 else self.weights.unsqueeze(0)
        return f * rows.reshape(*rows.shape, *(1,) * (f.dim() - 2))


class Jet:
    """Value, derivatives in R directions and the collapsed second-order sum of a quantity with N samples.

    Args:
        value: `(N, *S)`.
        first: `(N, R, *S)`; may be expanded along samples or directions.
        second: `(N, *S)`; None: zero, or not wanted.
        space: That of the call.
    """

    __slots__ = ("first", "second", "space", "value")

    def __init__(self, value: Part, first: Part, second: Part, space: Space) -> None:
        self.value = value
        self.first = first
        self.second = second
        self.space = space

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return call(func.__name__, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:  # methods of tensors, by the rules
        if name in RULES:
            return functools.partial(call, name, self)
        if hasattr(Tensor, name) and not name.startswith("__"):
            refuse(f"no rule for Tensor.{name}")
        raise AttributeError(f"a Taylor jet has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"Jet(shape={tuple(self.shape)}, directions={self.first.shape[1]}, order={self.space.order})"

    @property
    def shape(self) -> torch.Size:
        """That of the value."""
        return self.value.shape

    @property
    def ndim(self) -> int:
        """Axes of the value."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of all parts."""
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        """That of all parts."""
        return self.value.device

    def dim(self) -> int:
        """Axes of the value."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Shape of the value, or its extent along one axis."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return call("getitem", self, index)

    def __neg__(self) -> Any:
        return call("neg", self)

    def __add__(self, other: Any) -> Any:
        return call("add", self, other)

    __radd__ = __add__

    def __mul__(self, other: Any) -> Any:
        return call("mul", self, other)

    __rmul__ = __mul__

    def __sub__(self, other: Any) -> Any:
        return call("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return call("sub", other, self)

    def __truediv__(self, other: Any) -> Any:
        return call("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return call("div", other, self)

    def __pow__(self, exponent: Any) -> Any:
        return call("pow", self, exponent)

    def __rpow__(self, base: Any) -> Any:
        return call("pow", base, self)

    def __matmul__(self, other: Any) -> Any:
        return call("matmul", self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return call("matmul", other, self)

    def __abs__(self) -> Any:
        return call("abs", self)

    def __bool__(self) -> NoReturn:
        refuse("control flow that depends on data has no Taylor series: bool() of a jet")

    def __float__(self) -> NoReturn:
        refuse("a jet is no number: float() of a jet")

    def _compare(self, other: object) -> NoReturn:
        refuse("control flow that depends on data has no Taylor series: comparison of a jet")

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _compare
    __hash__ = object.__hash__


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for torch functions and methods of these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """Apply a torch function by its rule, in the innermost operator that has a jet among the arguments."""
    reflected = name.startswith("__r") and name.endswith("__") and name[3:-2] in _REFLECTED
    plain = _OPERATORS.get(name, name)
    found = RULES.get(plain)
    if found is None:
        refuse(f"no rule for {name}")
    if kwargs.pop("inplace", False):
        refuse(f"{name} in place; a jet is never changed")
    if kwargs.get("out") is not None:
        refuse(f"{name} with out=")
    space = max((jet.space for jet in _jets((*args, *kwargs.values()))), key=lambda space: space.level)
    return found(space, *(reversed(args) if reflected else args), **kwargs)


_REFLECTED = ("sub", "truediv", "div", "pow", "matmul")
_OPERATORS = {
    **{f"__{name}__": name for name in ("add", "sub", "mul", "pow", "matmul", "neg", "abs", "getitem")},
    **{f"__r{name}__": name for name in ("add", "sub", "mul", "pow", "matmul")},
    **{"__truediv__": "div", "__div__": "div", "__rtruediv__": "div", "__rdiv__": "div"},
}


def _jets(args: Iterable[Any]) -> Iterable[Jet]:
    for arg in args:
        if isinstance(arg, Jet):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _jets(arg)


@contextlib.contextmanager
def separate_samples() -> Iterator[None]:
    """Inside, every linear map is given all samples, for what replaces weights by copies of them, one a sample."""
    token = _separate.set(True)
    try:
        yield
    finally:
        _separate.reset(token)


def per_sample(first: Part, function: Callable[[Part], Part]) -> Part:
    """A function of first-order parts, evaluated once where they are the same for all samples, as of the inputs."""
    if _separate.get() or not isinstance(first, Tensor) or first.stride(0) != 0:
        return function(first)
    out = function(first[:1])
    return out.expand(first.shape[0], *out.shape[1:])


def each(jet: Jet, function: Callable[[Part], Part]) -> Jet:
    """A linear function that needs no more than the trailing axes, of all parts."""
    second = None if jet.second is None else function(jet.second)
    return Jet(function(jet.value), function(jet.first), second, jet.space)


def added(a: Part, b: Part) -> Part:
    """Sum of parts that may be None."""
    return b if a is None else a if b is None else a + b


def refuse(reason: str) -> NoReturn:
    """Raise the error of a model that has no Taylor series by these rules, with the module that is running.

    Raises:
        TypeError: Always.
    """
    running: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:  # from the innermost call outwards
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner not in running:
            running.append(owner)
        frame = frame.f_back
    where = ""
    if running:
        inner, root = running[0], running[-1]
        name = next((name for name, module in root.named_modules() if module is inner), "")
        where = f", called by {type(inner).__name__} {name!r}" if name else f", called by {type(inner).__name__}"
    raise TypeError(f"taylor: {reason}{where}")
