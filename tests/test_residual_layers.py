"""Layers in residual closures: recorded inputs, output gradients and factors; rows of J; sums of Kronecker products."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from residual_cases import dense, flat, grad, mlp, off, poisson, recorded
from secondorder import taylor
from secondorder.preconditioner.kronecker_sum import diagonalise, solve
from secondorder.preconditioner.layer_curvature import observed
from secondorder.residuals.columns import by_columns
from secondorder.residuals.expand import Memory
from secondorder.residuals.layers import LayerCapture
from secondorder.residuals.linearization import linearize
from secondorder.residuals.quadratic import best_combination, combined
from secondorder.residuals.terms import term


def captured(closure, params):
    """The linearisation, and what was seen on the way."""
    capture = LayerCapture(params)
    linear = linearize(capture.around(closure), params, "expand")
    return linear, capture


def points(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def columns(layers, params, linear, slices):
    """J from (Z, G): each layer's Σ_s g z̄ᵀ, at the places of weight and bias."""
    starts = torch.tensor([0, *[p.numel() for p in params]]).cumsum(0)
    J = torch.zeros(len(linear.residual), int(starts[-1]), dtype=torch.float64)
    for layer in layers:
        i = params[layer.weight].shape[1]
        for use, rows in zip(layer.uses, [slices[u.term] for u in layer.uses], strict=True):
            block = use.gradients.mT @ use.inputs
            J[rows, starts[layer.weight] : starts[layer.weight + 1]] += block[:, :, :i].flatten(1)
            if layer.bias is not None:
                J[rows, starts[layer.bias] : starts[layer.bias + 1]] += block[:, :, i]
    return J


# Recorded -------------------------------------------------------------------------------------------------------------


def problem(name):
    z = recorded(f"{name}_problem_engdw")
    net = mlp(2, *[len(z[f"W{i}"]) for i in range(3)])
    for i, layer in enumerate(net[::2]):
        layer.weight.data, layer.bias.data = z[f"W{i}"].clone(), z[f"b{i}"].clone()
    space = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def closure():
        if name == "tiny":
            operator = taylor.laplacian(net, z["X_int"])[1] + z["y_int"]
        else:
            _, du, lap = taylor.value_gradient_laplacian(net, z["X_int"], space)
            operator = du[:, 0] - lap / 4
        return {"interior": operator, "boundary": net(z["X_bnd"]) - z["y_bnd"]}

    return z, net, closure


@pytest.mark.parametrize("name", ["tiny", "tiny_heat"])
def test_recorded_inputs_and_gradients(name):
    z, net, closure = problem(name)
    params = list(net.parameters())
    linear, capture = captured(closure, params)
    layers = capture.layers()
    assert [(layer.weight, layer.bias) for layer in layers] == [(0, 1), (2, 3), (4, 5)] and not capture.nested
    for k, layer in enumerate(layers):
        assert [(use.term, use.jet) for use in layer.uses] == [(0, True), (1, False)]
        for use, part in zip(layer.uses, ("int", "bnd"), strict=True):
            assert off(use.inputs, z[f"Z_{part}_{k}"]) < 1e-10
            assert off(use.gradients * len(use.inputs) ** 0.5, z[f"G_{part}_{k}"]) < 1e-10
    N = len(z["X_int"])
    J = columns(layers, params, linear, [slice(0, N), slice(N, None)])
    assert off(J, z["J"]) < 1e-9 and off(J @ J.mT, linear.kernel()) < 1e-9
    assert off(linear.rows(), z["J"]) < 1e-10 and off(linear.kernel(), z["JJT"]) < 1e-10


def test_recorded_factors():
    z, net, closure = problem("tiny")
    expected, params = recorded("tiny_kfac"), list(net.parameters())
    _, capture = captured(closure, params)
    for k, layer in enumerate(capture.layers()):
        like = params[layer.weight]
        for number, part in enumerate(("int", "bnd")):
            A, B, weight = layer.sums({number}, like)
            assert off(A / weight, expected[f"A_{part}_{k}"]) < 1e-10 and off(B, expected[f"B_{part}_{k}"]) < 1e-10
        A, B, weight = layer.sums({0}, like, "reduce")
        assert off(A / weight, expected[f"Areduce_int_{k}"]) < 1e-10 and off(B, expected[f"Breduce_int_{k}"]) < 1e-10


