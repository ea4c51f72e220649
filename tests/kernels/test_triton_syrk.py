"""Triton's averages of Gram matrices against dense algebra in float64."""

import functools

import pytest
import torch

from laid import DEVICE, LAYOUTS, Laid, far_apart
from secondorder_kernels import explain, products, tables, use_kernels
from secondorder_kernels.reference.rounding import stochastic_round

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

import draws  # noqa: E402
from draws import gram, near  # noqa: E402
from secondorder_kernels.triton import syrk, tiles  # noqa: E402
from secondorder_kernels.triton.symmetric_product import symmetric_product  # noqa: E402

CONFIG = {"block": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}
SMALL = {**CONFIG, "block": 16, "block_k": 16}
SIZES = [(1, 1, 1), (3, 7, 5), (2, 33, 65), (1, 64, 32), (1, 70, 31)]
CANARY = 77.0
randn = functools.partial(draws.randn, dtype=torch.float32, device=DEVICE)
symmetric = functools.partial(draws.symmetric, dtype=torch.float32, device=DEVICE)


def rates(n):
    return torch.tensor([0.25, 1.0, 0.9], device=DEVICE)[:n]


def mean(C, S, rate):
    r = rate.double()[:, None, None]
    return (1 - r) * C.double() + r * S


# ema_syrk_


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_c_moves_to_the_gram_matrix_in_every_layout(layout, size):
    n, d, m = size
    X = Laid(randn(n, d, m), layout).t
    before = symmetric(n, d)
    C = Laid(before, LAYOUTS[LAYOUTS.index(layout) - 1], CANARY)
    S, scale = gram(X)
    syrk.ema_syrk_(C.t, X, rates(n), config=CONFIG)
    near(C.t, mean(before, S, rates(n)), scale + before.abs())
    assert torch.equal(C.t, C.t.mT) and C.untouched()


OPTIONS = {
    "lower": {"lower": True},
    "weight": {"weight": True},
    "ones": {"ones": True},
    "moments": {"moments": True},
    "all": {"lower": True, "weight": True, "ones": True, "moments": True},
}


