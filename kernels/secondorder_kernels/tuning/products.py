"""Cases of symmetric products: averages of Gram matrices, Gram matrices, products of commuting matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from secondorder_kernels import policy
from secondorder_kernels.tables import Config
from secondorder_kernels.tuning.case import TOLERANCE, Call, Case, Draw

RATE = 0.1
Shape = tuple[int, int, int]

# Batch, dimension and length of the sums: the blocks of at most 512 into which optimizers cut a GPT by default; whole
# layers, stacked; a single layer with its tokens.
SHAPES: tuple[Shape, ...] = (
    (144, 512, 512),
    (96, 461, 384),
    (24, 768, 768),
    (24, 1024, 1024),
    (64, 256, 256),
    (8, 2048, 2048),
    (12, 1024, 4096),
    (4, 4096, 4096),
    (24, 768, 3072),
    (1, 4096, 4096),
    (1, 768, 32768),
)
TINY: tuple[Shape, ...] = ((2, 40, 33), (1, 16, 200))
_QUICK = 4
_QUICK_OTHERS = 2  # of the rarer operations
_COMPILED = 3  # compiling takes seconds, and what comes out of it is the same product and one element-wise kernel
_PROGRAMS = 264  # two for each multiprocessor of a large GPU


def selected(sizes: str, shapes: tuple[Any, ...], tiny: tuple[Any, ...], quick: int) -> tuple[Any, ...]:
    """The shapes of a word for how many."""
    return tiny if sizes == "tiny" else shapes[:quick] if sizes == "quick" else shapes


def half() -> torch.dtype:
    """Half precision to measure with: in Triton's interpreter bfloat16 is wrong."""
    return torch.float16 if policy.interpreting() else torch.bfloat16


def precisions() -> tuple[str, ...]:
    """Settings of float32 products. The interpreter has no bfloat16, and tf32x3 is there what ieee is."""
    return ("high",) if policy.interpreting() else ("high", "medium", "highest")


def operands() -> Iterator[tuple[torch.dtype, str]]:
    """Dtypes of operands, and float32 precisions to use them with."""
    yield half(), "highest"
    for precision in precisions():
        yield torch.float32, precision


