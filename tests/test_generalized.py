"""Convex losses and energies as terms: gradients by autograd, matrices by hand, Newton steps of dense algebra."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

import secondorder
from cases import normal
from residual_cases import dense, flat, mlp, off
from secondorder.engdw import ENGDW
from secondorder.residuals.generalized import convex_loss, vmc_energy
from secondorder.residuals.linearization import linearize
from secondorder.residuals.terms import residual_terms, term


def softmax_curvature(f, y):
    p = f.softmax(-1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


# loss of one sample, its Hessian in f by hand, targets
LOSSES = {
    "cross entropy": (F.cross_entropy, softmax_curvature, torch.arange(7) % 3),
    "Poisson": (
        lambda f, y: F.poisson_nll_loss(f, y, reduction="sum"),
        lambda f, y: torch.diag_embed(f.exp()),
        torch.arange(21.0, dtype=torch.float64).view(7, 3),
    ),
    "squares": (
        lambda f, y: (f - y).square().sum() / 2,
        lambda f, y: torch.eye(3, dtype=f.dtype).expand(7, 3, 3),
        torch.linspace(-1, 1, 21, dtype=torch.float64).view(7, 3),
    ),
    "one of three": (  # no curvature in the others
        lambda f, y: F.softplus(f[0]) - y * f[0],
        lambda f, y: torch.diag_embed((f.sigmoid() * (1 - f.sigmoid())) * torch.tensor([1.0, 0, 0])),
        torch.arange(7).double() % 2,
    ),
}


@pytest.fixture(params=list(LOSSES))
def convex(request):
    loss, curvature, y = LOSSES[request.param]
    net, x = mlp(2, 5, 3), torch.linspace(-1, 1, 14, dtype=torch.float64).view(7, 2)
    params = list(net.parameters())
    mean = torch.stack([loss(f, t) for f, t in zip(net(x), y, strict=True)]).mean()
    gradient = flat(torch.autograd.grad(mean, params))
    _, Jf = dense(lambda: [term(net(x), reduction="sum")], params)
    Jf = Jf.view(7, 3, -1)
    G = torch.einsum("nad,nab,nbe->de", Jf, curvature(net(x).detach(), y), Jf) / 7
    return net, lambda: {"loss": convex_loss(net(x), loss, y)}, gradient, G


def test_gradient_and_matrix_are_those_of_the_loss(convex):
    net, closure, gradient, G = convex
    linear = linearize(closure, list(net.parameters()))
    assert linear.backend == "expand"
    assert off(flat(linear.gradient), gradient) < 1e-10
    assert off(linear.normal(), G) < 1e-10


def test_step_of_engdw(convex):
    net, closure, gradient, G = convex
    before = flat(net.parameters())
    ENGDW(net.parameters(), line_search=None, damping=1e-2, damping_kind="absolute", lr=0.5).step(closure)
    expected = -0.5 * torch.linalg.solve(G + 1e-2 * torch.eye(len(G), dtype=G.dtype), gradient)
    assert off(flat(net.parameters()) - before, expected) < 1e-9
    assert off(flat([p.grad for p in net.parameters()]), gradient) < 1e-10


def test_the_loss_is_that_of_the_samples():
    f, y = normal(7, 3).requires_grad_(), torch.arange(7) % 3
    terms = residual_terms({"nll": convex_loss(f, F.cross_entropy, y, weight=0.5)})
    torch.testing.assert_close(terms.loss(), 0.5 * F.cross_entropy(f, y), rtol=1e-14, atol=0)
    assert terms.by_term()["nll"] == terms.loss().detach()
    terms.backward()
    torch.testing.assert_close(f.grad, 0.5 * (f.softmax(1) - F.one_hot(y, 3)).detach() / 7, rtol=1e-12, atol=1e-15)
    summed = residual_terms({"nll": convex_loss(f, F.cross_entropy, y, reduction="sum")}).loss()
    torch.testing.assert_close(summed, F.cross_entropy(f, y, reduction="sum"))


def test_another_optimizer_minimizes_the_loss_itself(convex):
    net, closure, gradient, _ = convex
    before = residual_terms(closure()).loss().detach()
    assert secondorder.SOAP(net.parameters(), lr=1e-3).step(closure) == before
    assert off(flat([p.grad for p in net.parameters()]), gradient) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_saturated_samples_keep_their_gradient(dtype):
    """Sure, and wrong: a third class whose curvature is below rounding of that of the others."""
    f = torch.tensor([[50.0, 50.0, 0.0], [0.0, 0.0, 0.0], [90.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    r = convex_loss(f, F.cross_entropy, torch.tensor([2, 0, 1])).residual
    (found,) = torch.autograd.grad(r.square().sum() / 2, f)
    y = F.one_hot(torch.tensor([2, 0, 1]), 3)
    torch.testing.assert_close(found, (f.softmax(1) - y).detach(), rtol=1e-4, atol=1e-7)


def test_losses_without_curvature_have_their_gradient():
    """Linear: the curvature is that of squares, as none is known."""
    f = normal(4, 2).requires_grad_()
    r = convex_loss(f, lambda f: f[0] - 2 * f[1]).residual
    (found,) = torch.autograd.grad(r.square().sum() / 2, f)
    torch.testing.assert_close(found, torch.tensor([1.0, -2.0], dtype=f.dtype).expand(4, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_is_that_of_the_outputs(dtype):
    found = convex_loss(normal(4, 2).to(dtype), lambda f, y: (f - y).square().sum() / 2, torch.zeros(4, 2, dtype=dtype))
    assert found.residual.dtype == found.losses.dtype == dtype


def test_squares_are_the_residual_itself_but_for_a_rotation():
    f = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(4, 2, dtype=torch.float64)
    r = convex_loss(f, lambda f, y: (f - y).square().sum() / 2, y).residual
    assert torch.allclose(r.square().sum(1), (f - y).square().sum(1))


def test_what_is_not_finite_stays_so():
    f = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]], requires_grad=True)
    r = convex_loss(f, lambda f: f.exp().sum()).residual
    assert r[0].isfinite().all() and r[1].isnan().all()


def test_no_samples():
    f = normal(0, 3).requires_grad_()
    terms = residual_terms([convex_loss(f, F.cross_entropy, torch.zeros(0, dtype=torch.long))])
    assert terms.loss() == 0 and terms.vector().shape == (0,)


def test_wrong_arguments():
    loss = lambda f, y: (f - y).square().sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"outputs must be \(N, M\)"):
        convex_loss(torch.zeros(3), loss, torch.zeros(3))
    with pytest.raises(ValueError, match=r"must be \(N, M\) .* got \(3, 0\)"):
        convex_loss(torch.zeros(3, 0), loss, torch.zeros(3))
    with pytest.raises(ValueError, match=r"got \(3, 1\) and \[\(4,\)\]"):
        convex_loss(torch.zeros(3, 1), loss, torch.zeros(4))
    with pytest.raises(ValueError, match="weight of residual 'outputs' must be finite and >= 0, got -1"):
        convex_loss(torch.zeros(3, 1), loss, torch.zeros(3), weight=-1)
    with pytest.raises(ValueError, match=r"must be \(N,\), got \(3, 1\) and \(3,\)"):
        vmc_energy(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(TypeError, match="residual 'local_energy' must be of a floating-point dtype"):
        vmc_energy(torch.zeros(3), torch.zeros(3).long())


def blobs(n=60):
    x = normal(n, 2, seed=3) + torch.tensor([[0.0, 1], [1, 0], [-1, -1]]).repeat(n // 3, 1)
    return x, torch.arange(n) % 3


def newton(net, loss, ridge, damping):
    """One step of dense algebra, from the Hessian of the whole loss in the parameters."""
    names, start = zip(*((k, p.detach()) for k, p in net.named_parameters()), strict=True)

    def total(*parts):
        return loss(lambda x: functional_call(net, dict(zip(names, parts, strict=True)), x)) + ridge / 2 * sum(
            part.square().sum() for part in parts
        )

    blocks = hessian(total, start)
    sizes = [p.numel() for p in start]
    H = torch.cat([torch.cat([b.reshape(i, -1) for b in row], 1) for row, i in zip(blocks, sizes, strict=True)])
    g = flat(torch.autograd.grad(total(*(params := [p.clone().requires_grad_() for p in start])), params))
    return -torch.linalg.solve(H + damping * torch.eye(len(H), dtype=H.dtype), g)


def test_softmax_regression_is_newtons_method():
    """A linear network: the generalised Gauss-Newton matrix is the Hessian, and convergence quadratic."""
    net, (x, y) = nn.Linear(2, 3).double(), blobs()
    opt = ENGDW(net.parameters(), line_search=None, lr=1.0, damping=1e-9, damping_kind="absolute")

    def closure():
        penalty = torch.cat([p.flatten() for p in net.parameters()])
        return {"nll": convex_loss(net(x), F.cross_entropy, y), "ridge": term(penalty, 1e-2, "sum")}

    sizes = []
    for _ in range(8):
        expected = newton(net, lambda f: F.cross_entropy(f(x), y), 1e-2, 1e-9)
        before = flat(net.parameters())
        opt.step(closure)
        sizes.append(float(torch.cat([p.grad.flatten() for p in net.parameters()]).norm()))
        if sizes[-1] > 1e-9:
            assert off(flat(net.parameters()) - before, expected) < 1e-6
    assert sizes[-1] < 1e-12, sizes


HOW = {  # undamped steps overshoot where no search holds them back: the losses of classifiers are far from quadratic
    "fixed": dict(line_search=None, lr=1.0, damping=1e-2, damping_kind="absolute"),
    "bracket": dict(line_search="bracket", damping=0.1),
}


@pytest.mark.parametrize("how", HOW)
def test_a_classifier_is_trained_in_a_few_steps(how):
    """Twenty, after which Adam, at the best of five rates, is at twice the loss at least."""
    net, other, (x, y) = mlp(2, 8, 3), mlp(2, 8, 3), blobs()
    opt, adam = ENGDW(net.parameters(), **HOW[how]), torch.optim.Adam(other.parameters(), lr=0.3)
    losses = [float(opt.step(lambda: {"nll": convex_loss(net(x), F.cross_entropy, y)})) for _ in range(20)]
    for _ in range(20):
        adam.zero_grad()
        loss = F.cross_entropy(other(x), y)
        loss.backward()
        adam.step()
    assert losses[-1] < 0.5 * float(loss.detach()), losses
    if how == "bracket":
        assert all(b <= a for a, b in zip(losses, losses[1:], strict=False))


class TestEnergies:
    def test_step_is_stochastic_reconfiguration(self):
        net, x, E = mlp(2, 5, 1), normal(12, 2), normal(12, seed=2)
        params = list(net.parameters())
        rows = torch.stack([flat(torch.autograd.grad(net(row)[0], params)) for row in x])
        S, force = torch.cov(rows.T, correction=0), ((E - E.mean())[:, None] * (rows - rows.mean(0))).mean(0)
        before = flat(params)
        closure = lambda: {"energy": vmc_energy(net(x)[:, 0], E)}  # noqa: E731
        loss = ENGDW(params, 0.1, line_search=None, damping=1e-3, damping_kind="absolute").step(closure)
        expected = -0.1 * torch.linalg.solve(S + 1e-3 * torch.eye(len(S), dtype=S.dtype), force)
        assert off(flat(params) - before, expected) < 1e-9
        assert off(flat([p.grad for p in params]), force) < 1e-12
        assert float(loss) == pytest.approx(float(E.var(correction=0) / 2))

    def test_idiom_is_the_same(self):
        net, x, E = mlp(2, 5, 1), normal(12, 2), normal(12, seed=2)
        params = list(net.parameters())

        def idiom():
            log_psi = net(x)[:, 0]
            return {"energy": term(E + log_psi - log_psi.detach(), center=True)}

        one = linearize(lambda: {"energy": vmc_energy(net(x)[:, 0], E)}, params)
        two = linearize(idiom, params)
        assert one.backend == two.backend == "expand"
        assert off(one.residual, two.residual) < 1e-14 and off(one.kernel(), two.kernel()) < 1e-14

    def test_energies_have_no_graph_and_the_dtype_of_log_psi(self):
        log_psi = normal(4).float().requires_grad_()
        found = vmc_energy(log_psi, log_psi.double() ** 2)
        assert found.residual.dtype == torch.float32 and found.center
        (g,) = torch.autograd.grad(found.residual.sum(), log_psi)
        assert torch.equal(g, torch.ones(4))


class TestSearches:
    def terms(self):
        f = normal(4, 2).requires_grad_()
        inexact = {"nll": convex_loss(f, F.cross_entropy, torch.arange(4) % 2), "E": vmc_energy(f[:, 0], f[:, 1])}
        return {"r": term(f[:, 0], center=True), **inexact}

    def test_energies_have_none(self):
        for search in ("geodesic", "bracket", "grid"):
            with pytest.raises(ValueError, match=f"line_search must be None for the term 'E', .*; got '{search}'"):
                residual_terms(self.terms()).check_search(search)
        residual_terms(self.terms()).check_search(None)

    def test_convex_losses_have_straight_ones(self):
        terms = self.terms()
        del terms["E"]
        with pytest.raises(ValueError, match="line_search must be None, 'bracket' or 'grid' for the term 'nll'"):
            residual_terms(terms).check_search("geodesic")
        for search in (None, "bracket", "grid"):
            residual_terms(terms).check_search(search)

    def test_residuals_have_all(self):
        residual_terms({"r": self.terms()["r"]}).check_search("geodesic")

    @pytest.mark.parametrize("cls", [ENGDW, secondorder.SPRING, secondorder.ResidualKFAC])
    def test_a_step_refuses_them(self, cls):
        net, (x, y) = mlp(2, 4, 3), blobs()
        before = flat(net.parameters())

        def closure():
            f = net(x)
            return {"nll": convex_loss(f, F.cross_entropy, y), "E": vmc_energy(f[:, 0], x[:, 0])}

        with pytest.raises(ValueError, match="line_search must be None for the term 'E'"):
            cls(net.parameters(), line_search="bracket").step(closure)
        assert torch.equal(flat(net.parameters()), before)
        with pytest.raises(ValueError, match="must be None, 'bracket' or 'grid' for the term 'nll'"):
            ENGDW(net.parameters()).step(lambda: {"nll": convex_loss(net(x), F.cross_entropy, y)})
