"""EKFAC's second moments against per-example gradients from autograd, in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secondorder
from cases import labels, normal
from dense_kfac import assert_near, backward, cross_entropy, gradient, joint, mlp
from secondorder.curvature import layer as layer_statistics

SETTINGS = dict(
    lr=0.0,
    betas=(0.0, 0.0),
    damping=0.03,
    weight_decay=0.0,
    kl_clip=None,
    norm_clip=None,
    max_update_rms=None,
    momentum="update",
    nesterov=False,
)
NEVER = 10**6


def small(bias=True):
    return mlp(5, 7, 3, bias=bias)


def ekfac(model, **options):
    options = {**SETTINGS, "refresh_every": 1, "refresh": "together", **options}
    return secondorder.EKFAC(model.parameters(), module=model, **options)


def examples(model, layer, x, y):
    """`(n, d_out, d_in)`: the gradient of every sample's summed loss with respect to a layer's `[W | b]`."""
    twin, found = copy.deepcopy(model), []
    at = list(model.modules()).index(layer)
    for i in range(len(x)):
        twin.zero_grad()
        cross_entropy(twin(x[i : i + 1]), y[i : i + 1], reduction="sum").backward()
        found.append(gradient(list(twin.modules())[at]))
    return torch.stack(found)


def measured(model, x, y, **options):
    """An optimizer that found its bases in one step, and the moments of the same batch in them in the next."""
    opt = ekfac(model, **options)
    for period in (1, NEVER):
        opt.param_groups[0]["refresh_every"] = period
        backward(model, x, y)
        opt.step()
    return opt


def projected(state, E):
    """`Q_Gᵀ E Q_A`."""
    return state["basis_0"].mT @ E @ state["basis_1"]


# ---------------------------------------------------------------- the diagonal of the true block


@pytest.mark.parametrize("bias", [True, False])
def test_moments_are_the_diagonal_of_the_empirical_fisher_in_the_basis(bias):
    model, x, y = small(bias), normal(9, 5), labels(9)
    opt = measured(model, x, y)
    for layer in (model[0], model[2]):
        state, E = opt.state[layer.weight], examples(model, layer, x, y)
        assert_near(state["moment"], projected(state, E).square().mean(0))
        assert_near(state["moment"].sum(), E.square().sum() / len(E))  # the trace of the block


def test_moments_of_a_sum_loss_are_sums():
    model, x, y = small(), normal(9, 5), labels(9)
    opt = ekfac(model, loss_reduction="sum")
    for period in (1, NEVER):
        opt.param_groups[0]["refresh_every"] = period
        model.zero_grad()
        cross_entropy(model(x), y, reduction="sum").backward()
        opt.step()
    state = opt.state[model[0].weight]
    assert_near(state["moment"], projected(state, examples(model, model[0], x, y)).square().sum(0))


def test_expanded_positions_are_examples_of_their_own():
    model, x, y = small(), normal(4, 3, 5), labels(4, 3)
    opt = measured(model, x, y, sharing="expand")
    state = opt.state[model[0].weight]
    rows = examples(model, model[0], x.flatten(0, 1), y.flatten())
    assert_near(state["moment"], projected(state, rows).square().mean(0))


@pytest.mark.parametrize("chunk", [1, 1 << 24])
def test_reduced_positions_are_summed_before_squares(chunk, monkeypatch):
    monkeypatch.setattr(layer_statistics, "_CHUNK", chunk)
    model, x, y = small(), normal(4, 3, 5), labels(4, 3)
    opt = measured(model, x, y, sharing="reduce")
    state, E = opt.state[model[0].weight], examples(model, model[0], x, y)
    assert_near(state["moment"], projected(state, E).square().sum(0) / y.numel())


def test_moments_of_convolutions_are_exact_per_group():
    conv = nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(6 * 9, 3)).double()
    x, y = normal(6, 4, 5, 5), labels(6)
    opt = measured(model, x, y, sharing="reduce")
    state, E = opt.state[conv.weight], examples(model, conv, x, y)
    expected = projected(state, E.view(6, 2, 3, -1)).square().mean(0)
    assert_near(state["moment"], expected)


def test_moments_of_blocks_are_those_of_their_parts_of_the_gradient():
    model, x, y = small(), normal(9, 5), labels(9)
    opt = measured(model, x, y, max_block_size=4)
    E = examples(model, model[0], x, y)
    for r, rows in enumerate((slice(0, 4), slice(4, 7))):
        for c, columns in enumerate((slice(0, 3), slice(3, 6))):
            state = opt.state[model[0].weight][f"tile_r{r}_c{c}"]
            assert_near(state["moment"], projected(state, E[:, rows, columns]).square().mean(0))


def test_moments_of_embeddings_and_norms_are_exact():
    model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    x, y = labels(8, classes=10), labels(8)
    opt = measured(model, x, y, sharing="expand")
    words, norm = model[0], model[1]

    def each(of):
        found = []
        for i in range(len(x)):
            backward(model, x[i : i + 1], y[i : i + 1])
            found.append(of())
        opt.zero_grad()
        return torch.stack(found)

    E = each(lambda: words.weight.grad.clone())
    state = opt.state[words.weight]
    assert_near(state["moment"], (E @ state["basis_1"]).square().mean(0))
    E = each(lambda: torch.stack([norm.weight.grad, norm.bias.grad], 1))
    state = opt.state[norm.weight]
    expected = torch.einsum("fij,nfi->nfj", state["basis_0"], E).square().mean(0)
    assert_near(state["moment"].view(expected.shape), expected)


def test_moments_of_a_bias_apart_are_exact():
    model, x, y = small(), normal(9, 5), labels(9)
    first, last = model[0], model[2]
    groups = [dict(params=[first.weight, last.weight]), dict(params=[first.bias, last.bias])]
    opt = secondorder.EKFAC(groups, module=model, **{**SETTINGS, "refresh": "together"})
    for period in (1, NEVER):
        for group in opt.param_groups:
            group["refresh_every"] = period
        backward(model, x, y)
        opt.step()
    E = examples(model, first, x, y)
    state = opt.state[first.weight]
    assert_near(state["moment"], projected(state, E[..., :-1]).square().mean(0))
    state = opt.state[first.bias]
    assert_near(state["moment"], (E[..., -1] @ state["basis_0"]).square().mean(0))


def test_moments_on_the_input_side_alone_are_those_of_the_inputs():
    model, x, y = small(), normal(9, 5), labels(9)
    state = measured(model, x, y, sides="inputs").state[model[0].weight]
    inputs = torch.cat([x, x.new_ones(9, 1)], 1) @ state["basis_1"]
    assert_near(state["moment"], inputs.square().mean(0).expand(7, 6))


def test_moments_of_the_exact_fisher_are_the_diagonal_of_the_gauss_newton_matrix():
    model, x, y = small(), normal(6, 5), labels(6)
    opt = ekfac(model)
    for period in (1, NEVER):
        opt.param_groups[0]["refresh_every"] = period
        model.zero_grad()
        outputs = model(x)
        opt.fisher_backward(outputs, "cross_entropy", "type-2")
        F.cross_entropy(outputs, y).backward()
        opt.step()
    W, b = model[0].weight, model[0].bias
    state, expected = opt.state[W], 0.0
    for f in model(x):
        p = f.softmax(0).detach()
        root = torch.diag(p.sqrt()) - torch.outer(p, p.sqrt())
        for column in root.T:
            dW, db = torch.autograd.grad(f, (W, b), column, retain_graph=True)
            expected += projected(state, torch.cat([dW, db[:, None]], 1)).square() / len(x)
    assert_near(state["moment"], expected)


def test_correction_is_closer_to_the_empirical_fisher_than_the_product_of_factors():
    model, x, y = small(), normal(9, 5), labels(9)
    opt = measured(model, x, y)
    for layer in (model[0], model[2]):
        state, E = opt.state[layer.weight], examples(model, layer, x, y).flatten(1)
        fisher = E.T @ E / len(E)
        Q = torch.kron(state["basis_0"], state["basis_1"])
        product = torch.kron(state["covariance_0"], state["covariance_1"])
        corrected = Q * state["moment"].flatten() @ Q.T
        assert (fisher - corrected).norm() < 0.99 * (fisher - product).norm()
        assert_near((Q.T @ fisher @ Q).diagonal(), state["moment"].flatten())  # hence no diagonal is closer


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_step_divides_by_the_damped_moments(kind):
    model, x, y = small(), normal(9, 5), labels(9)
    opt = measured(model, x, y, damping_kind=kind)
    opt.param_groups[0]["lr"] = 1.0
    layer = model[0]
    backward(model, x, y)
    g, old = gradient(layer), joint(layer)
    opt.step()
    U = old - joint(layer)
    state = opt.state[layer.weight]
    moment = state["moment"]
    ridge = SETTINGS["damping"] * (moment.mean() if kind == "relative" else 1)
    expected = state["basis_0"] @ (projected(state, g) / (moment + ridge)) @ state["basis_1"].T
    assert_near(U, expected)


def test_moments_are_debiased_averages():
    model, beta = small(), 0.6
    opt = measured(model, normal(9, 5), labels(9))
    opt.param_groups[0]["betas"] = (0.0, beta)
    state = opt.state[model[0].weight]
    expected = state["moment"].clone()
    for seen in (3, 4):
        x, y = normal(9, 5, seed=seen), labels(9, seed=seen)
        backward(model, x, y)
        opt.step()
        new = projected(state, examples(model, model[0], x, y)).square().mean(0)
        expected += (1 - beta) / (1 - beta**seen) * (new - expected)
    assert_near(state["moment"], expected)


@pytest.mark.parametrize("refresh_by", ["eigh", "qr"])
def test_later_refreshes_transport_the_moments(refresh_by):
    """v <- (R ∘ R) v on either side: what the moments say of the new axes if the old ones did not correlate."""
    model = small()
    opt = ekfac(model, betas=(0.0, 0.5), refresh_by=refresh_by)
    for t in range(5):
        state = opt.state[model[0].weight]
        old = {key: state[key].clone() for key in ("moment", "basis_0", "basis_1") if key in state}
        x, y = normal(9, 5, seed=t), labels(9, seed=t)
        backward(model, x, y)
        opt.step()
        if t < 2:
            continue
        new = projected(old, examples(model, model[0], x, y)).square().mean(0)
        moved = old["moment"] + 0.5 / (1 - 0.5 ** (t + 1)) * (new - old["moment"])
        R_0, R_1 = (state[f"basis_{i}"].T @ old[f"basis_{i}"] for i in (0, 1))
        assert_near(state["moment"], R_0.square() @ moved @ R_1.square().T)
        assert_near(state["moment"].sum(), moved.sum())
        assert (R_0.square() - torch.eye(7)).abs().max() > 1e-3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_moments_of_the_mean_gradient_take_it_in_the_basis_that_is_applied(reduction):
    model, beta = small(), 0.6
    opt = ekfac(model, moment="gradient", loss_reduction=reduction)
    for period in (1, NEVER):
        opt.param_groups[0]["refresh_every"] = period
        model.zero_grad()
        cross_entropy(model(normal(9, 5)), labels(9), reduction=reduction).backward()
        opt.step()
    state, factor = opt.state[model[0].weight], 9 if reduction == "mean" else 1
    expected = factor * projected(state, gradient(model[0])).square()
    assert_near(state["moment"], expected)
    opt.param_groups[0]["betas"] = (0.0, beta)
    model.zero_grad()
    cross_entropy(model(normal(9, 5, seed=1)), labels(9, seed=1), reduction=reduction).backward()
    opt.step()
    new = factor * projected(state, gradient(model[0])).square()
    assert_near(state["moment"], expected + (1 - beta) / (1 - beta**3) * (new - expected))


def test_moments_wait_while_statistics_do():
    model = small()
    opt = measured(model, normal(9, 5), labels(9))
    opt.param_groups[0]["statistics_every"] = 100
    backward(model, normal(9, 5, seed=1), labels(9, seed=1))
    opt.step()  # its forward pass was tapped before the change
    state = opt.state[model[0].weight]
    old = state["moment"].clone()
    backward(model, normal(9, 5, seed=2), labels(9, seed=2))
    opt.step()
    assert torch.equal(state["moment"], old)
