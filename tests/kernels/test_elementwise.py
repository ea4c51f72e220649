"""Element-wise operations in plain tensor operations against their formulas in float64, and what they refuse."""

import pytest
import torch

from draws import randn
from secondorder_kernels import explain, use_kernels
from secondorder_kernels.elementwise import adam_direction_, root_free_
from secondorder_kernels.grafts import graft_
from secondorder_kernels.rounding import mix, row_keys, stochastic_round
from secondorder_kernels.updates import apply_update_

BF16 = torch.bfloat16
KEYS = torch.tensor([1, 2**32 - 1, 5])


def column(*rates):
    return torch.tensor(rates, dtype=torch.float64)[:, None, None]


# adam_direction_ with averages in bfloat16


def test_averages_in_bfloat16_are_rounded_with_keys_of_their_own_and_the_direction_is_made_before():
    m, v, g = (randn(3, 4, 5, seed=i, dtype=torch.float32) for i in range(3))
    m, v, rate = m.to(BF16), v.square().to(BF16), column(0.0, 0.5, 1.0).float()
    wide = [m.float(), v.float()]
    options = {"beta1_rate": rate, "beta2_rate": rate, "beta1": 0.9, "eps": 1e-3, "nesterov": False}
    before = m[0].clone(), v[0].clone()
    u = adam_direction_(m, v, g, **options, keys=KEYS)
    assert torch.equal(u, adam_direction_(*wide, g, **options))
    assert torch.equal(m, stochastic_round(wide[0], KEYS)) and torch.equal(v, stochastic_round(wide[1], mix(KEYS)))
    assert torch.equal(m[0], before[0]) and torch.equal(v[0], before[1])


def test_an_average_in_bfloat16_follows_what_rounding_to_nearest_would_lose():
    m, v, g = torch.ones(1, 400, dtype=BF16), torch.ones(1, 400), torch.full((1, 400), 2.0)
    rate = torch.tensor([[2.0**-10]])
    for t in range(1000):
        key = row_keys([torch.tensor([float(t)])], 0)
        adam_direction_(m, v, g, beta1_rate=rate, beta2_rate=rate, beta1=0.9, eps=0.0, nesterov=False, keys=key)
    assert abs(float(m.double().mean()) - (2 - (1 - 2**-10) ** 1000)) < 5e-3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keys": KEYS}, TypeError, "keys only where m or v is bfloat16, got torch.float32, torch.float32"),
        ({"m": BF16}, TypeError, "takes m in bfloat16 only with keys"),
        ({"v": BF16}, TypeError, "takes v in bfloat16 only with keys"),
        ({"v": BF16, "keys": KEYS.int()}, TypeError, "keys of int64, got torch.int32"),
        ({"v": BF16, "keys": KEYS[:2]}, ValueError, r"keys \(n,\) for tensors \(n, ...\), got \(2,\), \(3, 4, 5\)"),
        ({"m": torch.float16}, TypeError, "takes m, v, g, out, beta1_rate and beta2_rate of one dtype"),
        ({"m": BF16, "v": BF16, "g": BF16, "keys": KEYS}, TypeError, "of one dtype, float32 or float64"),
        ({"m": BF16, "g": torch.float64, "keys": KEYS}, TypeError, "of one dtype, float32 or float64"),
        ({"beta1_rate": torch.ones(3)}, ValueError, r"beta1_rate that broadcasts to \(3, 4, 5\), got \(3,\)"),
        ({"eps": torch.ones(4, 1, 1)}, ValueError, r"eps that broadcasts to \(3, 4, 5\), got \(4, 1, 1\)"),
    ],
)
def test_adam_direction_refuses_what_does_not_fit(change, error, message):
    arguments = {name: torch.zeros(3, 4, 5) for name in ("m", "v", "g")}
    arguments |= {"beta1_rate": torch.ones(3, 1, 1), "beta2_rate": torch.ones(()), "beta1": 0.9, "eps": 0.1}
    for name, value in change.items():
        arguments[name] = arguments[name].to(value) if isinstance(value, torch.dtype) else value
    with pytest.raises(error, match=message):
        adam_direction_(**arguments, nesterov=False)


# root_free_


@pytest.mark.parametrize("scale", [2.0, torch.tensor(2), torch.tensor(2.0)], ids=str)
@pytest.mark.parametrize(
    "rate",
    [column(0.0, 0.3, 1.0), randn(3, 4, 5, seed=9).sigmoid(), column(0.5)[0, 0, 0]],
    ids=["by row", "by element", "one"],
)
def test_root_free_is_its_formula(scale, rate):
    v, g, moment = randn(3, 4, 5).square(), randn(3, 4, 5, seed=1), randn(3, 4, 5, seed=2)
    expected = v + rate * (2 * g**2 - v)
    out = torch.full_like(v, torch.nan)
    assert root_free_(v, g, moment, rate=rate, scale=scale, eps=1e-3, out=out) is out
    torch.testing.assert_close(v, expected)
    torch.testing.assert_close(out, moment / (expected + 1e-3))


