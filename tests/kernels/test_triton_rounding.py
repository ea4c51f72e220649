"""Stochastic rounding by Triton is that of the reference, bit for bit."""

import math

import pytest
import torch

pytest.importorskip("triton")
from laid import DEVICE, LAYOUTS, Laid, far_apart  # noqa: E402
from secondorder_kernels import explain, rounding, tables, use_kernels  # noqa: E402
from secondorder_kernels.reference import rounding as reference  # noqa: E402


@pytest.fixture(autouse=True)
def _blocks(monkeypatch):
    monkeypatch.setattr(tables, "family_config", lambda *args: {"block": 64, "num_warps": 1})


def keys(n):
    return torch.randint(0, 2**32, (n,), generator=torch.Generator().manual_seed(n)).to(DEVICE)


def rounded(x, k, mode="triton"):
    with use_kernels(mode):
        return rounding.stochastic_round(x, k)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 7, 5), (2, 33, 17), (1, 64, 3)], ids=str)
def test_bits_are_those_of_the_reference_in_any_layout(shape, layout):
    x = Laid(torch.randn(shape), layout)
    found = rounded(x.t, keys(shape[0]))
    assert found.is_contiguous() and torch.equal(found, reference.stochastic_round(x.t, keys(shape[0])))
    assert x.untouched()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (0, 4), (4, 0), (2, 3, 2, 2)], ids=str)
def test_other_shapes_and_dtypes(shape, dtype):
    x = torch.randn(shape).to(DEVICE, dtype)
    assert torch.equal(rounded(x, keys(shape[0])), reference.stochastic_round(x, keys(shape[0])))


def test_numbers_of_all_sizes_and_what_is_none():
    bits = torch.randint(-(2**31), 2**31, (4, 300), dtype=torch.int64).to(torch.int32)
    bits[:, :4] = torch.tensor([math.inf, -math.inf, 0.0, -0.0]).view(torch.int32)
    bits[:, 4:40] %= 2**23  # subnormal numbers
    x = bits.view(torch.float32).to(DEVICE)
    found, expected = rounded(x, keys(4)), reference.stochastic_round(x, keys(4))
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isnan(), x.isnan())
    kept = ~x.isnan()
    assert torch.equal(found[kept].view(torch.int16), expected[kept].view(torch.int16))


def test_the_mean_over_keys_is_the_number():
    n, exact = 20000, float(torch.tensor(1.001))
    with use_kernels("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "family_config", lambda *args: {"block": 4096, "num_warps": 1})
        found = rounding.stochastic_round(torch.full((n, 1), exact, device=DEVICE), keys(n)).double()
    assert abs(float(found.mean()) - exact) < 4 * 2**-7 * 0.5 / math.sqrt(n)


@pytest.mark.parametrize("strides", [(2**30, 8, 1), (1, 2**27, 1)], ids=["rows", "inside a tile"])
def test_offsets_beyond_32_bits(tmp_path, strides):
    shape = (4, 2, 8) if strides[0] > 1 else (1, 18, 8)
    x = far_apart(tmp_path, shape, strides, torch.float16)
    x.copy_(torch.randn(shape))
    assert torch.equal(rounded(x, keys(len(x))), reference.stochastic_round(x.contiguous(), keys(len(x))))


def test_strides_of_more_axes_than_three_are_refused():
    x = torch.randn(2, 3, 2, 3, 2).permute(0, 4, 3, 2, 1).to(DEVICE)
    with use_kernels("triton"):
        path, reason = explain("stochastic_round", x, keys(2))
    assert path == "none" and "not those of a stack of matrices" in reason
    assert torch.equal(rounded(x, keys(2), "auto"), reference.stochastic_round(x, keys(2)))


@pytest.mark.parametrize("mode", ["auto", "triton"])
def test_the_registered_operation(mode):
    with use_kernels(mode):
        torch.library.opcheck(
            torch.ops.secondorder.stochastic_round.default, (torch.randn(3, 4, device=DEVICE).T, keys(4))
        )
