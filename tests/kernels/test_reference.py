"""Every operation, on every path of this machine, against torch.optim or dense algebra in float64; and the dispatch."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import secondorder_kernels as kernels
from draws import randn
from secondorder_kernels import adamw, dispatch

OPERATIONS = ("ema_syrk_", "adam_direction_", "adamw_")


def column(rate, X):
    return torch.tensor(rate, dtype=X.dtype)[:, None, None]


# ema_syrk_


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 4),
    d=st.integers(1, 20),
    m=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    transposed=st.booleans(),
)
def test_ema_syrk_is_the_weighted_mean_of_c_and_the_gram_matrix(n, d, m, dtype, transposed):
    C, X = randn(n, d, d, dtype=dtype), randn(n, d, m, seed=1, dtype=dtype)
    if transposed:
        X = X.mT.contiguous().mT
    rate = torch.linspace(0, 1, n, dtype=dtype)
    weight = rate.double()[:, None, None]
    expected = (1 - weight) * C.double() + weight * torch.einsum("nik,njk->nij", X.double(), X.double())
    before = C.data_ptr()
    assert kernels.ema_syrk_(C, X, rate) is C and C.data_ptr() == before
    torch.testing.assert_close(C.double(), expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-13)


def test_ema_syrk_takes_strided_matrices():
    wide = randn(3, 10, 14)
    rate = torch.full((3,), 0.25, dtype=torch.float64)
    expected = 0.25 * torch.einsum("nik,njk->nij", wide[:, ::2, 1::3], wide[:, ::2, 1::3])
    torch.testing.assert_close(kernels.ema_syrk_(torch.zeros_like(expected), wide[:, ::2, 1::3], rate), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ema_syrk_with_rate_0_leaves_rows_bitwise_and_with_rate_1_replaces_them(dtype):
    C, X = randn(4, 33, 33, dtype=dtype) * 1e-30, randn(4, 33, 50, seed=1, dtype=dtype) * 1e15
    before = C.clone()
    kernels.ema_syrk_(C, X, torch.tensor([0, 1, 0, 0.5], dtype=dtype))
    assert torch.equal(C[[0, 2]], before[[0, 2]])
    assert torch.equal(C[1], torch.bmm(X, X.mT)[1])


def test_ema_syrk_stays_symmetric_up_to_the_last_bits():
    for d, m in itertools.product((3, 17, 64, 130), (5, 64, 200)):
        C = torch.zeros(2, d, d)
        for seed in range(3):
            kernels.ema_syrk_(C, randn(2, d, m, seed=seed, dtype=torch.float32), torch.tensor([0.3, 0.05]))
        assert (C - C.mT).abs().max() <= 4 * torch.finfo(C.dtype).eps * C.abs().max()


@pytest.mark.parametrize(
    ("C", "X", "rate"),
    [((2, 3, 3), (2, 4, 5), (2,)), ((2, 3, 4), (2, 3, 5), (2,)), ((2, 3, 3), (2, 3, 5), ()), ((3, 3), (3, 5), (3,))],
)
def test_ema_syrk_refuses_other_shapes_and_shows_them(C, X, rate):
    with pytest.raises(ValueError, match=r"C \(n, d, d\), X \(n, d, m\) and rate \(n,\), got") as error:
        kernels.ema_syrk_(torch.zeros(C), torch.zeros(X), torch.zeros(rate))
    assert f"{C}, {X} and {rate}" in str(error.value)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16)])
def test_ema_syrk_refuses_other_dtypes(dtypes):
    C, X = torch.zeros(2, 3, 3, dtype=dtypes[0]), torch.zeros(2, 3, 3, dtype=dtypes[1])
    with pytest.raises(TypeError, match="one dtype, float32 or float64"):
        kernels.ema_syrk_(C, X, torch.zeros(2, dtype=dtypes[0]))


# adam_direction_


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("eps", [1e-3, torch.tensor([1e-3, 1e-2, 1.0], dtype=torch.float64)[:, None, None]])
def test_adam_direction_is_its_formula(nesterov, eps):
    m, v, g = randn(3, 4, 5), randn(3, 4, 5, seed=1).square(), randn(3, 4, 5, seed=2)
    r1, r2 = column([0.1, 0.5, 1.0], g), column([0.0, 0.3, 0.01], g)
    m_new = (1 - r1) * m + r1 * g
    v_new = (1 - r2) * v + r2 * g * g
    expected = (0.9 * m_new + 0.1 * g if nesterov else m_new) / (v_new.sqrt() + eps)
    gradient = g.clone()
    u = kernels.adam_direction_(m, v, g, beta1_rate=r1, beta2_rate=r2, beta1=0.9, eps=eps, nesterov=nesterov)
    torch.testing.assert_close(u, expected)
    torch.testing.assert_close(m, m_new)
    torch.testing.assert_close(v, v_new)
    assert torch.equal(g, gradient)


def test_adam_direction_with_debiased_rates_takes_the_steps_of_adam():
    p = torch.nn.Parameter(randn(2, 3, 4))
    optimizer = torch.optim.Adam([p], lr=0.1, betas=(0.8, 0.95), eps=1e-4, foreach=False)
    q, m, v = p.detach().clone(), torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3, 4, dtype=torch.float64)
    for t in range(1, 20):
        p.grad = randn(2, 3, 4, seed=t)
        optimizer.step()
        r1, r2 = (torch.tensor((1 - b) / (1 - b**t), dtype=torch.float64) for b in (0.8, 0.95))
        q -= 0.1 * kernels.adam_direction_(
            m, v, p.grad, beta1_rate=r1, beta2_rate=r2, beta1=0.8, eps=1e-4, nesterov=False
        )
        torch.testing.assert_close(q, p.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
def test_adam_direction_with_rate_0_leaves_rows_bitwise(nesterov):
    m, v, g = randn(3, 7, 9).float(), randn(3, 7, 9, seed=1).square().float(), randn(3, 7, 9, seed=2).float() * 1e18
    before = m.clone(), v.clone()
    rate = column([0.0, 1.0, 0.5], g)
    kernels.adam_direction_(m, v, g, beta1_rate=rate, beta2_rate=rate, beta1=0.9, eps=1e-8, nesterov=nesterov)
    assert torch.equal(m[0], before[0][0]) and torch.equal(v[0], before[1][0])
    assert torch.equal(m[1], g[1]) and torch.equal(v[1], g[1] * g[1])


def test_adam_direction_leaves_its_result_in_out():
    tensors = [randn(2, 3, 4, seed=i).abs() for i in range(3)]
    options = {"beta1_rate": column([0.1, 0.2], tensors[0]), "beta2_rate": column([0.1, 0.2], tensors[0])}
    options |= {"beta1": 0.9, "eps": 1e-8, "nesterov": True}
    expected = kernels.adam_direction_(*[t.clone() for t in tensors], **options)
    out = torch.full_like(expected, torch.nan)
    assert kernels.adam_direction_(*tensors, **options, out=out) is out
    assert torch.equal(out, expected)


def test_adam_direction_refuses_different_shapes_and_shows_them():
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    options = {"beta1_rate": a[0, 0], "beta2_rate": a[0, 0], "beta1": 0.9, "eps": 1e-8, "nesterov": False}
    for tensors in ((a, a, b), (a, b, a), (b, a, a)):
        with pytest.raises(ValueError, match="of one shape, got") as error:
            kernels.adam_direction_(*tensors, **options)
        assert ", ".join(str(tuple(t.shape)) for t in tensors) in str(error.value)
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2, 4\)"):
        kernels.adam_direction_(a, a, a, **options, out=b)


# adamw_

SHAPES = [(3, 4), (5,), (), (2, 3, 2)]
ADAMW_OPTIONS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "maximize": False}


class Lists:
    """Arguments of `adamw_`, for parameters of `SHAPES`."""

    def __init__(self, dtype=torch.float64):
        self.params = [randn(*shape, seed=i, dtype=dtype) for i, shape in enumerate(SHAPES)]
        self.exp_avgs = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.params]
        self.counts = [torch.zeros(()) for _ in self.params]

    def step(self, grads, refused=False, lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, maximize=False):
        for count in self.counts:
            count += not refused
        options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
        options |= {"weight_decay": weight_decay, "maximize": maximize, "refused": torch.tensor(float(refused))}
        kernels.adamw_(self.params, grads, self.exp_avgs, self.exp_avg_sqs, self.counts, **options)

    def tensors(self):
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs]


def gradients(t, dtype=torch.float64, scale=1.0):
    return [scale * randn(*shape, seed=100 * t + i, dtype=dtype) for i, shape in enumerate(SHAPES)]


@pytest.fixture(params=["auto", "reference"])
def mode(request):
    with kernels.use_kernels(request.param):
        yield request.param


OPTIONS = {
    "plain": {},
    "no decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True},
    "no momentum": {"beta1": 0.0},
    "other betas": {"beta1": 0.5, "beta2": 0.999, "eps": 1e-8},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2, dtype=torch.float64)], ids=["float", "tensor"])
def test_adamw_is_torch_optim_adamw_to_1e_15(mode, options, lr):
    ours = Lists()
    theirs = [torch.nn.Parameter(p.clone()) for p in ours.params]
    named = {"betas": (options.get("beta1", 0.9), options.get("beta2", 0.99)), "eps": options.get("eps", 1e-6)}
    named |= {"weight_decay": options.get("weight_decay", 0.1), "maximize": options.get("maximize", False)}
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, foreach=False, fused=False, **named)
    for t in range(1, 25):
        grads = gradients(t)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g
        optimizer.step()
        ours.step(grads, lr=lr, **options)
    state = [optimizer.state[p] for p in theirs]
    torch.testing.assert_close(ours.params, [p.detach() for p in theirs], rtol=0, atol=1e-15)
    torch.testing.assert_close(ours.exp_avgs, [s["exp_avg"] for s in state], rtol=0, atol=1e-15)
    torch.testing.assert_close(ours.exp_avg_sqs, [s["exp_avg_sq"] for s in state], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paths_of_adamw_agree_to_rounding(dtype):
    results = []
    for mode in ("auto", "reference"):
        lists = Lists(dtype)
        with kernels.use_kernels(mode):
            for t in range(1, 10):
                lists.step(gradients(t, dtype))
        results.append(lists.params)
    atol = 1e-6 if dtype == torch.float32 else 0.05  # a few units in the last place of bfloat16 at 2
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=atol)


def test_every_tensor_of_adamw_has_its_own_count(mode):
    lists = Lists()
    lists.counts = [torch.tensor(float(t)) for t in (0, 3, 10, 1000)]
    before = [p.clone() for p in lists.params]
    lists.step(gradients(1), beta1=0.9, beta2=0.99, eps=0.0, weight_decay=0.0, lr=1.0)
    for p, old, g, t in zip(lists.params, before, gradients(1), (1, 4, 11, 1001), strict=True):
        step = 0.1 / (1 - 0.9**t) * g.sign() / (0.01 / (1 - 0.99**t)) ** 0.5
        torch.testing.assert_close(p, old - step, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_a_refused_step_of_adamw_changes_nothing(mode, dtype, bad, steps_before, eps):
    lists = Lists(dtype)
    for t in range(steps_before):
        lists.step(gradients(t, dtype), eps=eps)
    before = [x.clone() for x in lists.tensors()]
    lists.step(gradients(9, dtype, scale=bad), refused=True, eps=eps)
    assert all(torch.equal(x, old) for x, old in zip(lists.tensors(), before, strict=True))


def test_a_run_with_a_refused_step_of_adamw_equals_the_run_without_it(mode):
    with_refusal, without = Lists(), Lists()
    for t in range(6):
        if t == 3:
            with_refusal.step(gradients(99, scale=torch.nan), refused=True)
        with_refusal.step(gradients(t))
        without.step(gradients(t))
    assert all(torch.equal(a, b) for a, b in zip(with_refusal.tensors(), without.tensors(), strict=True))


STRIDES = {
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim == 2 else x,
    "sliced": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "expanded": lambda x: x.flatten()[0].expand(x.shape),
}


@pytest.mark.parametrize("strided", STRIDES.values(), ids=STRIDES.keys())
def test_adamw_takes_gradients_and_state_with_any_strides(mode, strided):
    plain, other = Lists(), Lists()
    other.params = [STRIDES["sliced"](p) for p in other.params]
    other.exp_avgs = [STRIDES["transposed"](m) for m in other.exp_avgs]
    for t in range(3):
        grads = [strided(g) for g in gradients(t)]
        plain.step([g.contiguous() for g in grads])
        other.step(grads)
    torch.testing.assert_close(other.params, plain.params, rtol=0, atol=1e-14)


def test_where_torch_has_no_fused_adamw_the_reference_is_taken(monkeypatch):
    def missing(*args, **kwargs):
        raise NotImplementedError("not for this device")

    expected, lists = Lists(), Lists()
    with kernels.use_kernels("reference"):
        expected.step(gradients(1))
    monkeypatch.setattr(torch, "_fused_adamw_", missing)
    adamw._fused_adamw_fails.cache_clear()
    try:
        lists.step(gradients(1))
        path, reason = kernels.explain(
            "adamw_", lists.params, gradients(1), lists.exp_avgs, lists.exp_avg_sqs, lists.counts
        )
    finally:
        adamw._fused_adamw_fails.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(lists.tensors(), expected.tensors(), strict=True))
    assert path == "reference" and "not for this device" in reason


def test_the_reference_of_adamw_calls_one_operation_per_tensor_beside_multi_tensor_ones():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    calls = []
    for n in (1, 21):
        x = [[torch.zeros(3) for _ in range(n)] for _ in range(4)]
        counts, grads = [torch.ones(()) for _ in range(n)], x.pop()
        with kernels.use_kernels("reference"), Count() as count:
            kernels.adamw_(x[0], grads, *x[1:], counts, **ADAMW_OPTIONS, refused=torch.zeros(()))
        calls.append(count.calls)
    assert calls[1] - calls[0] <= 20


def test_adamw_refuses_lists_that_do_not_fit():
    x, y, count = torch.zeros(2, 3), torch.zeros(3, 2), torch.ones(())
    options = {**ADAMW_OPTIONS, "refused": torch.zeros(())}
    for lists, message in [
        (([], [], [], [], []), "as many counts as parameters, and some, got 0 and 0"),
        (([x], [x], [x], [x], []), "got 0 and 1"),
        (([x], [y], [x], [x], [count]), r"grads of the parameters' shapes.*\[2, 3\].*\[3, 2\]"),
        (([x], [x], [x, x], [x], [count]), r"exp_avgs of the parameters' shapes.*None.*\[2, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            kernels.adamw_(*lists, **options)
    with pytest.raises(TypeError, match="of one dtype"):
        kernels.adamw_([x], [x.double()], [x], [x], [count], **options)


# dispatch


def call(operation, device="cpu"):
    x, rate = torch.zeros(2, 3, 3, device=device), torch.zeros(2, device=device)
    if operation == "ema_syrk_":
        return kernels.ema_syrk_(x, x.clone(), rate)
    if operation == "adam_direction_":
        rates = {"beta1_rate": rate[:, None, None], "beta2_rate": rate[:, None, None]}
        return kernels.adam_direction_(x, x.clone(), x.clone(), **rates, beta1=0.9, eps=1.0, nesterov=True)
    tensors = [[x], [x.clone()], [x.clone()], [x.clone()], [rate[0]]]
    return kernels.adamw_(*tensors, **ADAMW_OPTIONS, refused=rate[1])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_nothing_is_read_on_the_host(operation, mode):
    with kernels.use_kernels(mode):
        call(operation, device="meta")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_in_mode_triton_a_call_without_a_kernel_raises_and_says_why(operation, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    reason = f"{operation} cannot use Triton here: "
    with kernels.use_kernels("triton"):
        with pytest.raises(RuntimeError, match=reason):
            call(operation)
        path = {name: (path, why) for name, path, why in kernels.explain_all()}[operation]
    # Explained is what a GPU's tensors take, where there is a GPU; called was with those of the CPU.
    assert torch.cuda.is_available() or (path[0] == "none" and reason in path[1])


def test_explain_all_names_every_operation_and_its_path():
    rows = kernels.explain_all()
    assert [name for name, _, _ in rows] == list(dispatch.operations())
    assert all(path and reason for _, path, reason in rows)
    with kernels.use_kernels("reference"):
        assert {path for _, path, _ in kernels.explain_all()} == {"reference"}


def test_explain_tells_of_strides_that_the_fused_kernel_cannot_take():
    x, count = [torch.zeros(3, 4)], [torch.ones(())]
    assert kernels.explain("adamw_", x, x, x, x, count)[0] == "torch fused"
    path, reason = kernels.explain("adamw_", x, [torch.zeros(4, 3).T], x, x, count)
    assert path == "reference" and "contiguous" in reason


def test_explain_refuses_an_unknown_operation():
    with pytest.raises(ValueError, match="must be one of .*adamw_.*, got 'gemm'"):
        kernels.explain("gemm")


def test_use_kernels_ends_with_its_block_even_after_an_error():
    before = kernels.explain_all()
    with pytest.raises(KeyError), kernels.use_kernels("reference"):
        raise KeyError
    assert kernels.explain_all() == before


def test_use_kernels_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match="mode must be one of auto, reference, triton, got 'cuda'"):
        with kernels.use_kernels("cuda"):
            pass


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_an_unknown_mode_in_the_environment_is_an_error_at_import():
    result = run_python("import secondorder_kernels", SECONDORDER_KERNELS="cuda")
    assert result.returncode == 1
    assert "ValueError: the environment variable SECONDORDER_KERNELS must be one of" in result.stderr


def test_the_environment_sets_the_mode_and_the_import_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import secondorder_kernels as k; "
        "print({path for _, path, _ in k.explain_all()})"
    )
    result = run_python(code, SECONDORDER_KERNELS="reference")
    assert result.stdout.strip() == "{'reference'}", result.stderr
