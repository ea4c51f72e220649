"""What a Triton kernel can take, whether it pays, and in which precision it multiplies."""

import importlib.util

import pytest
import torch

from secondorder_kernels import policy, tables

GPU = torch.device("cuda", 0)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(policy, "installed", lambda: True)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of compute capability 9.0, as far as questions go."""
    monkeypatch.setattr(policy, "installed", lambda: True)
    monkeypatch.setattr(policy, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    tables.file_name.cache_clear()
    yield monkeypatch
    tables.file_name.cache_clear()
    tables.forget()


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    @property
    def device(self):
        return GPU


def on_gpu(monkeypatch):
    """The same, taken for a plain one."""
    monkeypatch.setattr(policy, "Tensor", OnGpu)
    return torch.zeros(2).as_subclass(OnGpu)


# refuses


def test_plain_tensors_and_parameters_are_taken(interpreted):
    for dtype in policy.FLOATS:
        x = torch.zeros(2, dtype=dtype)
        assert policy.refuses([x, None, torch.nn.Parameter(x)]) is None


def test_every_refusal_is_a_sentence(interpreted, monkeypatch):
    x = torch.zeros(2)
    assert policy.refuses([x, x.double()]) == "there is no kernel for torch.float64"
    assert policy.refuses([x.half()], [torch.float32]) == "there is no kernel for torch.float16"
    assert policy.refuses([x, x.to("meta")]) == "tensors are on several devices, cpu, meta"
    assert policy.refuses([x.to("meta")]) == "tensors are on meta"
    subclass = x.as_subclass(OnGpu)
    monkeypatch.setattr(OnGpu, "device", torch.device("cpu"))
    assert policy.refuses([x, subclass]) == "OnGpu has no memory of its own that a kernel could be given"
    monkeypatch.setattr(policy, "installed", lambda: False)
    assert policy.refuses([x]) == "triton is not installed"


def test_without_the_interpreter_nothing_on_a_cpu_is_taken(interpreted, monkeypatch):
    for value in ("0", "false", ""):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert policy.refuses([torch.zeros(2)]) == "tensors are on cpu"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert policy.refuses([torch.zeros(2)]) == "tensors are on cpu"


def test_old_gpus_are_refused_by_their_capability(gpu):
    x = on_gpu(gpu)
    assert policy.refuses([x]) is None
    gpu.setattr(policy, "_capability", lambda device: (7, 5))
    assert policy.refuses([x]) == "cuda:0 has compute capability 7.5, and 8.0 is the least"
    gpu.setattr(torch.version, "hip", "6.4")  # AMD counts otherwise
    assert policy.refuses([x]) is None


def test_whether_triton_is_installed_is_found_out_without_importing_it(monkeypatch):
    for found in (None, object()):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, found=found: found)
        assert policy.installed.__wrapped__() is (found is not None)


# declines


def test_a_kernel_has_to_be_measured_and_faster_to_be_worth_it(gpu):
    def declines(entry):
        gpu.setattr(tables, "nearest", lambda operation, kind, sizes, device: entry)
        return policy.declines("ema_syrk_", "float32/k", (24, 1024), GPU)

    not_measured = "not measured on NVIDIA H100; python -m secondorder_kernels.tune does that"
    assert declines(None) == not_measured
    assert declines(tables.Entry((24, 1024), {"block": 64})) == not_measured  # compiles well, nothing more
    assert declines(tables.Entry((24, 512), None, 0.9)) == "torch was as fast at the nearest measured sizes, (24, 512)"
    assert declines(tables.Entry((24, 512), {"block": 64}, 1.4)) is None


def test_the_interpreter_is_never_worth_it(interpreted):
    assert policy.declines("ema_syrk_", "float32/k", (24,), torch.device("cpu")) == "Triton's interpreter is for tests"


def test_without_triton_it_is_not_worth_asking_what_was_measured(gpu):
    gpu.setattr(policy, "installed", lambda: False)
    assert policy.declines("ema_syrk_", "float32/k", (24,), GPU) == "triton is not installed"


# precision


@pytest.fixture
def restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("setting", "nvidia", "amd"), [("highest", "ieee", "ieee"), ("high", "tf32x3", "ieee"), ("medium", "bf16", "bf16")]
)
def test_products_of_float32_are_as_precise_as_torchs_setting_asks(restored, monkeypatch, setting, nvidia, amd):
    torch.set_float32_matmul_precision(setting)
    assert policy.precision(torch.float32) == nvidia
    assert policy.precision(torch.bfloat16) == policy.precision(torch.float16) == "ieee"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert policy.precision(torch.float32) == amd
