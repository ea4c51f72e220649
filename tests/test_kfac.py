"""KFAC's step against dense algebra, in float64: what is divided by what."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secondorder
from dense_kfac import (
    SETTINGS,
    assert_near,
    backward,
    batch,
    cross_entropy,
    gradient,
    joint,
    kfac,
    linears,
    mlp,
    pairs,
    solved,
    stepped,
)

KINDS = ("relative", "absolute", "pi", "factor")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [11, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_step_solves_the_damped_system(kind, n, bias):
    model = mlp(5, 7, 3, bias=bias)
    x, y = batch(model, n)
    opt = kfac(model, damping_kind=kind)
    backward(model, x, y)
    grads = [gradient(layer) for layer in linears(model)]
    expected = pairs(model, x, y)
    for U, (A, G), g in zip(stepped(opt, linears(model)), expected, grads, strict=True):
        assert_near(U, solved(A, G, g, kind))


@pytest.mark.parametrize("kind", ["relative", "pi"])
def test_large_layers_are_solved_block_by_block(kind):
    model = mlp(5, 7, 3)
    x, y = batch(model)
    opt = kfac(model, max_block_size=3, damping_kind=kind)
    backward(model, x, y)
    layer, g = model[0], gradient(model[0])
    A, G = pairs(model, x, y)[0]
    U = stepped(opt, [layer])[0]
    for rows in (slice(0, 3), slice(3, 5), slice(5, 7)):
        for columns in (slice(0, 3), slice(3, 6)):  # the bias is a column of the last
            expected = solved(A[columns, columns], G[rows, rows], g[rows, columns], kind)
            assert_near(U[rows, columns], expected)


def test_bias_apart_from_its_weight_is_divided_by_the_output_factor():
    model = mlp(5, 4, 3)
    x, y = batch(model)
    first, last = model[0], model[2]
    groups = [dict(params=[first.weight, last.weight]), dict(params=[first.bias, last.bias])]
    opt = secondorder.KFAC(groups, module=model, **SETTINGS)
    backward(model, x, y)
    A, G = pairs(model, x, y)[0]
    w, b = first.weight.grad, first.bias.grad
    U = stepped(opt, [first])[0]
    assert_near(U[:, :-1], solved(A[:-1, :-1], G, w))
    assert_near(U[:, -1:], solved(torch.ones(1, 1, dtype=w.dtype), G, b[:, None]))


def test_inputs_alone_are_a_solve_on_one_side():
    model = mlp(5, 7, 3)
    x, y = batch(model)
    opt = kfac(model, sides="inputs")
    backward(model, x, y)
    grads = [gradient(layer) for layer in linears(model)]
    expected = pairs(model, x, y)
    for U, (A, _), g in zip(stepped(opt, linears(model)), expected, grads, strict=True):
        ridge = SETTINGS["damping"] * A.trace() / len(A) * torch.eye(len(A), dtype=A.dtype)
        assert_near(U, torch.linalg.solve(A + ridge, g, left=False))


def test_embedding_rows_are_divided_by_their_frequencies_and_wide_heads_by_their_energies():
    words, width = 12, 4
    model = nn.Sequential(nn.Embedding(words, width), nn.Linear(width, words)).double()
    tokens, targets = torch.randint(0, words - 2, (6, 5)), torch.randint(0, words, (6, 5))  # two words do not occur
    embedding, head = copy.deepcopy(model)
    z = embedding(tokens)
    z.retain_grad()
    cross_entropy(head(z), targets).backward()
    g = z.grad.flatten(0, 1)
    frequency = torch.bincount(tokens.flatten(), minlength=words).double() / len(g)
    A, G = pairs(nn.Sequential(head), z.detach(), targets)[0]
    opt = kfac(model, max_block_size=8)
    backward(model, tokens, targets)
    U_embedding, U_head = stepped(opt, model)
    assert_near(U_embedding, solved(torch.diag(frequency), len(g) * g.T @ g, embedding.weight.grad.T).T)
    assert torch.equal(U_embedding[-2:], torch.zeros(2, width, dtype=g.dtype))
    assert_near(U_head, solved(A, torch.diag(G.diagonal()), gradient(head)))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_every_group_of_a_convolution_is_a_block(sharing):
    conv = nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(6 * 9, 3)).double()
    x, y = torch.randn(8, 4, 5, 5, dtype=torch.float64), torch.randint(0, 3, (8,))
    twin = copy.deepcopy(model)
    z = twin[0](x)
    z.retain_grad()
    cross_entropy(twin[1:](z), y).backward()
    opt = kfac(model, sharing=sharing)
    backward(model, x, y)
    U = stepped(opt, [conv])[0]
    for j in range(2):
        a = F.unfold(x[:, 2 * j : 2 * j + 2], 3, padding=1, stride=2).mT  # (n, s, d)
        a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], -1)
        g = z.grad[:, 3 * j : 3 * j + 3].flatten(2).mT
        a, g = (a.mean(1), g.sum(1)) if sharing == "reduce" else (a.flatten(0, 1), g.flatten(0, 1))
        rows = slice(3 * j, 3 * j + 3)
        assert_near(U[rows], solved(a.T @ a / len(a), len(x) * g.T @ g, gradient(twin[0])[rows]))


def test_norm_layers_have_the_exact_two_by_two_block_of_every_feature():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 3, (9,))
    twin, examples = copy.deepcopy(model), []

    def of(layer, what):
        return torch.stack([what(layer.weight), what(layer.bias)], 1).clone()  # (feature, 2)

    for i in range(len(x)):
        backward(twin, x[i : i + 1], y[i : i + 1])
        examples.append(of(twin[0], lambda p: p.grad))
    E = torch.stack(examples)
    blocks, old = torch.einsum("nfi,nfj->fij", E, E) / len(x), of(twin[0], torch.Tensor.detach)
    opt = kfac(model)
    backward(model, x, y)
    opt.step()
    U = old - of(model[0], torch.Tensor.detach)
    for block, g, u in zip(blocks, E.mean(0), U, strict=True):
        ridge = SETTINGS["damping"] * block.trace() / 2 * torch.eye(2, dtype=block.dtype)
        assert_near(u, torch.linalg.solve(block + ridge, g))


def test_split_damping_is_exact_where_one_side_is_a_number():
    model = mlp(5, 4, 1)
    x, y = batch(model)
    opt = kfac(model, damping_kind="pi")

    def loss_of(out, y):
        return F.mse_loss(out[:, 0], y.double() + x[:, 0])

    backward(model, x, y, loss_of)
    last, g = model[2], gradient(model[2])
    A, G = pairs(model, x, y, loss_of)[1]
    assert_near(stepped(opt, [last])[0], solved(A, G, g, "absolute"))


@pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.EKFAC])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_where_there_is_no_curvature_and_no_damping_nothing_moves(cls, clip):
    """A model that is certain has no Fisher information, whatever the labels say."""
    model = mlp(5, 3).float()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([200.0, 0.0, 0.0]))
    old = joint(model[0])
    opt = kfac(model, cls, kl_clip=clip)
    outputs = model(torch.randn(6, 5))
    opt.fisher_backward(outputs, "cross_entropy", "mc")
    cross_entropy(outputs, torch.ones(6, dtype=torch.long)).backward()
    opt.step()
    assert gradient(model[0]).norm() > 0.1 and torch.equal(joint(model[0]), old)


@settings(max_examples=15, deadline=None)
@given(loss=st.floats(-6, 6), inputs=st.floats(-3, 3), sides=st.sampled_from(["both", "inputs"]))
def test_relative_damping_knows_no_units(loss, inputs, sides):
    """c·loss moves 1/c as far (c, where only inputs are whitened); inputs in other units, as far in those units."""
    c, alpha = 10**loss, 10**inputs
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).double()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[0].weight.div_(alpha)
    x, y = batch(model)
    ours, theirs = kfac(model, sides=sides), kfac(twin, sides=sides)
    backward(model, x, y)
    backward(twin, alpha * x, y, lambda out, y: c * cross_entropy(out, y))
    U, V = stepped(ours, [model[0]])[0], stepped(theirs, [twin[0]])[0]
    assert_near(V * alpha, U * (c if sides == "inputs" else 1 / c), 1e-6)