def test_root_free_refuses_what_does_not_fit():
    x, y, rate = torch.zeros(3, 4), torch.zeros(4, 3), torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"v, g, moment and out of one shape, got \(3, 4\), \(3, 4\), \(4, 3\)"):
        root_free_(x, x, y, rate=rate, eps=0.1)
    with pytest.raises(ValueError, match=r"rate that broadcasts to \(3, 4\), got \(3,\)"):
        root_free_(x, x, x, rate=rate[:, 0], eps=0.1)
    with pytest.raises(ValueError, match=r"scale that is a number or 0-d, got \(3, 1\)"):
        root_free_(x, x, x, rate=rate, scale=rate, eps=0.1)
    with pytest.raises(TypeError, match="of one dtype, float32 or float64"):
        root_free_(x, x.double(), x, rate=rate, eps=0.1)


# apply_update_


@pytest.mark.parametrize("decay_after", [False, True])
@pytest.mark.parametrize("keep", [None, torch.tensor(0.9, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["float", "tensor"])
def test_apply_update_is_its_formula_and_updates_stay(lr, keep, decay_after):
    whole = randn(8, 9)
    params, updates = [whole[2:5, 3:], randn(4, seed=1), randn(seed=2)], [randn(3, 6), randn(4), randn()]
    before, kept = [u.clone() for u in updates], 1.0 if keep is None else 0.9
    pairs = zip(params, updates, strict=True)
    expected = [kept * (p - 0.1 * u) if decay_after else kept * p - 0.1 * u for p, u in pairs]
    apply_update_(params, updates, lr=lr, keep=keep, decay_after=decay_after)
    torch.testing.assert_close(params, expected)
    assert all(torch.equal(u, old) for u, old in zip(updates, before, strict=True))


@pytest.mark.parametrize("decay_after", [False, True])
def test_apply_update_with_keys_is_right_on_average(decay_after):
    n, p, u = 4000, 1.5, 0.0123
    params = [torch.full((1,), p, dtype=BF16) for _ in range(n)]
    updates, keys = [torch.full((1,), u)] * n, row_keys([torch.arange(float(n))], 0)
    apply_update_(params, updates, lr=0.1, keep=torch.tensor(0.99), decay_after=decay_after, keys=keys)
    exact = 0.99 * (p - 0.1 * u) if decay_after else 0.99 * p - 0.1 * u
    found = torch.cat(params).double()
    assert len(found.unique()) == 2 and abs(float(found.mean()) - exact) < 4 * 2**-7 * 0.5 / n**0.5


def test_apply_update_of_nothing():
    apply_update_([], [], lr=0.1)
    p = torch.ones(3)
    apply_update_([p, torch.zeros(0)], [torch.ones(3), torch.zeros(0)], lr=1.0)
    assert torch.equal(p, torch.zeros(3))


def test_apply_update_refuses_what_does_not_fit():
    x, y, half = torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, 3, dtype=BF16)
    for updates, message in (([], "1 and 0"), ([y], r"\(2, 3\) and \(3,\)")):
        with pytest.raises(ValueError, match=f"as many updates as parameters, in their shapes, got {message}"):
            apply_update_([x], updates, lr=0.1)
    with pytest.raises(TypeError, match="parameters of one dtype"):
        apply_update_([x, half], [x, x], lr=0.1)
    with pytest.raises(ValueError, match=r"takes keep that is 0-d, got \(3,\)"):
        apply_update_([x], [x], lr=0.1, keep=y)
    for params, updates, keys in (([x], [x], KEYS[:1]), ([half], [half], KEYS[:1]), ([half], [x], KEYS[:1].int())):
        with pytest.raises(TypeError, match="keys of int64 with parameters of bfloat16 and updates of float32"):
            apply_update_(params, updates, lr=0.1, keys=keys)
    with pytest.raises(ValueError, match=r"takes 1 keys, one for each parameter, got \(3,\)"):
        apply_update_([half], [x], lr=0.1, keys=KEYS)


# graft_


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 7), (3, 2, 3, 2), (0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("kind", ["adam", "adagrad", "sgd"])
def test_graft_is_its_formula(kind, shape):
    U, moment, G, V = (randn(*shape, seed=i) for i in range(4))
    V, rate = V.square(), torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)[: shape[0]]
    U[1:2] = 0
    r = rate.view(-1, *[1] * (len(shape) - 1))
    new = V + r * (G**2 - V) if kind == "adam" else V + (r > 0) * G**2
    D = moment if kind == "sgd" else moment / (new.sqrt() + 1e-3)
    before = V.clone()
    if kind == "sgd":
        u, scale = graft_(U, moment, kind=kind)
    else:
        u, scale = graft_(U, moment, G, V, rate=rate, eps=1e-3, kind=kind)
        torch.testing.assert_close(V, new)
        assert torch.equal(V[:1], before[:1])
    for row in range(shape[0]):
        own = U[row].norm()
        torch.testing.assert_close(scale[row], D[row].norm() / own if own > 0 else torch.zeros_like(own))
        torch.testing.assert_close(u[row], U[row] * scale[row] if own > 0 else D[row])
        torch.testing.assert_close(u[row].norm(), D[row].norm())


