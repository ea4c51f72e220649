"""J by its uses: kernels by products of Grams, and uses that are one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from residual_cases import dense, grad, mlp
from secondorder.residuals import factored
from secondorder.residuals.linearization import linearize


def close(actual, expected, tolerance=1e-10):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm().clamp_min(1e-30)


def points(*shape):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def laplacian(u, x):
    first = grad(u, x)
    return sum(grad(first[:, i], x)[:, i] for i in range(x.shape[1]))


@pytest.mark.parametrize("elementwise", [-10_000, 10_000], ids=["grams", "rows"])
def test_kernel_by_products_of_grams_or_by_rows(elementwise, monkeypatch):
    """Terms whose rows alternate, weights with several uses, tiles that end anywhere."""
    net, inside, outside = mlp(2, 6, 5, 2), points(7, 2), points(6, 2)
    params = list(net.parameters())

    def closure():
        x = inside.clone().requires_grad_(True)
        u, v = net(x).unbind(1)
        return [torch.stack([laplacian(u, x) + u * v, laplacian(v, x) - v**2], 1), net(outside) - net(-outside)]

    r, J = dense(closure, params)
    for name, value in (("ELEMENTWISE", elementwise), ("TILE", 4), ("WIDE", 5)):
        monkeypatch.setattr(factored, name, value)
    J_uses = linearize(closure, params)
    assert {J_uses._grams_are_cheaper(i) for i in range(len(params))} == {elementwise < 0}
    close(J_uses.kernel(), J @ J.T)
    close(J_uses.kernel(), J_uses.kernel().T, 0)


OPERATORS = {
    "Laplacian": lambda u, x: laplacian(u, x),
    "heat": lambda u, x: grad(u, x)[:, 0] - sum(grad(grad(u, x)[:, i], x)[:, i] for i in (1, 2)) / 4,
    "variable": lambda u, x: sum(x.prod(1) * grad(grad(u, x)[:, i], x)[:, i] for i in range(3)),
}


@pytest.mark.parametrize(("operator", "uses"), [("Laplacian", 5), ("heat", 4), ("variable", 5)])
def test_nested_derivatives_meet_the_same_tangents(operator, uses):
    """As many uses are left as a Taylor jet has columns, also where every derivative is taken from the beginning."""
    net, inside = mlp(3, 6, 5, 1), points(9, 3)
    params = list(net.parameters())

    def closure():
        x = inside.clone().requires_grad_(True)
        return [OPERATORS[operator](net(x)[:, 0], x)]

    lin = linearize(closure, params)
    recorded, (part,) = sum(a.shape[1] for a in lin._parts[2][0].a), lin.uses[2]
    assert sum(a.shape[1] for a in part.a) == uses < recorded
    close(lin.rows(), dense(closure, params)[1])
    close(lin.kernel(), lin.rows() @ lin.rows().T)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 9),
    alike=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    error=st.sampled_from([0.0, 1e-13, 1e-6]),
)
def test_uses_are_merged_only_where_they_are_multiples(seed, n, alike, error):
    draw = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=draw)  # noqa: E731
    base = randn(3, n, 5)
    base[:, torch.rand(n, generator=draw) < 0.3] = 0  # samples that a use does not see
    z = [base[k] * randn(n, 1) for k in alike]
    z[-1] = z[-1] + error * z[-1].norm(dim=1, keepdim=True) * randn(n, 5)
    a = [randn(n, 1, 4) for _ in z]
    part = factored.Part(slice(0, n), a, [column.unsqueeze(1) for column in z])
    fewer = factored.merged(part)
    rows = [sum(torch.einsum("nso,nsi->noi", a, z) for a, z in zip(p.a, p.z, strict=True)) for p in (part, fewer)]
    close(rows[1], rows[0], 1e-13)
    if not error:
        assert len(fewer.a) <= len(set(alike)) or not base.any()


def test_layers_are_known_by_what_is_used_together():
    """Weight and bias of a layer; what shares a bias is one."""
    net, slope = mlp(2, 4, 4, 1), torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    params, x = [slope, *net.parameters()], points(5, 2)

    def closure():
        z = torch.tanh(net[0](x) * slope)
        return [
            net[4](torch.tanh(net[2](z)) + z @ net[2].weight.T + torch.nn.functional.linear(z, net[2].weight, slope))
        ]

    assert linearize(closure, params).groups == [[0, 3, 4], [1, 2], [5, 6]]
    assert linearize(closure, params, "matvec").groups == [[i] for i in range(7)]
