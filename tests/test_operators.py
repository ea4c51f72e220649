"""`KroneckerOperator` against dense matrices that the tests assemble with Kronecker products in float64."""

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secondorder.preconditioner.operators import EigenBlock, KroneckerOperator


def orthogonal(d: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0].contiguous()


def make(view, cuts=None, modes=None, shape=None, seed=0, smallest=0.1):
    """Random blocks of a viewed parameter, and the dense operator.

    Args:
        view: Shape of the viewed parameter.
        cuts: For each mode where it is cut; default: nowhere.
        modes: The modes that have a basis; default: all.
        shape: The parameter's own shape; default: the view.
        seed: Of bases and spectra.
        smallest: Lower end of the spectrum, which reaches to `smallest + 1`.
    """
    generator = torch.Generator().manual_seed(seed)
    cuts = cuts or [()] * len(view)
    modes = range(len(view)) if modes is None else modes
    pieces = [[slice(a, b) for a, b in itertools.pairwise((0, *cut, d))] for cut, d in zip(cuts, view, strict=True)]
    size = math.prod(view)
    index = torch.arange(size).reshape(view)
    dense = torch.zeros(size, size, dtype=torch.float64)
    blocks = []
    for slices in itertools.product(*pieces):
        lengths = [s.stop - s.start for s in slices]
        bases = {mode: orthogonal(lengths[mode], generator) for mode in modes}
        spectrum = torch.rand(lengths, dtype=torch.float64, generator=generator) + smallest
        V = torch.eye(1, dtype=torch.float64)
        for mode, d in enumerate(lengths):
            V = torch.kron(V, bases.get(mode, torch.eye(d, dtype=torch.float64)))
        where = index[slices].reshape(-1)
        dense[where[:, None], where] = V @ spectrum.reshape(-1).diag() @ V.T
        blocks.append(EigenBlock(slices, bases, spectrum))
    return KroneckerOperator(view if shape is None else shape, view, blocks), dense