def test_graft_refuses_what_does_not_fit():
    x, y, rate = torch.zeros(3, 4), torch.zeros(4, 3), torch.zeros(3)
    with pytest.raises(ValueError, match="kind must be one of adam, adagrad, sgd, got 'rmsprop'"):
        graft_(x, x, x, x, rate=rate, kind="rmsprop")
    for given in ({"G": x, "V": x}, {"G": x, "rate": rate}, {}):
        with pytest.raises(ValueError, match=r'takes G, V and rate, but none of them for "sgd"; got .* for "adam"'):
            graft_(x, x, **given, kind="adam")
    with pytest.raises(ValueError, match="none of them"):
        graft_(x, x, x, x, rate=rate, kind="sgd")
    with pytest.raises(ValueError, match=r"of one shape, got \(3, 4\), \(4, 3\)"):
        graft_(x, y, kind="sgd")
    with pytest.raises(ValueError, match=r"rows \(n, d, ...\) and rate \(n,\), got \(3, 4\), \(2,\)"):
        graft_(x, x, x, x, rate=rate[:2], kind="adam")
    with pytest.raises(TypeError, match="of one dtype, float32 or float64"):
        graft_(x, x.double(), kind="sgd")


# stochastic_round (what it computes is tested with the engine's state)


def test_stochastic_round_refuses_what_does_not_fit():
    for x, keys in ((torch.zeros(3, dtype=torch.int32), KEYS), (torch.zeros(3), KEYS.int())):
        with pytest.raises(TypeError, match="floating-point x and keys of int64"):
            stochastic_round(x, keys)
    for x, keys in ((torch.zeros(()), KEYS[0]), (torch.zeros(2, 3), KEYS), (torch.zeros(3, 1), KEYS[:, None])):
        with pytest.raises(ValueError, match=r"takes x \(n, ...\) and keys \(n,\)"):
            stochastic_round(x, keys)


# all of them


def call(operation, device):
    x, rate = torch.zeros(2, 3, 4, device=device), torch.ones(2, device=device)
    keys = torch.zeros(2, dtype=torch.int64, device=device)
    if operation == "stochastic_round":
        stochastic_round(x, keys)
    elif operation == "apply_update_":
        apply_update_([x.to(BF16), x.to(BF16)], [x, x], lr=rate[0], keep=rate[1], keys=keys)
        apply_update_([x], [x.clone()], lr=0.1, keep=rate[1])
    elif operation == "graft_":
        graft_(x, x, x, x.clone(), rate=rate, eps=0.1, kind="adam")
    elif operation == "root_free_":
        root_free_(x.clone(), x, x, rate=rate.view(2, 1, 1), scale=rate[0], eps=0.1)
    else:
        options = {"beta1_rate": rate[0], "beta2_rate": rate[0], "beta1": 0.9, "eps": rate[1], "nesterov": True}
        adam_direction_(x.to(BF16), x.clone(), x, **options, keys=keys)


OPERATIONS = ["adam_direction_", "apply_update_", "graft_", "root_free_", "stochastic_round"]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_nothing_is_read_on_the_host(operation, mode):
    with use_kernels(mode):
        call(operation, "meta")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_without_triton_the_reference_is_taken_and_mode_triton_says_why(operation, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use_kernels("auto") as calls:
        call(operation, "cpu")
    assert {path for _, path, _ in calls} == {"reference"}
    with (
        use_kernels("triton"),
        pytest.raises(RuntimeError, match=f"{operation} cannot use Triton here: "),
    ):
        call(operation, "cpu")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_explain_needs_no_more_than_tensors(operation):
    x = torch.zeros(2, 3, 3)
    tensors = {"apply_update_": ([x], [x]), "stochastic_round": (x, KEYS[:2]), "graft_": (x, x, x, x, x, x[:, 0, 0])}
    assert explain(operation, *tensors.get(operation, (x, x, x, x)))[0] == "reference"
