"""ENGDW and SPRING against recorded trajectories of the papers' code, and dense algebra."""

import math

import pytest
import torch
from torch import nn

from residual_cases import dense, flat, grad, mlp, off, poisson, recorded, small
from secondorder.engdw import ENGDW
from secondorder.residuals.terms import residual_terms, term
from secondorder.spring import SPRING


@pytest.fixture(scope="module")
def z():
    return {**recorded("tiny_problem_engdw"), **recorded("tiny_spring")}


def tiny(z):
    """The recorded network, and its batches by number."""
    net = mlp(2, 16, 16, 1)
    for i, layer in enumerate(net[::2]):
        layer.weight.data, layer.bias.data = z[f"W{i}"].clone(), z[f"b{i}"].clone()
    return net, lambda k: lambda: poisson(net, *(z[f"{name}_seq"][k] for name in ("X_int", "y_int", "X_bnd", "y_bnd")))


# Recorded steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["auto", "primal", "dual"])
@pytest.mark.parametrize(("damping", "tolerance"), [("0.001", 1e-9), ("1e-06", 1e-6), ("1e-10", 1e-3)])
@pytest.mark.parametrize("name", ["tiny", "tiny_heat"])
def test_recorded_step(name, damping, tolerance, form):
    z = recorded(f"{name}_problem_engdw")
    net = mlp(2, *[len(z[f"W{i}"]) for i in range(3)])
    for i, layer in enumerate(net[::2]):
        layer.weight.data, layer.bias.data = z[f"W{i}"], z[f"b{i}"]

    def closure():
        if name == "tiny":
            return poisson(net, z["X_int"], z["y_int"], z["X_bnd"], z["y_bnd"])
        x = z["X_int"].clone().requires_grad_(True)
        first = grad(net(x), x)
        return [first[:, 0] - grad(first[:, 1], x)[:, 1] / 4, net(z["X_bnd"]) - z["y_bnd"]]

    lr = 0.3
    opt = ENGDW(net.parameters(), lr, line_search=None, damping=float(damping), damping_kind="absolute", form=form)
    loss = opt.step(closure)
    assert off(z["theta0"] - flat(net.parameters()), lr * z[f"engdw_step_lam{damping}"]) < tolerance
    assert float(loss) == pytest.approx(float(z["r"].square().sum() / 2), rel=1e-12) and not loss.requires_grad
    assert off(flat(p.grad for p in net.parameters()), z["grad"]) < 1e-10


def test_recorded_grid_search(z):
    net, batch = tiny(z)
    opt = ENGDW(net.parameters(), line_search="grid", damping=1e-6, damping_kind="absolute")
    for k in range(10):
        loss = opt.step(batch(0))
        assert float(loss) == pytest.approx(float(z["engdw_grid_losses"][k].sum()), rel=1e-4)
        assert opt.diagnostics()["step_size"] == float(z["engdw_grid_alphas"][k])
        assert opt.diagnostics()["evaluations"] == 31
        assert off(flat(net.parameters()), z["engdw_grid_theta"][k + 1]) < 1e-3


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("batches", ["fixed", "resampled"])
@pytest.mark.parametrize("form", ["primal", "dual"])
def test_recorded_spring(z, batches, corrected, form):
    net, batch = tiny(z)
    paper = dict(lr=0.05, damping=1e-3, damping_kind="absolute", norm_constraint=1e-3)
    paper |= dict(norm_constraint_kind="absolute")
    opt = SPRING(net.parameters(), momentum=0.9, bias_correction=corrected, form=form, **paper)
    name = f"{'rngd_bc' if corrected else 'spring'}_{batches}"
    for k in range(10):
        opt.step(batch(k if batches == "resampled" else 0))
        assert off(flat(net.parameters()), z[f"{name}_theta"][k + 1]) < 1e-7
        if not corrected:
            assert off(flat(opt.state[p]["phi"] for p in net.parameters()), z[f"{name}_phi"][k]) < 1e-7


