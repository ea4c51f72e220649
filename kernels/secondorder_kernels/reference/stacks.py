"""Stacks of matrices `(n, …)` of which some may fail: none disturbs its neighbours, and no device value is read.

On a CPU every matrix is decomposed by itself: LAPACK is no slower that way, and results do not depend on the stack a
matrix happens to sit in (in a stack of 33x33 matrices every other one starts at an odd address, and the SIMD code for
odd addresses rounds differently).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def finite(A: Tensor) -> Tensor:  # (n, ...) -> (n,)
    """Which matrices have no entry that is infinite or NaN."""
    # The extremes are NaN if any entry is; on a CPU they cost a tenth of A.isfinite().
    rows = A.flatten(1)
    return torch.maximum(rows.amax(dim=1), -rows.amin(dim=1)).isfinite()


def known(flags: Tensor) -> bool:
    """Whether all flags are set, as far as can be told without waiting: off the CPU, or to a compiler, nothing is."""
    return flags.device.type == "cpu" and not torch.compiler.is_compiling() and bool(flags.all())


def or_identity(ok: Tensor, A: Tensor) -> Tensor:
    """`A` with the identity in place of matrices that are not `ok`."""
    if known(ok):
        return A
    return torch.where(ok[:, None, None], A, torch.eye(*A.shape[1:], dtype=A.dtype, device=A.device))


def scaled(A: Tensor, dim: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Divide by the power of two that brings the largest absolute entry along `dim` into [1, 2)."""
    largest = torch.maximum(A.amax(dim=dim, keepdim=True), -A.amin(dim=dim, keepdim=True))
    mantissa, _ = torch.frexp(largest)  # largest = mantissa · 2^e with mantissa in [1/2, 1)
    scale = torch.where(largest > 0, largest / (2 * mantissa), 1.0)
    return A / scale, scale


def one_by_one(decompose: Callable[[Tensor], tuple[Tensor, ...]], A: Tensor, *results: Tensor) -> Tensor:
    """Decompose each matrix by itself into its row of `results`; again in float64, and then NaN, where that fails.

    torch hands LAPACK a copy of a single matrix, in an allocation of its own: that is what makes the result
    independent of the stack. Returns which rows are finite, `(n,)`.
    """
    ok, rows = torch.zeros(len(A), dtype=torch.bool, device=A.device), list(range(len(A)))
    for dtype in dict.fromkeys((A.dtype, torch.float64)):
        for row in rows:
            try:
                parts: tuple[Tensor | float, ...] = decompose(A[row].to(dtype))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                parts = (torch.nan,) * len(results)
            for result, part in zip(results, parts, strict=True):
                result[row] = part
        ok = torch.stack([finite(result) for result in results]).all(dim=0)
        rows = (~ok).nonzero().flatten().tolist()
    return ok
