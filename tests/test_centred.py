"""Centred terms against dense rows of autograd: the vector, its products by both back-ends, steps, processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import centred_ranks
import secondorder
from cases import normal
from distributed import pool
from residual_cases import dense, flat, mlp, off
from secondorder.engdw import ENGDW
from secondorder.residuals.linearization import linearize
from secondorder.residuals.terms import residual_terms, term
from secondorder.spring import SPRING

BACKENDS = pytest.mark.parametrize("backend", ["expand", "matvec"])


def problem(dtype=torch.float64, shapes=((9, 3, True), (5, 1, False)), reduction="mean"):
    """A network with three outputs, and terms of so many samples and equations, centred or not."""
    net = mlp(2, 5, 3, dtype=dtype)
    inputs = [normal(n, 2, seed=i).to(dtype) for i, (n, _, _) in enumerate(shapes)]

    def closure():
        found = {}
        for i, (x, (_, M, center)) in enumerate(zip(inputs, shapes, strict=True)):
            f = net(x) ** 2 + 0.3
            found[f"t{i}"] = term(f[:, 0] if M == 1 else f[:, :M], 0.5 + i, reduction, center)
        return found

    return net, closure, list(net.parameters())


def by_hand(closure):
    """Loss of residuals without their means."""
    total = 0.0
    for t in closure().values():
        r = t.residual - t.residual.mean(0, keepdim=True) if t.center else t.residual
        total = total + t.weight * r.square().sum() / 2 / (max(len(r), 1) if t.reduction == "mean" else 1)
    return total


def assert_is(linear, r, J):
    """All that a linearisation gives is that of r and J."""
    N, D = J.shape
    params = linear._params
    v = [normal(*p.shape, seed=1).to(p) for p in params]
    u, X = normal(N, seed=2).to(r), normal(N, 3, seed=3).to(r)
    assert off(linear.residual, r) < 1e-13
    assert float(linear.loss) == pytest.approx(float(r @ r / 2), rel=1e-12)
    assert off(flat(linear.gradient), J.T @ r) < 1e-11
    assert off(linear.jvp(v), J @ flat(v)) < 1e-12
    assert off(flat(linear.vjp(u)), J.T @ u) < 1e-12
    assert off(linear.kernel(), J @ J.T) < 1e-12
    assert off(linear.normal(), J.T @ J) < 1e-12
    assert off(linear.rows(), J) < 1e-12
    assert off(linear.apply_kernel(X), J @ (J.T @ X)) < 1e-12
    columns = torch.arange(D).split([p.numel() for p in params])
    some = J[:, torch.cat([columns[3], columns[0]])]
    assert off(linear.restricted([3, 0]).kernel(), some @ some.T) < 1e-12
    assert off(flat(linear.restricted([3, 0]).gradient), some.T @ r) < 1e-11


@BACKENDS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linearization_is_that_of_dense_rows(backend, reduction):
    _, closure, params = problem(reduction=reduction)
    linear = linearize(closure, params, backend)
    assert linear.backend == backend
    r, J = dense(closure, params)
    assert_is(linear, r, J)
    assert r[:27].view(9, 3).mean(0).abs().max() < 1e-15 and J[:27].view(9, 3, -1).mean(0).abs().max() < 1e-14
    if backend == "expand":
        assert off(linear.trace(), J.square().sum()) < 1e-12
        assert linear.groups == [[0, 1], [2, 3]]
    else:  # 16 vectors of random signs
        assert off(linear.trace(), J.square().sum()) < 0.4


TERMS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 3), st.booleans()), min_size=1, max_size=3)


@settings(deadline=None, max_examples=30)
@given(TERMS.filter(lambda terms: any(n for n, _, _ in terms)), st.sampled_from(["mean", "sum"]), st.booleans())
def test_any_terms(shapes, reduction, expand):
    """Loss, gradient, products and trace, whatever is centred; single samples leave nothing, none do no harm."""
    _, closure, params = problem(shapes=shapes, reduction=reduction)
    r, J = dense(closure, params)
    terms, linear = residual_terms(closure()), linearize(closure, params, "expand" if expand else "matvec")
    loss = by_hand(closure)
    close = dict(rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(terms.loss(), loss, **close)
    torch.testing.assert_close(sum(terms.by_term().values()), loss.detach(), **close)
    torch.testing.assert_close(linear.residual, r, **close)
    torch.testing.assert_close(linear.kernel(), J @ J.T, **close)
    torch.testing.assert_close(linear.normal(), J.T @ J, **close)
    gradient = flat(torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(flat(linear.gradient), gradient, **close)
    torch.testing.assert_close(J.T @ r, gradient, **close)
    if expand:
        torch.testing.assert_close(linear.trace(), J.square().sum(), **close)
        assert linear.trace() >= 0


def test_any_optimizer_gets_the_gradient_of_the_centred_loss():
    net, closure, params = problem()
    gradient = flat(torch.autograd.grad(by_hand(closure), params))
    loss = secondorder.SOAP(params, lr=1e-3).step(closure)
    assert off(flat([p.grad for p in params]), gradient) < 1e-13
    assert float(loss) == pytest.approx(float(residual_terms(problem()[1]()).loss().detach()), rel=1e-13)


@pytest.mark.parametrize(
    "options",
    [{"form": "dual"}, {"form": "primal"}, {"solver": "nystrom", "rank": 30}, {"solver": "cg"}, {"form": "auto"}],
    ids=str,
)
def test_step_of_engdw(options):
    net, closure, params = problem()
    (r, J), before = dense(closure, params), flat(params)
    damping = 1e-3 * J.square().sum() / len(r)
    ENGDW(params, line_search=None, damping=1e-3, **options).step(closure)
    expected = -torch.linalg.solve(J.T @ J + damping * torch.eye(J.shape[1], dtype=J.dtype), J.T @ r)
    # Conjugate gradients end when the model of the loss hardly falls.
    assert off(flat(params) - before, expected) < (0.2 if options.get("solver") == "cg" else 1e-9)
    assert off(flat([p.grad for p in params]), J.T @ r) < 1e-12


def test_damping_of_zero_is_the_shortest_step():
    """P K P is singular: the vector of ones is what it removes."""
    _, closure, params = problem(shapes=[(6, 1, True)])
    (r, J), before = dense(closure, params), flat(params)
    ENGDW(params, line_search=None, damping=0.0, form="dual").step(closure)
    assert off(flat(params) - before, -torch.linalg.pinv(J) @ r) < 1e-8


@pytest.mark.parametrize("search", ["geodesic", "bracket"])
def test_searches_lower_the_centred_loss(search):
    _, closure, params = problem()
    opt = ENGDW(params, line_search=search)
    losses = [float(opt.step(closure)) for _ in range(10)]
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False)) and losses[-1] < 0.9 * losses[0]
    assert losses[-1] == pytest.approx(float(opt.diagnostics()["loss"]))


def test_float32_networks_have_float64_systems():
    _, closure, params = problem(torch.float32)
    _, exact, doubles = problem()
    for p, q in zip(params, doubles, strict=True):
        q.data.copy_(p)
    linear, (_, J) = linearize(closure, params), dense(exact, doubles)
    assert linear.kernel(torch.float64).dtype == torch.float64 and off(linear.kernel(torch.float64), J @ J.T) < 1e-5
    assert [g.dtype for g in linear.gradient] == [torch.float32] * len(params)


def test_a_constant_is_of_no_account():
    """What centring is for: a quantity that is known up to a constant."""
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.linspace(-1, 1, 30, dtype=torch.float64)[:, None]
    opt = ENGDW(net.parameters())
    for _ in range(30):
        loss = opt.step(lambda: {"pressure": term(net(x) - x.sin() - 7, center=True)})
    assert float(loss) < 1e-8
    assert (net(x) - x.sin()).std() < 1e-3 and abs(net(x).mean() - 7) > 1  # no step has moved the constant


def test_spring_remembers():
    _, closure, params = problem()
    opt = SPRING(params, 0.1, momentum=0.9, damping=1e-3, damping_kind="absolute", norm_constraint=None)
    phi = torch.zeros_like(flat(params))
    for k in range(1, 4):
        (r, J), before = dense(closure, params), flat(params)
        K = J @ J.T + 1e-3 * torch.eye(len(r), dtype=r.dtype)
        phi = 0.9 * phi + J.T @ torch.linalg.solve(K, -r - 0.9 * J @ phi)
        opt.step(closure)
        assert off(flat(params) - before, 0.1 * phi / (1 - 0.9 ** (2 * k)) ** 0.5) < 1e-8


def test_center_is_a_bool():
    with pytest.raises(TypeError, match="center of residual 'r' must be True or False, got 1"):
        term(torch.ones(3), center=1)


# Samples on two processes ---------------------------------------------------------------------------------------------


def assert_same(ranks, one, tolerance):
    for key, value in one.items():
        for found in ranks:
            assert torch.equal(found[key], ranks[0][key]), key
            assert off(found[key], value) < tolerance, key


@pytest.mark.dist
@pytest.mark.parametrize(
    ("shares", "coupled"), [(centred_ranks.UNEVEN, False), (centred_ranks.EMPTY, False), (centred_ranks.UNEVEN, True)]
)
def test_means_are_those_of_all_processes(shares, coupled):
    ranks = pool.run(2, centred_ranks.linear, shares, coupled)
    one = centred_ranks.linear(0, 1, shares, coupled)
    one.pop("backend")
    assert_same(ranks, one, 1e-12)
    assert [found["backend"] for found in ranks] == ["matvec" if coupled else "expand"] * 2


@pytest.mark.dist
@pytest.mark.parametrize("method", ["energy", "convex"])
def test_steps_of_two_processes_are_those_of_one(method):
    assert_same(pool.run(2, centred_ranks.trained, method), centred_ranks.trained(0, 1, method), 1e-9)
