"""The largest eigenvalues of the curvature on a few examples, against the dense matrix from autograd, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

import secondorder
from cases import labels, normal


class Vision(nn.Module):
    """Convolutions with groups, plain and transposed, norm layers, and a layer with several positions."""

    def __init__(self):
        super().__init__()
        self.conv, self.deep = nn.Conv2d(2, 4, 2, groups=2), nn.Conv2d(4, 4, 2, groups=4, bias=False)
        self.up, self.group = nn.ConvTranspose2d(4, 2, 2), nn.GroupNorm(2, 4)
        self.norm, self.rows, self.out = nn.LayerNorm(6), nn.Linear(3, 2), nn.Linear(12, 3)
        self.double()

    def forward(self, x):
        h = self.up(self.deep(self.group(self.conv(x)).tanh()).tanh()).flatten(1)  # (n, 18)
        h = self.rows(h.view(-1, 6, 3)).flatten(1)
        return self.out(torch.cat([self.norm(h[:, :6]), h[:, 6:]], 1))


class Text(nn.Module):
    """Tokens, one of them padding, through attention to one class per example."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(7, 4, padding_idx=0)
        self.mix, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.double()

    def forward(self, ids):
        h = self.emb(ids)
        return self.out((h + self.mix(h, h, h, need_weights=False)[0]).mean(1))


def perceptron():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def of(model, names=None):
    return {name: p.detach() for name, p in model.named_parameters() if names is None or name in names}


def flat(found, n):
    return torch.cat([value.reshape(n, -1) for value in found.values()], 1)


def empirical(model, x, y, names=None):
    """`1/n Σ ∇ℓ ∇ℓᵀ`."""

    def loss(values, x, y):
        return F.cross_entropy(functional_call(model, values, (x[None],)), y[None])

    E = flat(vmap(grad(loss), (None, 0, 0))(of(model, names), x, y), len(x))
    return E.T @ E / len(x)


def gauss_newton(model, x, y):
    """`1/n Σ Jᵀ H J`."""
    total = 0
    for xi, yi in zip(x, y, strict=True):
        J = flat(jacrev(lambda values, xi=xi: functional_call(model, values, (xi[None],))[0])(of(model)), 3)
        H = hessian(lambda f, yi=yi: F.cross_entropy(f[None], yi[None]))(model(xi[None])[0].detach())
        total = total + J.T @ H @ J / len(x)
    return total


def step(model, optimizer, x, y, parts=1, fisher=None, reduction="mean"):
    optimizer.zero_grad()
    for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
        out = model(xs)
        if fisher is not None:
            optimizer.fisher_backward(out, "cross_entropy", fisher)
        (F.cross_entropy(out, ys, reduction=reduction) / (parts if reduction == "mean" else 1)).backward()
    optimizer.step()


def watched(model, samples, cls=secondorder.KFAC, **options):
    optimizer = cls(model.parameters(), module=model, lr=0.0, **options)
    optimizer.track(samples=samples)
    return optimizer


def agree(optimizer, matrix):
    told = optimizer.diagnostics()
    found = [told[f"ggn_top_{i}"] for i in range(1, 6) if f"ggn_top_{i}" in told]
    wanted = torch.linalg.eigvalsh(matrix).flip(0)[: len(found)].tolist()
    assert len(found) >= 3 and found == pytest.approx(wanted, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.EKFAC, secondorder.SINGD])
def test_of_images_are_those_of_the_empirical_fisher_matrix(cls, sharing):
    model, x, y = Vision(), normal(9, 2, 4, 4), labels(9)
    optimizer = watched(model, 6, cls, sharing=sharing)
    step(model, optimizer, x, y)
    agree(optimizer, empirical(model, x[:6], y[:6]))


def test_of_tokens_are_those_of_the_empirical_fisher_matrix():
    model, y = Text(), labels(8)
    ids = torch.randint(0, 7, (8, 5), generator=torch.Generator().manual_seed(0))
    optimizer = secondorder.KFAC(model.parameters(), module=model, lr=0.0)
    optimizer.track(samples=5)
    step(model, optimizer, ids, y)
    agree(optimizer, empirical(model, ids[:5], y[:5]))