# The algebra ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_step_is_dense_algebra_with_frozen_parameters(form, kind):
    net, closure = small()
    net[0].bias.requires_grad_(False)
    live = [p for p in net.parameters() if p.requires_grad]
    r, J = dense(closure, live)
    damping = 1e-4 * (J.square().sum() / len(r) if kind == "relative" else 1)
    step = torch.linalg.solve(J.mT @ J + damping * torch.eye(J.shape[1], dtype=J.dtype), J.mT @ r)
    before, bias = flat(live), net[0].bias.clone()
    ENGDW(net.parameters(), line_search=None, damping=1e-4, damping_kind=kind, form=form).step(closure)
    assert off(before - flat(live), step) < 1e-9
    assert torch.equal(net[0].bias, bias) and net[0].bias.grad is None


def test_groups_have_their_own_lr_and_weight_decay():
    net, closure = small()
    groups = [{"params": net[0].parameters(), "lr": 0.1, "weight_decay": 0.5}, {"params": net[2].parameters()}]
    opt = ENGDW(groups, 0.2, line_search=None, damping=1e-3)
    before = [flat(net[i].parameters()) for i in (0, 2)]
    r, J = dense(closure, list(net.parameters()))
    damping = 1e-3 * J.square().sum() / len(r)
    step = torch.linalg.solve(J.mT @ J + damping * torch.eye(J.shape[1], dtype=J.dtype), J.mT @ r)
    opt.step(closure)
    first = len(before[0])
    assert off(flat(net[0].parameters()), (1 - 0.1 * 0.5) * before[0] - 0.1 * step[:first]) < 1e-9
    assert off(flat(net[2].parameters()), before[1] - 0.2 * step[first:]) < 1e-9


def test_adaptive_momentum_fits_the_new_samples_best():
    """Against dense algebra: of all μ, φ = μ φ' + P (-r - μ J φ') has the one that leaves the least, whitened."""
    net, _ = small()
    params = list(net.parameters())
    opt = SPRING(params, 0.5, damping=1e-2, damping_kind="absolute", norm_constraint=None)
    found = []
    for seed in range(6):
        _, closure = small(seed, net=net, n=6)
        r, J = dense(closure, params)
        last = flat(opt.state_dict()["state"][i]["phi"] for i in range(len(params)))
        opt.step(closure)
        phi = flat(opt.state[p]["phi"] for p in params)
        K = torch.linalg.inv(J @ J.mT + 1e-2 * torch.eye(len(r), dtype=J.dtype))

        def left(mu, r=r, J=J, K=K, last=last):
            rest = -r - mu * J @ last
            return float(rest @ K @ rest)

        best = min(torch.linspace(0, 0.999, 1000).tolist(), key=left) if seed else 0.0
        found.append(best)
        expected = best * last + J.mT @ K @ (-r - best * J @ last)
        assert off(phi, expected) < 1e-2, (seed, best)
    assert any(0 < best < 0.99 for best in found), found


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_norm_constraint_caps_a_step(kind):
    net, closure = small()
    before = flat(net.parameters())
    SPRING(net.parameters(), 1.0, norm_constraint=1e-6, norm_constraint_kind=kind).step(closure)
    moved = float((flat(net.parameters()) - before).norm())
    assert moved == pytest.approx(1e-3 * (float(before.norm()) if kind == "relative" else 1.0), rel=1e-9)


@pytest.mark.parametrize("search", ["geodesic", "bracket", "grid"])
def test_lr_multiplies_the_step_size_of_the_search(search):
    steps = []
    for lr in (1.0, 0.25):
        net, closure = small()
        before = flat(net.parameters())
        opt = ENGDW(net.parameters(), lr, line_search=search, damping=1e-3)
        opt.step(closure)
        steps.append(opt.diagnostics()["step_size"])
        if search != "geodesic":
            assert off((flat(net.parameters()) - before) / steps[-1], dense_direction(closure, net, before)) < 1e-9
    assert steps[1] == 0.25 * steps[0]


def dense_direction(closure, net, theta, damping=1e-3):
    """-(JᵀJ + λ I)^-1 Jᵀ r with a relative damping, at other parameters."""
    here = flat(net.parameters())
    nn.utils.vector_to_parameters(theta.clone(), net.parameters())
    r, J = dense(closure, list(net.parameters()))
    nn.utils.vector_to_parameters(here, net.parameters())
    shift = damping * J.square().sum() / len(r)
    return -torch.linalg.solve(J.mT @ J + shift * torch.eye(J.shape[1], dtype=J.dtype), J.mT @ r)