def rules(dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """What hangs on how products are formed: whose peak bounds them, what deviates, the setting."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    formed = policy.precision(dtype)
    torch.set_float32_matmul_precision(before)
    unit = "bf16" if dtype != torch.float32 or formed == "bf16" else "fp32" if formed == "ieee" else "tf32x3"
    return {"unit": unit, "tolerance": TOLERANCE[formed], "precision": precision}


def words(shape: Iterable[int], dtype: torch.dtype, precision: str, *options: str) -> str:
    """A case's label."""
    short = str(dtype).removeprefix("torch.")
    parts = [str(tuple(shape)), short, *((precision,) if dtype == torch.float32 else ()), *options]
    return " ".join(part for part in parts if part)


def stages(count: int) -> int:
    """How many loads are under way: AMD's local memory has room for two."""
    return 2 if torch.version.hip else count


def tiles(n: int, d: int, m: int, dtype: torch.dtype) -> tuple[Config, ...]:
    """Configurations of symmetric products; where tiles are few and sums long, several programs share a tile.

    `m` is the length of the sums, or 0 where a tile cannot be shared.
    """
    wide = dtype == torch.float32
    depth = 32 if wide else 64
    found: list[Config] = []
    for block, block_k, warps, count in (
        (64, depth, 4, 3),
        (64, depth, 4, 4),
        (128, depth, 8, 3),
        (128, depth // 2, 8, 4),
        (32, depth, 4, 3),
        (64, 2 * depth, 4, 2),
    ):
        config = {"block": block, "block_k": block_k, "num_warps": warps, "num_stages": stages(count)}
        side = -(-d // block)
        programs = n * side * (side + 1) // 2
        found.append(config)
        if programs < _PROGRAMS and m >= 8 * d:
            found.append({**config, "split": min(32, -(-_PROGRAMS // programs))})
    return tuple(found)


def matrices(draw: Draw, shape: Shape, dtype: torch.dtype, fast: str) -> Tensor:
    """Operands `(n, d, m)`, of which the last axis ("k") or the one before ("d") is fast."""
    n, d, m = shape
    return draw.normal(n, d, m, dtype=dtype) if fast == "k" else draw.normal(n, m, d, dtype=dtype).mT


def _symmetric(draw: Draw, n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    A = draw.normal(n, d, d)
    return (A + A.mT).to(dtype)


def _baddbmm_(C: Tensor, X: Tensor, *rest: Any, beta: float, alpha: float) -> None:
    """`beta C + alpha X Xᵀ` in one call, whatever it takes: one weight for all matrices."""
    if X.dtype == C.dtype:
        C.baddbmm_(X, X.mT, beta=beta, alpha=alpha)
    else:
        torch.baddbmm(C, X, X.mT, out_dtype=C.dtype, beta=beta, alpha=alpha, out=C)


def _ema_baddbmm_(C: Tensor, X: Tensor, rate: Tensor, **options: Any) -> None:
    _baddbmm_(C, X, beta=1 - RATE, alpha=RATE)


def _ema_lerp_(C: Tensor, X: Tensor, rate: Tensor, **options: Any) -> None:
    """The product is rounded to the dtype of X."""
    C.lerp_(torch.bmm(X, X.mT).to(C.dtype), rate[:, None, None])


def _add_baddbmm_(C: Tensor, X: Tensor, scale: Tensor) -> None:
    _baddbmm_(C, X, beta=1.0, alpha=RATE)


def ema_syrk(sizes: str) -> Iterator[Case]:
    """Both triangles, and the lower one alone."""
    for number, shape in enumerate(selected(sizes, SHAPES, TINY, _QUICK)):
        for dtype, precision in operands():
            variants = (("k", False), ("d", False), ("k", True))
            for fast, lower in variants[:1] if sizes == "tiny" and number else variants:
                yield _ema_syrk(shape, dtype, precision, fast, lower, sizes != "tiny" and number < _COMPILED)


def _ema_syrk(shape: Shape, dtype: torch.dtype, precision: str, fast: str, lower: bool, compiled: bool) -> Case:
    n, d, m = shape
    options = {"lower": True} if lower else {}

    def make(draw: Draw) -> Call:
        C, X = _symmetric(draw, n, d), matrices(draw, shape, dtype, fast)
        return Call((C, X, draw.full((n,), RATE)), dict(options))

    return Case(
        "ema_syrk_",
        words(shape, dtype, precision, fast, "lower" if lower else ""),
        make,
        flops=n * d * (d + 1.0) * m,
        # One triangle is read, one or both are written.
        bytes=n * (d * m * dtype.itemsize + (4.0 if lower else 6.0) * d * d),
        candidates=tiles(n, d, m, dtype),
        baselines={
            "baddbmm": _ema_baddbmm_,
            **({} if dtype == torch.float32 else {"bmm + lerp_": _ema_lerp_}),
        },
        compiled=compiled,
        part=torch.tril if lower else _whole,
        **rules(dtype, precision),
    )


def _whole(result: Tensor) -> Tensor:
    return result


def _pair_apart(lerp: Callable[..., None]) -> Callable[..., None]:
    def both(L: Tensor, R: Tensor, G: Tensor, rate: Tensor) -> None:
        lerp(L, G, rate)
        lerp(R, G.mT, rate)

    return both


def ema_syrk_pair(sizes: str) -> Iterator[Case]:
    """Both factors of a matrix."""
    for number, shape in enumerate(selected(sizes, SHAPES[:-1], TINY[:1], _QUICK_OTHERS)):
        n, d1, d2 = shape
        for dtype, precision in operands():

            def make(draw: Draw, shape: Shape = shape, dtype: torch.dtype = dtype) -> Call:
                n, d1, d2 = shape
                left, right = (_symmetric(draw, n, d) for d in (d1, d2))
                return Call((left, right, draw.normal(n, d1, d2, dtype=dtype), draw.full((n,), RATE)))

            yield Case(
                "ema_syrk_pair_",
                words(shape, dtype, precision),
                make,
                flops=n * ((d1 + 1.0) * d1 * d2 + (d2 + 1.0) * d2 * d1),
                bytes=n * (d1 * d2 * dtype.itemsize + 6.0 * (d1 * d1 + d2 * d2)),
                candidates=tiles(n, min(d1, d2), 0, dtype)[:4],
                baselines={"two baddbmm": _pair_apart(_ema_baddbmm_)},
                compiled=sizes != "tiny" and number < _COMPILED,
                **rules(dtype, precision),
            )


def gram(sizes: str) -> Iterator[Case]:
    """New Gram matrices."""
    for shape in selected(sizes, SHAPES, TINY[:1], _QUICK_OTHERS):
        n, d, m = shape
        for dtype, precision in operands():
            for fast in ("k", "d"):

                def make(draw: Draw, shape: Shape = shape, dtype: torch.dtype = dtype, fast: str = fast) -> Call:
                    return Call((matrices(draw, shape, dtype, fast),))

                yield Case(
                    "gram",
                    words(shape, dtype, precision, fast),
                    make,
                    flops=n * d * (d + 1.0) * m,
                    bytes=n * (d * m + 1.0 * d * d) * dtype.itemsize,
                    candidates=tiles(n, d, m, dtype),
                    **rules(dtype, precision),
                )


def add_gram(sizes: str) -> Iterator[Case]:
    """Gram matrices that are added."""
    for shape in selected(sizes, SHAPES, TINY[:1], _QUICK_OTHERS):
        n, d, m = shape
        for dtype, precision in operands():

            def make(draw: Draw, shape: Shape = shape, dtype: torch.dtype = dtype) -> Call:
                C, X = _symmetric(draw, shape[0], shape[1]), matrices(draw, shape, dtype, "d")
                return Call((C, X, draw.full(shape[:1], RATE)))

            yield Case(
                "add_gram_",
                words(shape, dtype, precision, "d"),
                make,
                flops=n * d * (d + 1.0) * m,
                bytes=n * (d * m * dtype.itemsize + 6.0 * d * d),
                candidates=tiles(n, d, m, dtype),
                baselines={"baddbmm": _add_baddbmm_},
                **rules(dtype, precision),
            )


def _product_baddbmm(A: Tensor, B: Tensor, *, alpha: float, C: Tensor, beta: float, diagonal: float = 0.0) -> Tensor:
    return torch.baddbmm(C, A, B, beta=beta, alpha=alpha)


def symmetric_product(sizes: str) -> Iterator[Case]:
    """Steps of Newton's iterations: a product alone, and one with a matrix added."""
    shapes = tuple((n, d) for n, d, m in SHAPES if m == d)
    for n, d in selected(sizes, shapes, ((2, 40),), _QUICK_OTHERS):
        for dtype, precision in operands():
            for added in (False, True):

                def make(draw: Draw, n: int = n, d: int = d, dtype: Any = dtype, added: bool = added) -> Call:
                    A = _symmetric(draw, n, d, dtype) / d**0.5
                    options = {"alpha": -0.5, "C": _symmetric(draw, n, d, dtype), "beta": 1.5} if added else {}
                    return Call((A, A.clone()), options)  # what commutes with A: itself

                yield Case(
                    "symmetric_product",
                    words((n, d, d), dtype, precision, "added" if added else ""),
                    make,
                    flops=n * d * (d + 1.0) * d,
                    bytes=n * d * d * dtype.itemsize * (3.5 if added else 3.0),
                    candidates=tiles(n, d, 0, dtype),
                    baselines={"baddbmm": _product_baddbmm} if added else {},
                    **rules(dtype, precision),
                )
