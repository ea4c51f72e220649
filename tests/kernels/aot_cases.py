"""Calls of every operation with a kernel, by what is compiled apart: dtypes, precision, layout, options.

The sizes of a call are those of the tables' entries. Tensors are on the device "meta": they have no memory.
"""

import dataclasses
from collections.abc import Callable

import aot_findings
import torch

from secondorder_kernels import adamw, basis, elementwise, grafts, grams, group, products, rounding, structured, updates

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ODD = 3  # added to sizes and strides, so that no access is aligned


@dataclasses.dataclass(frozen=True)
class Case:
    """What is called.

    Attributes:
        operation: Name of the operation.
        variant: What is special about the call.
        call: Calls it with the sizes of a table's entry.
        precision: `torch.get_float32_matmul_precision()` during the call.
        wide: Least share of loads that must be of 16 bytes.
        spill: Bytes of spilled registers that are put up with.
    """

    operation: str
    variant: str
    call: Callable
    precision: str = "highest"
    wide: float = 0.5
    spill: int = aot_findings.NEGLIGIBLE_SPILL

    def name(self, sizes):
        return f"{self.operation} {self.variant} {'x'.join(map(str, sizes))}"

    def run(self, sizes):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            with torch.no_grad():
                self.call(*sizes)
        finally:
            torch.set_float32_matmul_precision(before)


