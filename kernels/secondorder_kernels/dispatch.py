"""Which path an operation takes, and why.

An operation has its reference and any number of faster paths, best first. A path tells for given arguments why it
cannot take them; in mode "auto" the first one that can is taken, else the reference, so that "auto" works wherever the
reference does. In mode "triton" a call that no Triton kernel takes is an error: that mode is for whoever must know
that the kernels run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

MODES = ("auto", "reference", "triton")


@dataclasses.dataclass(frozen=True)
class Path:
    """One way to carry out an operation.

    Attributes:
        name: What `explain` calls it.
        run: The function, with the operation's signature.
        refuses: Takes the operation's positional arguments; says why the path cannot take them, or returns None.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]


class Operation:
    """An operation by name: calling it runs the path that its arguments allow.

    Args:
        reference: The specification, named as the operation.
        example: Makes small positional arguments on a device, for `explain_all`.
        faster: Paths to prefer to the reference, best first.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        example: Callable[[torch.device], tuple[Any, ...]],
        faster: tuple[Path, ...] = (),
    ) -> None:
        self.name = reference.__name__
        self.example = example
        self._reference = Path("reference", reference, lambda *args: None)
        self._faster = faster
        _operations[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        path, _ = self.choose(*args)
        return path.run(*args, **kwargs)

    def choose(self, *args: Any) -> tuple[Path, str]:
        """Return the path that these positional arguments take, and the reason.

        Raises:
            RuntimeError: In mode "triton", if no Triton kernel takes them.
        """
        if _mode == "reference":
            return self._reference, "the mode is 'reference'"
        refusals = []
        for path in self._faster:
            if _mode == "triton" and path.name != "triton":
                continue
            refusal = path.refuses(*args)
            if refusal is None:
                return path, "the fastest path that takes these tensors"
            refusals.append(refusal)
        if all(path.name != "triton" for path in self._faster):
            refusals.append(f"no Triton kernel for {self.name} yet")
        reason = "; ".join(refusals)
        if _mode == "triton":
            raise RuntimeError(f"the mode is 'triton', but {self.name} cannot use Triton here: {reason}")
        return self._reference, reason


_operations: dict[str, Operation] = {}


def _checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source} must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


_mode = _checked(os.environ.get("SECONDORDER_KERNELS", "auto"), "the environment variable SECONDORDER_KERNELS")


@contextlib.contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Choose the paths of all operations for a while, for the whole process.

    Args:
        mode: "auto" (the fastest path that takes the arguments), "reference" (plain tensor operations) or "triton"
            (an error where no Triton kernel takes them).

    Raises:
        ValueError: If the mode is not one of these.
    """
    global _mode
    before, _mode = _mode, _checked(mode, "mode")
    try:
        yield
    finally:
        _mode = before


def explain(operation: str, *args: Any) -> tuple[str, str]:
    """Tell which path a call would take.

    Args:
        operation: Name of the operation, such as "ema_syrk_".
        args: Its positional arguments.

    Returns:
        The path ("none" where the call would raise) and the reason.

    Raises:
        ValueError: If there is no such operation.
    """
    if operation not in _operations:
        raise ValueError(f"operation must be one of {', '.join(_operations)}, got {operation!r}")
    try:
        path, reason = _operations[operation].choose(*args)
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
