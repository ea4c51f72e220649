"""Differential operators by collapsed Taylor mode against nested autograd and torch.func.hessian, in float64."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secondorder import taylor
from secondorder.taylor.jet import separate_samples

N, D = 5, 3


class Sine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(D, 8), nn.Linear(8, 6), nn.Linear(6, 1, bias=False)
        self.frequency = nn.Parameter(torch.rand(8, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sin(self.second(torch.cos(self.frequency * self.first(x)))))


class Residual(nn.Module):
    """Residual connections, gates, concatenation with the inputs, layer normalisation.

    Torch's `layer_norm` has wrong third derivatives (pytorch issue 175754, up to 2.13); oracles take `written_out`.
    """

    written_out = False

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.gate = nn.Linear(D, 6), nn.Linear(D, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.norm, self.last = nn.LayerNorm(6), nn.Linear(6 + D + 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).sigmoid()
        h = self.lift(x)
        for block in self.blocks:
            h = h + F.silu(block(self.normalised(h)))
            h = gate * h + (1 - gate) * h.tanh()
        return self.last(torch.cat([h, x, torch.ones_like(x[:, :1])], dim=-1))

    def normalised(self, h: Tensor) -> Tensor:
        if not self.written_out:
            return self.norm(h)
        centred = h - h.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.norm.eps).rsqrt()
        return centred * scale * self.norm.weight + self.norm.bias


class Product(nn.Module):
    """Two networks multiplied, with a factor that vanishes on a boundary and the radius."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(D, 6), nn.Softplus(), nn.Linear(6, 1))
        self.b = nn.Sequential(nn.Linear(1, 6), nn.GELU(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        radius = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        boundary = (x * (1 - x)).prod(1, keepdim=True)
        return self.a(x) * self.b(radius) * boundary / (1 + radius**2)


class Norm(nn.Module):
    """No parameters but a centre; one axis less than other models."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.rand(D, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-(x - self.centre).norm(dim=-1)) + x[:, 0] * x[:, 1]


def tanh_network() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tanh": tanh_network,
    "sine": Sine,
    "residual": Residual,
    "product": Product,
    "norm": Norm,
}
models = pytest.mark.parametrize("kind", MODELS)


def made(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MODELS[kind]().double(), torch.rand(N, D, dtype=torch.float64)


def single(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda point: model(point[None])[0]


def hessians(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:  # (N, *M, d, d)
    return vmap(hessian(single(model)))(x)


def laplacian_of(model: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """By reverse mode alone: forward mode of norms fails when it is nested."""
    return lambda x: vmap(jacrev(jacrev(single(model))))(x).diagonal(dim1=-2, dim2=-1).sum(-1)


def bilaplacian(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return laplacian_of(laplacian_of(model))(x)


def total(C: Tensor, H: Tensor) -> Tensor:
    return (C.reshape(-1, *(1,) * (H.dim() - 3), *C.shape[-2:]) * H).sum((-2, -1))


def nested_hessian(model: nn.Module, x: Tensor) -> Tensor:  # of the outputs' sum, (N, d, d)
    x = x.detach().requires_grad_()
    (du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return torch.stack([torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0] for i in range(D)], 1)


def summed(u: Tensor) -> Tensor:
    return u.reshape(len(u), -1).sum(1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@models
def test_value_and_gradient(kind: str) -> None:
    model, x = made(kind)
    u, du = taylor.gradient(model, x)
    close(u, model(x))
    close(taylor.value(model, x), model(x))
    close(du, vmap(jacrev(single(model)))(x).movedim(-1, 1))


@models
def test_laplacian(kind: str) -> None:
    model, x = made(kind)
    H = hessians(model, x)
    u, lap = taylor.laplacian(model, x)
    close(u, model(x))
    close(lap, H.diagonal(dim1=-2, dim2=-1).sum(-1))
    close(summed(lap), nested_hessian(model, x).diagonal(dim1=1, dim2=2).sum(1))
    for w in (torch.tensor([0.5, -2.0, 0.0], dtype=x.dtype), torch.randn(N, D, dtype=x.dtype)):
        expected = total(torch.diag_embed(w), H)
        close(taylor.laplacian(model, x, w)[1], expected)
        close(taylor.laplacian(model, x, w.flip(-1), coordinates=[2, 1, 0])[1], expected)
        both = taylor.value_gradient_laplacian(model, x, w)
        for actual, wanted in zip(both, (*taylor.gradient(model, x), expected), strict=True):
            close(actual, wanted)
    close(taylor.laplacian(model, x, coordinates=[1, 2])[1], H[..., 1, 1] + H[..., 2, 2])


@models
def test_second_order(kind: str) -> None:
    model, x = made(kind)
    H = hessians(model, x)
    for shape in ((D, D), (N, D, D)):
        C = torch.randn(shape, dtype=x.dtype)
        close(taylor.second_order(model, x, C)[1], total(C, H))
    for shape in ((2, D), (N, 2, D)):
        V = torch.randn(shape, dtype=x.dtype)
        close(taylor.second_order(model, x, vectors=V)[1], total(V.mT @ V, H))


@models
def test_biharmonic(kind: str) -> None:
    model, x = made(kind)
    u, bi = taylor.biharmonic(model, x)
    close(u, model(x))
    model.written_out = True
    torch.testing.assert_close(bi, bilaplacian(model, x), rtol=1e-10, atol=1e-8)


def gradients(loss: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        loss, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
    )


def close_gradients(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-9)


@models
def test_gradients_in_the_parameters(kind: str) -> None:
    model, x = made(kind)
    C = torch.randn(N, D, D, dtype=x.dtype)
    u, du, lap = taylor.value_gradient_laplacian(model, x)
    ours = gradients((summed(lap) + summed(du[:, 0]) * summed(u)).square().mean(), model)
    mixed = gradients(summed(taylor.second_order(model, x, C)[1]).square().mean(), model)
    model.written_out = True
    points = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(points).sum(), points, create_graph=True)
    H = nested_hessian(model, x)
    residual = H.diagonal(dim1=1, dim2=2).sum(1) + slope[:, 0] * summed(model(points))
    close_gradients(ours, gradients(residual.square().mean(), model))
    close_gradients(mixed, gradients((C * H).sum((1, 2)).square().mean(), model))


def test_gradient_of_the_biharmonic_in_the_parameters() -> None:
    model, x = made("tanh")
    ours = taylor.biharmonic(model, x)[1].square().sum()
    close_gradients(gradients(ours, model), gradients(bilaplacian(model, x).square().sum(), model))


def test_coefficients_and_points_are_differentiated() -> None:
    model, x = made("tanh")
    C = torch.eye(D, dtype=x.dtype).requires_grad_()
    w = torch.ones(D, dtype=x.dtype).requires_grad_()
    H = hessians(model, x)
    close(torch.autograd.grad(taylor.second_order(model, x, C)[1].sum(), C)[0], H.sum((0, 1)))
    close(torch.autograd.grad(taylor.laplacian(model, x, w)[1].sum(), w)[0], H.sum((0, 1)).diagonal())
    points = x.clone().requires_grad_()
    ours = torch.autograd.grad(taylor.laplacian(model, points)[1].sum(), points)[0]
    close(ours, torch.autograd.grad(laplacian_of(model)(points).sum(), points)[0])


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": nn.Sigmoid(),
    "logsigmoid": nn.LogSigmoid(),
    "silu": nn.SiLU(),
    "softplus": nn.Softplus(beta=2.0),
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU(approximate="tanh"),
    "mish": nn.Mish(),
    "relu": nn.ReLU(),
    "leaky relu": nn.LeakyReLU(0.2),
    "elu": nn.ELU(1.5),
    "sin": torch.sin,
    "cos": torch.cos,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "atan": torch.atan,
    "erf": torch.erf,
    "exp": torch.exp,
    "abs": abs,
    "square": torch.square,
    "log": lambda x: torch.log(x.square() + 0.1),
    "log1p": lambda x: (x**2).log1p(),
    "sqrt": lambda x: torch.sqrt(x**2 + 0.1),
    "rsqrt": lambda x: torch.rsqrt(x**2 + 0.1),
    "reciprocal": lambda x: 1 / (x * x + 0.3),
    "cube": lambda x: x**3,
    "power": lambda x: (x.square() + 0.1) ** -1.5,
    "powers 0 and 1": lambda x: x**0 + x**1 * x,
    "negative and difference": lambda x: -(2 - x) * (x - 3) / 7,
    "identity": nn.Identity(),
}


@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elementwise_functions(kind: str) -> None:
    torch.manual_seed(1)
    function, A = ELEMENTWISE[kind], torch.randn(4, D, dtype=torch.float64)
    model, x = lambda x: function(F.linear(x, A)), torch.randn(N, D, dtype=torch.float64)
    H = hessians(model, x)
    _, du, lap = taylor.value_gradient_laplacian(model, x)
    close(du, vmap(jacrev(single(model)))(x).movedim(-1, 1))
    close(lap, H.diagonal(dim1=-2, dim2=-1).sum(-1))
    torch.testing.assert_close(taylor.biharmonic(model, x)[1], bilaplacian(model, x), rtol=1e-9, atol=1e-7)


def test_derivatives_of_powers_at_zero_and_of_large_arguments_are_finite() -> None:
    x = torch.tensor([[0.0], [400.0]], dtype=torch.float64)
    close(taylor.laplacian(lambda x: x**3, x)[1], 6 * x)
    for function in (nn.ELU(), nn.SiLU(), nn.GELU(), nn.Softplus(), nn.Mish(), torch.tanh):
        assert taylor.laplacian(lambda x, f=function: f(x * 3 - 600), x)[1].isfinite().all()


M = torch.arange(1.0, 13.0, dtype=torch.float64)
AXES: dict[str, Callable[[Tensor], Tensor]] = {
    "indices": lambda x: x[:, [0, 2]] * x[..., 1:] + x[:, None, 0] - x[:, -1:],
    "unbind": lambda x: torch.stack([a * b for a, b in itertools.pairwise(x.unbind(-1))], dim=-1),
    "split and chunk": lambda x: torch.cat([*x.split([1, 2], dim=1), *x.chunk(2, -1)], 1).prod(1),
    "reshape": lambda x: (x.unsqueeze(1) * x.unsqueeze(2)).reshape(-1, 9).view(x.shape[0], 3, 3).flatten(1),
    "transpose": lambda x: torch.matmul(x[:, :, None], x[:, None, :] ** 2).transpose(1, 2).sum((1, 2)),
    "constant on the right": lambda x: (x @ M.view(3, 4)) * (x.unsqueeze(2) * x.unsqueeze(2)).squeeze(-1).mean(1, True),
    "constant on the left": lambda x: (M.view(4, 3) @ (x**2).unsqueeze(-1)).squeeze(-1) * M[:4],
    "constants in a stack": lambda x: torch.stack([x**2, torch.zeros_like(x), x.sin()], 1).mean(1),
    "broadcast": lambda x: (x[:, :1] ** 2 + M) * x[:, 1:2].expand(-1, 12) / M,
    "narrow": lambda x: x.narrow(1, 1, 2) * x.select(1, 0).unsqueeze(-1),
    "a constant": lambda x: torch.ones_like(x),
    "a linear function": lambda x: x.sum(-1),
    "a norm of several axes": lambda x: torch.linalg.norm(x.unsqueeze(1), dim=(1, 2)) + torch.norm(x, 2, 1),
    "batch normalisation": nn.BatchNorm1d(D).double().eval(),
    "dropout at rest": nn.Sequential(nn.Dropout(0.5), nn.Flatten()).eval(),
}


@pytest.mark.parametrize("kind", AXES)
def test_shapes_indices_and_products(kind: str) -> None:
    torch.manual_seed(2)
    model, x = AXES[kind], torch.rand(N, D, dtype=torch.float64)
    H = hessians(model, x)
    u, du, lap = taylor.value_gradient_laplacian(model, x)
    close(u, model(x))
    close(du, vmap(jacrev(single(model)))(x).movedim(-1, 1))
    close(lap, H.diagonal(dim1=-2, dim2=-1).sum(-1))
    C = torch.randn(N, D, D, dtype=x.dtype)
    close(taylor.second_order(model, x, C)[1], total(C, H))
    close(taylor.biharmonic(model, x)[1], bilaplacian(model, x))


def test_an_operator_inside_a_model_takes_what_is_outside_as_a_constant() -> None:
    x = torch.rand(N, 2, dtype=torch.float64)

    def model(y: Tensor) -> Tensor:  # y0 * Laplacian in z of |z|^2 y1^2 |z|^2 at z = y
        return y[:, 0] * taylor.laplacian(lambda z: (z * z).sum(1) ** 2 * y[:, 1] ** 2, y)[1]

    r2, y0, y1 = x.square().sum(1), x[:, 0], x[:, 1]
    closed = lambda y: y[0] * 16 * y.square().sum() * y[1] ** 2  # noqa: E731
    close(taylor.value(model, x), 16 * y0 * y1**2 * r2)
    close(taylor.laplacian(model, x)[1], vmap(hessian(closed))(x).diagonal(dim1=1, dim2=2).sum(1))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(MODELS)), st.floats(0, 2 * math.pi))
def test_the_laplacian_does_not_change_under_rotations(seed: int, kind: str, angle: float) -> None:
    model, _ = made(kind)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, D, dtype=torch.float64, generator=generator) + 0.1
    c, s = math.cos(angle), math.sin(angle)
    Q = torch.tensor([[c, s, 0], [-s, c, 0], [0, 0, 1]], dtype=torch.float64)
    rotated = taylor.laplacian(lambda y: model(y @ Q), x @ Q.mT)[1]
    torch.testing.assert_close(rotated, taylor.laplacian(model, x)[1], rtol=1e-8, atol=1e-8)


def test_the_rademacher_estimate_has_the_stated_mean_and_variance() -> None:
    model, x = made("tanh")
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=D)), dtype=x.dtype)  # all there are
    estimates = torch.stack([taylor.second_order(model, x, vectors=v[None])[1] for v in signs])
    H = hessians(model, x)
    off = H.square().sum((-2, -1)) - H.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    close(estimates.mean(0), taylor.laplacian(model, x)[1])
    close(estimates.var(0, correction=0), 2 * off)
    u, one = taylor.laplacian_estimate(model, x, 1, torch.Generator().manual_seed(0))
    close(u, model(x))
    assert (one - estimates).abs().amin(0).max() < 1e-12
    assert torch.equal(one, taylor.laplacian_estimate(model, x, 1, torch.Generator().manual_seed(0))[1])


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_estimates_by_many_directions_come_within_their_standard_error(distribution: str) -> None:
    model, x = made("tanh")
    S, H = 20_000, hessians(model, x)
    squares = H.square().sum((-2, -1))
    if distribution == "rademacher":
        squares = squares - H.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    estimate = taylor.laplacian_estimate(model, x, S, torch.Generator().manual_seed(1), distribution)[1]
    deviation = (estimate - taylor.laplacian(model, x)[1]) / (2 * squares / S).sqrt()
    assert deviation.abs().max() < 4 and deviation.square().mean() > 0.1


def test_float32_and_no_graph() -> None:
    model, x = made("residual")
    expected = taylor.laplacian(model, x)[1]
    with torch.no_grad():
        lap = taylor.laplacian(model.float(), x.float())[1]
    assert lap.dtype == torch.float32 and not lap.requires_grad
    torch.testing.assert_close(lap.double(), expected, rtol=1e-3, atol=1e-4)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.body["conv"](x[:, None, None]).flatten(1)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum(1)[:, None].norm(dim=1) > 0 else -x


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "convolution": (Images().double(), r"no rule for conv2d, called by Conv2d 'body\.conv'"),
    "batch normalisation": (nn.Sequential(nn.BatchNorm1d(D)).double(), r"couples samples.*called by BatchNorm1d '0'"),
    "dropout": (nn.Sequential(nn.Dropout()), r"random, called by Dropout '0'"),
    "in place": (nn.ReLU(inplace=True), r"relu in place"),
    "control flow": (Branch(), r"control flow.*called by Branch$"),
    "truth": (lambda x: x if x[:, 0] else -x, r"control flow"),
    "cumulative sum": (lambda x: x.cumsum(1), r"no rule for Tensor\.cumsum"),
    "sum over samples": (lambda x: x - x.mean(0), r"mean along axis 0 mixes samples"),
    "sum over all": (lambda x: x - x.sum(), r"sum over all axes mixes samples"),
    "chosen samples": (lambda x: x[1:], r"chooses samples"),
    "reshaped samples": (lambda x: x.reshape(-1, 1), r"mixes samples"),
    "samples times samples": (lambda x: torch.ones(N, N, dtype=x.dtype) @ x, r"mixes samples"),
    "features against samples": (lambda x: x * x[:, 0], r"equally many axes"),
    "two lists": (lambda x: x[:, None][:, [0], [1]], r"one axis at a time"),
    "detached": (lambda x: x.detach(), r"no rule for Tensor\.detach"),
    "other norm": (lambda x: x.norm(1, dim=1), r"Euclidean"),
    "power of a jet": (lambda x: x**x, r"pow"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals_name_the_function_and_the_module(kind: str) -> None:
    model, message = REFUSED[kind]
    with pytest.raises(TypeError, match=message):
        taylor.laplacian(model, torch.rand(N, D, dtype=torch.float64))


def test_linear_maps_are_given_all_samples_where_that_is_asked_for() -> None:
    model, x = made("tanh")
    seen: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for kind in types:
                if not issubclass(kind, Tensor):  # a jet's rules call torch functions of its parts
                    with self:
                        return kind.__torch_function__(func, types, args, kwargs)
            if func is F.linear:
                seen.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    expected = taylor.laplacian(model, x)[1]
    with Watch():
        close(taylor.laplacian(model, x)[1], expected)
    assert set(seen) == {1, N}
    seen.clear()
    with Watch(), separate_samples():
        close(taylor.laplacian(model, x)[1], expected)
    assert set(seen) == {N}


def test_no_samples() -> None:
    model, x = made("residual")
    for u in (
        *taylor.value_gradient_laplacian(model, x[:0]),
        *taylor.second_order(model, x[:0], torch.eye(D).double()),
    ):
        assert u.shape[0] == 0


def test_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[1] / "recipes" / "benchmark_taylor.py"
    spec = importlib.util.spec_from_file_location("benchmark_taylor", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    threads = torch.get_num_threads()
    try:
        benchmark.main(["--dimensions", "2", "--points", "4", "--rounds", "1"])
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("\n") == 4


def test_arguments() -> None:
    model, x = made("tanh")
    for wrong in (x[0], x.long()):
        with pytest.raises(ValueError, match="x must be"):
            taylor.gradient(model, wrong)
    with pytest.raises(TypeError, match="x must be a tensor"):
        taylor.gradient(model, [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights must be"):
        taylor.laplacian(model, x, torch.ones(D + 1, dtype=x.dtype))
    for coordinates in ([3], [0, 0], []):
        with pytest.raises(ValueError, match="coordinates must be"):
            taylor.laplacian(model, x, coordinates=coordinates)
    with pytest.raises(ValueError, match="either matrix or vectors"):
        taylor.second_order(model, x)
    with pytest.raises(ValueError, match="matrix must be"):
        taylor.second_order(model, x, torch.ones(D))
    with pytest.raises(ValueError, match="vectors must be"):
        taylor.second_order(model, x, vectors=torch.ones(D))
    with pytest.raises(ValueError, match="samples must be"):
        taylor.laplacian_estimate(model, x, 0)
    with pytest.raises(ValueError, match="distribution must be"):
        taylor.laplacian_estimate(model, x, 1, distribution="uniform")
    with pytest.raises(TypeError, match="one tensor"):
        taylor.laplacian(lambda x: (x, x), x)  # type: ignore[arg-type, return-value]
