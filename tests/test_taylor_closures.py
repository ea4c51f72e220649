"""Closures that differentiate by Taylor mode, linearised: every sample has its own copies of the weights there too."""

import pytest
import torch
from torch import nn

from secondorder import taylor
from secondorder.residuals.linearization import linearize


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()


@pytest.mark.parametrize("operator", [taylor.laplacian, taylor.biharmonic, taylor.gradient])
def test_rows_are_those_of_autograd(operator):
    net = network()
    x, edge = torch.rand(9, 2, dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64)

    def closure():
        u, derivatives = operator(net, x)
        return {"pde": derivatives.flatten(1) + u, "boundary": net(edge)}

    params = list(net.parameters())
    found, products = linearize(closure, params), linearize(closure, params, backend="matvec")
    assert found.backend == "expand", found.reason
    torch.testing.assert_close(found.rows(), products.rows(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.kernel(), products.rows() @ products.rows().mT, rtol=1e-10, atol=1e-10)
