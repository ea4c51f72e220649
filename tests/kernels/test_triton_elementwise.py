"""Element-wise kernels on stacks, against their formulas in float64: layouts, sizes, dtypes, options, bounds."""

import functools

import pytest
import torch

pytest.importorskip("triton")
import draws  # noqa: E402
from laid import DEVICE, LAYOUTS, Laid, far_apart  # noqa: E402
from secondorder_kernels import explain, use_kernels  # noqa: E402
from secondorder_kernels.elementwise import adam_direction_, root_free_  # noqa: E402
from secondorder_kernels.grafts import graft_  # noqa: E402
from secondorder_kernels.reference.rounding import mix, stochastic_round  # noqa: E402

CONFIG = {"block": 128, "num_warps": 1}
BF16 = torch.bfloat16
RATES = torch.tensor([0.0, 1.0, 0.3])  # of three rows, the first of which stays as it is
SHAPES = [(3, 1, 1), (3, 7, 5), (1, 33, 65), (3, 64, 32), (1, 130, 31), (0, 4, 4)]
CASES = [(shape, LAYOUTS[i % 4]) for i, shape in enumerate(SHAPES)] + [((3, 7, 5), layout) for layout in LAYOUTS]
randn = functools.partial(draws.randn, dtype=torch.float32)
pytestmark = pytest.mark.usefixtures("triton_mode")


def column(r, ndim=3):
    return r.view(-1, *[1] * (ndim - 1))


def keys(n):
    return torch.arange(1, n + 1, device=DEVICE) * 1234567


def close(found, expected, rtol=2e-6, atol=2e-6):
    torch.testing.assert_close(found.double().cpu(), expected, rtol=rtol, atol=atol)


# adam_direction_


class Adam:
    """Arguments of `adam_direction_`, and what must come out, in float64."""

    def __init__(self, shape, layout="rows", dtype=torch.float32, rate="row", eps=1e-3, nesterov=True):
        n = shape[0]
        self.m, self.v = (Laid(x.to(dtype), layout, 7.0) for x in (randn(*shape), randn(*shape, seed=1).square()))
        self.g, self.out = Laid(randn(*shape, seed=2), layout), Laid(torch.full(shape, torch.nan), layout, 7.0)
        r1, r2 = RATES[:n], 0.5 * RATES[:n]
        if rate == "entry":
            r1, r2 = (r.view(-1, 1, 1).expand(shape) * torch.rand(shape) for r in (r1, r2))
        elif rate == "all":
            r1, r2 = torch.tensor(0.7), torch.tensor(0.2)
        else:
            r1, r2 = column(r1, len(shape)), column(r2, len(shape))
        if eps == "row":
            eps = column(torch.tensor([1e-3, 1e-2, 1.0])[:n], len(shape))
        elif eps == "entry":
            eps = 0.1 + torch.rand(shape)
        m, v, g = (x.t.double().cpu() for x in (self.m, self.v, self.g))
        self.new_m, self.new_v = m + r1.double() * (g - m), v + r2.double() * (g * g - v)
        ahead = 0.9 * self.new_m + 0.1 * g if nesterov else self.new_m
        self.u = ahead / (self.new_v.sqrt() + (eps.double() if isinstance(eps, torch.Tensor) else eps))
        self.options = {"beta1_rate": r1.to(DEVICE), "beta2_rate": r2.to(DEVICE), "beta1": 0.9, "nesterov": nesterov}
        self.options["eps"] = eps.to(DEVICE) if isinstance(eps, torch.Tensor) else eps
        self.options["keys"] = keys(n) if dtype == BF16 else None

    def run(self):
        assert adam_direction_(self.m.t, self.v.t, self.g.t, **self.options, out=self.out.t) is self.out.t
        return self.out.t

    def check(self, rtol=2e-6):
        before = self.m.t[:1].clone(), self.v.t[:1].clone()
        close(self.run(), self.u)
        close(self.m.t, self.new_m, rtol)
        close(self.v.t, self.new_v, rtol)
        if len(self.m.t) == 3:
            assert torch.equal(self.m.t[:1], before[0]) and torch.equal(self.v.t[:1], before[1])
        assert all(x.untouched() for x in (self.m, self.v, self.g, self.out))


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_adam_direction_is_its_formula(shape, layout):
    Adam(shape, layout).check()


