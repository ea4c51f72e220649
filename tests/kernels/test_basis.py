"""Adam in a basis against its formula in float64."""

import pytest
import torch

from draws import randn
from laid import DEVICE
from secondorder_kernels import explain, use_kernels
from secondorder_kernels.basis import adam_in_basis_
from secondorder_kernels.elementwise import adam_direction_


def arguments(n=3, d1=4, d2=5, dtype=torch.float64):
    m, v, X = randn(n, d1, d2, dtype=dtype), randn(n, d1, d2, seed=1, dtype=dtype).square(), randn(n, d1, d2, seed=2)
    return m, v, X.to(dtype), torch.linalg.qr(randn(n, d2, d2, seed=3))[0].to(dtype)


def options(n=3, dtype=torch.float64, **changed):
    r1, r2 = torch.linspace(0, 1, n, dtype=dtype), torch.linspace(0.5, 0, n, dtype=dtype)
    return {"beta1_rate": r1, "beta2_rate": r2, "beta1": 0.9, "eps": 1e-3, "nesterov": False, **changed}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("eps", [1e-3, torch.tensor([1e-3, 1e-2, 1.0], dtype=torch.float64)[:, None, None]])
def test_the_direction_is_its_formula_for_the_rotated_gradient(nesterov, eps):
    m, v, X, Q = arguments()
    given = options(nesterov=nesterov, eps=eps)
    r1, r2 = given["beta1_rate"][:, None, None], given["beta2_rate"][:, None, None]
    g = torch.einsum("nik,nkj->nij", X, Q)
    m_new, v_new = (1 - r1) * m + r1 * g, (1 - r2) * v + r2 * g**2
    expected = (0.9 * m_new + 0.1 * g if nesterov else m_new) / (v_new.sqrt() + eps)
    before = X.clone(), Q.clone()
    torch.testing.assert_close(adam_in_basis_(m, v, X, Q, **given), expected)
    torch.testing.assert_close(m, m_new)
    torch.testing.assert_close(v, v_new)
    assert torch.equal(X, before[0]) and torch.equal(Q, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_has_the_bits_of_a_product_and_adam_direction(dtype):
    m, v, X, Q = arguments(3, 17, 33, dtype)
    others, given = (m.clone(), v.clone()), options(dtype=dtype, nesterov=True)
    rates = {name: given[name][:, None, None] for name in ("beta1_rate", "beta2_rate")}
    expected = adam_direction_(*others, X @ Q, **{**given, **rates})
    assert torch.equal(adam_in_basis_(m, v, X, Q, **given), expected)
    assert torch.equal(m, others[0]) and torch.equal(v, others[1])


def test_rows_with_rate_0_keep_their_bits_and_the_direction_is_left_in_out():
    m, v, X, Q = arguments(dtype=torch.float32)
    before, out = (m.clone(), v.clone()), torch.full_like(m, torch.nan)
    rate = torch.tensor([0.0, 0.5, 0.0])
    given = options(dtype=torch.float32, beta1_rate=rate, beta2_rate=rate)
    assert adam_in_basis_(m, v, X, Q, **given, out=out) is out and out.isfinite().all()
    for now, old in zip((m, v), before, strict=True):
        assert torch.equal(now[[0, 2]], old[[0, 2]]) and not torch.equal(now[1], old[1])


def test_other_shapes_are_refused_and_shown():
    m, v, X, Q = arguments()
    for tensors in ((m[:2], v, X, Q), (m, v[0], X, Q), (m, v, X.mT, Q), (m, v, X, Q[:, :4]), (m[0], v[0], X[0], Q[0])):
        with pytest.raises(ValueError, match=r"X and out \(n, d1, d2\) and Q \(n, d2, d2\), got") as error:
            adam_in_basis_(*tensors, **options())
        assert str(tuple(tensors[0].shape)) in str(error.value) and str(tuple(tensors[3].shape)) in str(error.value)
    with pytest.raises(ValueError, match=r"rates \(n,\), got \(3, 1, 1\) and \(3,\)"):
        adam_in_basis_(m, v, X, Q, **options(beta1_rate=torch.zeros(3, 1, 1, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_refused(dtype):
    m, v, X, Q = arguments()
    with pytest.raises(TypeError, match="of one dtype, float32 or float64"):
        adam_in_basis_(m, v, X.to(dtype), Q, **options())


@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_nothing_is_read_on_the_host(mode):
    with use_kernels(mode):
        tensors = [torch.empty(3, 4, 5, device="meta") for _ in range(3)]
        given = options(beta1_rate=torch.empty(3, device="meta"), beta2_rate=torch.empty(3, device="meta"))
        adam_in_basis_(*tensors, torch.empty(3, 5, 5, device="meta"), **given)


def test_a_kernel_refuses_an_eps_for_every_element():
    m, v, X, Q = (t.float().to(DEVICE) for t in arguments())
    given = options(dtype=torch.float32) | {"eps_tensor": torch.ones(3, 4, 5)}
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in given.items() if name != "eps"}
    with use_kernels("triton"):
        path, reason = explain("adam_in_basis_", m, v, X, Q, m.clone(), **given)
    assert path == "none" and "(3, 4, 5)" in reason
