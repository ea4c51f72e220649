"""Which path an operation takes, and why.

An operation has its reference and any number of faster paths, best first. A path tells for given arguments why it
cannot take them (it refuses), or why another one is better (it declines). In mode "auto" the first one that does
neither is taken, else the reference, so that "auto" works wherever the reference does. In mode "triton" a call that no
Triton kernel can take is an error: that mode is for whoever must know that the kernels run.

Every operation either changes some of its arguments and returns nothing, or returns new tensors. So it can be
registered with `torch.library` as it is, which makes it opaque to a compiler: in eager mode the registered form is
passed by, since it costs some microseconds a call.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from secondorder_kernels import tables

MODES = ("auto", "reference", "triton")

# Counts of calls by (operation, path, reason).
Calls = collections.Counter[tuple[str, str, str]]

_library = torch.library.Library("secondorder", "FRAGMENT")


def _never(*args: Any, **kwargs: Any) -> None:
    """Nothing to be said against it."""


@dataclasses.dataclass(frozen=True)
class Path:
    """One way to carry out an operation.

    Attributes:
        name: What `explain` calls it.
        run: The function, with the operation's signature.
        refuses: Takes the operation's arguments; says why the path cannot take them, or returns None.
        declines: Says why mode "auto" should pass on, or returns None.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None] = _never
    declines: Callable[..., str | None] = _never


class Operation:
    """An operation by name: calling it runs the path that its arguments allow.

    Args:
        reference: The specification, named as the operation.
        example: Makes small arguments on a device, for `explain_all`: those without a default.
        faster: Paths to prefer to the reference, best first.
        schema: Of `torch.library`, without the name: "(Tensor(a!) C, Tensor X, *, bool lower=False) -> ()".
        fake: Makes the results from fake tensors; None where the operation returns nothing.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        example: Callable[[torch.device], tuple[Any, ...]],
        faster: tuple[Path, ...] = (),
        *,
        schema: str,
        fake: Callable[..., Any] = _never,
    ) -> None:
        self.name = reference.__name__
        self.example = example
        self.reference = reference
        self._reference = Path("reference", reference)
        self.faster = faster
        self._has_triton = any(path.name == "triton" for path in faster)
        self._broken: str | None = None
        _library.define(self.name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"secondorder::{self.name}", fake, lib=_library)
        self.registered = getattr(torch.ops.secondorder, self.name).default
        _operations[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        if torch.compiler.is_compiling() and self._opaque(args[0]):
            return self.registered(*args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        path, reason = self.choose(*args, **kwargs)
        if _calls is not None:
            _calls[self.name, path.name, reason] += 1
        if path.name != "triton" or _mode == "triton":
            return path.run(*args, **kwargs)
        try:
            return path.run(*args, **kwargs)
        except Exception as error:  # of an operation's first launch, before anything has changed
            self._broken = f"a kernel failed on this machine: {type(error).__name__}: {error}"
            warnings.warn(f"{self.name} goes on without Triton, {self._broken}", stacklevel=3)
            return self._reference.run(*args, **kwargs)

    @property
    def triton(self) -> Path | None:
        """The path through Triton, if there is one."""
        return next((path for path in self.faster if path.name == "triton"), None)

    def choose(self, *args: Any, **kwargs: Any) -> tuple[Path, str]:
        """Return the path that these arguments take, and the reason.

        Raises:
            RuntimeError: In mode "triton", if no Triton kernel takes them.
        """
        if _mode == "reference":
            return self._reference, "the mode is 'reference'"
        reasons = []
        for path in self.faster:
            if _mode == "triton" and self._has_triton:
                if path.name != "triton":
                    continue
                reason = path.refuses(*args, **kwargs)
                if reason is None:
                    return path, "the mode is 'triton'"
            else:
                reason = self._not_triton() if path.name == "triton" else None
                reason = reason or path.declines(*args, **kwargs) or path.refuses(*args, **kwargs)
                if reason is None:
                    return path, "the fastest path that takes these tensors"
            reasons.append(reason)
        if not self._has_triton:
            reasons.append(f"{self.name} needs no Triton kernel")
        because = "; ".join(reasons)
        if _mode == "triton" and _strict and self._has_triton:
            raise RuntimeError(f"the mode is 'triton', but {self.name} cannot use Triton here: {because}")
        return self._reference, because

    def _not_triton(self) -> str | None:
        # A compiler that comes here traces on a CPU, where policy has nothing to say that is worth a guard.
        return "a compiler traces the call" if torch.compiler.is_compiling() else self._broken

    def _opaque(self, first: Any) -> bool:
        """Whether a compiler should not look inside: where a kernel may run; it cannot be traced."""
        if not self._has_triton or _mode == "reference":
            return False
        tensor: Tensor = first[0] if isinstance(first, (list, tuple)) else first
        return _mode == "triton" or tensor.device.type == "cuda"


_operations: dict[str, Operation] = {}


def operations() -> Mapping[str, Operation]:
    """All operations by name, for whoever measures them."""
    return _operations


def _checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source} must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


_mode = _checked(os.environ.get("SECONDORDER_KERNELS", "auto"), "the environment variable SECONDORDER_KERNELS")
_strict = True
_calls: Calls | None = None


@contextlib.contextmanager
def use_kernels(mode: str, *, strict: bool = True) -> Iterator[Calls]:
    """Choose the paths of all operations for a while, for the whole process, and count what was called.

    Args:
        mode: "auto" (the fastest path that takes the arguments), "reference" (plain tensor operations) or "triton"
            (Triton's kernels, profitable or not).
        strict: In mode "triton", whether a call that no kernel takes is an error; otherwise it takes the reference.

    Yields:
        Counts of calls by (operation, path, reason), as they come in.

    Raises:
        ValueError: If the mode is not one of these.
    """
    global _mode, _strict, _calls
    before = _mode, _strict, _calls
    _mode, _strict, _calls = _checked(mode, "mode"), strict, Calls()
    try:
        yield _calls
    finally:
        _mode, _strict, _calls = before


def explain(operation: str, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """Tell which path a call would take.

    Args:
        operation: Name of the operation, such as "ema_syrk_".
        args: Its arguments; those with a default may be left out.
        kwargs: The same.

    Returns:
        The path ("none" where the call would raise) and the reason.

    Raises:
        ValueError: If there is no such operation.
    """
    if operation not in _operations:
        raise ValueError(f"operation must be one of {', '.join(_operations)}, got {operation!r}")
    try:
        path, reason = _operations[operation].choose(*args, **kwargs)
    except RuntimeError as error:
        return "none", str(error)
    return path.name, reason


def explain_all() -> list[tuple[str, str, str]]:
    """Tell for every operation which path float32 tensors take on this machine: on its GPU, where it has one.

    Returns:
        Triples of operation, path and reason.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [(name, *explain(name, *operation.example(device))) for name, operation in _operations.items()]


def fingerprint() -> str:
    """A word that is the same in two processes if their kernels round alike: the mode and a digest of all tables."""
    return f"{_mode} {tables.fingerprint()}"