@pytest.mark.parametrize(
    "options",
    [
        {"rate": "entry", "eps": "entry"},
        {"rate": "all", "eps": "row", "layout": "columns"},
        {"rate": "entry", "eps": "row", "layout": "batch", "nesterov": False},
        {"rate": "row", "eps": "entry", "layout": "sliced"},
    ],
    ids=str,
)
def test_coefficients_of_adam_may_be_one_or_per_row_or_per_entry(options):
    case = Adam((3, 7, 5), **options)
    close(case.run(), case.u)
    close(case.m.t, case.new_m)
    close(case.v.t, case.new_v)


@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 2, 2, 2)], ids=str)
def test_adam_direction_of_other_shapes(shape):
    m, v, g = randn(*shape), randn(*shape, seed=1).square(), randn(*shape, seed=2)
    rate = torch.rand(shape)
    new_v = v.double() + rate * (g.double() ** 2 - v)
    expected = (m.double() + rate * (g.double() - m)) / (new_v.sqrt() + 1e-3)
    m, v, g, rate = (t.to(DEVICE) for t in (m, v, g, rate))
    close(adam_direction_(m, v, g, beta1_rate=rate, beta2_rate=rate, beta1=0.9, eps=1e-3, nesterov=False), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averages_of_adam_in_bfloat16_are_rounded_stochastically(layout):
    case = Adam((3, 7, 5), layout, BF16)
    wide = Adam((3, 7, 5), layout)
    for narrow, other in ((case.m, wide.m), (case.v, wide.v)):
        other.t.copy_(narrow.t.float())
    case.check(rtol=2**-7)
    u = wide.run()
    assert torch.equal(case.out.t, u)  # the direction knows the averages before they are rounded
    assert torch.equal(case.m.t, stochastic_round(wide.m.t, keys(3)))
    assert torch.equal(case.v.t, stochastic_round(wide.v.t, mix(keys(3))))


def test_one_average_of_adam_may_be_bfloat16():
    for narrow in ("m", "v"):
        case = Adam((3, 7, 5))
        setattr(case, narrow, Laid(getattr(case, narrow).t.to(BF16), "columns", 7.0))
        case.options["keys"] = keys(3)
        case.run()
        assert getattr(case, narrow).t.dtype == BF16
        close(case.m.t, case.new_m, 2**-6, 2**-6)
        close(case.v.t, case.new_v, 2**-6, 2**-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_rates_of_0_and_1_of_adam():
    case = Adam((3, 7, 5))
    case.m.t[0, 0, 0], case.g.t[0] = -0.0, torch.inf
    before = case.m.t.clone(), case.v.t.clone()
    case.options["beta2_rate"] = case.options["beta1_rate"]
    case.run()
    g = case.g.t
    assert all(
        torch.equal(a.view(torch.int32), b[:1].view(torch.int32))
        for a, b in ((case.m.t[:1], before[0]), (case.v.t[:1], before[1]))
    )
    assert torch.equal(case.m.t[1], g[1]) and torch.equal(case.v.t[1], g[1] * g[1])


@pytest.mark.parametrize("strides", [(2**30, 8, 1), (1, 2**27, 1)], ids=["rows", "inside a tile"])
def test_offsets_of_adam_beyond_32_bits(tmp_path, strides):
    shape = (3, 2, 8) if strides[0] > 1 else (1, 18, 8)
    case = Adam(shape)
    for name in ("m", "g"):
        near = getattr(case, name).t
        getattr(case, name).t = far_apart(tmp_path, shape, strides, torch.float32)
        getattr(case, name).t.copy_(near)
    close(case.run(), case.u)
    close(case.m.t, case.new_m)


def test_adam_refuses_more_axes_than_three():
    t = [randn(2, 3, 2, 3, 2).to(DEVICE) for _ in range(4)]
    t[2] = t[2].permute(0, 4, 3, 2, 1).contiguous().permute(0, 4, 3, 2, 1)
    rate = torch.ones(2, 1, 1, 1, 1, device=DEVICE)
    path, reason = explain("adam_direction_", *t, beta1_rate=rate, beta2_rate=rate)
    assert path == "none" and "cannot be seen as stacks of matrices" in reason


# root_free_


def root_free(shape, layout, rate, scale=3.0):
    v, g, moment = (
        Laid(x, layout, fill)
        for x, fill in (
            (randn(*shape).square(), 7.0),
            (randn(*shape, seed=1), torch.nan),
            (randn(*shape, seed=2), torch.nan),
        )
    )
    out = Laid(torch.full(shape, torch.nan), layout, 7.0)
    v0, g0, m0 = (x.t.double().cpu() for x in (v, g, moment))
    new = v0 + rate.double() * (float(scale) * g0 * g0 - v0)
    assert root_free_(v.t, g.t, moment.t, rate=rate.to(DEVICE), scale=scale, eps=1e-3, out=out.t) is out.t
    close(v.t, new)
    close(out.t, m0 / (new + 1e-3), 4e-6)
    assert all(x.untouched() for x in (v, g, moment, out))
    return v0, v.t


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_root_free_is_its_formula(shape, layout):
    rate = column(RATES[: shape[0]])
    before, after = root_free(shape, layout, rate)
    if shape[0] == 3:
        assert torch.equal(after[0].double().cpu(), before[0])


@pytest.mark.parametrize("layout", ["rows", "sliced"])
@pytest.mark.parametrize("scale", [torch.tensor(8), torch.tensor(0.5, dtype=torch.float64), 2], ids=str)
def test_root_free_of_a_flat_bucket(layout, scale):
    scale = scale.to(DEVICE) if isinstance(scale, torch.Tensor) else scale
    for rate in (torch.rand(300), torch.tensor(0.1)):
        root_free((300,), layout, rate, scale)


def test_the_moment_of_root_free_may_be_the_gradient():
    v, g = torch.ones(50, device=DEVICE), randn(50).to(DEVICE)
    u = root_free_(v, g, g, rate=torch.tensor(0.5, device=DEVICE), eps=0.0)
    close(u, g.double().cpu() / (0.5 + 0.5 * g.double().cpu() ** 2))


# graft_


def graft(shape, layout, kind, wide=1.0):
    U, moment, G = (Laid(randn(*shape, seed=i), layout) for i in range(3))
    V = Laid(randn(*shape, seed=3).square(), layout, 7.0)
    U.t[1:2] = 0
    U.t.mul_(wide)
    rate = RATES[: shape[0]]
    u, m, g, v = (x.t.double().cpu() for x in (U, moment, G, V))
    r = column(rate.double(), len(shape))
    new = v + r * (g * g - v) if kind == "adam" else v + (r > 0) * g * g
    D = m if kind == "sgd" else m / (new.sqrt() + 1e-3)
    lengths, own = (x.flatten(1).norm(dim=1) for x in (D, u))
    scale = torch.where(own > 0, lengths / own, 0.0)
    more = () if kind == "sgd" else (G.t, V.t)
    out, found = graft_(U.t, moment.t, *more, rate=None if kind == "sgd" else rate.to(DEVICE), eps=1e-3, kind=kind)
    close(found, scale, 2e-6, 0)
    close(out, torch.where(column(own > 0, len(shape)), u * column(scale, len(shape)), D), 4e-6)
    if kind != "sgd":
        close(V.t, new)
        assert torch.equal(V.t[:1].double().cpu(), v[:1]) or shape[0] == 0
    assert all(x.untouched() for x in (U, moment, G, V))
    return out, found


@pytest.mark.parametrize("kind", ["adam", "adagrad", "sgd"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_graft_is_its_formula_in_any_layout(layout, kind):
    graft((3, 7, 5), layout, kind)


@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (1, 33, 65), (2, 64, 32), (3, 130, 3), (0, 4, 4), (3, 0, 4), (3, 5)], ids=str
)
@pytest.mark.parametrize("layout", ["rows", pytest.param("sliced", marks=pytest.mark.slow)])
def test_graft_of_other_sizes(shape, layout):
    graft(shape, layout, "adam")


@pytest.mark.parametrize("wide", [1e-30, 1e30])
def test_norms_of_graft_neither_vanish_nor_overflow(wide):
    graft((3, 7, 5), "rows", "adam", wide)


def test_a_graft_is_the_same_bits_each_time():
    first, second = (graft((2, 64, 32), "columns", "adam") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# registration


@pytest.mark.parametrize("mode", ["auto", "triton"])
@pytest.mark.parametrize("operation", ["adam_direction_", "root_free_", "graft_"])
def test_the_registered_operations(operation, mode):
    t = [randn(2, 3, 4, seed=i).square().to(DEVICE) for i in range(5)]
    rate, scale = torch.rand(2, device=DEVICE), torch.empty(2, device=DEVICE)
    per_row = rate.view(2, 1, 1)
    args, kwargs = {
        "adam_direction_": (
            (t[0].to(BF16), *t[1:4]),
            {"beta1_rate": per_row, "beta2_rate": per_row, "beta1": 0.9, "eps": 0.1, "keys": keys(2)},
        ),
        "root_free_": (tuple(t[:4]), {"rate": per_row, "scale_tensor": rate[0], "eps": 0.1}),
        "graft_": ((*t, scale), {"rate": rate, "eps": 0.1, "kind": "adam"}),
    }[operation]
    with use_kernels(mode):
        torch.library.opcheck(getattr(torch.ops.secondorder, operation).default, args, kwargs)
