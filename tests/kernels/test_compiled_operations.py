"""Public functions inside compiled code: kernels where there are some, and the results of eager mode."""

import functools

import pytest
import torch

import draws  # noqa: E402
import secondorder_kernels as kernels
from laid import DEVICE  # noqa: E402

pytest.importorskip("triton")

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a", "ignore::DeprecationWarning")
randn = functools.partial(draws.randn, dtype=torch.float32, device=DEVICE)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def products(C, X, rate):
    kernels.ema_syrk_(C, 2 * X, rate)
    return kernels.gram(X, scale=rate) + C


def group(K, M, step):
    new, squares = kernels.multiply_update(K, M, step)
    return new.tril() / squares[:, None, None]


def steps(p, q, g, h, count):
    params, averages = [p, q], [torch.zeros_like(p), torch.zeros_like(q)]
    squares = [torch.zeros_like(p), torch.zeros_like(q)]
    options = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "maximize": False, "lr": 0.1}
    kernels.adamw_(params, [g, h], averages, squares, [count, count], refused=torch.zeros_like(count), **options)
    kernels.apply_update_(params, [g, h], lr=0.1)
    return averages[0] + squares[0]


CALLS = {
    products: ({"ema_syrk_", "gram"}, lambda: (randn(2, 5, 5), randn(2, 5, 7, seed=1), randn(2, seed=2).sigmoid())),
    group: ({"multiply_update"}, lambda: (randn(2, 6, 6), randn(2, 6, 6, seed=1), randn(2, seed=2))),
    steps: (
        {"adamw_", "apply_update_"},
        lambda: (randn(4, 3), randn(5, seed=1), randn(4, 3, seed=2), randn(5, seed=3), torch.ones((), device=DEVICE)),
    ),
}


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("mode", ["triton", "auto"])
def test_a_whole_graph_of_public_functions_is_eager_mode(function, mode):
    operations, arguments = CALLS[function]
    ours, theirs = arguments(), arguments()
    with kernels.use_kernels(mode) as eager:
        expected = function(*theirs)
    with kernels.use_kernels(mode) as compiled:
        found = torch.compile(function, backend="aot_eager", fullgraph=True)(*ours)
    torch.testing.assert_close((found, ours), (expected, theirs))
    assert {name for name, *_ in eager} == operations
    if mode == "triton":
        assert compiled == eager and {path for _, path, _ in eager} == {"triton"}


def test_inductor_keeps_what_is_changed_in_place():
    ours, theirs = CALLS[products][1](), CALLS[products][1]()
    with kernels.use_kernels("triton"):
        expected = products(*theirs)
        found = torch.compile(products, fullgraph=True)(*ours)
    torch.testing.assert_close((found, ours), (expected, theirs))
