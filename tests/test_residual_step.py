"""Systems of a step: forms and solvers of a closure's linearisation against dense algebra."""

import pytest
import torch

from residual_cases import dense, flat, off, small
from secondorder.residuals import nystrom as ny
from secondorder.residuals.linearization import linearize
from secondorder.residuals.system import system


@pytest.fixture(scope="module", params=("expand", "matvec"))
def problem(request):
    """A linearisation (N = 19, D = 25), its parameters, J, and some u."""
    net, closure = small()
    params = list(net.parameters())
    _, J = dense(closure, params)
    return linearize(closure, params, request.param), params, J, torch.linspace(-1, 1, 19, dtype=torch.float64)


def solved(J: torch.Tensor, u: torch.Tensor, damping: float) -> torch.Tensor:
    return torch.linalg.solve(J.mT @ J + damping * torch.eye(J.shape[1], dtype=J.dtype), J.mT @ u)


@pytest.mark.parametrize("form", ("auto", "primal", "dual"))
def test_system_of_all_parameters(problem, form):
    linear, params, J, u = problem
    found = system(linear, params, 1e-3, "absolute", form)
    assert off(flat(found.apply(u)), solved(J, u, 1e-3)) < 1e-9 and found.ok and found.rank == 0
    eigenvalues = torch.linalg.eigvalsh(J @ J.mT)
    assert float(found.effective_dimension()) == pytest.approx(float((eigenvalues / (eigenvalues + 1e-3)).sum()))
    relative = system(linear, params, 1e-3, "relative", form)
    assert float(relative.damping) == pytest.approx(1e-3 * float(J.square().sum()) / 19)


@pytest.mark.parametrize("form", ("primal", "dual"))
def test_system_of_a_float32_network_is_solved_in_float64(form):
    net, closure = small(dtype=torch.float32)
    params = list(net.parameters())
    linear = linearize(closure, params)
    J, r = linear.rows(torch.float64), linear.residual
    found = system(linear, params, 1e-7, "absolute", form).apply(r)
    assert {part.dtype for part in found} == {r.dtype} == {torch.float32}
    assert off(flat(found).double(), solved(J, r.double(), 1e-7)) < 1e-6
    assert {part.dtype for part in linear.gradient} == {torch.float32}


def test_system_of_every_layer_for_itself(problem):
    """Blocks of JᵀJ: weight and bias together where that is known."""
    linear, params, J, u = problem
    columns = J.split([p.numel() for p in params], 1)
    layers = [[0, 1], [2, 3]] if linear.backend == "expand" else [[0], [1], [2], [3]]
    assert linear.groups == layers
    expected: dict[int, torch.Tensor] = {}
    dimension = 0.0
    for layer in layers:
        block = torch.cat([columns[i] for i in layer], 1)
        damping = 1e-2 * float(block.square().sum()) / 19
        parts = solved(block, u, damping).split([params[i].numel() for i in layer])
        expected.update(zip(layer, parts, strict=True))
        dimension += float(
            torch.trace(
                torch.linalg.solve(
                    block.mT @ block + damping * torch.eye(block.shape[1], dtype=J.dtype), block.mT @ block
                )
            )
        )
    found = system(linear, params, 1e-2, "relative", "layerwise")
    assert off(flat(found.apply(u)), torch.cat([expected[i] for i in range(4)])) < 1e-9
    assert [part.shape for part in found.apply(u)] == [p.shape for p in params]
    assert float(found.effective_dimension()) == pytest.approx(dimension)


def test_system_by_a_sketch(problem):
    linear, params, J, u = problem
    K, damping = J @ J.mT, 1e-1
    omega = ny.gaussian(19, 5, torch.Generator().manual_seed(7))
    sketch = ny.nystrom(K, omega, damping, damping / 10)
    found = system(linear, params, damping, "absolute", solver="nystrom", rank=5, step=7)
    assert off(flat(found.apply(u)), J.mT @ sketch.solve(u)) < 1e-9 and found.rank == 5
    assert float(found.effective_dimension()) == pytest.approx(float(sketch.factor.effective_dimension()))
    again, other = (system(linear, params, damping, "absolute", solver="nystrom", rank=5, step=k) for k in (7, 8))
    assert torch.equal(flat(again.apply(u)), flat(found.apply(u)))
    assert not torch.equal(flat(other.apply(u)), flat(found.apply(u)))


@pytest.mark.parametrize(("rank", "dimension", "expected"), [
    (None, None, 1), (None, 0.9, 5), (None, 1.9, 0), (6, None, 6), (7, None, 0), (100, None, 0)
])  # fmt: skip
def test_rank_of_a_sketch(problem, rank, dimension, expected):
    """None: N / 10, then by the effective dimension; more than a third of N = 19 are solved exactly."""
    linear, params, J, u = problem
    found = system(linear, params, 1e-2, "absolute", solver="nystrom", rank=rank, dimension=dimension)
    assert found.rank == expected
    if not expected:
        assert off(flat(found.apply(u)), solved(J, u, 1e-2)) < 1e-9


@pytest.mark.parametrize("rank", (None, 6, 40))
def test_system_by_conjugate_gradients(problem, rank):
    linear, params, J, u = problem
    found = system(linear, params, 1e-2, "absolute", solver="cg", rank=rank)
    assert off(flat(found.apply(u)), solved(J, u, 1e-2)) < 1e-2
    model = lambda x: (J @ x - u).square().sum() + 1e-2 * x.square().sum()  # noqa: E731
    best = model(solved(J, u, 1e-2))
    assert model(flat(found.apply(u))) - best < 5e-3 * (u.square().sum() - best)
    assert (found.effective_dimension() is None) == (rank is None)


def test_conjugate_gradients_begin_at_the_last_step(problem, monkeypatch):
    linear, params, J, u = problem
    found = system(linear, params, 1e-2, "absolute", solver="cg")
    exact, counts = solved(J, u, 1e-2), []
    start = [part.view(p.shape) for part, p in zip(exact.split([p.numel() for p in params]), params, strict=True)]
    for guess in (None, [3 * part for part in start], [torch.full_like(p, float("nan")) for p in params]):
        calls = []
        with monkeypatch.context() as patch:
            true = linear.jvp
            patch.setattr(linear, "jvp", lambda v: calls.append(1) or true(v))  # noqa: B023
            x = flat(found.apply(u, guess))
        counts.append(len(calls))
        assert off(x, exact) < 1e-2
    assert counts[1] == 1 < counts[0] == counts[2] - 1  # the guess itself is a product


@pytest.mark.parametrize("given", ({"form": "whole"}, {"solver": "lu"}, {"solver": "cg", "form": "dual"},
                                   {"solver": "nystrom", "form": "layerwise"}))  # fmt: skip
def test_systems_that_there_are_not(problem, given):
    with pytest.raises(ValueError, match=f"form must be one of .*solver={given.get('solver', 'cholesky')!r}"):
        system(problem[0], problem[1], 1e-3, "absolute", **given)
