"""Recorded algebra of structured matrices: twelve classes, every operation on a non-symmetric element."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secondorder.preconditioner.structures import Structure, structure

TOLERANCE = 1e-12

# Recorded class -> our name. Its block-diagonal transposes had been repaired for the recording.
NAMES = {
    "dense": "dense",
    "diagonal": "diagonal",
    "block30diagonal": "block(30)",
    "block3diagonal": "block(3)",
    "hierarchical15_15": "hierarchical(15,15)",
    "hierarchical3_2": "hierarchical(3,2)",
    "triltoeplitz": "tril_toeplitz",
    "triutoeplitz": "triu_toeplitz",
    "trilbottomrightdiag": "tril_bottom_right_diag",
    "triltopleftdiag": "tril_top_left_diag",
    "triubottomrightdiag": "triu_bottom_right_diag",
    "triutopleftdiag": "triu_top_left_diag",
}


def replay(z: Any) -> dict[str, tuple[float, float]]:
    """Relative deviation of every operation, for every class and dimension."""
    cases = sorted({key.rpartition("/")[0] for key in z.files if key.count("/") == 2})
    assert {case.partition("/")[0] for case in cases} == NAMES.keys()
    found = {}
    for case in cases:
        for op, result in operations(case, z).items():
            expected = torch.tensor(z[f"{case}/{op}"])
            scale = expected.abs().max().clamp_min(1)
            found[f"{case}/{op}"] = (float((result - expected).abs().max() / scale), TOLERANCE)
    return found


def stored(s: Structure, K: Tensor) -> Tensor:
    """The element `(1, *shape)` that represents `K (d, d)`: each stored number shows as some of its entries."""
    shape = s.shape(len(K))
    shown = s.to_dense(torch.eye(math.prod(shape), dtype=K.dtype).unflatten(1, shape)).flatten(1)
    return (shown @ K.flatten() / shown.sum(1).clamp_min(1)).view(1, *shape)


def operations(case: str, z: Any) -> dict[str, Tensor]:
    """All recorded operations of one class and dimension, computed by our structure; matrices dense."""
    kind, _, dimension = case.partition("/")
    s, d = structure(NAMES[kind]), int(dimension)
    sym, X, B = (torch.tensor(z[f"{case}/{key}"])[None] for key in ("sym", "X", "Bm"))
    eye = s.eye(d, dtype=torch.float64)
    K = stored(s, torch.tensor(z[f"{case}/K"]))
    matrices = {
        "project": s.project(sym),
        "K": K,
        "K2": s.product(K, s.project(B)),
        "from_inner": s.self_gram(K),
        "from_inner_X": s.project_gram(s.apply_t(K, X)),
        "from_mat_inner": s.project_gram(X),
        "diag_add": s.project(sym) - 1.23 * eye,
    }
    return {
        **{op: s.to_dense(stack)[0] for op, stack in matrices.items()},
        "matmul": s.apply(K, X)[0],
        "rmatmat": s.apply_t(K, X)[0],
        "average_trace": s.average_trace(K)[0],
        "inf_norm": s.largest(K)[0],
        "fro_norm": s.frobenius(K)[0],
    }


REPLAYS: dict[str, Callable[[Any], dict[str, tuple[float, float]]]] = {"structures_unit_*": replay}