CASES = {
    "one mode": {"view": (7,)},
    "matrix": {"view": (4, 5)},
    "three modes": {"view": (2, 3, 4)},
    "left side only": {"view": (4, 5), "modes": [0]},
    "right side only": {"view": (4, 5), "modes": [1]},
    "no basis": {"view": (4, 5), "modes": []},
    "middle mode only": {"view": (2, 3, 4), "modes": [1]},
    "split columns": {"view": (3, 8), "cuts": [(), (4,)]},
    "grid": {"view": (7, 8), "cuts": [(3,), (2, 5)]},
    "grid of one side": {"view": (7, 8), "cuts": [(3,), (2, 5)], "modes": [1]},
    "grid of three modes": {"view": (3, 4, 5), "cuts": [(1,), (2,), (3,)], "modes": [0, 2]},
    "convolution": {"view": (4, 6), "shape": (4, 2, 3, 1)},
    "scalar": {"view": (), "shape": ()},
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def pair(request):
    return make(**request.param)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def vectors(operator, k, seed=3):
    return torch.randn(operator.shape[0], k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_to_dense_is_the_sum_of_kronecker_products(pair):
    operator, dense = pair
    close(operator.to_dense(), dense)
    assert operator.shape == dense.shape and operator.dtype == torch.float64 and operator.device == dense.device


def test_products_are_those_of_the_dense_matrix_in_every_form_of_the_argument(pair):
    operator, dense = pair
    x = vectors(operator, 3)
    close(operator @ x, dense @ x)
    close(operator @ x[:, :1], dense @ x[:, :1])
    close(operator @ x[:, 0], dense @ x[:, 0])
    shape = operator._parameter_shape
    close(operator @ x[:, 0].reshape(shape), (dense @ x[:, 0]).reshape(shape))


def test_solve_inverts(pair):
    operator, dense = pair
    x = vectors(operator, 2)
    close(operator.solve(x), torch.linalg.solve(dense, x))
    shape = operator._parameter_shape
    close(operator.solve(x[:, 0].reshape(shape)), torch.linalg.solve(dense, x[:, 0]).reshape(shape))


@pytest.mark.parametrize("exponent", [-1, -0.5, -0.25, 0, 0.5, 1, 2, 3.7])
def test_power_is_the_power_of_the_dense_matrix(pair, exponent):
    operator, dense = pair
    eigenvalues, Q = torch.linalg.eigh(dense)
    power = operator.power(exponent)
    close(power.to_dense(), Q * eigenvalues**exponent @ Q.T)
    close(operator.to_dense(), dense)  # itself unchanged
    assert isinstance(power, KroneckerOperator) and power.shape == operator.shape


@pytest.mark.parametrize("damping", [0.0, 0.3, 10])
def test_inv_is_the_inverse_of_the_damped_dense_matrix(pair, damping):
    operator, dense = pair
    inverse = operator.inv(damping)
    close(inverse.to_dense(), torch.linalg.inv(dense + damping * torch.eye(len(dense), dtype=torch.float64)))
    close(operator.to_dense(), dense)  # itself unchanged
    assert isinstance(inverse, KroneckerOperator) and inverse.shape == operator.shape


def test_scalar_summaries_are_those_of_the_dense_matrix(pair):
    operator, dense = pair
    close(operator.logdet(), torch.linalg.slogdet(dense).logabsdet)
    close(operator.trace(), dense.trace())
    close(operator.diag(), dense.diagonal().reshape(operator._parameter_shape))
    close(operator.eigenvalues(), torch.linalg.eigvalsh(dense).flip(0))
    close(operator.eigvalsh(), torch.linalg.eigvalsh(dense))
    close(operator.frobenius(), torch.linalg.matrix_norm(dense))
    close(operator.condition(), torch.linalg.cond(dense))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_grid_of_any_view_is_the_dense_operator(data):
    view = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    cuts = [tuple(sorted(data.draw(st.sets(st.integers(1, d - 1))))) if d > 1 else () for d in view]
    modes = sorted(data.draw(st.sets(st.sampled_from(range(len(view))))))
    operator, dense = make(view, cuts, modes, seed=data.draw(st.integers(0, 99)))
    x = vectors(operator, 2)
    close(operator @ x, dense @ x)
    close(operator.solve(x), torch.linalg.solve(dense, x))
    close(operator.diag().reshape(-1), dense.diagonal())
    close(operator.logdet(), torch.linalg.slogdet(dense).logabsdet)


def test_it_is_applied_to_tensors_with_any_strides():
    operator, dense = make((4, 6), shape=(4, 2, 3, 1))
    x = torch.randn(4, 2, 3, 1, dtype=torch.float64).to(memory_format=torch.channels_last)
    close(operator @ x, (dense @ x.flatten()).reshape(x.shape))
    x = torch.randn(2, 24, dtype=torch.float64).T
    close(operator @ x, dense @ x)


def test_it_computes_in_its_own_dtype():
    operator, dense = make((4, 5))
    x = torch.randn(4, 5).bfloat16()
    result = operator @ x
    assert result.dtype == torch.float64
    close(result, (dense @ x.double().flatten()).reshape(4, 5))


def test_nothing_aliases_what_it_was_made_from():
    basis, spectrum = torch.eye(3), torch.ones(3)
    operator = KroneckerOperator((3,), (3,), [EigenBlock((slice(0, 3),), {0: basis}, spectrum)])
    basis.fill_(7.0)
    spectrum.fill_(7.0)
    assert torch.equal(operator.to_dense(), torch.eye(3))


def test_its_own_tensors_need_no_gradient():
    spectrum = torch.ones(3, requires_grad=True)
    operator = KroneckerOperator((3,), (3,), [EigenBlock((slice(None),), {}, spectrum)])
    assert not operator.to_dense().requires_grad


# eigenvalues that are not positive


def singular():
    spectrum = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 4.0]], dtype=torch.float64)
    return KroneckerOperator((2, 3), (2, 3), [EigenBlock((slice(0, 2), slice(0, 3)), {}, spectrum)])


@pytest.mark.parametrize(
    "operation",
    [lambda op: op.solve(torch.ones(6)), lambda op: op.logdet(), lambda op: op.power(-1), lambda op: op.power(-0.5)],
    ids=["solve", "logdet", "power(-1)", "power(-0.5)"],
)
def test_inverses_of_a_singular_operator_say_how_many_eigenvalues_are_not_positive(operation):
    with pytest.raises(torch.linalg.LinAlgError, match=r"needs eigenvalues that are positive; 3 of 6 are not"):
        operation(singular())


def test_inv_of_a_singular_operator_needs_damping():
    operator = singular()
    with pytest.raises(torch.linalg.LinAlgError, match=r"inv\(damping=0.0\) needs .* positive; 3 of 6 are not"):
        operator.inv()
    close(operator.inv(0.5).eigvalsh(), 1 / (operator.eigenvalues() + 0.5))


def test_inv_looks_at_the_damped_eigenvalues():
    operator = KroneckerOperator((2,), (2,), [EigenBlock((slice(0, 2),), {}, torch.tensor([1.0, -0.5]))])
    with pytest.raises(torch.linalg.LinAlgError, match=r"inv\(damping=0.25\) needs .* positive; 1 of 2 are not"):
        operator.inv(0.25)
    assert operator.inv(1.0).eigenvalues()[0] == 2


