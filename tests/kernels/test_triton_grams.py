"""Triton's new symmetric products against dense algebra in float64."""

import functools

import pytest
import torch

from laid import DEVICE, LAYOUTS, Laid
from secondorder_kernels import explain, grams, tables, use_kernels

pytest.importorskip("triton")
import draws  # noqa: E402
from draws import gram, near  # noqa: E402
from secondorder_kernels.triton import syrk  # noqa: E402
from secondorder_kernels.triton.symmetric_product import symmetric_product  # noqa: E402

CONFIG = {"block": 32, "block_k": 32, "num_warps": 4, "num_stages": 2}
SIZES = [(1, 1, 1), (3, 7, 5), (2, 33, 65), (1, 64, 32)]
CANARY = 77.0
randn = functools.partial(draws.randn, dtype=torch.float32, device=DEVICE)


@pytest.fixture
def poisoned():
    """New tensors are NaN until they are written."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


# gram


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_matrices_in_every_layout(layout, size, poisoned):
    n, d, m = size
    X = Laid(randn(n, d, m), layout).t
    S, scale = gram(X)
    G = syrk.gram(X, config=CONFIG)
    near(G, S, scale)
    assert torch.equal(G, G.mT) and G.is_contiguous()


@pytest.mark.parametrize(
    ("layout", "split"),
    [
        ("rows", 1),
        ("columns", 4),
        pytest.param("rows", 4, marks=pytest.mark.slow),
        pytest.param("columns", 1, marks=pytest.mark.slow),
    ],
)
def test_gram_of_a_layer_with_a_bias_and_rows_that_do_not_count(layout, split):
    n, d, m = 2, 32, 90
    X = Laid(randn(n, d, m), layout).t
    weight, by = (randn(n, m, seed=1) > 0).float(), torch.tensor([2.0, 0.0], device=DEVICE)
    S, scale = gram(X, weight, ones=True)
    for options, factor in (({"scale": -0.5}, -0.5), ({"scale_tensor": by}, by[:, None, None]), ({}, 1.0)):
        G = syrk.gram(X, weight=weight, ones=True, **options, config={**CONFIG, "split": split})
        near(G, S * factor, scale * 2)
        assert torch.equal(G, G.mT)
    assert torch.equal(G[:, -1, -1], weight.sum(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_of_half_precision_is_rounded_once(dtype):
    X = randn(2, 20, 40, dtype=dtype)
    G = syrk.gram(X, config=CONFIG)
    S, scale = gram(X)
    assert G.dtype == dtype
    near(G, S, S.abs() + 1e-5 * scale, tolerance=0.6 * torch.finfo(dtype).eps)
    many = torch.ones(1, 3, 4096, dtype=dtype, device=DEVICE)
    assert (syrk.gram(many, config=CONFIG) == 4096).all()  # 256 if summed in bfloat16


def test_empty_stacks_and_empty_sums():
    assert syrk.gram(randn(0, 3, 4), config=CONFIG).shape == (0, 3, 3)
    assert torch.equal(syrk.gram(randn(2, 3, 0), config=CONFIG), torch.zeros(2, 3, 3, device=DEVICE))
    assert symmetric_product(randn(0, 3, 3), randn(0, 3, 3), config=CONFIG).shape == (0, 3, 3)


# add_gram_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_add_gram_adds_to_both_triangles(layout, dtype):
    n, d, m = 3, 33, 40
    X = Laid(randn(n, d, m, dtype=dtype), layout).t
    before = randn(n, d, d, seed=1)
    before = before + before.mT
    before[1, 0, 1] = 5.0  # a matrix that is not symmetric shows who writes to it
    C = Laid(before, LAYOUTS[LAYOUTS.index(layout) - 1], CANARY)
    by = torch.tensor([2.0, 0.0, -0.3], device=DEVICE)
    S, scale = gram(X)
    syrk.add_gram_(C.t, X, by, config=CONFIG)
    near(C.t, before.double() + by[:, None, None] * S, 2 * scale + before.abs())
    assert torch.equal(C.t[[0, 2]], C.t[[0, 2]].mT) and torch.equal(C.t[1], before[1]) and C.untouched()


# symmetric_product


def commuting(n, d, dtype=torch.float32):
    """Symmetric matrices `(n, d, d)` of which the first two commute, and a third one."""
    M = randn(n, d, d, dtype=torch.float64)
    M = (M + M.mT) / (2 * d) ** 0.5
    Z = randn(n, d, d, seed=1, dtype=torch.float64)
    return [A.to(dtype) for A in (M + 0.5 * M @ M, torch.eye(d, device=DEVICE) - M, Z + Z.mT)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (3, 7), (2, 33), (1, 64)])
def test_products_of_commuting_matrices(layout, size, poisoned):
    A, B, C = (Laid(t, LAYOUTS[(LAYOUTS.index(layout) + shift) % 4]).t for shift, t in enumerate(commuting(*size)))
    product, scale = A.double() @ B.double(), A.abs().double() @ B.abs().double()
    identity = torch.eye(size[1], device=DEVICE, dtype=torch.float64)
    plain = symmetric_product(A, B, config=CONFIG)
    near(plain, product, scale)
    full = symmetric_product(A, B, alpha=-0.5, C=C, beta=0.25, diagonal=1.5, config=CONFIG)
    near(full, -0.5 * product + 0.25 * C.double() + 1.5 * identity, scale + C.abs() + 1.5)
    assert torch.equal(plain, plain.mT) and torch.equal(full, full.mT)


def test_newton_schulz_iterations_give_the_inverse_square_root():
    """Coupled iterations: Y → (A / c)^(1/2), Z → (A / c)^(-1/2)."""
    values, Q = torch.linspace(0.05, 1.0, 20, dtype=torch.float64, device=DEVICE), torch.linalg.qr(randn(20, 20))[0]
    A = ((Q.double() * values) @ Q.double().mT).float()[None]
    eigenvalues, basis = torch.linalg.eigh(A.double())
    Y, Z = A, torch.eye(20, device=DEVICE)[None]
    for _ in range(12):
        T = symmetric_product(Z, Y, alpha=-0.5, diagonal=1.5, config=CONFIG)
        Y, Z = symmetric_product(Y, T, config=CONFIG), symmetric_product(T, Z, config=CONFIG)
    expected = (basis * eigenvalues[:, None] ** -0.5) @ basis.mT
    torch.testing.assert_close(Z.double(), expected, rtol=0, atol=2e-4)


def test_half_precision_products_keep_the_dtype():
    A, B, _ = commuting(2, 33, torch.bfloat16)
    product = A.double() @ B.double()
    out = symmetric_product(A, B, config=CONFIG)
    assert out.dtype == torch.bfloat16
    # A and B do not commute to more than their rounding.
    near(out, product, A.abs().double() @ B.abs().double(), tolerance=2e-2)


# dispatch


def test_operations_run_their_kernels(triton_mode):
    X, (A, B, _) = randn(2, 7, 9), commuting(2, 7)
    S, scale = gram(X)
    near(grams.gram(X, scale=2.0), 2 * S, 2 * scale)
    near(grams.add_gram_(torch.zeros_like(A), X, torch.ones(2, device=DEVICE)), S, scale)
    near(grams.symmetric_product(A, B), A.double() @ B.double(), A.abs().double() @ B.abs().double())
    assert "there is no kernel for torch.float64" in explain("gram", X.double())[1]
    assert {path for _, path, _ in triton_mode} == {"triton"} and len(triton_mode) == 3


@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_operations_are_registered_as_they_behave(mode, monkeypatch):
    monkeypatch.setattr(tables, "family_config", lambda *what: {**CONFIG, "block": 16, "block_k": 16})
    X, by, operations = randn(2, 6, 9), torch.ones(2, device=DEVICE), torch.ops.secondorder
    A, B, C = commuting(2, 6)
    with use_kernels(mode):
        torch.library.opcheck(operations.gram.default, (X,), {})
        torch.library.opcheck(
            operations.gram.default, (X.mT,), {"scale_tensor": by, "weight": randn(2, 6), "ones": True}
        )
        torch.library.opcheck(operations.add_gram_.default, (C, X, by), {})
        torch.library.opcheck(operations.symmetric_product.default, (A, B), {"C": C, "beta": 2.0})