# Rows of J from (Z, G) ------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A layer that is called twice, one without bias, one in the middle of an axis, and parameters of no layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 2, bias=False)
        self.slope = nn.Parameter(torch.tensor(1.3))

    def forward(self, x):
        z = torch.tanh(self.slope * self.first(x))
        z = torch.tanh(self.shared(z)) + z
        z = torch.stack([torch.tanh(self.shared(z)), z * z], 1)
        return self.last(z).sum(1)


@pytest.mark.parametrize("operator", ["laplacian", "gradient", "biharmonic", "second_order"])
def test_rows_of_operators(operator):
    """Against autograd's: two equations, weights of terms, a shared layer, jets of jets."""
    net, x, edge = Net().double(), points(5, 2), points(4, 2, seed=1)
    params = list(net.parameters())

    def closure():
        if operator == "second_order":
            u, d = taylor.second_order(net, x, torch.tensor([[2.0, 0.5], [0.5, -1.0]], dtype=torch.float64))
        else:
            u, d = getattr(taylor, operator)(net, x)
        d = d[:, 0] if operator == "gradient" else d
        return {"pde": term(d * u, 3.0), "edge": net(edge)[:, :1]}

    linear, capture = captured(closure, params)
    layers = capture.layers()
    assert {(layer.weight, layer.bias) for layer in layers} == {(1, 2), (3, 4), (5, None)}
    assert {(use.term, use.jet) for layer in layers for use in layer.uses} == {(0, True), (1, False)}
    assert all(float(use.weight) == pytest.approx((3.0, 1.0)[use.term]) for layer in layers for use in layer.uses)
    slices = {0: [slice(0, 10, 2), slice(1, 10, 2)], 1: [slice(10, 14)]}
    _, J = dense(closure, params)
    own = torch.zeros_like(J)
    for layer in layers:
        per_term = {0: iter(slices[0]), 1: iter(slices[1])}
        one = [type(layer)(layer.weight, layer.bias, [use]) for use in layer.uses]
        for single in one:
            t = single.uses[0].term
            own += columns([single], params, linear, {t: next(per_term[t])})
    assert off(own[:, 1:], J[:, 1:]) < 1e-10
    assert off(linear.rows(), J) < 1e-10


def test_values_and_nothing_else_have_ones():
    """(N, q, i) into a layer: q values a sample, and their derivatives."""
    layer, x = nn.Linear(1, 3).double(), points(6, 2)
    closure = lambda: [taylor.laplacian(lambda y: layer(torch.sin(y).unsqueeze(-1)).prod(1), x)[1]]  # noqa: E731
    _, capture = captured(closure, list(layer.parameters()))
    (found,) = capture.layers()
    assert all(use.inputs.shape == (6, 2 * 4, 2) for use in found.uses) and len(found.uses) == 3
    expected = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0], dtype=torch.float64).expand(6, -1)
    assert all(torch.equal(use.inputs[:, :, -1], expected) for use in found.uses)


def test_factors_are_weighted_as_the_loss_is():
    """Two terms together: B adds up, A is the mean of both by their weights."""
    net, x, y = mlp(2, 3, 1), points(7, 2), points(4, 2, seed=1)
    params = list(net.parameters())
    _, capture = captured(lambda: {"a": term(net(x), 3.0), "b": net(y)}, params)
    for layer in capture.layers():
        like = params[layer.weight]
        (A, B, w), (A1, B1, w1), (A2, B2, w2) = (layer.sums(terms, like) for terms in ({0, 1}, {0}, {1}))
        assert float(w1) == pytest.approx(3) and float(w2) == pytest.approx(1)
        z = torch.cat([x, torch.ones(7, 1)], 1) if layer.weight == 0 else None
        if z is not None:
            assert off(A1 / w1, z.mT @ z / 7) < 1e-12
        assert off(A / w, (3 * A1 / w1 + A2 / w2) / 4) < 1e-12 and off(B, B1 + B2) < 1e-12


