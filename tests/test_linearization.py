"""Linearised residual closures against recorded Jacobians and `torch.func.jacrev`, by autograd in float64."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev
from torch.utils._python_dispatch import TorchDispatchMode

from residual_cases import dense, flat, grad, recorded
from secondorder.residuals import expand as expand_module
from secondorder.residuals import factored
from secondorder.residuals.expand import Memory
from secondorder.residuals.linearization import linearize
from secondorder.residuals.matvec import Products
from secondorder.residuals.terms import term

BACKENDS = ["expand", "matvec"]


def close(actual, expected, tolerance=1e-10):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm().clamp_min(1e-30)


def points(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mlp(*sizes, bias=True):
    torch.manual_seed(0)
    layers = [nn.Linear(i, o, bias=bias) for i, o in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1]).double()


def laplacian(u, x):
    first = grad(u, x)
    return sum(grad(first[:, i], x)[:, i] for i in range(x.shape[1]))


def poisson(net, n=12, n_boundary=5, d=2):
    """A textbook closure."""
    interior, boundary = points(n, d), points(n_boundary, d, seed=1)
    dtype = next(net.parameters()).dtype
    interior, boundary = interior.to(dtype), boundary.to(dtype)

    def closure():
        x = interior.clone().requires_grad_(True)
        return {
            "pde": laplacian(net(x)[:, 0], x) + x.prod(1),
            "boundary": term((net(boundary) - boundary[:, :1].sin())[:, 0], weight=3.0),
        }

    return closure


def verify(lin, r, J, params, tolerance=1e-10):
    """Everything that a linearisation says."""
    generator = torch.Generator().manual_seed(5)
    v = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in params]
    u = torch.randn(r.shape, dtype=r.dtype, generator=generator)
    close(lin.residual, r, tolerance)
    close(lin.loss, r.square().sum() / 2, tolerance)
    close(lin.rows(), J, tolerance)
    close(lin.jvp(v), J @ flat(v), tolerance)
    close(flat(lin.vjp(u)), J.T @ u, tolerance)
    close(flat(lin.gradient), J.T @ r, tolerance)
    close(lin.kernel(), J @ J.T, tolerance)
    close(lin.normal(), J.T @ J, tolerance)
    X = torch.stack([u, lin.residual, u + 1], 1)
    close(lin.apply_kernel(X), J @ (J.T @ X), tolerance)
    exact = lin.backend == "expand"
    assert abs(lin.trace() - J.square().sum()) <= (1e-10 if exact else 1.0) * J.square().sum()
    assert sorted(i for layer in lin.groups for i in layer) == list(range(len(params)))
    sizes = [p.numel() for p in params]
    for own in ([0], list(range(len(params)))[::-2]):
        columns = torch.cat([J.split(sizes, 1)[i] for i in own], 1)
        close(lin.restricted(own).rows(), columns, tolerance)
        close(lin.restricted(own).kernel(), columns @ columns.T, tolerance)
    assert [part.shape for part in lin.gradient] == [p.shape for p in params]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny", "tiny_heat"])
def test_recorded_jacobian(name, backend):
    data = recorded(f"{name}_problem_engdw")
    net = mlp(2, *[len(data[f"W{i}"]) for i in range(3)])
    for i, layer in enumerate(net[::2]):
        layer.weight.data, layer.bias.data = data[f"W{i}"], data[f"b{i}"]

    def closure():
        x = data["X_int"].clone().requires_grad_(True)
        u = net(x)
        first = grad(u, x)
        if name == "tiny":
            operator = grad(first[:, 0], x)[:, 0] + grad(first[:, 1], x)[:, 1] + data["y_int"][:, 0]
        else:
            operator = first[:, 0] - grad(first[:, 1], x)[:, 1] / 4
        return {"interior": operator, "boundary": net(data["X_bnd"]) - data["y_bnd"]}

    lin = linearize(closure, list(net.parameters()), backend)
    assert lin.backend == backend and lin.reason == ""
    close(lin.residual, data["r"])
    close(lin.rows(), data["J"])
    close(lin.kernel(), data["JJT"])
    close(flat(lin.gradient), data["grad"])
    close(lin.loss, data["loss"].double(), 1e-6)  # recorded in float32


class Skip(nn.Module):
    """Skip connections, a shared layer, a layer without bias, an adaptive activation and a middle axis."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared, self.last = nn.Linear(2, 5), nn.Linear(5, 5), nn.Linear(5, 2, bias=False)
        self.slope, self.shift = nn.Parameter(torch.tensor(1.2)), nn.Parameter(torch.randn(5))
        self.by_hand, self.scale = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(1, 5))

    def forward(self, x):
        z = torch.tanh(self.slope * self.first(x) + self.shift)
        z = z + torch.tanh(self.shared(z))
        z = torch.tanh(self.shared(z) @ self.by_hand) + z @ self.by_hand.T
        z = z * self.scale + F.linear(z, self.by_hand.t(), self.shift)
        return self.last(torch.stack([z, z**2], 1) - self.shift).sum(1)


