"""Structured matrices against dense algebra, on group elements K = (I - .3 Π(A)) (I - .3 Π(B)): they are not symmetric.

The oracle knows a structure only as a pattern: which entries it has and which it ties together.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from secondorder.preconditioner.structures import STRUCTURES, Arrow, BlockDiagonal, Structure, structure
from secondorder.preconditioner.structures.toeplitz import _length

HALF = (torch.bfloat16, torch.float16)
NAMES = [*STRUCTURES, "block(3)", "hierarchical(3,2)"]
STRUCTURED = [name for name in STRUCTURES if name != "dense"]

names = st.one_of(
    st.sampled_from(list(STRUCTURES)),
    st.integers(1, 45).map(lambda b: f"block({b})"),
    st.tuples(st.integers(0, 25), st.integers(0, 25)).map(lambda k: f"hierarchical({k[0]},{k[1]})"),
)


# ---------------------------------------------------------------------- the oracle


def pattern(s: Structure, name: str, d: int) -> torch.Tensor:
    """Labels `(d, d)`: 0 where the structure has no entry, one label for all entries that are tied."""
    i, j = torch.meshgrid(torch.arange(d), torch.arange(d), indexing="ij")
    own = i * d + j + 1
    if isinstance(s, BlockDiagonal):
        return own * (i // s.size == j // s.size)
    if name.startswith("hierarchical"):
        end = d - min(s.bottom, d - min(s.top, d))
        return own * ((i < s.top) | (i == j) | (i >= end) & (j >= s.top))
    return {
        "dense": own,
        "diagonal": own * (i == j),
        "tril_toeplitz": (i - j + 1).clamp_min(0),
        "triu_toeplitz": (j - i + 1).clamp_min(0),
        "tril_bottom_right_diag": own * ((j == 0) | (i == j)),
        "triu_bottom_right_diag": own * ((i == 0) | (i == j)),
        "tril_top_left_diag": own * ((i == d - 1) | (i == j)),
        "triu_top_left_diag": own * ((j == d - 1) | (i == j)),
    }[name]


def tied_sums(M: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sums of `M (n, d, d)` over the entries of each label, `(n, d² + 1)`."""
    sums = torch.zeros(len(M), labels.numel() + 1, dtype=M.dtype)
    return sums.index_add(1, labels.flatten(), M.flatten(1))