def test_derivatives_by_autograd_are_told():
    net, x = mlp(2, 4, 1), points(5, 2).requires_grad_(True)
    source = lambda: grad(torch.sin(x).prod(1), x)[:, 0]  # noqa: E731  of no parameter
    params = list(net.parameters())

    def closure():
        u, lap = taylor.laplacian(net, x)
        return {"pde": lap[:, 0] + source(), "flux": grad(net(x), x)[:, 0], "edge": u[:, 0]}

    _, capture = captured(closure, params)
    assert capture.nested == {1}


def test_weights_by_gradients_are_no_derivatives_of_a_term():
    net, x = mlp(2, 4, 1), points(5, 2)
    params = list(net.parameters())

    def closure():
        r = taylor.laplacian(net, x)[1][:, 0]
        size = flat(torch.autograd.grad(r.square().mean(), params, retain_graph=True, materialize_grads=True)).norm()
        return {"pde": r * size}

    _, capture = captured(closure, params)
    assert not capture.nested and len(capture.layers()) == 2


def test_known_closures_and_switched_off():
    """The passes are counted anew in every evaluation; nothing is seen, and nothing changed, when it is off."""
    net, x = mlp(2, 4, 1), points(5, 2)
    params, memory = list(net.parameters()), Memory()
    capture = LayerCapture(params)
    closure = capture.around(lambda: {"r": net(x)})
    for _ in range(3):
        linearize(closure, params, memory=memory)
        assert [len(layer.uses) for layer in capture.layers()] == [1, 1]
    capture.active = False
    before = capture.layers()
    assert torch.equal(closure()["r"], net(x)) and len(capture.layers()) == len(before)


def test_a_constraint_on_an_integral():
    """One residual that depends on many samples, and on a layer at two numbers of them."""
    net, x, many = mlp(2, 3, 1), points(5, 2), points(30, 2, seed=1)
    params = list(net.parameters())
    _, capture = captured(
        lambda: {"pde": taylor.laplacian(net, x)[1], "mass": net(many).mean(0) - net(x)[:1, 0]}, params
    )
    first = capture.layers()[0]
    assert [(use.term, use.jet, len(use.inputs)) for use in first.uses] == [(0, True, 5), (1, False, 30), (1, False, 5)]
    A, B, weight = first.sums({1}, params[0])
    z = [torch.cat([y, torch.ones(len(y), 1)], 1) for y in (many, x)]
    assert off(A / weight, sum(y.mT @ y / len(y) for y in z) / 2) < 1e-12 and bool((B.diagonal() > 0).all())


def test_frozen_and_functional_weights():
    net, x = mlp(2, 4, 1), points(5, 2)
    net[0].weight.requires_grad_(False)
    W = nn.Parameter(points(2, 1))
    params = [*net.parameters(), W]
    _, capture = captured(lambda: [F.linear(taylor.laplacian(net, x)[1], W)], params)
    assert [(layer.weight, layer.bias) for layer in capture.layers()] == [(2, 3), (4, None)]


# Found in J: nested autograd ------------------------------------------------------------------------------------------


def heat(net, x, nested):
    """u_t - u_xx / 4 with x = (t, x)."""
    if nested:
        x = x.clone().requires_grad_(True)
        du = grad(net(x), x)
        return du[:, 0] - grad(du[:, 1], x)[:, 1] / 4
    _, du, lap = taylor.value_gradient_laplacian(net, x, torch.tensor([0.0, 1.0], dtype=x.dtype))
    return du[:, 0, 0] - lap[:, 0] / 4