@pytest.mark.parametrize("damping", [-1e-3, math.nan, math.inf])
def test_a_damping_that_is_negative_or_not_finite_is_refused(damping):
    with pytest.raises(ValueError, match=f"damping must be a finite number >= 0, got {damping}"):
        singular().inv(damping)


def test_a_singular_operator_has_positive_powers_and_an_infinite_condition():
    operator = singular()
    close(operator.power(0.5).eigenvalues(), operator.eigenvalues().sqrt())
    assert operator.condition() == torch.inf


def test_a_fractional_power_of_a_negative_eigenvalue_is_refused():
    operator = KroneckerOperator((2,), (2,), [EigenBlock((slice(0, 2),), {}, torch.tensor([1.0, -1e-9]))])
    with pytest.raises(torch.linalg.LinAlgError, match=r"power\(0.5\) .* not negative; 1 of 2 are not"):
        operator.power(0.5)
    assert operator.power(2).eigenvalues()[0] == 1


# bad input


@pytest.mark.parametrize("shape", [(20, 1, 1), (5, 4), (19,), (21, 2), (), (1, 20)])
def test_an_argument_of_another_shape_is_refused_with_both_shapes(shape):
    operator, _ = make((4, 5))
    for apply in (operator.__matmul__, operator.solve):
        with pytest.raises(ValueError, match=r"\(4, 5\).*cannot be applied to a tensor of shape") as error:
            apply(torch.zeros(shape))
        assert f"of shape {shape};" in str(error.value)


WHOLE = (slice(0, 2), slice(0, 3))
BAD_BLOCKS = {
    "wrong number of slices": ([EigenBlock((slice(0, 2),), {}, torch.ones(2))], "needs 2 slices"),
    "spectrum of another shape": ([EigenBlock(WHOLE, {}, torch.ones(3, 2))], r"must have shape \(2, 3\), got \(3, 2\)"),
    "slice outside": ([EigenBlock((slice(0, 2), slice(0, 4)), {}, torch.ones(2, 4))], "must have shape"),
    "basis of another size": ([EigenBlock(WHOLE, {0: torch.eye(3)}, torch.ones(2, 3))], r"\(2, 2\), got \(3, 3\)"),
    "basis of no mode": ([EigenBlock(WHOLE, {2: torch.eye(3)}, torch.ones(2, 3))], "has no mode 2"),
    "overlap": ([EigenBlock(WHOLE, {}, torch.ones(2, 3))] * 2, "cover every entry"),
    "gap": ([EigenBlock((slice(0, 2), slice(0, 2)), {}, torch.ones(2, 2))], "cover every entry"),
    "no blocks": ([], "cover every entry"),
    "two dtypes": ([EigenBlock(WHOLE, {0: torch.eye(2).double()}, torch.ones(2, 3))], "one floating dtype"),
    "integers": ([EigenBlock(WHOLE, {}, torch.ones(2, 3, dtype=torch.int64))], "one floating dtype"),
}


@pytest.mark.parametrize(("blocks", "message"), BAD_BLOCKS.values(), ids=BAD_BLOCKS.keys())
def test_blocks_that_do_not_fit_are_refused(blocks, message):
    with pytest.raises(ValueError, match=message):
        KroneckerOperator((2, 3), (2, 3), blocks)


def test_a_view_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) cannot be viewed as \(2, 4\)"):
        KroneckerOperator((2, 3), (2, 4), [])


# looks


def test_repr_shows_shapes_blocks_and_dtype():
    operator, _ = make((3, 8), [(), (4,)])
    assert repr(operator) == "KroneckerOperator(shape=(24, 24), parameter=(3, 8), 2 blocks, torch.float64)"


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        make((4, 5))[0].to_scipy()


def test_scipy_solves_with_it():
    linalg = pytest.importorskip("scipy.sparse.linalg", reason="SciPy is optional, and not installed here")
    operator, dense = make((4, 5), [(2,), ()])
    view = operator.to_scipy()
    b = torch.randn(20, dtype=torch.float64)
    solution, info = linalg.cg(view, b.numpy(), rtol=1e-12)
    assert info == 0 and view.shape == (20, 20) and view.dtype == "float64"
    torch.testing.assert_close(torch.from_numpy(solution), torch.linalg.solve(dense, b), rtol=1e-8, atol=1e-8)
    close(torch.from_numpy(view @ dense.numpy()), dense @ dense)
    close(torch.from_numpy(view.T @ b.numpy()), dense @ b)
