"""Keys of the noise by which parameters in bfloat16 are rounded stochastically: `param_rounding="stochastic"`.

A key is made of a block's own updates, its parameter's position and where the region begins. So it does not hang on how
blocks share buckets, differs between parameters and between steps, and is the same after a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secondorder.layout.buckets import BaseBucket, Strand
from secondorder_kernels import row_keys

_SEED = 0x70617261


def rounding_keys(b: BaseBucket, chosen: Sequence[int], hp: Mapping[str, Any]) -> Tensor | None:
    """Keys `(n,)` for the chosen strands of a bucket, int64; None where parameters are rounded to nearest."""
    if hp["param_rounding"] == "nearest" or b.param_dtype != torch.bfloat16:
        return None
    if b.origins is None:
        span = b.rows // len(b.pieces)
        lines = [(r * span, strand.index, _start(strand)) for r, strand in b.strands]
        b.origins = torch.tensor(lines).T.to(b.device)
    rows, parameters, starts = b.origins
    if len(chosen) < len(b.strands):
        some = torch.tensor(chosen).to(b.device)
        rows, parameters, starts = rows[some], parameters[some], starts[some]
    return row_keys((b.s["count"][rows], parameters, starts), _SEED)


def _start(strand: Strand) -> int:
    """Position of a region's first element in its parameter's view."""
    at = 0
    for axis, size in enumerate(strand.view):
        at = at * size + (0 if strand.region is None else strand.region[axis].start or 0)
    return at