def burgers(net, x, nested):
    """First derivatives alone, and a product: u u_x + u_t."""
    x = x.clone().requires_grad_(nested)
    u = net(x)
    du = grad(u, x) if nested else taylor.gradient(net, x)[1][..., 0]
    return u[:, 0] * du[:, 1] + du[:, 0]


def varying(net, x, nested):
    """-exp(x) Δu + u²: a coefficient at every sample, and a sign."""
    y = x.clone().requires_grad_(nested)
    if nested:
        u = net(y)
        du = grad(u, y)
        lap = sum(grad(du[:, i], y)[:, i] for i in range(2))
    else:
        u, lap = (part[:, 0] for part in taylor.laplacian(net, y))
    return -x[:, 0].exp() * lap + u.reshape(len(u), -1)[:, 0] ** 2


def system(net, x, nested):
    """Two fields and two equations: Δu + v, Δv - u."""
    x = x.clone().requires_grad_(nested)
    if nested:
        u = net(x)
        first = [grad(u[:, k], x) for k in range(2)]
        lap = torch.stack([sum(grad(du[:, i], x)[:, i] for i in range(2)) for du in first], 1)
    else:
        u, lap = taylor.laplacian(net, x)
    return lap + u.flip(1) * torch.tensor([1.0, -1.0], dtype=x.dtype)


OPERATORS = {"heat": heat, "burgers": burgers, "varying": varying, "system": system}


def in_rows(operator, nested, dtype=torch.float64):
    """Layers of one problem in either way of writing it, with J and the parameters."""
    net = mlp(2, 5, 4, 2 if operator == "system" else 1, dtype=dtype)
    x, edge, params = points(9, 2).to(dtype), points(4, 2, seed=1).to(dtype), list(net.parameters())
    linear, capture = captured(
        lambda: {"pde": term(OPERATORS[operator](net, x, nested), 3.0), "edge": net(edge)}, params
    )
    assert capture.nested == ({0} if nested else set())
    capture.nested = {0}  # so that those of a jet are found in J as well
    return by_columns(capture.layers(), linear, capture), linear, params


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("operator", OPERATORS)
def test_factors_do_not_depend_on_how_derivatives_are_written(operator, dtype):
    found = [in_rows(operator, nested, dtype)[::2] for nested in (True, False)]
    (nested, params), (jets, _) = found
    for one, other in zip(nested, jets, strict=True):
        for t in (0, 1):
            for sharing in ("expand", "reduce"):
                sums = [layer.sums({t}, params[layer.weight], sharing) for layer in (one, other)]
                assert all(off(x, y) < 100 * torch.finfo(dtype).eps for x, y in zip(*sums, strict=True))


@pytest.mark.parametrize("operator", OPERATORS)
def test_columns_that_are_found(operator):
    """Their sum is J; z̄ and the unscaled g are equally long; the bias is in the value's column alone."""
    layers, linear, params = in_rows(operator, nested=True)
    J, n = linear.rows(), 2 if operator == "system" else 1
    own = torch.zeros_like(J)
    for layer in layers:
        uses = [use for use in layer.uses if use.term == 0]
        assert len(uses) == n and all(use.jet and use.found for use in uses)
        rest = [use for use in layer.uses if use.term == 1]
        for m, use in enumerate(uses):
            one = type(layer)(layer.weight, layer.bias, [use])
            own += columns([one], params, linear, {0: slice(m, 9 * n, n)})
            z, g = use.inputs.norm(dim=2), use.gradients.norm(dim=2) * (9 / 3.0) ** 0.5
            assert off(z, g) < 1e-12
            assert int((use.inputs[:, :, -1].abs().amax(0) > 0).sum()) <= 1
        assert all(use.inputs.shape[1] == 1 for use in rest)
    assert off(own[: 9 * n], J[: 9 * n]) < 1e-12
    first, middle, last = ([use.inputs.shape[1] for use in layer.uses if use.term == 0] for layer in layers)
    expected = {"heat": (3, 3, 1), "burgers": (2, 2, 1), "varying": (3, 4, 1), "system": (3, 4, 2)}
    assert (first[0], middle[0], last[0]) == expected[operator]