def system(net, n=7):
    """Two fields, vector-valued residuals of unlike sizes."""
    inside, outside = points(n, 2), points(3, 2, seed=2)

    def closure():
        x = inside.clone().requires_grad_(True)
        u, v = net(x).unbind(1)
        return {
            "momentum": torch.stack([laplacian(u, x) + u * v, laplacian(v, x) - v**2], 1),
            "divergence": grad(u, x)[:, 0] + grad(v, x)[:, 1],
            "boundary": net(outside) - 1,
        }

    return closure


@pytest.mark.parametrize("backend", BACKENDS)
def test_vector_valued_residuals_skips_and_shared_weights(backend):
    net = Skip().double()
    params, closure = list(net.parameters()), system(net)
    lin = linearize(closure, params, backend)
    verify(lin, *dense(closure, params), params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jacrev(backend):
    net, x = mlp(3, 6, 4), points(9, 3)
    J = jacrev(lambda p: functional_call(net, p, (x,)).sin().flatten() / 3)(dict(net.named_parameters()))
    lin = linearize(lambda: [net(x).sin()], list(net.parameters()), backend)
    close(lin.rows(), torch.cat([part.flatten(1) for part in J.values()], 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_and_unused_parameters_have_zero_columns(backend):
    net = mlp(2, 5, 5, 1)
    net[0].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    params = [*net.parameters(), unused]
    lin = linearize(poisson(net), params, backend)
    trained = [p for p in params if p.requires_grad]
    r, J = dense(poisson(net), trained)
    columns = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in params])
    whole = J.new_zeros(len(r), len(columns))
    whole[:, columns] = J
    verify(lin, r, whole, params)


INVERSE = {
    "multiplied": lambda nu, u: nu * u,
    "from the right": lambda nu, u: u / nu,
    "power": lambda nu, u: u.abs() ** nu,
    "exponential": lambda nu, u: nu.exp() * u,
    "both": lambda nu, u: nu * u - nu.square(),
    "times two": lambda nu, u: (2 * nu) * u,
}


@pytest.mark.parametrize("use", INVERSE)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_coefficients_of_inverse_problems(use, shape):
    net, nu = mlp(2, 6, 1), nn.Parameter(torch.full(shape, 0.7, dtype=torch.float64))
    inside, seen = points(11, 2), points(4, 2, seed=3)

    def closure():
        x = inside.clone().requires_grad_(True)
        u = net(x)[:, 0]
        return {"pde": grad(u, x)[:, 0] - INVERSE[use](nu, laplacian(u, x)), "data": net(seen)[:, 0] - 0.3}

    params, memory = [*net.parameters(), nu], Memory()
    for _ in range(2):
        lin = linearize(closure, params, memory=memory)
        assert lin.backend == "expand"
        verify(lin, *dense(closure, params), params)
    assert memory.excluded == (set() if use in ("multiplied", "from the right", "power") else {4})


def batch_norm():
    net = mlp(2, 6, 6, 1)
    net.insert(1, nn.BatchNorm1d(6, affine=False).double())
    return net, poisson(net), "depend on other samples"


def centred():
    net, x = mlp(2, 6, 1), points(10, 2)
    return net, lambda: {"r": (net(x) - net(x).mean(0))[:, 0]}, "depend on other samples"


def rolled():
    net, x = mlp(2, 6, 1), points(10, 2)
    return net, lambda: {"r": net(x).roll(1, 0)[:, 0]}, "depend on other samples"


def together():
    net, x = mlp(2, 20, 1), points(24, 2)
    return net, lambda: {"a": net(x)[:13], "b": net(x)[13:]}, "not the 13 samples"


def convolution():
    net, x = nn.Sequential(nn.Conv1d(2, 40, 1), nn.Tanh(), nn.Flatten(), nn.Linear(120, 1)).double(), points(4, 2, 3)
    return net, lambda: {"r": net(x)}, "in conv1d"


def weight_normalised():
    net = mlp(3, 30, 1)
    nn.utils.parametrizations.weight_norm(net[0])
    return net, poisson(net, d=3), "_weight_norm"


def functional():
    net, x = mlp(2, 6, 1), points(5, 2)
    hessian = jacrev(jacrev(lambda y: net(y[None])[0, 0]))
    return net, lambda: {"r": torch.func.vmap(hessian)(x).diagonal(dim1=1, dim2=2).sum(1)}, "autograd.Function"


CANNOT = [batch_norm, centred, rolled, together, convolution, weight_normalised, functional]


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_expanded_is_said_and_done_by_products(case):
    net, closure, reason = case()
    params, memory = list(net.parameters()), Memory()
    lin = linearize(closure, params, memory=memory)
    assert lin.backend == "matvec" and re.search(reason, lin.reason) and lin.reason == memory.reason
    verify(lin, *dense(closure, params), params)
    with pytest.raises((ValueError, RuntimeError), match=reason):
        linearize(closure, params, "expand")


def test_closure_that_weighs_terms_by_their_gradients():
    net = mlp(2, 6, 1)
    base, params = poisson(net), list(net.parameters())

    def closure():
        terms = base()
        weight = flat(
            torch.autograd.grad(
                terms["pde"].square().mean(), params, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        ).norm()
        return {**terms, "pde": terms["pde"] * weight.detach()}

    lin = linearize(closure, params)
    assert lin.backend == "expand"
    verify(lin, *dense(closure, params), params)


@pytest.mark.parametrize("through_functional", [False, True])
def test_closure_with_batched_derivatives(through_functional):
    net, inside = mlp(2, 6, 2), points(5, 2)

    def closure():
        x = inside.clone().requires_grad_(True)
        if through_functional:
            jacobian = torch.autograd.functional.jacobian
            return {"r": jacobian(lambda x: net(x).sum(0), x, create_graph=True, vectorize=True).square().sum((0, 2))}
        u = net(x)
        units = torch.eye(2, dtype=u.dtype)[:, None].expand(2, *u.shape)
        return {"r": torch.autograd.grad(u, x, units, create_graph=True, is_grads_batched=True)[0].square().sum((0, 2))}

    params = list(net.parameters())
    lin = linearize(closure, params)
    assert lin.backend == "expand"
    verify(lin, *dense(closure, params), params)


def test_integral_constraint_and_a_weight_used_in_two_ways():
    net, W, x, seen = mlp(2, 20, 1), nn.Parameter(points(2, 2)), points(30, 2), points(6, 2, seed=4)

    def closure():
        mass = net(x @ W).mean() - 1
        return {"data": net(seen @ W + (seen[:, None] * W).sum(1)), "mass": mass[None], "size": W.sum(1) * 1e-2}

    params = [*net.parameters(), W]
    lin = linearize(lambda: {k: r for k, r in closure().items() if k != "size"}, params)
    assert lin.backend == "expand"
    r, J = dense(lambda: {k: r for k, r in closure().items() if k != "size"}, params)
    verify(lin, r, J, params)
    lin = linearize(closure, params)
    assert lin.backend == "expand"
    verify(lin, *dense(closure, params), params)


def test_three_axes_and_terms_without_samples():
    net, x = mlp(2, 5, 3), points(4, 2, 2)
    closure = lambda: {"r": net(x).sin(), "none": net(x[:0]), "known": torch.ones(3, dtype=torch.float64)}  # noqa: E731
    params = list(net.parameters())
    lin = linearize(closure, params)
    assert lin.backend == "expand"
    verify(lin, *dense(closure, params), params)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    n=st.integers(1, 6),
    chunk=st.integers(1, 60),
    bias=st.booleans(),
)
def test_chunks_change_nothing(sizes, n, chunk, bias):
    net = mlp(2, *sizes, 1, bias=bias)
    params, closure = list(net.parameters()), poisson(net, n, n_boundary=2)
    r, J = dense(closure, params)
    for backend in BACKENDS:
        verify(linearize(closure, params, backend, chunk), r, J, params)


def test_float32_network_with_a_kernel_in_float64():
    net = mlp(2, 8, 8, 1).float()
    params, closure = list(net.parameters()), poisson(net)
    lin = linearize(closure, params)
    K = lin.kernel(torch.float64)
    J = lin.rows()
    assert lin.backend == "expand" and K.dtype == torch.float64 and J.dtype == torch.float32
    close(K, lin.rows(torch.float64) @ lin.rows(torch.float64).T, 1e-14)
    close(lin.kernel().double(), K, 1e-5)
    assert torch.linalg.eigvalsh(K)[0] > -1e-14 * K.trace()
    close(J, dense(closure, params)[1], 1e-4)
    assert all(part.dtype == torch.float32 for part in lin.gradient)


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is allocated (views share theirs)."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                Largest.numel = max(Largest.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_kernel_without_the_jacobian_in_memory(monkeypatch):
    """3500 residuals, 117k parameters: a thirtieth of either, and of the memory."""
    net = mlp(2, 50, 50, 25, 1)
    params = list(net.parameters())
    N, D = 120, sum(p.numel() for p in params)
    closure = poisson(net, 100, 20)
    monkeypatch.setattr(factored, "TILE", 50)
    Largest.numel = 0
    with Largest():
        K = linearize(closure, params, chunk=200).kernel()
    assert Largest.numel <= max(N * 200, N * N, 100 * 50 * 6)
    assert Largest.numel < N * D / 10
    r, J = dense(closure, params)
    close(K, J @ J.T)


def count_passes(monkeypatch, closure, call):
    """Calls of torch.autograd.grad outside of the closure, and calls of the closure."""
    counts, inside, real = {"passes": 0, "closure": 0}, [False], torch.autograd.grad

    def counted(*args, **kwargs):
        counts["passes"] += not inside[0]
        return real(*args, **kwargs)

    def watched():
        counts["closure"] += 1
        inside[0] = True
        try:
            return closure()
        finally:
            inside[0] = False

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", counted)
        call(watched)
    return counts


def test_passes(monkeypatch):
    """One a residual of a sample; the check of a structure, once, costs one."""
    net, memory = Skip().double(), Memory()
    params, closure = list(net.parameters()), system(net)

    def everything(watched):
        lin = linearize(watched, params, memory=memory)
        return lin.kernel(), lin.gradient, lin.jvp(params), lin.vjp(lin.residual), lin.rows()

    assert count_passes(monkeypatch, closure, everything) == {"passes": 5 + 1, "closure": 1}
    assert count_passes(monkeypatch, closure, everything) == {"passes": 5, "closure": 1}
    assert count_passes(monkeypatch, system(net, 8), everything) == {"passes": 5 + 1, "closure": 1}
    products = lambda watched: [f(linearize(watched, params, "matvec")) for f in (lambda lin: lin.gradient,)]  # noqa: E731
    assert count_passes(monkeypatch, closure, products) == {"passes": 1, "closure": 1}
    rows = lambda watched: linearize(watched, params, "matvec", chunk=10).rows()  # noqa: E731
    assert count_passes(monkeypatch, closure, rows) == {"passes": math.ceil(27 / 10), "closure": 1}


def test_leaves_nothing_behind():
    """Random numbers, gradients and the meaning of functions are the user's."""
    net = mlp(2, 6, 1)
    state = torch.get_rng_state()
    linearize(poisson(net), list(net.parameters())).kernel()
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())
    y = F.linear(points(3, 2), net[0].weight, net[0].bias)
    assert type(y.grad_fn).__name__ == "AddmmBackward0"


