"""Cases of element-wise operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from secondorder_kernels import policy
from secondorder_kernels.tables import Config
from secondorder_kernels.tuning.case import Call, Case, Draw
from secondorder_kernels.tuning.products import selected, words

SHAPES: tuple[tuple[int, int, int], ...] = (
    (144, 512, 512),
    (96, 461, 384),
    (24, 768, 768),
    (64, 256, 256),
    (8, 2048, 2048),
    (12, 3072, 768),
    (2, 4096, 4096),
)
TINY = ((2, 20, 33),)
QUICK = 2


def blocks() -> tuple[Config, ...]:
    """Configurations of kernels on tiles of so many elements."""
    return tuple(
        {"block": block, "num_warps": warps} for block, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (512, 4))
    )


def _state_dtypes() -> tuple[torch.dtype, ...]:
    """What state may be stored in; the interpreter's bfloat16 is wrong."""
    return (torch.float32,) if policy.interpreting() else (torch.float32, torch.bfloat16)


def adam_direction(sizes: str) -> Iterator[Case]:
    """Averages in float32, and in bfloat16."""
    for n, rows, d in selected(sizes, SHAPES, TINY, QUICK):
        for dtype in _state_dtypes():

            def make(draw: Draw, n: int = n, rows: int = rows, d: int = d, dtype: torch.dtype = dtype) -> Call:
                m, v = draw.normal(n, rows, d, dtype=dtype), draw.uniform(n, rows, d, dtype=dtype)
                g = draw.normal(n, rows, d)
                rate = draw.full((n, 1, 1), 0.1)
                options: dict[str, Any] = {"beta1_rate": rate, "beta2_rate": rate.clone(), "beta1": 0.9, "eps": 1e-8}
                options["nesterov"] = True
                if dtype == torch.bfloat16:
                    options["keys"] = draw.keys(n)
                return Call((m, v, g, draw.nan(n, rows, d)), options)

            yield Case(
                "adam_direction_",
                words((n, rows, d), dtype, ""),
                make,
                flops=12.0 * n * rows * d,
                bytes=n * rows * d * (8.0 + 4 * dtype.itemsize),
                unit="fp32",
                candidates=blocks(),
                compiled=sizes != "tiny",
            )


def root_free(sizes: str) -> Iterator[Case]:
    """A stack of rows."""
    for n, rows, d in selected(sizes, SHAPES, TINY, QUICK):

        def make(draw: Draw, n: int = n, size: int = rows * d) -> Call:
            v, g, moment = draw.uniform(n, size), draw.normal(n, size), draw.normal(n, size)
            options = {"rate": draw.full((n, 1), 0.1), "scale_tensor": draw.full((), 2.0), "eps": 1e-4}
            return Call((v, g, moment, draw.nan(n, size)), options)

        yield Case(
            "root_free_",
            words((n, rows * d), torch.float32, ""),
            make,
            flops=6.0 * n * rows * d,
            bytes=20.0 * n * rows * d,
            unit="fp32",
            candidates=blocks(),
            compiled=sizes != "tiny",
        )


def graft(sizes: str) -> Iterator[Case]:
    """Adam's length, and that of the moment."""
    for n, rows, d in selected(sizes, SHAPES, TINY, QUICK):
        for kind in ("adam", "sgd"):

            def make(draw: Draw, n: int = n, rows: int = rows, d: int = d, kind: str = kind) -> Call:
                U, moment = (draw.normal(n, rows, d) for _ in range(2))
                out, scale = draw.nan(n, rows, d), draw.nan(n)
                if kind == "sgd":
                    return Call((U, moment, None, None, out, scale), {"kind": kind})
                G, V = draw.normal(n, rows, d), draw.uniform(n, rows, d)
                return Call((U, moment, G, V, out, scale), {"kind": kind, "rate": draw.full((n,), 0.1), "eps": 1e-8})

            adam = kind == "adam"
            yield Case(
                "graft_",
                words((n, rows, d), torch.float32, "", kind),
                make,
                flops=(10.0 if adam else 5.0) * n * rows * d,
                # U twice: its norm is known only after all of it was read.
                bytes=(24.0 if adam else 16.0) * n * rows * d,
                unit="fp32",
                candidates=blocks(),
                compiled=sizes != "tiny",
            )


