"""The path of an operation through its Triton kernel: policy, table, device, launcher."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from secondorder_kernels import policy, tables
from secondorder_kernels.dispatch import Path

Shape = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonPath(Path):
    """A path through Triton, as the tuner sees it.

    Attributes:
        shape: Takes the operation's arguments, gives `(kind, sizes)`, by which tables are looked up.
        launch: Takes the operation's arguments and `config`, whatever tables say.
    """

    shape: Callable[..., Shape]
    launch: Callable[..., Any]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """No further reason to refuse."""


def triton_path(
    operation: str,
    launcher: str,
    *,
    tensors: Callable[..., Iterable[Tensor | None]],
    shape: Callable[..., Shape],
    refuses: Callable[..., str | None] = _nothing,
    dtypes: Collection[torch.dtype] = policy.FLOATS,
) -> TritonPath:
    """Describe how an operation runs through Triton.

    Args:
        operation: Its name, by which tables know it.
        launcher: "module:function" below `secondorder_kernels.triton`, imported at the first call: a function of the
            operation's arguments and `config`, with the operation's results.
        tensors: Takes the operation's arguments, gives all tensors among them, none left out; the first tells the
            device.
        shape: Takes the operation's arguments, gives `(kind, sizes)`, by which tables are looked up.
        refuses: Why the kernel cannot take these arguments, beside devices, dtypes and subclasses.
        dtypes: That tensors may have.

    Returns:
        A path named "triton".
    """

    def device_of(*args: Any, **kwargs: Any) -> torch.device:
        return next(t for t in tensors(*args, **kwargs) if t is not None).device

    def cannot(*args: Any, **kwargs: Any) -> str | None:
        return policy.refuses(tensors(*args, **kwargs), dtypes) or refuses(*args, **kwargs)

    def need_not(*args: Any, **kwargs: Any) -> str | None:
        device = device_of(*args, **kwargs)
        # Off a GPU the shape does not matter, and finding it takes as long as a small operation.
        kind, sizes = shape(*args, **kwargs) if device.type == "cuda" else ("", ())
        return policy.declines(operation, kind, sizes, device)

    def launch_on(device: torch.device, config: tables.Config, args: Any, kwargs: Any) -> Any:
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return _imported(launcher)(*args, **kwargs, config=config)

    def run(*args: Any, **kwargs: Any) -> Any:
        device = device_of(*args, **kwargs)
        return launch_on(device, tables.config(operation, *shape(*args, **kwargs), device), args, kwargs)

    def launch(*args: Any, config: tables.Config, **kwargs: Any) -> Any:
        return launch_on(device_of(*args, **kwargs), config, args, kwargs)

    return TritonPath("triton", run, cannot, need_not, shape=shape, launch=launch)


@functools.cache
def _imported(launcher: str) -> Callable[..., Any]:
    module, function = launcher.split(":")
    return getattr(importlib.import_module(f"secondorder_kernels.triton.{module}"), function)