def projected(M: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Π(M), dense: the mean over tied entries; those without a mirror image count twice."""
    weights = torch.where((labels > 0) & (labels.mT == 0), 2, 1) * (labels > 0)
    counts = torch.bincount(labels.flatten(), minlength=labels.numel() + 1).clamp_min(1)
    return (tied_sums(weights * M, labels) / counts)[:, labels]


class Case:
    """Random operands of one structure and size, with K and m as the oracle has them and as they are stored."""

    def __init__(self, name: str, d: int, n: int = 2, m: int = 3, seed: int = 0, dtype=torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        A, B, M, Y = (torch.randn(n, d, d, generator=generator, dtype=torch.float64) for _ in range(4))
        self.A, self.B, self.M, self.Y = ((Z + Z.mT).to(dtype) / (2 * math.sqrt(d)) for Z in (A, B, M, Y))
        self.X = torch.randn(n, d, m, generator=generator, dtype=torch.float64).to(dtype)
        self.s = structure(name)
        self.labels = pattern(self.s, name, d)
        one = self.s.eye(d, dtype=dtype)
        self.K = self.s.product(one - 0.3 * self.s.project(self.A), one - 0.3 * self.s.project(self.B))
        self.m = self.s.project(self.Y)
        assert self.K.shape == (n, *self.s.shape(d)) and self.K.dtype == dtype


cases = st.builds(
    Case, name=names, d=st.integers(1, 40), n=st.integers(0, 3), m=st.integers(1, 5), seed=st.integers(0, 999)
)

# What is computed on the storage, and the same in dense algebra: (structure, K, m, X, M), and (Π, K, m, X, M).
MATRICES = {
    "product": (lambda s, K, m, X, M: s.product(K, m), lambda P, K, m, X, M: K @ m),
    "project": (lambda s, K, m, X, M: s.project(M), lambda P, K, m, X, M: P(M)),
    "project_gram": (lambda s, K, m, X, M: s.project_gram(X), lambda P, K, m, X, M: P(X @ X.mT)),
    "self_gram": (lambda s, K, m, X, M: s.self_gram(K), lambda P, K, m, X, M: P(K.mT @ K)),
}
OTHERS = {
    "apply": (lambda s, K, m, X, M: s.apply(K, X), lambda P, K, m, X, M: K @ X),
    "apply_t": (lambda s, K, m, X, M: s.apply_t(K, X), lambda P, K, m, X, M: K.mT @ X),
    "average_trace": (
        lambda s, K, m, X, M: s.average_trace(K),
        lambda P, K, m, X, M: K.diagonal(dim1=1, dim2=2).mean(1),
    ),
    "frobenius": (lambda s, K, m, X, M: s.frobenius(K), lambda P, K, m, X, M: K.square().sum((1, 2)).sqrt()),
    "largest": (lambda s, K, m, X, M: s.largest(K), lambda P, K, m, X, M: K.abs().amax((1, 2))),
}
OPERATIONS = {**MATRICES, **OTHERS}
CHEAP = [op for op in OPERATIONS if op != "project"]  # the others begin with a dense matrix


def deviation(case: Case, op: str) -> float:
    """Of one operation from dense algebra in float64 on the represented matrices, relative to its largest entry."""
    s, operands = case.s, (case.K, case.m, case.X, case.M)
    found = OPERATIONS[op][0](s, *operands)
    dense = (s.to_dense(case.K), s.to_dense(case.m), case.X, case.M)
    expected = OPERATIONS[op][1](lambda M: projected(M, case.labels), *(Z.double() for Z in dense))
    if op in MATRICES:
        assert found.shape == case.K.shape
        found = s.to_dense(found)
    assert found.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1))


# ---------------------------------------------------------------------- mathematics


@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_group_elements_are_those_of_dense_algebra(case):
    one = torch.eye(case.A.shape[1], dtype=torch.float64)
    expected = (one - 0.3 * projected(case.A, case.labels)) @ (one - 0.3 * projected(case.B, case.labels))
    assert torch.allclose(case.s.to_dense(case.K), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", OPERATIONS)
@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_operation_on_group_elements_equals_dense_algebra(case, op):
    assert deviation(case, op) <= 1e-12


@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_product_of_elements_has_no_entry_outside_the_structure(case):
    product = case.s.to_dense(case.s.product(case.K, case.K))
    assert (product[:, case.labels == 0] == 0).all()
    tied = projected(product, case.labels) / torch.where(case.labels.mT == 0, 2, 1)
    assert torch.allclose(product, tied, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_padding_stays_zero(case):
    """Else the norm of the storage would differ from that of the matrix."""
    for op, (run, _) in MATRICES.items():
        found = run(case.s, case.K, case.m, case.X, case.M)
        norm = case.s.to_dense(found).square().sum((1, 2)).sqrt()
        assert torch.allclose(case.s.frobenius(found), norm, rtol=1e-12, atol=0), op


@settings(max_examples=40, deadline=None)
@given(case=cases)
def test_projection_is_the_least_element_with_the_nearest_symmetric_part(case):
    N = case.s.to_dense(case.s.project(case.M))
    symmetric = (N + N.mT) / 2
    # Nearest: the rest is orthogonal to every element, and so to its symmetric part.
    rest = tied_sums(case.M - symmetric, case.labels)[:, 1:]
    assert torch.allclose(rest, torch.zeros_like(rest), atol=1e-12)
    # Least: orthogonal to elements without a symmetric part.
    both = (case.labels > 0) & (case.labels.mT > 0)
    assert torch.allclose(N * both, N.mT * both, rtol=0, atol=1e-12)
    assert torch.allclose(case.s.to_dense(case.s.project(symmetric)), N, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_identity_is_neutral(name):
    for d in (1, 2, 3, 20, 33):
        case = Case(name, d)
        one = case.s.eye(d, dtype=torch.float64)
        assert torch.equal(case.s.to_dense(one[None])[0], torch.eye(d, dtype=torch.float64))
        for both in (case.s.product(one.expand_as(case.K), case.K), case.s.product(case.K, one.expand_as(case.K))):
            assert torch.allclose(both, case.K, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["block(3)", "hierarchical(3,2)", "tril_toeplitz", "triu_top_left_diag"])
def test_group_elements_of_these_tests_are_not_symmetric(name):
    """Else a missing transpose would pass."""
    case = Case(name, 7)
    K = case.s.to_dense(case.K)
    assert (K - K.mT).abs().max() > 0.01
    assert (case.s.apply(case.K, case.X) - case.s.apply_t(case.K, case.X)).abs().max() > 0.01


# ---------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_lower_precision_agrees_to_its_own_rounding(name, dtype):
    for op in OPERATIONS:
        for d in (1, 5, 40):
            assert deviation(Case(name, d, dtype=dtype), op) <= 8 * torch.finfo(dtype).eps, (op, d)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_results_keep_the_dtype_and_scalars_are_float32_at_least(name, dtype):
    case = Case(name, 12, dtype=dtype)
    for op, (run, _) in OPERATIONS.items():
        scalar = op in ("average_trace", "frobenius", "largest")
        expected = torch.promote_types(dtype, torch.float32) if scalar else dtype
        assert run(case.s, case.K, case.m, case.X, case.M).dtype == expected, op
    assert case.s.to_dense(case.K).dtype == dtype


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_sums_do_not_stall(name):
    """Summed in bfloat16, 4096 ones make 256."""
    case = Case(name, 4, dtype=torch.bfloat16)
    gram = case.s.project_gram(torch.ones(1, 4, 4096, dtype=torch.bfloat16))
    assert torch.equal(case.s.to_dense(gram).diagonal(dim1=1, dim2=2).float(), torch.full((1, 4), 4096.0))


# ---------------------------------------------------------------------- cost


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("name", STRUCTURED)
def test_no_operation_forms_a_dense_matrix(name):
    d, m = 1000, 5
    s = structure(name)
    X = torch.randn(1, d, m)
    with Largest() as largest:
        K = s.project_gram(X)
        for op in CHEAP:
            OPERATIONS[op][0](s, K, K, X, None)
    # A spectrum has the numbers of two padded sequences; everything else is as large as X or the storage.
    assert largest.elements <= max(3 * d * m, 33 * 1024)


@pytest.mark.parametrize("name", STRUCTURED)
def test_storage_is_as_small_as_documented(name):
    numbers = {"block": 32, "hierarchical": 33, "diagonal": 1, "tril_toeplitz": 1, "triu_toeplitz": 1}
    for d in (64, 1000, 1024):
        assert math.prod(structure(name).shape(d)) == numbers.get(name, 2) * d


def test_fourier_length_holds_a_convolution_and_is_near_it():
    for d in range(1, 3000):
        assert 2 * d - 1 <= _length(d) <= max(1.34 * (2 * d - 1), 4)


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_stack_do_not_meet(name):
    case = Case(name, 20, n=3)
    operands = (case.K, case.m, case.X, case.M)
    spoilt = [torch.cat([Z[:1], torch.full_like(Z[1:2], math.nan), Z[2:]]) for Z in operands]
    for op, (run, _) in OPERATIONS.items():
        whole, other = run(case.s, *operands), run(case.s, *spoilt)
        for i in (0, 2):
            alone = run(case.s, *(Z[i : i + 1] for Z in operands))[0]
            assert torch.allclose(whole[i], alone, rtol=0, atol=1e-14), op
            assert torch.allclose(other[i], alone, rtol=0, atol=1e-14), op


@pytest.mark.parametrize("name", NAMES)
def test_nothing_reads_a_value(name):
    """On meta tensors there is none to read."""
    s = structure(name)
    X, M = torch.empty(2, 20, 3, device="meta"), torch.empty(2, 20, 20, device="meta")
    K = s.eye(20, device="meta").expand(2, *s.shape(20))
    for run, _ in OPERATIONS.values():
        assert run(s, K, K, X, M).device.type == "meta"


@pytest.mark.parametrize("name", ["block(3)", "tril_toeplitz", "hierarchical(3,2)"])
def test_operations_are_traced_whole(name):
    case = Case(name, 10)

    def everything(*operands):
        return [run(case.s, *operands) for run, _ in OPERATIONS.values()] + [case.s.eye(10)]

    operands = (case.K, case.m, case.X, case.M)
    compiled = torch.compile(everything, backend="eager", fullgraph=True)
    for found, expected in zip(compiled(*operands), everything(*operands), strict=True):
        assert torch.equal(found, expected)


def test_inputs_are_left_as_they_are():
    for name in NAMES:
        case = Case(name, 12)
        operands = (case.K, case.m, case.X, case.M)
        before = [Z.clone() for Z in operands]
        for run, _ in OPERATIONS.values():
            run(case.s, *operands)
        assert all(torch.equal(old, Z) for old, Z in zip(before, operands, strict=True)), name


# ---------------------------------------------------------------------- names


def test_sizes_are_parsed():
    assert structure("block(30)") == BlockDiagonal(30)
    assert structure("hierarchical(15, 15)") == Arrow(15, 15)
    assert structure("block") == BlockDiagonal(32) == structure("block(32)")
    assert len({structure(name) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    "name", ["sparse", "block()", "block(2,3)", "block(-1)", "block(0)", "hierarchical(3)", "dense(4)", "block(3"]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"Invalid (structure: .*diagonal|block size: 0)"):
        structure(name)
    with pytest.raises(TypeError, match="structure must be a name"):
        structure(3)
    with pytest.raises(ValueError, match="Invalid number of bottom rows: -1"):
        Arrow(1, -1)
