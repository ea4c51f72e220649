"""A case: one call of an operation, the work in it, what it must give, and what it competes with."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from secondorder_kernels.dispatch import Operation, operations
from secondorder_kernels.launch import TritonPath
from secondorder_kernels.tables import Config

# By how a kernel forms products: allowed deviation of an entry, relative to its size and the root mean square of all.
TOLERANCE = {"ieee": 2e-3, "tf32x3": 2e-3, "bf16": 5e-2}
_OF_BASELINES = 5e-2  # they may round what lies between to bfloat16; that is their affair


@dataclass(frozen=True)
class Call:
    """Arguments of one call, as the operation's schema has them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def of(self, function: Callable[..., Any]) -> Any:
        """Call a function with them."""
        return function(*self.args, **self.kwargs)

    def map(self, function: Callable[[Any], Any]) -> Call:
        """The call with `function` of every argument."""
        return Call(tuple(map(function, self.args)), {name: function(value) for name, value in self.kwargs.items()})


class Draw:
    """Random tensors, the same in every run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, device=self.device, generator=self._generator).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Numbers between 1/10 and 1: no second moment is near 0."""
        return (0.1 + 0.9 * torch.rand(shape, device=self.device, generator=self._generator)).to(dtype)

    def keys(self, n: int) -> Tensor:
        """Keys of stochastic rounding."""
        return torch.randint(0, 2**32, (n,), device=self.device, generator=self._generator)

    def nan(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Where a result is to be left."""
        return torch.full(shape, math.nan, device=self.device, dtype=dtype)

    def full(self, shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Equal numbers."""
        return torch.full(shape, value, device=self.device, dtype=dtype)


Maker = Callable[[Draw], Call]


@dataclass(frozen=True)
class Case:
    """A call to be measured.

    Attributes:
        operation: Name of the operation.
        label: Shapes, dtypes and options, for people.
        make: Draws the arguments.
        flops: Floating-point operations that the task needs, whoever carries it out.
        bytes: That must be read and written at least.
        unit: "bf16", "tf32" or "fp32": whose peak bounds the operations.
        candidates: Configurations to try, for the launcher.
        baselines: By name, functions of the operation's arguments that do the same work with torch alone, beside the
            operation's other paths; they may leave more than was asked for, such as both triangles.
        compiled: Whether the reference, compiled, is a baseline too: that takes seconds.
        tolerance: Allowed deviation of an entry, see `TOLERANCE`.
        precision: `torch.get_float32_matmul_precision()` during the call.
        part: What counts of a result, such as its lower triangle.
    """

    operation: str
    label: str
    make: Maker
    flops: float
    bytes: float
    unit: str
    candidates: tuple[Config, ...]
    baselines: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    compiled: bool = False
    tolerance: float = TOLERANCE["ieee"]
    precision: str = "highest"
    part: Callable[[Tensor], Tensor] = lambda result: result

    def call(self, device: torch.device) -> Call:
        """Arguments, the same each time."""
        return self.make(Draw(device))

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        """The float32 precision of the case, for a while, and no gradients."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            with torch.no_grad():
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def floor_us(self, ceilings: Mapping[str, float]) -> float:
        """Microseconds that the case takes at least; `ceilings` per second, by unit and "bytes"."""
        return 1e6 * max(self.flops / ceilings[self.unit], self.bytes / ceilings["bytes"])


class Compiled:
    """A function that torch.compile compiles for the shapes of its first call.

    Args:
        function: Of an operation's arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        if self._compiled is None:
            # Of one function, compilers keep only so many versions; beyond, they run it as it is, without a word.
            torch._dynamo.reset()
            self._compiled = torch.compile(self._function, dynamic=False)
        return self._compiled(*args, **kwargs)


def other_paths(case: Case, call: Call) -> dict[str, Callable[..., Any]]:
    """What a call takes where the kernel is not taken: the operation's other paths, by name."""
    operation = operations()[case.operation]
    found: dict[str, Callable[..., Any]] = {"reference": operation.reference}
    for path in operation.faster:
        if not isinstance(path, TritonPath) and call.of(path.refuses) is None:
            found[path.name] = path.run
    return found


def alternatives(case: Case, call: Call) -> dict[str, Callable[..., Any]]:
    """What competes with the kernel: the operation's other paths, their reference compiled, the case's baselines."""
    found = other_paths(case, call)
    if case.compiled:
        found["torch.compile"] = Compiled(operations()[case.operation].reference)
    return {**found, **case.baselines}


def triton_path(name: str) -> TritonPath | None:
    """An operation's path through Triton, if it has one."""
    path = operations()[name].triton
    return path if isinstance(path, TritonPath) else None


class _Poisoned(TorchDispatchMode):
    """What is allocated is NaN until it is written."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if "::empty" in func.name() or "::new_empty" in func.name():
            if out.is_floating_point():
                out.fill_(math.nan)
        return out


class Verifier:
    """The first and last row of a case's results in float64, and what deviates from them.

    Args:
        case: The case.
        device: Where its tensors are to be.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self._operation = operations()[case.operation]
        call = case.call(device)
        self._n = _rows(call)
        self._expected = {}
        for i in sorted({0, self._n - 1}):
            row = call.map(lambda value, i=i: _double(_row(value, self._n, i)))  # type: ignore[misc]
            row.kwargs.pop("keys", None)
            self._expected[i] = _flat(_results(self._operation, row, row.of(self._operation.reference)))

    def error(self, function: Callable[..., Any], baseline: bool = False) -> str | None:
        """What is wrong with what a function of the case's arguments does; None if nothing is."""
        call = self.case.call(self.device)
        # Inside such a mode nothing is compiled; what torch leaves unwritten is not our question.
        with contextlib.nullcontext() if baseline else _Poisoned():
            returned = call.of(function)
        found = _results(self._operation, call, returned)
        for k, result in enumerate(_flat(found)):
            if not bool(self.case.part(result).isfinite().all()):
                return f"result {k} is not finite everywhere"
        tolerance = max(self.case.tolerance, _OF_BASELINES) if baseline else self.case.tolerance
        for i, expected in self._expected.items():
            given_row = _flat([_row(entry, self._n, i) for entry in found])
            for k, (given, wanted) in enumerate(zip(given_row, expected, strict=True)):
                given, wanted = self.case.part(given), self.case.part(wanted).double()
                allowed = tolerance + 2 * torch.finfo(given.dtype).eps
                ratio = ((given.double() - wanted).abs() / (wanted.abs() + wanted.square().mean().sqrt() + 1e-30)).max()
                if not ratio <= allowed:
                    return f"result {k} deviates by {ratio:.1e} of its size in row {i}, allowed are {allowed:.1e}"
        return None


def _results(operation: Operation, call: Call, returned: Any) -> list[Any]:
    """What an operation changed or, where it changes nothing, returned: tensors and lists of tensors."""
    schema = operation.registered._schema.arguments
    written = [k for k, a in enumerate(schema) if a.alias_info is not None and a.alias_info.is_write]
    if not written:
        return list(returned) if isinstance(returned, (list, tuple)) else [returned]
    return [call.args[k] if k < len(call.args) else call.kwargs.get(schema[k].name) for k in written]


def _flat(entries: list[Any]) -> list[Tensor]:
    """The floating-point tensors among results."""
    found = [t for entry in entries for t in (entry if isinstance(entry, (list, tuple)) else [entry])]
    return [t for t in found if t is not None and t.is_floating_point()]


def _rows(call: Call) -> int:
    first = call.args[0]
    return len(first) if isinstance(first, (list, tuple)) else int(first.shape[0])


def _row(value: Any, n: int, i: int) -> Any:
    """Row `i` of what has `n` rows; everything else as it is."""
    if isinstance(value, (list, tuple)):
        return [value[i]] if len(value) == n else value
    return value[i : i + 1] if isinstance(value, Tensor) and value.ndim and value.shape[0] == n else value


def _double(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_double(entry) for entry in value]
    # A copy in any case: the reference works in place.
    return value.double().clone() if isinstance(value, Tensor) and value.is_floating_point() else value
