"""Cases of factors: Adam in a basis, factors moved by products, structured factors, orthonormal columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from secondorder_kernels import elementwise, orthogonal, policy
from secondorder_kernels.tables import Config
from secondorder_kernels.tuning.case import Call, Case, Draw, triton_path
from secondorder_kernels.tuning.products import precisions, rules, selected, stages, words

STEP = 0.01

BLOCKS: tuple[tuple[int, int, int], ...] = (
    (144, 512, 512),
    (96, 461, 384),
    (24, 768, 768),
    (64, 256, 256),
    (8, 2048, 2048),
    (12, 3072, 768),
    (2, 4096, 4096),
)
SQUARES: tuple[tuple[int, int], ...] = ((144, 512), (96, 461), (24, 768), (24, 1024), (64, 256), (8, 2048), (4, 4096))
_QUICK = 2


def adam_in_basis(sizes: str) -> Iterator[Case]:
    """The rotation into the last mode's basis, and Adam's averages."""
    for n, rows, d in selected(sizes, BLOCKS, ((2, 40, 33),), _QUICK):
        for precision in precisions():

            def make(draw: Draw, n: int = n, rows: int = rows, d: int = d) -> Call:
                m, v, X = draw.normal(n, rows, d), draw.uniform(n, rows, d), draw.normal(n, rows, d)
                Q = draw.normal(n, d, d) / d**0.5  # to a product it is all one whether it is a rotation
                rate = draw.full((n,), 0.1)
                options = {"beta1_rate": rate, "beta2_rate": rate.clone(), "beta1": 0.9, "eps": 1e-8, "nesterov": True}
                return Call((m, v, X, Q, draw.nan(n, rows, d)), options)

            yield Case(
                "adam_in_basis_",
                words((n, rows, d), torch.float32, precision),
                make,
                flops=n * rows * d * (2.0 * d + 12),
                bytes=4.0 * n * d * (6 * rows + d),
                candidates=_products(),
                baselines={} if sizes == "tiny" else {"bmm + adam_direction_": _product_then_kernel},
                compiled=sizes != "tiny",
                **rules(torch.float32, precision),
            )


def _product_then_kernel(
    m: Tensor, v: Tensor, X: Tensor, Q: Tensor, out: Tensor, *, beta1_rate: Tensor, beta2_rate: Tensor, **options: Any
) -> None:
    """A product of torch's, and Triton's kernel for what comes after it: what the fused one must be worth."""
    path = triton_path("adam_direction_")
    run: Callable[..., Any] = elementwise.reference.adam_direction_ if path is None else path.run
    rates = {"beta1_rate": beta1_rate[:, None, None], "beta2_rate": beta2_rate[:, None, None]}
    run(m, v, torch.bmm(X, Q), out, **rates, **options)


def _products() -> tuple[Config, ...]:
    sizes = ((64, 64, 32, 4, 3), (64, 64, 64, 4, 3), (128, 64, 32, 8, 3), (128, 64, 64, 8, 3), (64, 128, 32, 8, 3))
    return tuple(
        {"rows": rows, "columns": columns, "depth": depth, "num_warps": warps, "num_stages": stages(count)}
        for rows, columns, depth, warps, count in sizes
    )


def _squares() -> tuple[Config, ...]:
    sizes = ((64, 32, 4, 3), (64, 64, 4, 3), (128, 32, 8, 3), (32, 32, 4, 3))
    return tuple(
        {"size": size, "depth": depth, "num_warps": warps, "num_stages": stages(count)}
        for size, depth, warps, count in sizes
    )


def _update_baddbmm(K: Tensor, M: Tensor, step: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    new = torch.baddbmm(K, K, M, alpha=-STEP)
    return new, torch.linalg.vector_norm(new, dim=(1, 2)).square()


def multiply_update(sizes: str) -> Iterator[Case]:
    """Triangular and dense factors; M as it lies, and transposed; factors stored in bfloat16."""
    forms = [(lower, mirrored, torch.float32) for lower in (True, False) for mirrored in (False, True)]
    if not policy.interpreting():
        forms += [(True, False, torch.bfloat16), (False, False, torch.bfloat16)]
    for n, d in selected(sizes, SQUARES, ((2, 40),), _QUICK):
        for precision in precisions():
            for lower, mirrored, dtype in forms:
                yield _multiply_update(n, d, precision, lower, mirrored, dtype, sizes != "tiny")


def _multiply_update(
    n: int, d: int, precision: str, lower: bool, mirrored: bool, dtype: torch.dtype, compiled: bool
) -> Case:
    def make(draw: Draw) -> Call:
        K = torch.eye(d, device=draw.device) + 0.3 / d**0.5 * draw.normal(n, d, d)
        M = draw.normal(n, d, d) / d**0.5
        if lower:
            K, M = K.tril(), M.tril()
        if mirrored:
            M = M.mT.contiguous().mT
        keys = {"keys": draw.keys(n)} if dtype == torch.bfloat16 else {}
        return Call((K.to(dtype), M, draw.full((n,), STEP)), {"lower": lower, **keys})

    options = ("lower" if lower else "dense", "transposed" if mirrored else "", f"{precision} products")
    full = dtype == torch.float32
    return Case(
        "multiply_update",
        words((n, d, d), dtype, precision, *options[: 2 if full else 3]),
        make,
        flops=n * d**3 * (1 / 3 if lower else 2.0),
        # Half of K and of M is read, but all of the result is written, zeros too.
        bytes=n * d * d * ((0.5 if lower else 1.0) * (dtype.itemsize + 4.0) + dtype.itemsize),
        candidates=_squares(),
        baselines={"baddbmm": _update_baddbmm} if full else {},
        compiled=compiled and full and not mirrored,
        **rules(torch.float32, precision),
    )


def symmetrise(sizes: str) -> Iterator[Case]:
    """Factors that are not symmetric."""
    for n, d in selected(sizes, SQUARES, ((2, 40),), _QUICK):
        for precision in precisions():

            def make(draw: Draw, n: int = n, d: int = d) -> Call:
                return Call((torch.eye(d, device=draw.device) + 0.3 / d**0.5 * draw.normal(n, d, d),))

            yield Case(
                "symmetrise",
                words((n, d, d), torch.float32, precision),
                make,
                flops=4.0 * n * d**3,
                bytes=8.0 * n * d * d,
                candidates=_squares(),
                compiled=sizes != "tiny",
                **rules(torch.float32, precision),
            )


def _element_wise() -> tuple[Config, ...]:
    sizes = ((32, 128, 4), (64, 128, 4), (32, 256, 8), (16, 256, 4))
    return tuple({"rows": rows, "columns": columns, "num_warps": warps} for rows, columns, warps in sizes)


def diagonal(sizes: str) -> Iterator[Case]:
    """Diagonal factors: statistics and application."""
    for name, written in (("diagonal_moments", 0), ("diagonal_apply", 1)):
        for n, rows, d in selected(sizes, BLOCKS, ((2, 40, 33),), _QUICK):

            def make(draw: Draw, n: int = n, rows: int = rows, d: int = d) -> Call:
                return Call((draw.normal(n, rows, d), draw.uniform(n, rows), draw.uniform(n, d)))

            yield Case(
                name,
                words((n, rows, d), torch.float32, ""),
                make,
                flops=6.0 * n * rows * d,
                bytes=4.0 * n * (rows * d * (1 + written) + (rows + d) * (2 - written)),
                unit="fp32",
                candidates=_element_wise(),
                compiled=sizes != "tiny",
            )


def block_apply(sizes: str) -> Iterator[Case]:
    """Block-diagonal factors."""
    shapes = ((24, 12, 64, 768), (24, 24, 32, 768), (8, 16, 128, 2048))
    for n, q, b, columns in selected(sizes, shapes, ((2, 2, 20, 33),), 1):
        for precision in precisions():

            def make(draw: Draw, n: int = n, q: int = q, b: int = b, columns: int = columns) -> Call:
                return Call((draw.normal(n, q, b, b), draw.normal(n, q, b, columns)))

            yield Case(
                "block_apply",
                words((n, q, b, columns), torch.float32, precision),
                make,
                flops=2.0 * n * q * b * b * columns,
                bytes=4.0 * n * q * b * (b + 2 * columns),
                candidates=_products(),
                **rules(torch.float32, precision),
            )


def orthogonalize(sizes: str) -> Iterator[Case]:
    """No kernel of Triton's: Cholesky factors in float64 beside Householder reflections."""
    for n, d in selected(sizes, SQUARES, ((2, 40),), _QUICK):

        def make(draw: Draw, n: int = n, d: int = d) -> Call:
            return Call((torch.eye(d, device=draw.device) + 0.3 / d**0.5 * draw.normal(n, d, d),))

        yield Case(
            "orthogonalize",
            words((n, d, d), torch.float32, ""),
            make,
            flops=n * d**3 * 4 / 3,
            bytes=8.0 * n * d * d,
            unit="fp32",
            candidates=(),
            baselines={"cholesky": orthogonal.cholesky_qr},
            part=torch.abs,  # signs of columns are each algorithm's own
        )
