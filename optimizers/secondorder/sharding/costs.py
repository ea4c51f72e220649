"""What a block costs its owner: operations per step and bytes of state, from the method's own description."""

from __future__ import annotations

import torch

from secondorder.layout.buckets import Candidate, factor_dtype


def cost(c: Candidate) -> float:
    """Floating-point operations per step: statistics, two changes of basis, and refreshes spread over their period."""
    b, numel = c.bucket, torch.Size(c.bucket.shape).numel()
    period = max(1, int(c.hp.get("refresh_every", 1)))
    refreshes = sum(b.method.refresh_cost(b.shape, mode) for mode in b.modes) / period
    return c.rows * (refreshes + sum(6.0 * numel * b.shape[mode] for mode in b.modes) + 10.0 * numel)


def state_bytes(c: Candidate) -> int:
    """Bytes of the block's state."""
    specs = c.bucket.specs(c.hp).values()
    dtypes = [(torch.Size(spec.shape).numel(), spec.dtype or factor_dtype(c.bucket.param_dtype)) for spec in specs]
    return c.rows * (12 + sum(n * dtype.itemsize for n, dtype in dtypes))


def phases(c: Candidate) -> tuple[tuple[int, int, float], ...]:
    """`(period, phase, operations)` of the block's refreshes."""
    b, period = c.bucket, max(1, int(c.hp.get("refresh_every", 1)))
    return tuple((period, phase, c.rows * b.method.refresh_cost(b.shape, mode)) for mode, phase in c.phases.items())
