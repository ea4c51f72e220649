"""What a Triton kernel can take on this machine, and whether it pays: pure functions, one sentence for every refusal.

A path *refuses* what it cannot do; then no mode takes it. It *declines* what it could do but another path does better;
then mode "auto" passes on, and mode "triton" does not ask. "auto" trusts a kernel only where a table of this device
says that its result was checked there and its time beat that of the other paths (`tables.py`, `tune.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from secondorder_kernels import tables

_LEAST_CAPABILITY = (8, 0)  # asynchronous copies, bfloat16 and TF32 products

# Float32 products by `torch.get_float32_matmul_precision()`. TF32 as Triton has it truncates its operands, which is
# biased and adds up over steps; so "medium" rounds to bfloat16, and "high" splits into three products of TF32, which
# AMD's compiler does not know.
_PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "bf16"}

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def precision(dtype: torch.dtype) -> str:
    """How products of operands of a dtype are formed: "ieee", "tf32x3" or "bf16" (operands rounded to bfloat16)."""
    if dtype != torch.float32:
        return "ieee"
    chosen = _PRECISIONS[torch.get_float32_matmul_precision()]
    return "ieee" if chosen == "tf32x3" and torch.version.hip else chosen


def refuses(tensors: Iterable[Tensor | None], dtypes: Collection[torch.dtype] = FLOATS) -> str | None:
    """Why no Triton kernel can take these tensors; None if one can.

    Args:
        tensors: All tensors of the call; None where an optional one is left out.
        dtypes: Those that the kernel is written for.
    """
    given = [t for t in tensors if t is not None]
    if not installed():
        return "triton is not installed"
    devices = {t.device for t in given}
    if len(devices) > 1:
        return f"tensors are on several devices, {', '.join(sorted(map(str, devices)))}"
    device = devices.pop()
    if not (device.type == "cuda" or (device.type == "cpu" and interpreting())):
        return f"tensors are on {device}"
    if device.type == "cuda" and not torch.version.hip and _capability(device) < _LEAST_CAPABILITY:
        major, minor = _capability(device)
        return f"{device} has compute capability {major}.{minor}, and 8.0 is the least"
    for t in given:
        if type(t) not in (Tensor, torch.nn.Parameter):
            return f"{type(t).__name__} has no memory of its own that a kernel could be given"
        if t.dtype not in dtypes:
            return f"there is no kernel for {t.dtype}"
    return None


def declines(operation: str, kind: str, sizes: tuple[int, ...], device: torch.device) -> str | None:
    """Why a Triton kernel is not worth it here; None if it was measured to be.

    Args:
        operation: Name of the operation.
        kind: What is compiled apart: dtypes, precision, layout.
        sizes: What the time depends on.
        device: Where the tensors are.
    """
    if device.type != "cuda":  # if at all, kernels are interpreted there
        interpreted = device.type == "cpu" and interpreting()
        return "Triton's interpreter is for tests" if interpreted else f"tensors are on {device}"
    if not installed():
        return "triton is not installed"
    found = tables.nearest(operation, kind, sizes, device)
    if found is None or found.ratio is None:
        return f"not measured on {torch.cuda.get_device_name(device)}; python -m secondorder_kernels.tune does that"
    if found.config is None:
        return f"torch was as fast at the nearest measured sizes, {found.sizes}"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