def test_columns_of_any_closure():
    """A layer that is called twice, one without bias, a frozen bias; an integral, and a use that J has by columns."""
    net, x, many = Net().double(), points(9, 2), points(20, 2, seed=1).requires_grad_(True)
    net.first.bias.requires_grad_(False)
    params = [net.first.weight, net.shared.weight, net.shared.bias, net.last.weight]

    def closure():
        y = x.clone().requires_grad_(True)
        du = grad(net(y)[:, 0], y)
        flux = grad(net(many)[:, 1], many)[:, 0].mean().reshape(1)
        return {"pde": du[:, 0] * grad(du[:, 1], y)[:, 0], "flux": flux * net.first.weight.norm()}

    linear, capture = captured(closure, params)
    found = by_columns(capture.layers(), linear, capture)
    assert capture.nested == {0, 1} and [(layer.weight, layer.bias) for layer in found] == [
        (0, None),
        (1, 2),
        (3, None),
    ]
    assert off(columns(found, params, linear, [slice(0, 9), slice(9, 10)]), dense(closure, params)[1]) < 1e-10


@pytest.mark.parametrize("operator", OPERATORS)
def test_scales_of_factors_that_are_found(operator):
    """The mean eigenvalue of A is 1, and A ⊗ B has the trace of the block of JᵀJ."""
    layers, linear, params = in_rows(operator, nested=True)
    J = dict(enumerate(linear.rows()[: -4 * len(params[-1])].split([p.numel() for p in params], 1)))
    for layer in layers:
        factors = observed(layers, linear, params, "expand")[layer.weight]
        A, B = factors["A_operator"], factors["B_operator"]
        assert float(A.diagonal().mean()) == pytest.approx(1)
        block = J[layer.weight].square().sum() + J[layer.bias].square().sum()
        assert float(A.trace() * B.trace()) == pytest.approx(float(block))


def test_columns_of_golden_jets():
    """Up to their scales those of the published code, without columns that nothing depends on."""
    z, net, _ = problem("tiny")
    params = list(net.parameters())
    linear, capture = captured(lambda: poisson(net, z["X_int"], z["y_int"], z["X_bnd"], z["y_bnd"]), params)
    unit = torch.nn.functional.normalize
    for k, layer in enumerate(by_columns(capture.layers(), linear, capture)):
        (use,) = [use for use in layer.uses if use.term == 0]
        Z, G = z[f"Z_int_{k}"], z[f"G_int_{k}"] / len(use.inputs) ** 0.5
        present = [s for s in range(4) if float(Z[:, s].norm()) * float(G[:, s].norm()) > 1e-12]
        assert use.inputs.shape[1] == len(present)
        for s in present:
            cosine = (unit(use.inputs, dim=2) * unit(Z[:, s : s + 1], dim=2)).sum(2).abs()
            c = int(cosine.sum(0).argmax())
            assert bool((cosine[:, c] > 1 - 1e-12).all())
            one, other = (
                g[:, :, None] * y[:, None] for g, y in ((use.gradients[:, c], use.inputs[:, c]), (G[:, s], Z[:, s]))
            )
            assert off(one, other) < 1e-10


# Sums of two Kronecker products ---------------------------------------------------------------------------------------


def spd(n, condition, generator):
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    values = torch.logspace(0, -condition, n, dtype=torch.float64)
    return (Q * values) @ Q.mT