@pytest.mark.parametrize(
    ("layout", "split"),
    [
        ("rows", 1),
        ("columns", 3),
        pytest.param("rows", 3, marks=pytest.mark.slow),
        pytest.param("columns", 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options(options, layout, split):
    n, d, m = 2, 35, 70
    lower, ones = options.get("lower", False), options.get("ones", False)
    X = Laid(randn(n, d - ones, m), layout).t
    weight = Laid(randn(n, m, seed=2), "batch").t if "weight" in options else None
    moments = torch.full((2, n), torch.nan, device=DEVICE).T if "moments" in options else None
    before = symmetric(n, d)
    laid = Laid(before, "sliced", CANARY)
    C = laid.t
    S, scale = gram(X, weight, ones)
    expected = mean(before, S, rates(n))
    syrk.ema_syrk_(
        C, X, rates(n), lower=lower, weight=weight, ones=ones, moments=moments, config={**CONFIG, "split": split}
    )
    written = torch.ones_like(C, dtype=torch.bool).tril() if lower else torch.ones_like(C, dtype=torch.bool)
    near(C[written], expected[written], (scale + before.abs())[written])
    assert torch.equal(C[~written], before[~written]) and laid.untouched()
    assert lower or torch.equal(C, C.mT)
    if moments is not None:
        full = C.double().tril() + C.double().tril(-1).mT
        truth = torch.stack([full.diagonal(dim1=1, dim2=2).sum(1), full.square().sum((1, 2))], 1)
        near(moments, truth, torch.stack([full.diagonal(dim1=1, dim2=2).abs().sum(1), truth[:, 1]], 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ones", [False, True])
def test_half_precision_is_multiplied_exactly(dtype, weighted, ones):
    n, d, m = 2, 33, 40
    X = randn(n, d - ones, m, dtype=dtype)
    weight = randn(n, m, seed=2) if weighted else None
    C = symmetric(n, d)
    S, scale = gram(X, weight, ones)
    expected = mean(C, S, rates(n))
    syrk.ema_syrk_(C, X, rates(n), weight=weight, ones=ones, config=CONFIG)
    near(C, expected, scale + C.abs())


@pytest.mark.parametrize(
    ("precision", "weighted"), [("medium", False), ("medium", True), ("high", False)], indirect=["precision"]
)
def test_precision_follows_torch(precision, weighted):
    n, d, m = 1, 20, 40
    X, weight = randn(n, d, m), randn(n, m, seed=2).abs() if weighted else torch.ones(n, m, device=DEVICE)
    C = torch.zeros(n, d, d, device=DEVICE)
    syrk.ema_syrk_(C, X, rates(n), weight=weight if weighted else None, config=CONFIG)
    left, right = (
        (X * weight[:, None], X)
        if precision == "high"
        else (
            (X * weight[:, None]).bfloat16().double(),
            X.bfloat16().double(),
        )
    )
    products = left.double() @ right.double().mT
    lower = torch.ones_like(C, dtype=torch.bool).tril()
    near(C[lower], 0.25 * products[lower], gram(X, weight)[1][lower])


def test_a_bfloat16_average_is_rounded_stochastically_and_stays_symmetric():
    """All numbers are such that float32 has them exactly, whatever the order of the sums."""
    n, d, m = 3, 40, 33
    X = randn(n, d, m).mul(50).round()
    before = (symmetric(n, d) * 8).round().bfloat16()
    rate = torch.tensor([0.25, 0.0, 0.5], device=DEVICE)
    keys = torch.tensor([5, 7, 4294967295], device=DEVICE)
    new = mean(before, gram(X)[0], rate)
    assert torch.equal(new, new.float().double()) and not torch.equal(new, new.bfloat16().double())
    rounded = stochastic_round(new.float(), keys)
    assert not torch.equal(rounded, rounded.mT)
    for lower in (False, True):
        C, moments = before.clone(), torch.empty(n, 2, device=DEVICE)
        syrk.ema_syrk_(C, X, rate, lower=lower, keys=keys, moments=moments, config=CONFIG)
        below = torch.ones_like(C, dtype=torch.bool).tril()
        assert torch.equal(C[below], rounded[below])
        assert torch.equal(C[~below], before[~below]) if lower else torch.equal(C, C.mT)
        full = rounded.double().tril() + rounded.double().tril(-1).mT
        torch.testing.assert_close(moments[:, 1].double(), full.square().sum((1, 2)), rtol=1e-6, atol=0)
    assert not torch.equal(rounded, new.bfloat16())


@pytest.mark.parametrize("split", [1, 2])
def test_a_row_with_rate_0_keeps_its_bits_even_if_it_is_not_symmetric(split):
    C, X = randn(3, 33, 33), randn(3, 33, 64, seed=1)
    C[0, 0], X[2, 0, 0] = -0.0, torch.nan
    before, moments = C.clone(), torch.empty(3, 2, device=DEVICE)
    rate = torch.tensor([0.0, 0.5, 0.0], device=DEVICE)
    syrk.ema_syrk_(C, X, rate, moments=moments, config={**CONFIG, "split": split})
    bits, old = C.view(torch.int32), before.view(torch.int32)
    assert torch.equal(bits[0], old[0]) and torch.equal(bits[2], old[2]) and not torch.equal(bits[1], old[1])
    lower = before[[0, 2]].double().tril()
    expected = 2 * lower.square().sum((1, 2)) - lower.diagonal(dim1=1, dim2=2).square().sum(1)
    torch.testing.assert_close(moments[[0, 2], 1].double(), expected, rtol=1e-6, atol=0)


def test_rate_1_gives_the_gram_matrix_itself():
    C, X = randn(2, 33, 33) * 1e12, randn(2, 33, 40, seed=1)
    syrk.ema_syrk_(C, X, torch.ones(2, device=DEVICE), config=CONFIG)
    assert torch.equal(C, syrk.gram(X, config=CONFIG))


@pytest.mark.parametrize("split", [1, 3])
def test_bits_are_the_same_in_every_run_and_in_every_batch(split):
    X, before = randn(3, 40, 100), symmetric(3, 40)
    results = []
    for rows in (slice(0, 3), slice(0, 3), slice(1, 2)):
        C = before[rows].clone()
        syrk.ema_syrk_(C, X[rows], rates(3)[rows], config={**CONFIG, "split": split})
        results.append(C)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0][1:2], results[2])


def test_empty_stacks_and_empty_sums():
    for n, d, m in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        C, X, moments = torch.ones(n, d, d, device=DEVICE), randn(n, d, m), torch.full((n, 2), torch.nan, device=DEVICE)
        syrk.ema_syrk_(C, X, rates(n), moments=moments, config={**CONFIG, "split": 2})
        near(C, mean(torch.ones_like(C), 0.0, rates(n)), 1.0)
        near(moments[:, 0], C.diagonal(dim1=1, dim2=2).sum(1).double(), 1.0)
    C = torch.zeros(1, 1, 1, device=DEVICE)
    syrk.ema_syrk_(C, randn(1, 0, 5), torch.ones(1, device=DEVICE), ones=True, config=CONFIG)
    assert C.item() == 5  # a layer without inputs: the number of its rows


# ema_syrk_pair_


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 7, 5), (2, 33, 65), (1, 64, 32)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pair_follows_both_unfoldings(layout, size):
    n, d1, d2 = size
    G = Laid(randn(n, d1, d2), layout).t
    before = symmetric(n, d1), symmetric(n, d2, seed=2)
    L, R = Laid(before[0], "sliced", CANARY), Laid(before[1], layout, CANARY)
    syrk.ema_syrk_pair_(L.t, R.t, G, rates(n), config=CONFIG)
    for C, old, X in ((L, before[0], G), (R, before[1], G.mT)):
        S, scale = gram(X)
        near(C.t, mean(old, S, rates(n)), scale + old.abs())
        assert torch.equal(C.t, C.t.mT) and C.untouched()


def test_a_pair_has_the_bits_of_two_products():
    for dtype in (torch.float32, torch.bfloat16):
        G, rate = randn(3, 40, 33, dtype=dtype), torch.tensor([0.3, 0.0, 1.0], device=DEVICE)
        L, R = randn(3, 40, 40, seed=1), randn(3, 33, 33, seed=2)
        apart = L.clone(), R.clone()
        syrk.ema_syrk_pair_(L, R, G, rate, config=CONFIG)
        syrk.ema_syrk_(apart[0], G, rate, config=CONFIG)
        syrk.ema_syrk_(apart[1], G.mT, rate, config=CONFIG)
        assert torch.equal(L, apart[0]) and torch.equal(R, apart[1])


# addresses


@triton.jit
def where_kernel(numbers, rows, cols):
    row, col = tiles.lower_tile(tl.load(numbers + tl.program_id(0)))
    tl.store(rows + tl.program_id(0), row)
    tl.store(cols + tl.program_id(0), col)


def test_tiles_below_the_diagonal_are_counted_row_by_row():
    """The first and the last one of a row, and the second."""
    starts = {row: row * (row + 1) // 2 for row in (0, 1, 2, 3, 57, 5000, 40000)}
    wanted = [(row, col) for row in starts for col in sorted({0, min(1, row), row})]
    numbers = torch.tensor([starts[row] + col for row, col in wanted], dtype=torch.int32, device=DEVICE)
    rows, cols = torch.empty_like(numbers), torch.empty_like(numbers)
    where_kernel[(len(numbers),)](numbers, rows, cols)
    assert list(zip(rows.tolist(), cols.tolist(), strict=True)) == wanted
    assert tiles.lower_tiles(4999 * 32 + 1, 32) == starts[5000]


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 5, 8), (2**30, 8, 1)), ((1, 17, 8), (0, 2**27, 1)), ((1, 5, 17), (0, 1, 2**27))],
    ids=["batch", "rows", "columns"],
)
def test_addresses_beyond_2_to_31(tmp_path, shape, strides):
    X = far_apart(tmp_path, shape, strides, torch.float16).copy_(randn(*shape))
    S, scale = gram(X)
    near(syrk.gram(X, config=SMALL if strides[0] == 0 else CONFIG), S, scale, tolerance=1e-3)
    weight = torch.ones(shape[0], shape[2], device=DEVICE)
    near(syrk.gram(X, weight=weight, config={**SMALL, "split": 2}), S, scale, tolerance=1e-3)


