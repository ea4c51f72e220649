"""Which path orthonormal columns take. What they are is tested with the optimizers' linear algebra: test_linalg.py."""

import pytest
import torch

from secondorder_kernels import explain, use_kernels
from secondorder_kernels.orthogonal import cholesky_qr, orthogonalize


def test_on_a_cpu_they_are_householders():
    Y = torch.randn(3, 9, 5)
    assert explain("orthogonalize", Y)[0] == "reference"
    Q, ok = orthogonalize(Y)
    expected = torch.linalg.qr(Y.double()).Q
    assert ok.all()
    torch.testing.assert_close(Q.double(), expected, rtol=0, atol=1e-5)


def test_elsewhere_they_are_choleskys_unless_the_reference_is_asked_for():
    Y = torch.empty(3, 9, 5, device="meta")
    assert explain("orthogonalize", Y)[0] == "cholesky"
    with use_kernels("reference"):
        Q, ok = orthogonalize(Y)
    assert Q.shape == Y.shape and ok.shape == (3,) and Q.is_contiguous()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_with_the_kernels_of_triton_they_are_what_they_are_without(device):
    Y = torch.randn(3, 9, 5).to(device)
    expected = explain("orthogonalize", Y)
    with use_kernels("triton"):
        assert explain("orthogonalize", Y)[0] == expected[0]
        Q, ok = orthogonalize(Y)
    assert Q.shape == Y.shape and ok.shape == (3,)


@pytest.mark.parametrize("Y", [torch.randn(3, 9, 5), torch.randn(2, 5, 4).mT.contiguous().mT, torch.zeros(0, 3, 2)])
def test_it_is_an_operation_to_a_compiler(Y):
    torch.library.opcheck(torch.ops.secondorder.orthogonalize.default, (Y,))


@pytest.mark.parametrize("function", [orthogonalize, cholesky_qr])
def test_each_says_who_refused(function):
    with pytest.raises(ValueError, match=rf"{function.__name__} takes .* d >= m, got shape \(2, 3, 4\)"):
        function(torch.zeros(2, 3, 4))