@pytest.mark.parametrize("coupled", [False, True])
def test_geodesic_follows_the_second_derivative(coupled):
    """Against the second derivative of r along δ by `torch.func`, in both back-ends."""
    net, closure = small()

    def residuals():
        found = closure()
        return {**found, "interior": found["interior"] - coupled * found["interior"].mean()}

    theta = flat(net.parameters())
    direction = dense_direction(residuals, net, theta)
    _, J = dense(residuals, list(net.parameters()))
    h = 1e-4
    vectors = []
    for t in (-h, 0.0, h):
        nn.utils.vector_to_parameters(theta + t * direction, net.parameters())
        vectors.append(residual_terms(residuals()).vector().detach())
    second = (vectors[0] - 2 * vectors[1] + vectors[2]) / h**2
    shift = 1e-3 * J.square().sum() / len(J)
    a = -torch.linalg.solve(J.mT @ J + shift * torch.eye(J.shape[1], dtype=J.dtype), J.mT @ second) / 2
    nn.utils.vector_to_parameters(theta.clone(), net.parameters())
    opt = ENGDW(net.parameters(), damping=1e-3)
    opt.step(residuals)
    alpha = opt.diagnostics()["step_size"]
    bent = (flat(net.parameters()) - theta - alpha * direction) / alpha**2
    assert alpha > 0.1 and off(bent, a) < 1e-2  # a one-sided difference, where the last step would have been 2^-6


def test_coupled_samples_are_products():
    """A closure that has no rows by copies: the mean over the batch."""
    results = []
    for coupled in (False, True):
        net, closure = small()

        def both(closure=closure, coupled=coupled):
            found = closure()
            return {**found, "pde": found["interior"] - found["interior"].mean() * coupled}

        r, J = dense(both, list(net.parameters()))
        damping = 1e-3 * J.square().sum() / len(r)
        step = torch.linalg.solve(J.mT @ J + damping * torch.eye(J.shape[1], dtype=J.dtype), J.mT @ r)
        before = flat(net.parameters())
        ENGDW(net.parameters(), line_search=None, damping=1e-3).step(both)
        results.append(off(before - flat(net.parameters()), step))
    assert max(results) < 1e-8


def test_poisson_in_two_dimensions():
    """2-64-1 and the 900 + 120 points of the papers, told by their initial loss; the defaults."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    x = torch.rand(900, 2)
    f = 2 * math.pi**2 * (math.pi * x).sin().prod(1, keepdim=True)
    edge = torch.rand(120, 2)
    axis, side = torch.randint(0, 2, (120,)), torch.randint(0, 2, (120,)).to(edge)
    edge[torch.arange(120), axis] = side
    g = (math.pi * edge).sin().prod(1, keepdim=True)
    seen = torch.rand(2000, 2)
    u = (math.pi * seen).sin().prod(1, keepdim=True).double()
    data = [t.double() for t in (x, f, edge, g)]
    opt = ENGDW(net.parameters())
    reached, losses = {}, []
    for step in range(1, 111):
        losses.append(float(opt.step(lambda: poisson(net, *data))))
        with torch.no_grad():
            error = off(net(seen.double()), u)
        for level in (1e-4, 1e-6):
            if error < level:
                reached.setdefault(level, step)
        if 1e-6 in reached:
            break
    assert losses[0] == pytest.approx(48.92347435353573, rel=1e-12)
    assert losses == sorted(losses, reverse=True)
    assert reached[1e-4] <= 60 and reached[1e-6] <= 110, reached  # 36 and 41 where it was written: rounding decides


def test_weights_of_terms():
    net, closure = small()

    def weighted():
        return {name: term(r, 4.0) for name, r in closure().items()}

    twin, twins = small()
    loss = ENGDW(net.parameters(), damping=1e-6).step(weighted)
    assert float(loss) == pytest.approx(4 * float(ENGDW(twin.parameters(), damping=1e-6).step(twins)), rel=1e-12)
    assert off(flat(net.parameters()), flat(twin.parameters())) < 1e-6  # a relative damping sees no scale
