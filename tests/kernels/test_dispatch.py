"""The path through Triton: chosen, configured, counted, given up after a failure, and opaque to compilers.

On operations of its own, with kernels that do next to nothing.
"""

import sys
import types
import warnings

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import secondorder_kernels as kernels  # noqa: E402
from laid import DEVICE  # noqa: E402
from secondorder_kernels import dispatch, launch, policy, tables  # noqa: E402


@triton.jit
def scale_kernel(X, FACTORS, OUT, m, SIZE: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    x = tl.load(X + row * m + i, mask=i < m).to(tl.float32)
    tl.store(OUT + row * m + i, x * tl.load(FACTORS + row), mask=i < m)


launches = []


def launch_scale_(x, factors, *, config):
    launches.append(config)
    scale_kernel[(len(x),)](x, factors, x, x.shape[1], SIZE=config["block"])


def launch_scaled(xs, *, factor, config):
    launches.append(config)
    out = torch.empty_like(xs[0])
    factors = torch.full((len(out),), factor, device=out.device)
    scale_kernel[(len(out),)](xs[0], factors, out, out.shape[1], SIZE=config["block"])
    return out


def launch_broken(x, factors, *, config):
    raise RuntimeError("out of resources")


def toy_scale_(x, factors):
    x.mul_(factors[:, None])


def toy_scaled(xs, *, factor):
    return xs[0] * factor


def toy_failing_(x, factors):
    toy_scale_(x, factors)


def tensors(x, factors):
    return x, factors


def shape(x, factors):
    return str(x.dtype), tuple(x.shape)


def operation(reference, schema, path, **options):
    """An operation that is known to torch, and not to `explain_all`."""
    made = dispatch.Operation(reference, lambda device: (), (path,), schema=schema, **options)
    del dispatch._operations[made.name]
    return made


scale_ = operation(
    toy_scale_,
    "(Tensor(a!) x, Tensor factors) -> ()",
    launch.triton_path(
        "toy_scale_",
        "toy:launch_scale_",
        tensors=tensors,
        shape=shape,
        refuses=lambda x, factors: "rows are not contiguous" if x.stride(-1) != 1 else None,
    ),
)
scaled = operation(
    toy_scaled,
    "(Tensor[] xs, *, float factor) -> Tensor",
    launch.triton_path(
        "toy_scaled",
        "toy:launch_scaled",
        tensors=lambda xs, *, factor: xs,
        shape=lambda xs, *, factor: (str(xs[0].dtype), tuple(xs[0].shape)),
    ),
    fake=lambda xs, *, factor: torch.empty_like(xs[0]),
)
failing_ = operation(
    toy_failing_,
    "(Tensor(a!) x, Tensor factors) -> ()",
    launch.triton_path("toy_failing_", "toy:launch_broken", tensors=tensors, shape=shape),
)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Their kernels' module and configurations, and no calls yet."""
    module = types.ModuleType("secondorder_kernels.triton.toy")
    for launcher in (launch_scale_, launch_scaled, launch_broken):
        setattr(module, launcher.__name__, launcher)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(tables, "family_config", lambda operation, kind, sizes, name: {"block": 8, "for": sizes})
    monkeypatch.setattr(tables, "nearest", lambda operation, kind, sizes, device: None)
    monkeypatch.setattr(failing_, "_broken", None)
    launches.clear()
    yield
    launch._imported.cache_clear()
    torch._dynamo.reset()


@pytest.fixture
def worthwhile(monkeypatch):
    monkeypatch.setattr(policy, "declines", lambda operation, kind, sizes, device: None)


def arguments():
    return torch.arange(6.0, device=DEVICE).reshape(2, 3), torch.tensor([2.0, 3.0], device=DEVICE)


EXPECTED = torch.tensor([[0.0, 2.0, 4.0], [9.0, 12.0, 15.0]], device=DEVICE)


def test_mode_triton_launches_with_the_tables_configuration():
    x, factors = arguments()
    with kernels.use_kernels("triton") as calls:
        assert scale_(x, factors) is None
        assert torch.equal(scaled([x], factor=2.0), 2 * EXPECTED)
    assert torch.equal(x, EXPECTED)
    assert launches == [{"block": 8, "for": (2, 3)}] * 2
    assert calls == {
        ("toy_scale_", "triton", "the mode is 'triton'"): 1,
        ("toy_scaled", "triton", "the mode is 'triton'"): 1,
    }


def test_mode_auto_launches_what_was_measured_to_be_worth_it(worthwhile):
    x, factors = arguments()
    with kernels.use_kernels("auto") as calls:
        scale_(x, factors)
    assert torch.equal(x, EXPECTED) and len(launches) == 1
    assert calls == {("toy_scale_", "triton", "the fastest path that takes these tensors"): 1}


def test_mode_auto_takes_the_reference_where_nothing_was_measured():
    x, factors = arguments()
    with kernels.use_kernels("auto") as calls:
        scale_(x, factors)
    assert torch.equal(x, EXPECTED) and not launches
    ((_, path, reason),) = calls
    assert path == "reference" and ("interpreter is for tests" in reason or "not measured" in reason)


def test_calls_are_counted_by_reason_and_only_inside_their_block():
    x, factors = arguments()
    with kernels.use_kernels("reference") as outer:
        scale_(x, factors)
        with kernels.use_kernels("triton") as inner:
            for _ in range(3):
                scale_(x, factors)
        scale_(x, factors)
    scale_(x, factors)
    assert outer == {("toy_scale_", "reference", "the mode is 'reference'"): 2}
    assert inner == {("toy_scale_", "triton", "the mode is 'triton'"): 3}


def test_what_the_kernel_refuses_is_an_error_in_mode_triton_unless_that_is_not_strict():
    x, factors = arguments()
    columns = x.T.contiguous().T
    with (
        kernels.use_kernels("triton"),
        pytest.raises(RuntimeError, match="toy_scale_ cannot use Triton here: rows are"),
    ):
        scale_(columns, factors)
    with kernels.use_kernels("triton"), pytest.raises(RuntimeError, match="there is no kernel for torch.float64"):
        scale_(x.double(), factors)
    assert torch.equal(columns, arguments()[0])
    with kernels.use_kernels("triton", strict=False) as calls:
        scale_(columns, factors)
        scale_(x, factors)
    assert torch.equal(columns, EXPECTED) and torch.equal(x, EXPECTED)
    assert calls == {
        ("toy_scale_", "reference", "rows are not contiguous"): 1,
        ("toy_scale_", "triton", "the mode is 'triton'"): 1,
    }


# a kernel that fails


def test_in_mode_auto_a_failure_is_warned_of_once_and_the_reference_taken_from_then_on(worthwhile):
    with kernels.use_kernels("auto") as calls:
        x, factors = arguments()
        with pytest.warns(UserWarning, match="toy_failing_ goes on without Triton.*RuntimeError: out of resources"):
            failing_(x, factors)
        assert torch.equal(x, EXPECTED)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                x, factors = arguments()
                failing_(x, factors)
                assert torch.equal(x, EXPECTED)
        path, reason = failing_.choose(x, factors)
    assert path.name == "reference" and "failed on this machine" in reason
    assert [count for (_, path, _), count in calls.items() if path == "reference"] == [2]


def test_in_mode_triton_a_failure_is_an_error(worthwhile):
    with kernels.use_kernels("triton"), pytest.raises(RuntimeError, match="out of resources"):
        failing_(*arguments())
    with kernels.use_kernels("triton"), pytest.raises(RuntimeError, match="out of resources"):
        failing_(*arguments())


# compilers


def test_torch_finds_nothing_wrong_with_registered_operations():
    with kernels.use_kernels("triton", strict=False):
        torch.library.opcheck(scale_.registered, arguments())
        torch.library.opcheck(scaled.registered, ([arguments()[0]],), {"factor": 2.0})


def in_place_and_out_of_place(x, factors):
    y = x + 1
    scale_(y, factors)
    z = scaled([y.sin(), y], factor=3.0)
    scale_(x, factors)
    return y + z.sum() - x


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a", "ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["triton", "auto", "reference"])
def test_a_whole_graph_is_compiled_around_them(mode, backend):
    with kernels.use_kernels(mode, strict=False):
        x, factors = arguments()
        expected = in_place_and_out_of_place(x, factors)
        before, (twin, _) = len(launches), arguments()
        found = torch.compile(in_place_and_out_of_place, backend=backend, fullgraph=True)(twin, factors)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(twin, x)
    assert len(launches) - before == (3 if mode == "triton" else 0)


def test_fake_tensors_take_the_reference_and_have_its_shapes():
    with FakeTensorMode() as mode, kernels.use_kernels("triton", strict=False):
        x, factors = mode.from_tensor(torch.zeros(2, 3)), mode.from_tensor(torch.zeros(2))
        scale_(x, factors)
        out = scaled([x], factor=2.0)
        registered = scaled.registered([x], factor=2.0)
    assert out.shape == registered.shape == (2, 3) and not launches