def test_rows_outlive_the_parameters():
    net = mlp(2, 6, 1)
    params, closure = list(net.parameters()), poisson(net)
    r, J = dense(closure, params)
    lin = linearize(closure, params)
    with torch.no_grad():
        for p in params:
            p.add_(1)
    verify(lin, r, J, params)


def test_wrong_arguments():
    net = mlp(2, 6, 1)
    params, closure = list(net.parameters()), poisson(net)
    with pytest.raises(ValueError, match="backend must be one of auto, expand, matvec, got 'jets'"):
        linearize(closure, params, "jets")
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        linearize(closure, params, chunk=0)
    with pytest.raises(TypeError, match="must return residuals"):
        linearize(lambda: closure()["pde"].square().sum(), params)
    with pytest.raises(ValueError, match="depend on a parameter"):
        linearize(lambda: [points(3)], params)


def test_errors_of_the_closure_come_out():
    net = mlp(2, 6, 1)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linearize(lambda: [net(points(3, 5))], list(net.parameters()))


def test_a_residual_that_is_not_finite_proves_nothing():
    net, memory = mlp(2, 6, 1), Memory()
    params, base, factor = list(net.parameters()), poisson(net), [math.nan]
    closure = lambda: {name: r * factor[0] for name, r in base().items() if name == "pde"}  # noqa: E731
    assert linearize(closure, params, memory=memory).backend == "expand" and not memory.checked
    factor[0] = 1.0
    assert linearize(closure, params, memory=memory).backend == "expand" and len(memory.checked) == 1


