"""Symmetric products by panels, the path of large matrices on a CPU, against the plain one."""

import pytest
import torch

import secondorder_kernels as kernels


@pytest.mark.parametrize(("d", "m"), [(256, 40), (300, 17), (513, 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_panels_are_the_weighted_mean_of_c_and_the_gram_matrix(d, m, transposed):
    X = torch.randn(2, m, d, dtype=torch.float64).mT if transposed else torch.randn(2, d, m, dtype=torch.float64)
    C = torch.randn(2, d, d, dtype=torch.float64)
    C, rate = C + C.mT, torch.tensor([0.3, 1.0], dtype=torch.float64)
    assert kernels.explain("ema_syrk_", C, X, rate)[0] == "panels"
    expected = C + rate[:, None, None] * (X @ X.mT - C)
    torch.testing.assert_close(kernels.ema_syrk_(C, X, rate), expected)
    torch.testing.assert_close(C, C.mT, rtol=0, atol=1e-12)


def test_a_row_with_rate_0_keeps_its_bits_even_if_it_is_not_symmetric():
    C, X = torch.randn(3, 256, 256), torch.randn(3, 256, 8)
    before, rate = C.clone(), torch.tensor([0.0, 0.5, 0.0])
    kernels.ema_syrk_(C, X, rate)
    assert torch.equal(C[0], before[0]) and torch.equal(C[2], before[2])
    alone = before[1:2].clone()
    assert torch.equal(kernels.ema_syrk_(alone, X[1:2], rate[1:2]), C[1:2])  # whatever its neighbours do


def test_small_matrices_take_the_plain_path():
    assert kernels.explain("ema_syrk_", torch.zeros(2, 255, 255), torch.zeros(2, 255, 8), torch.zeros(2))[0] != "panels"
