"""Symmetric products in plain tensor operations, and the paths of large matrices on a CPU."""

import pytest
import torch

from draws import gram, randn, symmetric
from secondorder_kernels import explain, grams, products, use_kernels
from secondorder_kernels.reference import products as reference
from secondorder_kernels.reference.rounding import stochastic_round


def dense(X, weight=None, ones=False):
    return gram(X, weight, ones)[0]


def column(r):
    return r[:, None, None]


RATE = torch.tensor([0.25, 0.0, 1.0], dtype=torch.float64)


# ema_syrk_


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ones", [False, True])
def test_options_of_ema_syrk(lower, weighted, ones):
    X, weight, moments = randn(3, 5 - ones, 7), randn(3, 7, seed=2) if weighted else None, randn(3, 2)
    before = symmetric(3, 5)
    expected = (1 - column(RATE)) * before + column(RATE) * dense(X, weight, ones)
    C = products.ema_syrk_(before.clone(), X, RATE, lower=lower, weight=weight, ones=ones, moments=moments)
    torch.testing.assert_close(C.tril() if lower else C, expected.tril() if lower else expected)
    if lower:
        assert torch.equal(C.triu(1), before.triu(1))
    torch.testing.assert_close(moments[:, 0], expected.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(moments[:, 1], expected.square().sum((1, 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_first(dtype):
    X, C, rate = randn(3, 5, 7, dtype=dtype), symmetric(3, 5, dtype=torch.float32), RATE.float()
    expected = products.ema_syrk_(C.clone(), X.float(), rate)
    assert torch.equal(products.ema_syrk_(C.clone(), X, rate), expected)


@pytest.mark.parametrize("lower", [False, True])
def test_a_bfloat16_average_is_rounded_stochastically_and_stays_symmetric(lower):
    before, X, rate = symmetric(3, 9, dtype=torch.bfloat16), randn(3, 9, 7).float(), RATE.float()
    before[1, 0, 1] += 1  # a row with rate 0 keeps its bits even if it is not symmetric
    keys = torch.tensor([5, 7, 4294967295])
    rounded = stochastic_round(before.float().lerp(X @ X.mT, column(rate)), keys)
    C = products.ema_syrk_(before.clone(), X, rate, lower=lower, keys=keys)
    assert C.dtype == torch.bfloat16 and torch.equal(C.tril(), rounded.tril()) and torch.equal(C[1], before[1])
    assert torch.equal(C.triu(1), before.triu(1)) if lower else torch.equal(C[[0, 2]], C[[0, 2]].mT)


def test_stochastic_rounding_is_right_on_average():
    """C moves by a hundredth of a unit in the last place, a hundred times."""
    C, X = torch.ones(1, 2, 2, dtype=torch.bfloat16).expand(400, 2, 2).clone(), torch.full((400, 2, 1), 2**0.5)
    rate = torch.full((400,), 2.0**-14)
    for t in range(100):
        keys = (torch.arange(400) * 2654435761 + t * 40503 * 65537) % 2**32
        products.ema_syrk_(C, X, rate, keys=keys)
    assert abs(C.float().mean() - (2 - (1 - 2.0**-14) ** 100)) < 1e-3


def test_ema_syrk_refuses_options_that_do_not_fit():
    C, X, rate = torch.zeros(2, 3, 3), torch.zeros(2, 3, 4), torch.zeros(2)
    for options, message in [
        ({"ones": True}, r"X \(n, d - 1, m\) and rate \(n,\), got \(2, 3, 3\), \(2, 3, 4\) and \(2,\)"),
        ({"weight": torch.zeros(2, 3)}, r"weight \(2, 4\) for X \(2, 3, 4\), got \(2, 3\)"),
        ({"moments": torch.zeros(2)}, r"moments \(2, 2\) for X \(2, 3, 4\), got \(2,\)"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, r"keys \(2,\) for X \(2, 3, 4\), got \(3,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            products.ema_syrk_(C, X, rate, **options)
    keys = torch.zeros(2, dtype=torch.int64)
    for tensors, options in [
        ((C.bfloat16(), X, rate), {}),
        ((C, X, rate), {"keys": keys}),
        ((C.bfloat16(), X, rate), {"keys": keys.int()}),
        ((C.bfloat16(), X, rate.bfloat16()), {"keys": keys}),
        ((C.double(), X.bfloat16(), rate.double()), {}),
        ((C, X, rate), {"weight": torch.zeros(2, 4, dtype=torch.bfloat16)}),
    ]:
        with pytest.raises(TypeError, match="ema_syrk_ takes"):
            products.ema_syrk_(*tensors, **options)


# ema_syrk_pair_


@pytest.mark.parametrize(("d1", "d2"), [(5, 7), (260, 40), (40, 300)])
def test_a_pair_has_the_bits_of_two_averages(d1, d2):
    G, rate = randn(3, d1, d2, dtype=torch.float32), RATE.float()
    L, R = symmetric(3, d1, dtype=torch.float32), symmetric(3, d2, dtype=torch.float32)
    apart = products.ema_syrk_(L.clone(), G, rate), products.ema_syrk_(R.clone(), G.mT, rate)
    with use_kernels("auto") as calls:
        products.ema_syrk_pair_(L, R, G, rate)
    assert torch.equal(L, apart[0]) and torch.equal(R, apart[1])
    paths = {path for name, path, _ in calls if name == "ema_syrk_"}
    assert paths == ({"panels", "reference"} if max(d1, d2) > 256 else {"reference"})
    with use_kernels("reference"):
        L, R = symmetric(3, d1), symmetric(3, d2)
        G, before = G.double(), (L.clone(), R.clone())
        products.ema_syrk_pair_(L, R, G, RATE)
    torch.testing.assert_close(L, before[0] + column(RATE) * (dense(G) - before[0]))
    torch.testing.assert_close(R, before[1] + column(RATE) * (dense(G.mT) - before[1]))


def test_a_pair_refuses_what_does_not_fit():
    L, R, G, rate = torch.zeros(2, 3, 3), torch.zeros(2, 4, 4), torch.zeros(2, 3, 4), torch.zeros(2)
    with pytest.raises(ValueError, match=r"got \(2, 4, 4\), \(2, 3, 3\), \(2, 3, 4\), \(2,\)"):
        products.ema_syrk_pair_(R, L, G, rate)
    with pytest.raises(TypeError, match="torch.float32, torch.float64"):
        products.ema_syrk_pair_(L, R.double(), G, rate)


# gram


@pytest.mark.parametrize(("d", "path"), [(5, "reference"), (300, "halves")])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("scale", [1.0, -0.5, RATE])
def test_gram_is_its_formula(d, path, weighted, ones, scale):
    X, weight = randn(3, 160, d).mT, randn(3, 160, seed=2) if weighted else None
    with use_kernels("auto") as calls:
        S = grams.gram(X, scale=scale, weight=weight, ones=ones)
    assert [name for _, name, _ in calls] == [path]
    factor = column(scale) if isinstance(scale, torch.Tensor) else scale
    torch.testing.assert_close(S, factor * dense(X, weight, ones), rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(S, S.mT, rtol=0, atol=1e-10)


def test_halves_are_for_large_matrices_with_many_columns():
    def path(d, m):
        return explain("gram", torch.zeros(1, d, m))[0]

    assert [path(128, 128), path(129, 65), path(129, 64)] == ["reference", "halves", "reference"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_halves_multiply_what_they_keep(dtype):
    """0.56 of the multiplications of the whole product."""
    calls, whole = [], reference.whole

    def counted(Y, X):
        calls.append(Y.shape[1] * X.shape[1])
        return whole(Y, X)

    X = randn(1, 1024, 600, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "whole", counted)
        S = grams.gram(X)
    assert sum(calls) == (8 * 128**2) + (4 * 128**2) + (2 * 256**2) + 512**2
    torch.testing.assert_close(S.double(), dense(X), rtol=1e-4, atol=1e-3)


def test_half_precision_sums_do_not_stall():
    for dtype in (torch.bfloat16, torch.float16):
        S = grams.gram(torch.ones(1, 4, 4096, dtype=dtype))
        assert S.dtype == dtype and (S == 4096).all()  # 256 if summed in bfloat16


@pytest.mark.parametrize("d", [5, 200])
def test_products_can_be_traced_whole(d):
    X, weight = randn(2, d, 210, dtype=torch.float32), torch.ones(2, 210)
    compiled = torch.compile(lambda X, w: grams.gram(X, weight=w, ones=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, weight), grams.gram(X, weight=weight, ones=True))
    pair = [symmetric(2, d, dtype=torch.float32), symmetric(2, 210, dtype=torch.float32)]
    expected = [C.clone() for C in pair]
    compiled = torch.compile(products.ema_syrk_pair_, fullgraph=True, backend="aot_eager")
    compiled(*pair, X, torch.ones(2))
    products.ema_syrk_pair_(*expected, X, torch.ones(2))
    torch.testing.assert_close(pair, expected)


def test_gram_refuses_what_does_not_fit():
    X = torch.zeros(2, 3, 4)
    for options in ({"scale": torch.zeros(3)}, {"weight": torch.zeros(2, 3)}):
        with pytest.raises(ValueError, match=r"gram takes X \(n, d, m\).*got \(2, 3, 4\)"):
            grams.gram(X, **options)
    with pytest.raises(ValueError, match="gram takes"):
        grams.gram(X[0])
    for x, options in ((X.long(), {}), (X.bfloat16(), {"scale": torch.zeros(2).bfloat16()})):
        with pytest.raises(TypeError, match="gram takes floating-point X"):
            grams.gram(x, **options)


# add_gram_ and symmetric_product


def test_add_gram_adds():
    X, C = randn(3, 5, 7), symmetric(3, 5)
    expected = C + column(RATE) * dense(X)
    assert grams.add_gram_(C, X, RATE) is C
    torch.testing.assert_close(C, expected)
    with pytest.raises(ValueError, match=r"got \(3, 5, 5\), \(3, 7, 5\) and \(3,\)"):
        grams.add_gram_(C, X.mT, RATE)
    with pytest.raises(TypeError, match="torch.float64, torch.float32 and torch.float64"):
        grams.add_gram_(C, X.float(), RATE)


def test_symmetric_product_is_its_formula():
    M, C = symmetric(2, 6), symmetric(2, 6, seed=3)
    A, B = M @ M, M + torch.eye(6)
    expected = -0.5 * A @ B + 0.25 * C + 1.5 * torch.eye(6)
    torch.testing.assert_close(grams.symmetric_product(A, B, alpha=-0.5, C=C, beta=0.25, diagonal=1.5), expected)
    assert torch.equal(grams.symmetric_product(A, B, C=C * torch.nan), A @ B)  # what has no weight is not read
    with pytest.raises(ValueError, match=r"got \(2, 6, 6\), \(2, 5, 5\)"):
        grams.symmetric_product(A, symmetric(2, 5))
    with pytest.raises(TypeError, match="torch.float64, torch.float32"):
        grams.symmetric_product(A, B.float())


def test_nothing_is_read_on_the_host():
    n, d, m = 2, 300, 400
    C, R, X, by = (torch.zeros(shape, device="meta") for shape in ((n, d, d), (n, m, m), (n, d, m), (n,)))
    products.ema_syrk_(C, X, by, lower=True, moments=torch.zeros(n, 2, device="meta"))
    keys = torch.zeros(n, dtype=torch.int64, device="meta")
    products.ema_syrk_(C.bfloat16(), X, by, keys=keys)
    products.ema_syrk_pair_(C, R, X, by)
    assert grams.gram(X, scale=by, ones=True).shape == (n, d + 1, d + 1)
    grams.add_gram_(C, X, by)
    assert grams.symmetric_product(C, C, C=C, beta=1.0).shape == C.shape
