"""Adam as the epilogue of a product, against its formula in float64: layouts, sizes, options, bounds."""

import functools

import pytest
import torch

pytest.importorskip("triton")
import draws  # noqa: E402
from laid import DEVICE, LAYOUTS, Laid, far_apart  # noqa: E402
from secondorder_kernels import explain  # noqa: E402
from secondorder_kernels.basis import adam_in_basis_  # noqa: E402

CONFIG = {"rows": 32, "columns": 16, "depth": 32, "num_warps": 4, "num_stages": 2}
SHAPES = [(3, 1, 1), (3, 7, 5), (1, 33, 65), (2, 64, 32), (1, 70, 31), (0, 4, 4)]
CASES = [(shape, LAYOUTS[i % 4]) for i, shape in enumerate(SHAPES)] + [((3, 7, 5), layout) for layout in LAYOUTS]
RATES = torch.tensor([0.3, 1.0, 0.0])
randn = functools.partial(draws.randn, dtype=torch.float32)
pytestmark = pytest.mark.usefixtures("triton_mode")


class Call:
    """Arguments of `adam_in_basis_`, and what must come out, in float64."""

    def __init__(self, shape, layout="rows", eps=1e-3, nesterov=False):
        n, _, d = shape
        following = LAYOUTS[LAYOUTS.index(layout) - 1]
        m, v, X, Q = randn(*shape), randn(*shape, seed=1).square(), randn(*shape, seed=2), randn(n, d, d, seed=3)
        self.before = m.to(DEVICE), v.to(DEVICE)
        self.m, self.v = Laid(m, layout, 7.0), Laid(v, following, 7.0)
        self.X, self.Q = Laid(X, layout), Laid(Q, following)
        self.out = Laid(torch.full(shape, torch.nan), layout, 7.0)
        r1, r2 = RATES[:n], 0.7 * RATES[:n]
        self.options = {"beta1_rate": r1.to(DEVICE), "beta2_rate": r2.to(DEVICE), "beta1": 0.9}
        self.options |= {"nesterov": nesterov, "eps": eps.to(DEVICE) if isinstance(eps, torch.Tensor) else eps}

        m, v, X, Q, r1, r2 = (t.double() for t in (m, v, X, Q, r1[:, None, None], r2[:, None, None]))
        g = torch.einsum("nik,nkj->nij", X, Q)
        m, v = (1 - r1) * m + r1 * g, (1 - r2) * v + r2 * g * g
        self.expected = m, v, ((0.9 * m + 0.1 * g) if nesterov else m) / (v.sqrt() + eps)

    def run(self):
        state = [laid.t for laid in (self.m, self.v, self.X, self.Q)]
        assert adam_in_basis_(*state, **self.options, out=self.out.t) is self.out.t
        return self.m.t, self.v.t, self.out.t

    def check(self, tolerance=1e-4):
        for found, expected in zip(self.run(), self.expected, strict=True):
            torch.testing.assert_close(found.double().cpu(), expected, rtol=tolerance, atol=tolerance)
        assert self.m.untouched() and self.v.untouched() and self.out.untouched()


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_every_layout_and_size(shape, layout):
    Call(shape, layout).check()


@pytest.mark.parametrize("eps", [0.5, torch.tensor(0.5), torch.tensor([1e-3, 1e-2, 1.0])[:, None, None]])
def test_options(eps):
    Call((3, 7, 5), "sliced", eps=eps, nesterov=True).check()


def test_rows_with_rate_0_keep_their_bits_and_with_rate_1_take_the_gradient():
    call = Call((3, 7, 5))
    m, v, _ = call.run()
    assert torch.equal(m[2], call.before[0][2]) and torch.equal(v[2], call.before[1][2])
    g = torch.einsum("ik,kj->ij", call.X.t[1].double(), call.Q.t[1].double())
    torch.testing.assert_close(m[1].double(), g, rtol=0, atol=1e-5)


def test_a_gradient_that_is_not_finite_stays_in_its_row():
    call = Call((3, 7, 5))
    call.X.t[1, 2, 3] = torch.nan
    m, v, out = call.run()
    for t in (m, v, out):
        assert t[1, 2].isnan().all() and t[[0, 2]].isfinite().all() and t[1, 3:].isfinite().all()


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [("highest", 0, 1e-5), ("high", 0, 1e-5), ("medium", 1e-4, 5e-2)],
    indirect=["precision"],
)
def test_the_precision_of_the_product_is_that_of_torch(precision, least, most):
    call = Call((1, 16, 32))
    call.options["beta1_rate"] = torch.ones(1, device=DEVICE)
    found = call.run()[0].cpu().double()
    g = torch.einsum("nik,nkj->nij", call.X.t.cpu().double(), call.Q.t.cpu().double())
    error = ((found - g).abs().max() / g.abs().max()).item()
    assert least <= error <= most


def test_results_are_the_same_bits_every_time():
    first, second = Call((2, 33, 40)).run(), Call((2, 33, 40)).run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("strides", [(2**30, 5, 1), (2**4, 2**30, 1), (2**4, 1, 2**30)])
def test_offsets_beyond_2_31_elements_are_right(tmp_path, strides):
    call = Call((3, 3, 3))
    for name in ("m", "v", "X"):
        laid = getattr(call, name)
        far = far_apart(tmp_path, (3, 3, 3), strides, torch.float32)
        laid.t = far.copy_(laid.t)
    call.check()


def test_double_precision_and_other_devices_are_refused():
    call = Call((3, 7, 5))
    state = [laid.t.double() for laid in (call.m, call.v, call.X, call.Q)]
    options = {**call.options, "beta1_rate": RATES.double().to(DEVICE), "beta2_rate": RATES.double().to(DEVICE)}
    with pytest.raises(RuntimeError, match="no kernel for torch.float64"):
        adam_in_basis_(*state, **options)


def test_it_is_taken_by_the_registered_operation():
    call = Call((3, 7, 5))
    tensors = [laid.t for laid in (call.m, call.v, call.X, call.Q, call.out)]
    assert explain("adam_in_basis_", *tensors, **call.options) == ("triton", "the mode is 'triton'")
    torch.library.opcheck(torch.ops.secondorder.adam_in_basis_.default, tuple(tensors), call.options)