@settings(max_examples=25, deadline=None)
@given(
    o=st.integers(1, 5),
    i=st.integers(1, 5),
    conditions=st.tuples(*[st.floats(0, 9)] * 4),
    scales=st.tuples(*[st.floats(-6, 6)] * 4),
    seed=st.integers(0, 99),
)
def test_inverse_of_the_sum(o, i, conditions, scales, seed):
    """Against the dense matrix: a small residual always, a small error where it is well conditioned."""
    generator = torch.Generator().manual_seed(seed)
    sides = [spd(n, c, generator) * 10**s for n, c, s in zip((i, i, o, o), conditions, scales, strict=True)]
    A1, A2, B1, B2 = sides
    dense_sum = torch.kron(B1, A1) + torch.kron(B2, A2)
    G = torch.randn(o, i, dtype=torch.float64, generator=generator)
    A, B = diagonalise(A1[None], A2[None]), diagonalise(B1[None], B2[None])
    assert bool(A.ok.all() & B.ok.all())
    X = solve(A, B, G[None])[0]
    residual = (dense_sum @ X.flatten() - G.flatten()).norm()
    size = torch.linalg.matrix_norm(dense_sum, 2)
    assert residual <= 1e-8 * (size * X.norm() + G.norm())
    condition = float(torch.linalg.cond(dense_sum))
    if condition < 1e4 and max(conditions) < 3:
        assert off(X.flatten(), torch.linalg.solve(dense_sum, G.flatten())) < 1e-10


def test_stacked_and_one_by_one_are_the_same():
    generator = torch.Generator().manual_seed(0)
    A1, A2 = (torch.stack([spd(4, 2, generator) for _ in range(3)]) for _ in range(2))
    B1, B2 = (torch.stack([spd(2, 2, generator) for _ in range(3)]) for _ in range(2))
    G = torch.randn(3, 2, 4, dtype=torch.float64, generator=generator)
    X = solve(diagonalise(A1, A2), diagonalise(B1, B2), G)
    for k in range(3):
        one = slice(k, k + 1)
        assert off(solve(diagonalise(A1[one], A2[one]), diagonalise(B1[one], B2[one]), G[one]), X[one]) < 1e-12


def test_a_term_that_is_missing_and_a_layer_that_is_not_used():
    """One of the products zero: the other's inverse. Both, nothing known: zero, whatever the gradient."""
    generator = torch.Generator().manual_seed(0)
    A, B, none = spd(3, 1, generator)[None], spd(2, 1, generator)[None], torch.zeros(1, 3, 3, dtype=torch.float64)
    G = torch.randn(1, 2, 3, dtype=torch.float64, generator=generator)
    X = solve(diagonalise(A, none), diagonalise(B, none[:, :2, :2]), G)
    assert off(X[0], torch.linalg.inv(B[0]) @ G[0] @ torch.linalg.inv(A[0])) < 1e-12
    pencils = diagonalise(none, none), diagonalise(none[:, :2, :2], none[:, :2, :2])
    assert torch.equal(solve(*pencils, G), 0 * G)


def test_what_is_not_finite_is_told():
    A = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
    A[0, 1, 1] = torch.nan
    assert diagonalise(A, torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)).ok.tolist() == [False, True]


# The best combination of directions -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(-12, 12), damping=st.sampled_from([0.0, 1e-2]))
def test_best_combination(seed, scale, damping):
    """Least squares over the span, whatever the directions' lengths."""
    generator = torch.Generator().manual_seed(seed)
    J, r = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((9, 5), (9,)))
    d = [torch.randn(5, dtype=torch.float64, generator=generator) for _ in range(2)]
    d[1] *= 10**scale
    c = best_combination([J @ x for x in d], r, [[x] for x in d], damping)
    D = torch.stack(d, 1)
    system = torch.cat([J, damping**0.5 * torch.eye(5, dtype=torch.float64)]) @ D
    unit = system / system.norm(dim=0)
    expected = torch.linalg.lstsq(unit, torch.cat([-r, torch.zeros(5)])[:, None]).solution[:, 0] / system.norm(dim=0)
    assert off(combined(c, d), D @ expected) < 1e-9


def test_parallel_and_vanishing_directions():
    J, r, d = points(6, 4), points(6, seed=1), points(4, seed=2)
    alone = best_combination([J @ d], r)
    step = combined(alone, [d])
    for other in (0 * d, 2 * d, -1e-9 * d):
        c = best_combination([J @ d, J @ other], r)
        assert off(combined(c, [d, other]), step) < 1e-9 and bool(torch.isfinite(c).all())
