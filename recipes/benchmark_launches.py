"""How many operations a step launches, counted on the meta device: they must grow with buckets, not with layers.

Every method steps on GPTs of GPT-2 small's shapes with 1, 6 and 12 layers, whose blocks fall into the same buckets.
Counted is what a GPU would be given to do: operations of torch that write a tensor on the device (views, allocations
and what stays on the host left out), and launches of Triton's kernels, of which each takes a bucket whole. Nothing is
computed, so nothing is decided by values either; on a GPU decompositions launch more than one kernel.

A step between two refreshes, and the dearest of a period in which all factors are refreshed together, or of those in
which factors rest and move in turn. An operation on a list of tensors counts once: on a GPU those launch one kernel for
each few dozen tensors.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import secondorder
import secondorder_kernels
from benchmark_step import table
from gpt import GPT
from secondorder_kernels import policy, tables

WIDTH, HEADS, CONTEXT, VOCABULARY = 768, 12, 1024, 50257
PERIOD = 4
STEPS = 3 * PERIOD  # in the first two periods what is refreshed is made anew
ALLOCATES = ("::empty", "::new_empty", "::detach", "::_unsafe_view", "::alias", "profiler")


class Launches(TorchDispatchMode):
    """Counts operations that write on the device, by name, and kernels of Triton's that are launched."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        written = [out] if out is not None else [args]  # a list operation in place returns nothing
        here = any(isinstance(t, Tensor) and t.device.type == "meta" for t in tree_leaves(written))
        if here and not func.is_view and not any(word in func.name() for word in ALLOCATES):
            self.operations[func.name()] += 1
        return out

    @property
    def total(self) -> int:
        """Of both."""
        return self.operations.total() + self.kernels.total()


@contextlib.contextmanager
def _launching(launches: Launches) -> Iterator[None]:
    """Kernels take tensors without memory, and are counted instead of compiled."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    def count(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launches.kernels[kernel.fn.__name__] += 1

    def refuses(tensors: Any, dtypes: Any = policy.FLOATS) -> str | None:
        odd = [t.dtype for t in tensors if t is not None and t.dtype not in dtypes]
        return f"there is no kernel for {odd[0]}" if odd else None

    with (
        mock.patch.object(JITFunction, "run", count),
        mock.patch.object(InterpretedFunction, "run", count),
        mock.patch.object(policy, "refuses", refuses),
        mock.patch.object(tables, "family", lambda device: "sm90"),
    ):
        yield


@dataclass(frozen=True)
class Count:
    """Of one method and number of layers.

    Attributes:
        buckets: Stacks that the optimizer works on.
        plain: Launches of the step with fewest.
        most: Launches of the step with most.
        kernels: Of the plain step, those of Triton's kernels.
    """

    buckets: int
    plain: int
    most: int
    kernels: int


def count(name: str, layers: int, mode: str, width: int = WIDTH) -> Count:
    """Launches of a method on a GPT.

    Args:
        name: Of the class.
        layers: Of the GPT.
        mode: "triton" or "reference", of the kernels.
        width: Of the GPT.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        model = GPT(VOCABULARY, CONTEXT, layers, HEADS, width)
    cls = getattr(secondorder, name)
    together = {"refresh_every": PERIOD, "refresh": "together"}
    options = together if "refresh_every" in cls.shared_options else {}
    optimizer = cls(model.parameters(), module=model, **options)
    tokens = torch.zeros(2, 16, dtype=torch.long, device="meta")
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        launches = Launches()
        with secondorder_kernels.use_kernels(mode, strict=False), _launching(launches), launches:
            optimizer.step()
        found.append(launches)
    period = sorted(found[-PERIOD:], key=lambda launches: launches.total)
    buckets = len(optimizer._layout.buckets)  # what no report of the optimizer says
    return Count(buckets, period[0].total, period[-1].total, period[0].kernels.total())


def methods() -> list[str]:
    """The public optimizers."""
    public = ((name, getattr(secondorder, name)) for name in secondorder.__all__)
    return [name for name, item in public if inspect.isclass(item) and issubclass(item, torch.optim.Optimizer)]


def report(layers: Sequence[int], names: Sequence[str] | None = None, width: int = WIDTH) -> str:
    """The table in Markdown.

    Args:
        layers: Numbers of layers.
        names: Methods; None: all.
        width: Of the GPTs.
    """
    counts = " / ".join(map(str, layers))
    header = [
        "method",
        f"buckets, {counts} layers",
        "plain step",
        "of these Triton's",
        "dearest step",
        "plain step, torch alone",
        "more per layer",
    ]
    body = []
    for name in methods() if names is None else names:
        ours = [count(name, n, "triton", width) for n in layers]
        alone = [count(name, n, "reference", width) for n in layers]
        columns = [[c.buckets for c in ours], [c.plain for c in ours], [c.kernels for c in ours]]
        columns += [[c.most for c in ours], [c.plain for c in alone]]
        growth = (ours[-1].plain - ours[0].plain) / (layers[-1] - layers[0])
        body.append([name, *(" / ".join(map(str, column)) for column in columns), f"{growth:.1f}"])
    title = f"Operations launched by a step on GPTs of width {width} with {counts} layers, vocabulary {VOCABULARY}"
    return f"{title}\n\n{table(header, body)}"