def empty(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


def columns(n, rows, cols, dtype=F32):
    """A stack of matrices whose columns lie in one piece."""
    return empty(n, cols, rows, dtype=dtype).mT


def odd(n, rows, cols, dtype=F32):
    """A stack of matrices whose rows start anywhere."""
    return empty(n, rows, cols + ODD, dtype=dtype)[..., :cols]


def far(n, rows, cols, dtype=F32):
    """A stack of matrices whose rows are so far apart that offsets inside a tile need 64 bits."""
    return empty(n, rows, 2**27, dtype=dtype)[..., :cols]


def keys(n):
    return empty(n, dtype=torch.int64)


# Such calls are to work, fast or not: their kernels keep an address for every element.
UNALIGNED = {"wide": 0.0, "spill": 4096}

PRECISIONS = {"ieee": "highest", "tf32x3": "high", "bf16": "medium"}


def ema_syrk_(make, dtype=F32, stored=F32, weight=False, ones=False, moments=False, more=0, **options):
    def call(n, d, m):
        d, m = d + more, m + more
        given = {"weight": empty(n, m)} if weight else {}
        given |= {"moments": empty(n, 2)} if moments else {}
        given |= {"keys": keys(n)} if stored == BF16 else {}
        C = empty(n, d, d, dtype=stored)
        X = make(n, d - ones, m, dtype=dtype)
        products.ema_syrk_(C, X, empty(n), ones=ones, **given, **options)

    return call


def ema_syrk_pair_(dtype):
    return lambda n, d1, d2: products.ema_syrk_pair_(
        empty(n, d1, d1), empty(n, d2, d2), empty(n, d1, d2, dtype=dtype), empty(n)
    )


def gram(make, dtype=F32, weight=False, scale=None):
    return lambda n, d, m: grams.gram(
        make(n, d, m, dtype=dtype),
        scale=empty(n) if scale is None else scale,
        weight=empty(n, m) if weight else None,
    )


def add_gram_(make, dtype):
    return lambda n, d, m: grams.add_gram_(empty(n, d, d), make(n, d, m, dtype=dtype), empty(n))


def symmetric_product(dtype, **options):
    def call(n, d):
        A, B, C = (empty(n, d, d, dtype=dtype) for _ in range(3))
        grams.symmetric_product(A, B, **({"C": C, **options} if options else {}))

    return call


def adam_direction_(stored=F32, make=empty):
    def call(size):
        shape = 2, 64, size // 128
        m, v = (empty(*shape, dtype=stored) for _ in range(2))
        options = {"keys": keys(2)} if stored == BF16 else {}
        rate = empty(2, 1, 1)
        elementwise.adam_direction_(
            m, v, make(*shape), beta1_rate=rate, beta2_rate=rate, beta1=0.9, eps=1e-8, nesterov=True, **options
        )

    return call


def root_free_(size):
    v, g, moment = (empty(2, 64, size // 128) for _ in range(3))
    elementwise.root_free_(v, g, moment, rate=empty(2, 1, 1), scale=empty(), eps=1e-8)


def stochastic_round(size):
    rounding.stochastic_round(empty(2, 64, size // 128), keys(2))


def graft_(kind):
    def call(n, size):
        U, moment, G, V = (empty(n, 64, size // 64) for _ in range(4))
        given = () if kind == "sgd" else (G, V)
        grafts.graft_(U, moment, *given, rate=None if kind == "sgd" else empty(n), eps=1e-8, kind=kind)

    return call


def tensors(count, size, dtype, make=empty):
    """Matrices that have so many elements together."""
    return [make(1, 16, size // count // 16, dtype=dtype)[0] for _ in range(count)]


def adamw_(dtype, make=empty):
    def call(count, size):
        params, grads, exp_avgs, exp_avg_sqs = (tensors(count, size, dtype, way) for way in (empty, make, empty, empty))
        options = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "maximize": False}
        counts = [empty() for _ in params]
        adamw.adamw_(params, grads, exp_avgs, exp_avg_sqs, counts, lr=empty(), refused=empty(), **options)

    return call


def apply_update_(dtype, make=empty):
    def call(count, size):
        given = {"keys": keys(count)} if dtype == BF16 else {}
        params, changes = tensors(count, size, dtype), tensors(count, size, F32, make)
        updates.apply_update_(params, changes, lr=empty(), keep=empty(), **given)

    return call


def adam_in_basis_(q=empty, more=0):
    def call(n, d1, d2):
        shape = n, d1 + more, d2 + more
        m, v, X = (empty(*shape) for _ in range(3))
        basis.adam_in_basis_(
            m,
            v,
            X,
            q(n, shape[2], shape[2]),
            beta1_rate=empty(n),
            beta2_rate=empty(n),
            beta1=0.9,
            eps=1e-8,
            nesterov=True,
        )

    return call


def multiply_update(make=empty, stored=F32, more=0, **options):
    def call(n, d):
        d += more
        given = {"keys": keys(n)} if stored == BF16 else {}
        group.multiply_update(empty(n, d, d, dtype=stored), make(n, d, d), empty(n), keep=empty(n), **given, **options)

    return call


def symmetrise(make=empty):
    return lambda n, d: group.symmetrise(make(n, d, d))


def diagonal(function, make=empty):
    return lambda n, d1, d2: function(make(n, d1, d2), empty(n, d1), empty(n, d2))


def block_apply(dtype, **options):
    return lambda nq, b, m: structured.block_apply(
        empty(1, nq, b, b, dtype=dtype), empty(1, nq, b, m, dtype=dtype), **options
    )


def _products():
    """Those whose operands are multiplied: in every precision of float32, and in half precision."""
    for name, precision in PRECISIONS.items():
        yield Case("ema_syrk_", f"float32 {name} rows", ema_syrk_(empty), precision)
        yield Case("ema_syrk_pair_", f"float32 {name}", ema_syrk_pair_(F32), precision)
        yield Case("gram", f"float32 {name} rows", gram(empty), precision)
        yield Case("add_gram_", f"float32 {name} rows", add_gram_(empty, F32), precision)
        yield Case("symmetric_product", f"float32 {name}", symmetric_product(F32), precision)
        yield Case("adam_in_basis_", f"float32 {name} Q rows", adam_in_basis_(), precision)
        yield Case("multiply_update", f"float32 {name}", multiply_update(), precision)
        yield Case("multiply_update", f"float32 {name} lower", multiply_update(lower=True), precision)
        yield Case("symmetrise", f"float32 {name}", symmetrise(), precision)
        yield Case("block_apply", f"float32 {name}", block_apply(F32), precision)
    for name, precision in list(PRECISIONS.items())[1:]:
        # Operands of float32 have to lie by rows in shared memory: columns are copied there by 4 bytes.
        narrow = {"precision": precision, "wide": 0.15}
        yield Case("ema_syrk_", f"float32 {name} columns", ema_syrk_(columns), **narrow)
        yield Case("gram", f"float32 {name} columns", gram(columns), **narrow)
        yield Case("gram", f"float32 {name} columns weighted", gram(columns, weight=True), precision, wide=0)
        yield Case("add_gram_", f"float32 {name} columns", add_gram_(columns, F32), **narrow)
        yield Case("adam_in_basis_", f"float32 {name} Q columns", adam_in_basis_(columns), precision)
        yield Case("multiply_update", f"float32 {name} M columns", multiply_update(columns), precision)


def _syrks():
    yield Case("ema_syrk_", "bfloat16 rows", ema_syrk_(empty, BF16))
    yield Case("ema_syrk_", "bfloat16 columns", ema_syrk_(columns, BF16))
    yield Case("ema_syrk_", "float16 rows", ema_syrk_(empty, F16))
    yield Case("ema_syrk_", "bfloat16 rows lower moments", ema_syrk_(empty, BF16, lower=True, moments=True))
    yield Case("ema_syrk_", "bfloat16 rows ones", ema_syrk_(empty, BF16, ones=True))
    yield Case("ema_syrk_", "bfloat16 rows into bfloat16", ema_syrk_(empty, BF16, BF16))
    weighted = ema_syrk_(columns, weight=True, ones=True)
    yield Case("ema_syrk_", "float32 bf16 columns weighted ones", weighted, "medium", wide=0)
    yield Case("ema_syrk_", "bfloat16 rows odd", ema_syrk_(odd, BF16, more=ODD), **UNALIGNED)
    yield Case("ema_syrk_", "float32 tf32x3 rows odd", ema_syrk_(odd, more=ODD), "high", **UNALIGNED)
    yield Case("ema_syrk_", "bfloat16 rows far", ema_syrk_(far, BF16))
    yield Case("ema_syrk_pair_", "bfloat16", ema_syrk_pair_(BF16))
    yield Case("gram", "bfloat16 rows", gram(empty, BF16))
    yield Case("gram", "bfloat16 columns weighted", gram(columns, BF16, weight=True), "medium")
    yield Case("add_gram_", "bfloat16 columns", add_gram_(columns, BF16))
    yield Case("symmetric_product", "float32 bf16 with C", symmetric_product(F32, beta=0.5, diagonal=1.0), "medium")
    yield Case("symmetric_product", "bfloat16", symmetric_product(BF16))


def _groups():
    yield Case("multiply_update", "bfloat16 bf16", multiply_update(stored=BF16), "medium")
    yield Case("multiply_update", "bfloat16 tf32x3 lower", multiply_update(stored=BF16, lower=True), "high")
    yield Case("multiply_update", "float32 bf16 odd", multiply_update(odd, more=ODD), "medium", **UNALIGNED)
    yield Case("multiply_update", "float32 bf16 M far", multiply_update(far), "medium")
    yield Case("adam_in_basis_", "float32 bf16 Q far", adam_in_basis_(far), "medium")
    yield Case("symmetrise", "float32 bf16 far", symmetrise(far), "medium")
    yield Case("adam_in_basis_", "float32 bf16 odd", adam_in_basis_(odd, more=ODD), "medium", **UNALIGNED)
    yield Case("symmetrise", "float32 bf16 columns", symmetrise(columns), "medium")
    yield Case("block_apply", "bfloat16", block_apply(BF16))
    yield Case("block_apply", "float32 bf16 transposed", block_apply(F32, transposed=True), "medium")


def _elementwise():
    yield Case("adam_direction_", "float32", adam_direction_())
    yield Case("adam_direction_", "bfloat16", adam_direction_(BF16))
    yield Case("adam_direction_", "float32 g columns", adam_direction_(make=columns), wide=0)
    yield Case("adam_direction_", "float32 g far", adam_direction_(make=far))
    yield Case("root_free_", "float32", root_free_)
    yield Case("stochastic_round", "float32", stochastic_round)
    for kind in grafts.KINDS:
        yield Case("graft_", kind, graft_(kind))
    for function in (structured.diagonal_moments, structured.diagonal_apply):
        yield Case(function.__name__, "rows", diagonal(function), wide=0.4)
        yield Case(function.__name__, "columns", diagonal(function, columns), wide=0.4)
        yield Case(function.__name__, "far", diagonal(function, far), wide=0.4)
    # Their last pieces are masked, by sizes that no compiler knows: half of their code is narrow.
    yield Case("adamw_", "float32", adamw_(F32), wide=0.1)
    yield Case("adamw_", "bfloat16", adamw_(BF16), wide=0.05)
    yield Case("adamw_", "float32 gradients columns", adamw_(F32, columns), wide=0)
    yield Case("apply_update_", "float32", apply_update_(F32), wide=0.1)
    yield Case("apply_update_", "bfloat16 stochastic", apply_update_(BF16), wide=0.05)
    yield Case("apply_update_", "float32 updates columns", apply_update_(F32, columns), wide=0)


CASES = [*_products(), *_syrks(), *_groups(), *_elementwise()]
