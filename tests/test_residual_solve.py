"""Damped solves of residual Jacobians: dense algebra, recorded steps of the peers, and what must hold for any."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, hessian, vmap

from secondorder.residuals import nystrom as ny
from secondorder.residuals import solve as so
from secondorder.residuals.line_search import grid

GOLDEN = Path(__file__).parent / "golden"
PROBLEMS = ("tiny_problem_engdw", "tiny_heat_problem_engdw")
DAMPINGS = {"0.001": 1e-9, "1e-06": 1e-6, "1e-10": 1e-3}  # and the tolerances of the index


def recorded(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as z:
        return {key: torch.from_numpy(z[key]) for key in z.files}


@pytest.fixture(scope="module", params=PROBLEMS)
def z(request):
    return recorded(request.param)


def off(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x - y).norm() / y.norm())


def jacobian(n: int, d: int, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    """Singular values from 1 down to 1e-3, `rank` of them."""
    rank = min(n, d) if rank is None else rank
    draw = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64, generator=draw))[0]
    V = torch.linalg.qr(torch.randn(d, rank, dtype=torch.float64, generator=draw))[0]
    return U * torch.logspace(0, -3, rank, dtype=torch.float64) @ V.mT


# Recorded steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", DAMPINGS)
def test_recorded_step(z, damping):
    J, r, step = z["J"], z["r"], z[f"engdw_step_lam{damping}"]
    dual = J.mT @ so.factorize(J @ J.mT, float(damping)).solve(r)
    primal = so.factorize(J.mT @ J, float(damping)).solve(J.mT @ r)
    assert off(dual, step) < DAMPINGS[damping]
    assert off(primal, step) < DAMPINGS[damping]


def test_recorded_nystrom(z):
    J, r = z["J"], z["r"]
    sketch = ny.nystrom(J @ J.mT, z["nystrom_Omega"], 1e-3, 1e-7)
    assert off(sketch.B, z["nystrom_B"]) < 1e-6
    assert off(J.mT @ sketch.solve(r), z["nystrom_step"]) < 1e-6
    by_products = ny.nystrom(lambda X: J @ (J.mT @ X), z["nystrom_Omega"], 1e-3, 1e-7)
    assert off(J.mT @ by_products.solve(r), z["nystrom_step"]) < 1e-6


def field(theta: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The network 2-16-16-1 at one point."""
    for i, (n_in, n_out) in enumerate(((2, 16), (16, 16), (16, 1))):
        W, b, theta = theta.tensor_split((n_in * n_out, (n_in + 1) * n_out))
        x = W.view(n_out, n_in) @ (x.tanh() if i else x) + b
    return x[0]