def test_rows_beyond_2_to_31_of_pairs_and_of_commuting_matrices(tmp_path):
    G = far_apart(tmp_path, (3, 5, 8), (2**30, 8, 1), torch.float16).copy_(randn(3, 5, 8))
    L, R, one = torch.zeros(3, 5, 5, device=DEVICE), torch.zeros(3, 8, 8, device=DEVICE), torch.ones(3, device=DEVICE)
    syrk.ema_syrk_pair_(L, R, G, one, config=CONFIG)
    near(L, *gram(G))
    near(R, *gram(G.mT))
    A = far_apart(tmp_path, (3, 5, 5), (2**30, 5, 1), torch.float16).copy_(symmetric(3, 5))
    near(symmetric_product(A, A, config=CONFIG), *gram(A), tolerance=1e-3)


def test_offsets_in_a_tile_are_32_bits_wide_where_they_may_be():
    assert str(tiles.index_type((4096, 1), 128)) == "int32"
    assert str(tiles.index_type((1, 2**24), 128)) == "int64"


# dispatch


def test_operations_run_their_kernels(triton_mode):
    X, C, rate = randn(2, 20, 33), symmetric(2, 20), rates(2)
    expected = mean(C, gram(X)[0], rate)
    assert products.ema_syrk_(C, X, rate) is C
    near(C, expected, gram(X)[1] + C.abs())
    L, R = symmetric(2, 20), symmetric(2, 33)
    expected = mean(L, gram(X)[0], rate)
    products.ema_syrk_pair_(L, R, X, rate)
    near(L, expected, gram(X)[1] + L.abs())
    assert {(name, path) for name, path, _ in triton_mode} == {("ema_syrk_", "triton"), ("ema_syrk_pair_", "triton")}


def test_float64_is_refused_in_a_sentence(triton_mode):
    X, C, rate = randn(2, 3, 3, dtype=torch.float64), symmetric(2, 3, dtype=torch.float64), rates(2).double()
    path, reason = explain("ema_syrk_", C, X, rate)
    assert path == "none" and "there is no kernel for torch.float64" in reason


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_operations_are_registered_as_they_behave(mode, monkeypatch):
    monkeypatch.setattr(tables, "family_config", lambda *what: SMALL)
    X, rate = randn(2, 5, 6), rates(2)
    keys, moments = torch.tensor([1, 2], device=DEVICE), torch.zeros(2, 2, device=DEVICE)
    with use_kernels(mode):
        for C, options in (
            (symmetric(2, 5), {}),
            (symmetric(2, 6), {"lower": True, "ones": True, "weight": randn(2, 6), "moments": moments}),
            (symmetric(2, 5, dtype=torch.bfloat16), {"keys": keys}),
        ):
            torch.library.opcheck(torch.ops.secondorder.ema_syrk_.default, (C, X, rate), options)
        pair = symmetric(2, 5), symmetric(2, 6), X, rate
        torch.library.opcheck(torch.ops.secondorder.ema_syrk_pair_.default, pair)