def test_limit_of_columns(monkeypatch):
    monkeypatch.setattr(expand_module, "COLUMNS", 3)
    net, nu = mlp(2, 6, 1), nn.Parameter(torch.ones(4, dtype=torch.float64))
    x = points(5, 2)
    closure = lambda: [net(x)[:, 0] * nu.exp().sum()]  # noqa: E731
    params = [*net.parameters(), nu]
    assert linearize(closure, params).reason == "the closure uses parameter 4 (4,) in exp"
    verify(linearize(closure, params), *dense(closure, params), params)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_network_is_recorded_as_it_was_written(compiler):
    """Its graph does not show the calls: J would be zero, autograd's too, and nobody noticed."""
    net = mlp(2, 5, 1)
    compiled = torch.compile(net, backend=compiler)
    params, x = list(net.parameters()), points(7, 2)
    compiled(x)
    lin = linearize(lambda: [compiled(x)[:, 0] - x.prod(1)], params, "expand")
    verify(lin, *dense(lambda: [net(x)[:, 0] - x.prod(1)], params), params)


def test_products_without_samples():
    """As of a process whose samples are all on others: J has no rows, and r no graph."""
    params, r = list(mlp(2, 3, 1).parameters()), torch.zeros(0, dtype=torch.float64)
    verify(lin := Products(r, params), r, r.new_zeros(0, 13), params)
    assert [part.shape for part in lin.vjps(r.new_zeros(3, 0))] == [(3, *p.shape) for p in params]
    assert lin.jvps([p.new_ones(3, *p.shape) for p in params]).shape == (3, 0)