def inside(theta: torch.Tensor, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """Poisson's equation at one point."""
    return hessian(field, argnums=1)(theta, x).trace() + f


def boundary(theta: torch.Tensor, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return field(theta, x) - g


def residual(theta, X_int, y_int, X_bnd, y_bnd) -> torch.Tensor:
    terms = ((inside, X_int, y_int), (boundary, X_bnd, y_bnd))
    return torch.cat([vmap(term, in_dims=(None, 0, 0))(theta, x, y[:, 0]) / len(x) ** 0.5 for term, x, y in terms])


def linearized(theta, X_int, y_int, X_bnd, y_bnd) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual, and its Jacobian point by point."""
    J = [
        vmap(grad(term), in_dims=(None, 0, 0))(theta, x, y[:, 0]) / len(x) ** 0.5
        for term, x, y in ((inside, X_int, y_int), (boundary, X_bnd, y_bnd))
    ]
    return residual(theta, X_int, y_int, X_bnd, y_bnd), torch.cat(J)


@pytest.mark.parametrize("corrected", (False, True))
@pytest.mark.parametrize("points", ("fixed", "resampled"))
def test_recorded_spring(points, corrected):
    z = recorded("tiny_spring")
    name = f"{'rngd_bc' if corrected else 'spring'}_{points}"
    theta, phi = z[f"{name}_theta"][0], None
    for k in range(10):
        batch = [z[f"{key}_seq"][k if points == "resampled" else 0] for key in ("X_int", "y_int", "X_bnd", "y_bnd")]
        r, J = linearized(theta, *batch)
        losses = torch.stack([r[:64].square().sum(), r[64:].square().sum()]) / 2
        assert off(losses, z[f"{name}_losses"][k]) < 1e-7
        factor = so.factorize(J @ J.mT, 1e-3)
        J_phi = None if phi is None else J @ phi[0]
        phi = so.spring(r, lambda u, J=J, factor=factor: [J.mT @ factor.solve(u)], 0.9, phi, J_phi)
        if not corrected:
            assert off(phi[0], z[f"{name}_phi"][k]) < 1e-7
        scale = so.capped(0.05, phi[0].norm(), 1e-3**0.5)
        theta = theta + scale * phi[0] * (so.bias_correction(0.9, k + 1) if corrected else 1.0)
        assert off(theta, z[f"{name}_theta"][k + 1]) < 1e-7


def test_recorded_grid_search():
    """The recorded step sizes exactly."""
    z = recorded("tiny_spring")
    batch = [z[f"{key}_seq"][0] for key in ("X_int", "y_int", "X_bnd", "y_bnd")]
    theta = z["engdw_grid_theta"][0]
    for k, alpha in enumerate(z["engdw_grid_alphas"].tolist()):
        r, J = linearized(theta, *batch)
        step = J.mT @ so.factorize(J @ J.mT, 1e-6).solve(r)

        def loss_at(alpha, theta=theta, step=step):
            return residual(theta - alpha * step, *batch).square().sum() / 2

        found = grid(loss_at, r @ r / 2)
        assert found.alpha == alpha, f"step {k}"
        theta = theta - alpha * step
        assert off(theta, z["engdw_grid_theta"][k + 1]) < 1e-3


# Dense algebra -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_solves_in_float64_and_answers_in_the_dtype_asked(dtype):
    J = jacobian(12, 30)
    K, v = J @ J.mT, torch.randn(12, 3, dtype=torch.float64)
    damping = 1e-6
    expected = torch.linalg.solve(K + damping * torch.eye(12, dtype=torch.float64), v.to(dtype).double())
    factor = so.factorize(K, damping)
    found = factor.solve(v.to(dtype))
    assert found.dtype == dtype and factor.ok
    torch.testing.assert_close(found, expected.to(dtype), rtol=1e-9 if dtype == torch.float64 else 1e-6, atol=0)
    torch.testing.assert_close(factor.solve(v[:, 0]), factor.solve(v)[:, 0])


def indefinite(n: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A kernel with an eigenvalue that rounding took below zero."""
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    eigenvalues = torch.linspace(1, 2, n, dtype=torch.float64)
    eigenvalues[0] = -1e-3
    return (Q * eigenvalues) @ Q.mT, Q, eigenvalues.clamp_min(0)


def test_clamps_eigenvalues_where_cholesky_fails():
    A, Q, clamped = indefinite()
    factor = so.factorize(A, 1e-5)
    assert factor.triangle is None and factor.ok
    v = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(factor.solve(v), Q @ ((Q.mT @ v) / (clamped + 1e-5)))
    torch.testing.assert_close(factor.effective_dimension(), (clamped / (clamped + 1e-5)).sum())


def test_without_damping_a_singular_matrix_is_inverted_on_its_range():
    A = torch.zeros(5, 5, dtype=torch.float64)
    A[:3, :3] = torch.tensor([[2.0, 1, 0], [1, 2, 1], [0, 1, 2]])
    v = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(so.factorize(A, 0.0).solve(v), torch.linalg.pinv(A) @ v)


def test_failures_are_data():
    A = torch.eye(4, dtype=torch.float64)
    A[2, 1] = A[1, 2] = float("nan")
    factor = so.factorize(A, 1e-3)
    assert not factor.ok
    assert factor.solve(torch.ones(4)).tolist() == [0.0] * 4
    assert factor.effective_dimension() == 0
    assert not so.factorize(torch.eye(4), float("nan")).ok
    sketch = ny.nystrom(A, torch.randn(4, 2), 1e-3)
    assert not sketch.ok and sketch.solve(torch.ones(4)).tolist() == [0.0] * 4


def test_the_matrix_is_not_changed():
    A = torch.eye(3, dtype=torch.float64)
    so.factorize(A, 1.0)
    assert A.equal(torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("shape", ((3,), (3, 4), (0, 0), (1, 3, 3)))
def test_refuses_what_is_not_a_square_matrix(shape):
    with pytest.raises(ValueError, match="square"):
        so.factorize(torch.zeros(shape), 1.0)


def test_any_gradient_of_a_convex_loss():
    J, L = jacobian(10, 24), torch.randn(10, 10, dtype=torch.float64)
    J, g = L.mT @ J, torch.randn(24, dtype=torch.float64)  # g is no combination of rows
    for damping in (1.0, 1e-2, 1e-4):
        factor = so.factorize(J @ J.mT, damping)
        parts = so.solve_grad(
            g.split([5, 19]), factor, lambda x: J @ torch.cat(tuple(x)), lambda u: (J.mT @ u).split([5, 19])
        )
        expected = torch.linalg.solve(J.mT @ J + damping * torch.eye(24, dtype=torch.float64), g)
        assert off(torch.cat(parts), expected) < 1e-10 / damping


def test_dampings():
    trace = torch.tensor(40.0)
    assert so.damping_of("absolute", 1e-3, trace, 8) == 1e-3
    for kind in ("relative", "adaptive"):
        found = so.damping_of(kind, 1e-3, trace, 8)
        assert found.dtype == torch.float64 and float(found) == pytest.approx(5e-3)
    with pytest.raises(ValueError, match="absolute, relative, adaptive"):
        so.damping_of("absolut", 1e-3, trace, 8)


def test_relative_damping_does_not_depend_on_the_units_of_the_residual():
    J, r = jacobian(9, 20), torch.randn(9, dtype=torch.float64)
    steps = []
    for unit in (1.0, 1e4):
        K = (unit * J) @ (unit * J).mT
        steps.append((unit * J).mT @ so.factorize(K, so.damping_of("relative", 1e-4, K.trace(), 9)).solve(unit * r))
    torch.testing.assert_close(*steps)


# Invariants ----------------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
dampings = st.floats(-6, 2).map(lambda x: 10**x)
few = settings(max_examples=40, deadline=None)


@few
@given(shapes, dampings)
def test_primal_is_dual(shape, damping):
    n, d, seed = shape
    J, r = jacobian(n, d, seed=seed), torch.randn(n, dtype=torch.float64)
    dual = J.mT @ so.factorize(J @ J.mT, damping).solve(r)
    primal = so.factorize(J.mT @ J, damping).solve(J.mT @ r)
    torch.testing.assert_close(dual, primal, rtol=1e-8, atol=1e-8 * float(dual.norm()))


@few
@given(shapes, dampings)
def test_effective_dimension_lies_between_0_and_the_rank(shape, damping):
    n, d, seed = shape
    J = jacobian(n, d, seed=seed)
    dual, primal = (so.factorize(A, damping).effective_dimension() for A in (J @ J.mT, J.mT @ J))
    assert -1e-9 <= float(dual) <= min(n, d) + 1e-9
    torch.testing.assert_close(dual, primal, rtol=1e-6, atol=1e-8)


@few
@given(shapes, dampings, st.floats(0, 0.99))
def test_spring_minimises_what_it_says(shape, damping, momentum):
    n, d, seed = shape
    J, r, last = jacobian(n, d, seed=seed), torch.randn(n, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    factor = so.factorize(J @ J.mT, damping)
    phi = so.spring(r, lambda u: [J.mT @ factor.solve(u)], momentum, [last], J @ last)[0]
    gradient = J.mT @ (J @ phi + r) + damping * (phi - momentum * last)
    assert float(gradient.norm()) < 1e-9 * float(1 + r.norm() + phi.norm())


def test_spring_without_momentum_is_the_energy_natural_gradient():
    J, r = jacobian(6, 15), torch.randn(6, dtype=torch.float64)
    factor = so.factorize(J @ J.mT, 1e-4)

    def direction(u):
        return [J.mT @ factor.solve(u)]

    last = torch.randn(15, dtype=torch.float64)
    for found in (
        so.spring(r, direction, 0.0, [last], J @ last),
        so.spring(r, direction, 0.0),
        so.spring(r, direction, 0.9),
    ):
        torch.testing.assert_close(found[0], -direction(r)[0])
    assert so.bias_correction(0.0, 1) == 1.0
    with pytest.raises(ValueError, match="both"):
        so.spring(r, direction, 0.9, [last])


@few
@given(st.floats(0, 10), st.floats(0, 1e3), st.floats(1e-6, 10))
def test_a_capped_step_stays_within_its_limit(lr, norm, limit):
    size = torch.tensor(norm, dtype=torch.float64)
    scale = float(so.capped(lr, size, limit))
    assert scale <= lr and scale * norm <= limit * (1 + 1e-12)
    assert scale == lr or scale * norm == pytest.approx(limit)


# Iterations and sketches ---------------------------------------------------------------------------------------------


def spread(n: int, rank: int, tail: float) -> torch.Tensor:
    """A kernel with `rank` eigenvalues from 1e3 to 1, the others at the tail."""
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    eigenvalues = torch.full((n,), tail, dtype=torch.float64)
    eigenvalues[:rank] = torch.logspace(3, 0, rank, dtype=torch.float64)
    return (Q * eigenvalues) @ Q.mT


def test_conjugate_gradients():
    A, b = spread(30, 5, 1.0), torch.randn(30, dtype=torch.float64)
    found = so.conjugate_gradients(lambda x: A @ x, b, tolerance=1e-10)
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-9)
    assert found.residual <= 1e-10 and found.iterations <= 20  # distinct eigenvalues: 6, and rounding
    jacobi = so.conjugate_gradients(lambda x: A @ x, b, lambda x: torch.linalg.solve(A, x), 1e-10)
    assert jacobi.iterations == 1
    short = so.conjugate_gradients(lambda x: A @ x, b, tolerance=1e-10, max_iterations=2)
    assert short.iterations == 2 and short.residual > 1e-10


def test_conjugate_gradients_stop_without_harm():
    zero = so.conjugate_gradients(lambda x: x, torch.zeros(4))
    assert zero.iterations == 0 and zero.x.tolist() == [0.0] * 4 and zero.residual == 0
    flat = so.conjugate_gradients(lambda x: -x, torch.ones(4))
    assert flat.iterations == 0 and flat.residual == 1
    bad = so.conjugate_gradients(lambda x: x * float("nan"), torch.ones(4))
    assert bad.x.tolist() == [0.0] * 4


def test_conjugate_gradients_stop_where_the_model_hardly_falls():
    J = jacobian(60, 60)
    A, b = J @ J.mT + 1e-8 * torch.eye(60, dtype=torch.float64), J @ torch.ones(60, dtype=torch.float64)
    model = lambda x: 0.5 * x @ A @ x - b @ x  # noqa: E731
    least = model(torch.linalg.solve(A, b))
    for decrease in (1e-3, 1e-2):
        found = so.conjugate_gradients(lambda x: A @ x, b, tolerance=1e-12, max_iterations=500, decrease=decrease)
        n = int(found.iterations)
        at = [
            model(so.conjugate_gradients(lambda x: A @ x, b, tolerance=0.0, max_iterations=k).x) for k in range(n + 1)
        ]
        slow = [k for k in range(10, n + 1) if at[k - 10] - at[k] <= -10 * decrease * at[k]]
        assert slow == [n] and n < 100
        assert (at[n] - least) / -least < 0.5


def test_on_a_device_that_is_not_read_further_iterations_change_nothing(monkeypatch):
    A, b, calls = spread(12, 4, 1.0), torch.randn(12, dtype=torch.float64), []

    def matvec(x):
        calls.append(x)
        return A @ x

    read = so.conjugate_gradients(matvec, b, tolerance=1e-8, max_iterations=60)
    assert len(calls) == read.iterations < 60
    monkeypatch.setattr(so, "_readable", lambda flag: False)
    calls.clear()
    unread = so.conjugate_gradients(matvec, b, tolerance=1e-8, max_iterations=60)
    assert len(calls) == 60
    for one, other in zip(read, unread, strict=True):
        assert torch.equal(one, other)


def test_a_sketch_of_full_rank_is_exact_and_one_of_low_rank_is_below():
    J, v = jacobian(20, 40), torch.randn(20, dtype=torch.float64)
    K, draw = J @ J.mT, torch.Generator().manual_seed(3)
    full = ny.nystrom(K, ny.gaussian(20, 20, draw), 1e-3, 1e-12)
    assert off(full.solve(v), so.factorize(K, 1e-3).solve(v)) < 1e-6
    low = ny.nystrom(K, ny.gaussian(20, 6, draw), 1e-3, 1e-12)
    assert torch.linalg.eigvalsh(K - low.B @ low.B.mT).amin() > -1e-10
    exact = so.factorize(K, 1e-3).effective_dimension()
    assert 0 < low.factor.effective_dimension() <= exact


def test_a_sketch_of_more_columns_than_the_rank():
    """Without a shift `Ωᵀ K Ω` is singular, and Cholesky fails or might: B keeps what is no rounding error."""
    J = jacobian(16, 40, rank=3)
    K, v = J @ J.mT, torch.randn(16, dtype=torch.float64)
    sketch = ny.nystrom(
        -1e-9 * torch.eye(16, dtype=torch.float64) + K, torch.randn(16, 8, dtype=torch.float64), 1e-3, 0.0
    )
    assert sketch.ok
    assert off(sketch.solve(v), so.factorize(K, 1e-3).solve(v)) < 1e-2
    with pytest.raises(ValueError, match="omega"):
        ny.nystrom(K, torch.randn(16, 17), 1e-3)


def test_preconditioned_iterations_solve_the_damped_system():
    K, v, damping = spread(120, 25, 1e-6), torch.randn(120, dtype=torch.float64), 1e-3
    exact = so.factorize(K, damping)
    rank = ny.rank_for(6.0, 120)
    sketch = ny.nystrom(K, ny.gaussian(120, 40, torch.Generator().manual_seed(0)), damping)
    found = ny.preconditioned(lambda x: K @ x, v, sketch, 1e-9)
    plain = so.conjugate_gradients(lambda x: K @ x + damping * x, v, tolerance=1e-9, max_iterations=1000)
    assert rank == 19
    assert off(found.x, exact.solve(v)) < 1e-7
    assert found.iterations < 10 < plain.iterations
    single = ny.preconditioned(lambda x: K.float() @ x, v.float(), sketch, 1e-4)
    assert single.x.dtype == torch.float32 and single.residual < 1e-4


def test_rank():
    assert ny.rank_for(10.0, 200) == 31
    assert ny.rank_for(10.0, 93) == 31
    assert ny.rank_for(10.0, 92) is None
    assert ny.rank_for(float("nan"), 92) is None
    assert ny.rank_for(0.0, 3) == 1
