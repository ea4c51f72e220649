"""Words by which tables tell kernels apart that are compiled apart."""

from __future__ import annotations

from torch import Tensor


def dtypes(*tensors: Tensor) -> str:
    """Dtypes as in "float32/bfloat16"."""
    return "/".join(str(t.dtype).removeprefix("torch.") for t in tensors)


def layout(*stacks: Tensor) -> str:
    """One letter per stack of matrices: "r" if rows lie in one piece, "c" if columns do, "s" if neither."""
    return "".join("r" if A.stride(-1) == 1 else "c" if A.stride(-2) == 1 else "s" for A in stacks)