@pytest.mark.parametrize("parts", [1, 2])
def test_of_type_2_vectors_are_those_of_the_gauss_newton_matrix(parts):
    model, x, y = perceptron(), normal(8, 5), labels(8)
    optimizer = watched(model, 3)
    step(model, optimizer, x, y, parts, "type-2")
    chosen = [0, 1, 2] if parts == 1 else [0, 1, 2, 4, 5, 6]
    agree(optimizer, gauss_newton(model, x[chosen], y[chosen]))


def test_of_accumulated_passes_are_those_of_all_examples():
    model, x, y = perceptron(), normal(12, 5), labels(12)
    optimizer = watched(model, 99)
    step(model, optimizer, x, y, parts=3)
    agree(optimizer, empirical(model, x, y))


def test_of_a_sum_are_those_of_its_terms():
    model, x, y = perceptron(), normal(8, 5), labels(8)
    optimizer = watched(model, 8, loss_reduction="sum")
    step(model, optimizer, x, y, reduction="sum")
    agree(optimizer, empirical(model, x, y))


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.bias"])
def test_only_trained_parameters_count(frozen):
    model, x, y = perceptron(), normal(8, 5), labels(8)
    model.get_parameter(frozen).requires_grad_(False)
    optimizer = watched(model, 8)
    step(model, optimizer, x, y)
    agree(optimizer, empirical(model, x, y, {name for name, _ in model.named_parameters()} - {frozen}))


def test_are_measured_when_asked_for():
    model, x, y = perceptron(), normal(8, 5), labels(8)
    optimizer = watched(model, 4)
    optimizer.track(2, samples=4)
    for told in (False, True):
        step(model, optimizer, x, y)
        assert ("ggn_top_1" in optimizer.diagnostics()) == told
    optimizer.track(0)
    model.get_submodule("0").weight.data.mul_(2)
    before = optimizer.diagnostics()["ggn_top_1"]
    step(model, optimizer, x, y)
    assert optimizer.diagnostics()["ggn_top_1"] == before
    assert not any(site.kept for site in optimizer._capture.sites)


def test_passes_whose_gradients_go_are_dropped():
    model, x, y = perceptron(), normal(8, 5), labels(8)
    optimizer = watched(model, 8)
    F.cross_entropy(model(2 * x), y).backward()
    model.zero_grad()
    step(model, optimizer, x, y)
    agree(optimizer, empirical(model, x, y))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5).double(), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.b(self.a(self.a(x).tanh()))


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 2).double(), nn.Linear(4, 3).double()

    def forward(self, x):  # two rows of the batch make one example of the second layer
        return self.b(self.a(x).view(-1, 4))


@pytest.mark.parametrize(("cls", "y"), [(Twice, labels(8)), (Cut, labels(4))])
def test_are_left_out_where_rows_do_not_fit_together(cls, y):
    model = cls()
    optimizer = watched(model, 4)
    step(model, optimizer, normal(8, 5), y)
    told = optimizer.diagnostics()
    assert "update_norm" in told and "ggn_top_1" not in told


def test_watching_changes_no_bit():
    found = []
    for samples in (0, 4):
        torch.manual_seed(0)
        model = perceptron()
        optimizer = secondorder.EKFAC(model.parameters(), module=model, lr=0.05)
        optimizer.track(samples=samples)
        for seed in range(4):
            step(model, optimizer, normal(8, 5, seed=seed), labels(8, seed=seed))
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("samples", [-1, 2.0])
def test_what_is_no_count_is_refused(samples):
    model = perceptron()
    with pytest.raises(ValueError, match="samples"):
        secondorder.KFAC(model.parameters(), module=model).track(samples=samples)


def test_a_bias_in_a_group_of_its_own_has_a_rank():
    """A block with one axis: its spectrum is that of its one factor."""
    layer = nn.Linear(5, 4).double()
    groups = [{"params": [layer.weight]}, {"params": [layer.bias]}]
    optimizer = secondorder.KFAC(groups, module=layer)
    for step in range(3):
        optimizer.zero_grad()
        F.mse_loss(layer(normal(8, 5, seed=step).double()), normal(8, 4, seed=9 + step).double()).backward()
        optimizer.step()
    found = optimizer.diagnostics(full=True)
    (ours,) = (value for key, value in found.items() if key.endswith("group1.4/effective_rank_0"))
    d = torch.linalg.eigvalsh(optimizer.state[layer.bias]["covariance_0"])
    p = d / d.sum()
    assert ours == pytest.approx(float((-p * p.log()).sum().exp()), rel=1e-3)