def stochastic_round(sizes: str) -> Iterator[Case]:
    """From float32."""
    for n, rows, d in selected(sizes, SHAPES, () if policy.interpreting() else TINY, QUICK):

        def make(draw: Draw, n: int = n, rows: int = rows, d: int = d) -> Call:
            return Call((draw.normal(n, rows, d), draw.keys(n)))

        yield Case(
            "stochastic_round",
            words((n, rows, d), torch.float32, ""),
            make,
            flops=10.0 * n * rows * d,  # on integers
            bytes=6.0 * n * rows * d,
            unit="fp32",
            candidates=blocks(),
            compiled=sizes != "tiny",
        )


def matrices(layers: int, d: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of a GPT's matrices."""
    return ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d)) * layers


LISTS: tuple[tuple[int, int], ...] = ((12, 768), (2, 256), (24, 1024))


def apply_update(sizes: str) -> Iterator[Case]:
    """The parameters of a GPT's layers, in float32, and in bfloat16 with stochastic rounding."""
    for layers, d in selected(sizes, LISTS, ((1, 8),), 1):
        for dtype in _state_dtypes():

            def make(draw: Draw, layers: int = layers, d: int = d, dtype: torch.dtype = dtype) -> Call:
                shapes = matrices(layers, d)
                params = [draw.normal(*shape, dtype=dtype) for shape in shapes]
                updates = [draw.normal(*shape) for shape in shapes]
                options = {"lr_tensor": draw.full((), 1e-3), "keep": draw.full((), 0.999)}
                if dtype == torch.bfloat16:
                    options["keys"] = draw.keys(len(shapes))
                return Call((params, updates), options)

            size = sum(a * b for a, b in matrices(layers, d))
            yield Case(
                "apply_update_",
                f"{layers} layers of width {d} {str(dtype).removeprefix('torch.')}",
                make,
                flops=3.0 * size,
                bytes=size * (4.0 + 2 * dtype.itemsize),
                unit="fp32",
                candidates=blocks(),
                compiled=sizes != "tiny",
            )


def adamw(sizes: str) -> Iterator[Case]:
    """What a GPT leaves to the fallback: embeddings, norms, biases; and a whole GPT."""
    for layers, d, vocabulary in selected(sizes, ((0, 768, 50257), (12, 768, 50257), (2, 256, 4096)), ((1, 8, 20),), 1):
        vectors = ((d,),) * (2 * max(layers, 12))
        shapes: tuple[tuple[int, ...], ...] = (*matrices(layers, d), *vectors, (vocabulary, d))

        def make(draw: Draw, shapes: tuple[tuple[int, ...], ...] = shapes) -> Call:
            params, grads, exp_avgs = ([draw.normal(*shape) for shape in shapes] for _ in range(3))
            exp_avg_sqs = [draw.uniform(*shape) for shape in shapes]
            counts = [draw.full((), 10.0) for _ in shapes]
            options = {"lr_tensor": draw.full((), 1e-3), "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}
            options.update(weight_decay=0.1, maximize=False)
            return Call((params, grads, exp_avgs, exp_avg_sqs, counts, draw.full((), 0.0)), options)

        size = sum(torch.Size(shape).numel() for shape in shapes)
        yield Case(
            "adamw_",
            f"{len(shapes)} tensors, {size / 1e6:.1f} M float32",
            make,
            flops=15.0 * size,
            bytes=28.0 * size,
            unit="fp32",
            candidates=blocks(),
            compiled=sizes != "tiny",
        )
