"""The path of an operation through its Triton kernel: policy, table, device, launcher."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from secondorder_kernels import policy, tables
from secondorder_kernels.dispatch import Path

Shape = tuple[str, tuple[int, ...]]


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
) -> Path:
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
        return policy.declines(operation, *shape(*args, **kwargs), device_of(*args, **kwargs))

    def run(*args: Any, **kwargs: Any) -> Any:
        device = device_of(*args, **kwargs)
        config = tables.config(operation, *shape(*args, **kwargs), device)
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return _imported(launcher)(*args, **kwargs, config=config)

    return Path("triton", run, cannot, need_not)


@functools.cache
def _imported(launcher: str) -> Callable[..., Any]:
    module, function = launcher.split(":")
    return getattr(importlib.import_module(f"secondorder_kernels.triton.{module}"), function)
