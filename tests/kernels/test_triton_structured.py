"""Kernels of structured factors, against dense algebra in float64: layouts, sizes, dtypes, bounds."""

import functools

import pytest
import torch

pytest.importorskip("triton")
import draws  # noqa: E402
from laid import DEVICE, LAYOUTS, Laid, far_apart  # noqa: E402
from secondorder_kernels import explain, use_kernels  # noqa: E402
from secondorder_kernels.structured import block_apply, diagonal_apply, diagonal_moments  # noqa: E402

CONFIG = {"rows": 32, "columns": 32, "depth": 16, "num_warps": 4, "num_stages": 2}
SHAPES = [(3, 1, 1), (3, 7, 5), (1, 33, 65), (2, 64, 32), (1, 70, 31), (0, 4, 4), (2, 0, 3), (2, 3, 0)]
CASES = [(shape, LAYOUTS[i % 4]) for i, shape in enumerate(SHAPES)] + [((3, 7, 5), layout) for layout in LAYOUTS]
randn = functools.partial(draws.randn, dtype=torch.float32)
pytestmark = pytest.mark.usefixtures("triton_mode")


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.double().cpu(), expected, rtol=tolerance, atol=tolerance)


# diagonal factors


class Diagonals:
    """A matrix and its diagonal factors, laid out, and in float64."""

    def __init__(self, shape, layout="rows"):
        n, d1, d2 = shape
        G, a, b = randn(*shape), randn(n, d1, seed=1), randn(n, d2, seed=2)
        self.arguments = Laid(G, layout).t, Laid(a, layout).t, Laid(b, "columns" if layout == "rows" else "rows").t
        self.G, self.a, self.b = G.double(), a.double()[:, :, None], b.double()[:, None]


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_every_layout_and_size_of_diagonal_factors(shape, layout):
    given = Diagonals(shape, layout)
    squares = (given.a * given.G * given.b) ** 2
    rows, columns = diagonal_moments(*given.arguments)
    close(rows, squares.sum(2))
    close(columns, squares.sum(1))
    close(diagonal_apply(*given.arguments), given.a**2 * given.G * given.b**2)


def test_diagonal_apply_has_the_bits_of_the_reference():
    given = Diagonals((3, 33, 40), "columns")
    found = diagonal_apply(*given.arguments)
    with use_kernels("reference"):
        assert torch.equal(found, diagonal_apply(*given.arguments))


def test_what_is_not_finite_stays_in_its_row_and_column():
    G, a, b = Diagonals((2, 40, 33)).arguments
    G[1, 35, 2] = torch.inf
    rows, columns = diagonal_moments(G, a, b)
    assert (~rows.isfinite()).nonzero().tolist() == [[1, 35]]
    assert (~columns.isfinite()).nonzero().tolist() == [[1, 2]]


# diagonal blocks


BLOCKS = [
    (2, 3, 8, 5),
    (1, 2, 1, 1),
    (2, 2, 20, 33),
    (1, 2, 33, 40),
    (1, 1, 64, 16),
    (0, 2, 4, 4),
    (2, 0, 4, 4),
    (2, 2, 4, 0),
]


@pytest.mark.parametrize(("n", "q", "b", "m"), BLOCKS)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_size_of_blocks(n, q, b, m, transposed):
    layout = LAYOUTS[(b + transposed) % 4]
    K, X = randn(n, q, b, b), randn(n, q, b, m, seed=1)
    found = block_apply(Laid(K, layout).t, Laid(X, LAYOUTS[LAYOUTS.index(layout) - 1]).t, transposed=transposed)
    close(found, torch.einsum("nqki,nqkj->nqij" if transposed else "nqik,nqkj->nqij", K.double(), X.double()))
    assert found.is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layout_and_dtype_of_blocks(layout, dtype):
    K, X = randn(2, 3, 20, 20, dtype=dtype), randn(2, 3, 20, 7, seed=1, dtype=dtype)
    found = block_apply(Laid(K, layout).t, Laid(X, layout).t)
    assert found.dtype == dtype
    expected = torch.einsum("nqik,nqkj->nqij", K.double(), X.double())
    if dtype == torch.float32:
        close(found, expected)
    else:  # summed in float32, then rounded once
        assert (
            torch.equal(found.cpu(), expected.float().to(dtype))
            or ((found.cpu().double() - expected).abs() <= 0.51 * torch.finfo(dtype).eps * expected.abs() + 1e-5).all()
        )


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [("highest", 0, 1e-6), ("high", 0, 1e-6), ("medium", 1e-4, 2e-2)],
    indirect=["precision"],
)
def test_the_precision_of_products_is_that_of_torch(precision, least, most):
    K, X = randn(1, 1, 32, 32), randn(1, 1, 32, 16, seed=1)
    found = block_apply(K.to(DEVICE), X.to(DEVICE)).cpu().double()
    expected = torch.einsum("nqik,nqkj->nqij", K.double(), X.double())
    assert least <= ((found - expected).abs().max() / expected.abs().max()).item() <= most


# all of them


CALLS = {
    "diagonal_moments": lambda: Diagonals((2, 40, 33)).arguments,
    "diagonal_apply": lambda: Diagonals((2, 40, 33)).arguments,
    "block_apply": lambda: (randn(2, 2, 20, 20).to(DEVICE), randn(2, 2, 20, 33).to(DEVICE)),
}
FUNCTIONS = [diagonal_moments, diagonal_apply, block_apply]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_results_are_the_same_bits_every_time_and_arguments_stay(function):
    arguments = CALLS[function.__name__]()
    before = [t.clone() for t in arguments]
    first, second = (
        results if isinstance(results, tuple) else (results,)
        for results in (function(*arguments), function(*arguments))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_each_is_taken_by_the_registered_operation(function):
    name, arguments = function.__name__, CALLS[function.__name__]()
    assert explain(name, *arguments) == ("triton", "the mode is 'triton'")
    torch.library.opcheck(getattr(torch.ops.secondorder, name).default, arguments)
    with pytest.raises(RuntimeError, match="no kernel for torch.float64"):
        function(*(t.double() for t in arguments))


@pytest.mark.parametrize("strides", [(2**30, 3, 1), (2**4, 2**30, 1), (2**4, 1, 2**30)])
def test_offsets_beyond_2_31_elements_are_right(tmp_path, strides):
    given = Diagonals((3, 3, 3))
    G, a, b = given.arguments
    G = far_apart(tmp_path, (3, 3, 3), strides, torch.float32).copy_(G)
    close(diagonal_moments(G, a, b)[0], ((given.a * given.G * given.b) ** 2).sum(2))
    close(diagonal_apply(G, a, b), given.a**2 * given.G * given.b**2)
    for K, X in ((G[:, None], G[:1, None].expand(3, 1, 3, 3)), (G[None], G[None])):
        close(block_apply(K, X), torch.einsum("nqik,nqkj->nqij", K.double().cpu(), X.double().cpu()))
