"""What the interpreter computes is what a GPU computes; on a machine with a GPU the same tests run there."""

import functools
import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

import draws  # noqa: E402
from laid import DEVICE  # noqa: E402
from secondorder_kernels.policy import interpreting  # noqa: E402

N = 16
randn = functools.partial(draws.randn, dtype=torch.float32)


@triton.jit
def cast_kernel(X, Y, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(X + i, mask=i < n)
    tl.store(Y + i, x.to(Y.dtype.element_ty), mask=i < n)


@triton.jit
def dot_kernel(A, B, C, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at), input_precision=PRECISION))


@triton.jit
def add_kernel(X, Y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(Y + i, tl.load(X + i) + tl.load(X + i))


@triton.jit
def extremes_kernel(X, Y, LEAST, GREATEST, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y = tl.load(X + i), tl.load(Y + i)
    tl.store(LEAST + i, tl.minimum(x, y))
    tl.store(GREATEST + i, tl.maximum(x, y))


def cast(x, dtype):
    y = torch.empty(x.shape, dtype=dtype, device=DEVICE)
    cast_kernel[(1,)](x.to(DEVICE), y, x.numel(), triton.next_power_of_2(x.numel()))
    return y.cpu()


def dot(a, b, precision="ieee"):
    c = torch.full((N, N), torch.nan, device=DEVICE)
    dot_kernel[(1,)](a.to(DEVICE), b.to(DEVICE), c, precision, N)
    return c.cpu()


def patterns():
    """Float32 numbers of every exponent and sign, with mantissas that round up, down and to even; NaN left out."""
    high = torch.arange(-(2**15), 2**15, 7, dtype=torch.int64)
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (high[:, None] * 2**16 + low).flatten().to(torch.int32).view(torch.float32)
    return x[~x.isnan()]


def test_float32_is_cast_to_the_nearest_bfloat16():
    x = patterns()
    assert torch.equal(cast(x, torch.bfloat16).view(torch.int16), x.bfloat16().view(torch.int16))


def test_ties_go_to_the_even_bfloat16_and_numbers_above_the_largest_to_infinity():
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.3963e38, -3.3963e38, 2.0**-133, 2.0**-134, 1.5 * 2.0**-133])
    expected = torch.tensor([1.0, 1 + 2**-6, torch.inf, -torch.inf, 2.0**-133, 0.0, 2.0**-132])
    assert torch.equal(cast(x, torch.bfloat16).float(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_in_half_precision_is_widened_exactly(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide, nan = cast(x, torch.float32), x.isnan()
    assert torch.equal(wide[~nan].view(torch.int32), x[~nan].float().view(torch.int32)) and wide[nan].isnan().all()


def test_nan_stays_nan_in_bfloat16():
    # A NaN of which only the lower half says so would become infinite by truncation, and zero by rounding up.
    bits = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF]).to(torch.int32)
    assert cast(bits.view(torch.float32), torch.bfloat16).isnan().all()
    infinite = torch.tensor([torch.inf, -torch.inf])
    assert torch.equal(cast(infinite, torch.bfloat16).float(), infinite)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_float32_is_cast_to_the_nearest_float16():
    x = torch.cat([patterns(), 1 + torch.arange(16) * 2.0**-13, torch.tensor([65519.9, 65520.0, 2.0**-25, 3e-8])])
    assert torch.equal(cast(x, torch.float16).view(torch.int16), x.half().view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_are_cast_to_bfloat16_by_value(dtype):
    x = torch.tensor([0, 1, -3, 256, 257, 258, 259, -70000], dtype=dtype)
    assert torch.equal(cast(x, torch.bfloat16).float(), torch.tensor([0.0, 1, -3, 256, 256, 258, 260, -70144]))
    assert cast(torch.tensor([2.5, -2.5, 300.0]).bfloat16(), dtype).tolist() == [2, -2, 300]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_products_of_half_precision_are_exact_up_to_the_sum(dtype):
    a, b = randn(N, N).to(dtype), randn(N, N, seed=1).to(dtype)
    torch.testing.assert_close(dot(a, b).double(), a.double() @ b.double(), rtol=0, atol=2e-6)


def test_dot_products_of_bfloat16_know_subnormal_numbers_infinities_and_nan():
    a = torch.diag(torch.tensor([2.0**-130, torch.inf, torch.nan, *[-1.5] * 13])).bfloat16()
    c = dot(a, torch.full((N, N), 2.0**4).bfloat16())
    assert (c[0] == 2.0**-126).all() and (c[1] == torch.inf).all() and c[2].isnan().all() and (c[3:] == -24).all()


def test_operands_in_tf32_are_truncated_to_10_bits_of_mantissa():
    a = randn(N, N)
    ulp = 2.0 ** (a.abs().log2().floor() - 10)
    expected = (a / ulp).trunc() * ulp
    assert torch.equal(dot(a, torch.eye(N), "tf32"), expected)
    assert torch.equal(dot(torch.eye(N), a, "tf32"), expected)
    assert not torch.equal(a, expected)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_the_other_precisions_are_those_of_float32(precision):
    a, b = randn(N, N), randn(N, N, seed=1)
    exact = a.double() @ b.double()
    torch.testing.assert_close(dot(a, b, precision).double(), exact, rtol=0, atol=1e-5)
    assert (dot(a, b, "tf32").double() - exact).abs().max() > 1e-3


def test_of_a_number_and_nan_the_extremes_are_the_number():
    x, y = torch.tensor([1.0, torch.nan, torch.nan, 2.0]), torch.tensor([torch.nan, -1.0, torch.nan, 3.0])
    least, greatest = torch.empty(4, device=DEVICE), torch.empty(4, device=DEVICE)
    extremes_kernel[(1,)](x.to(DEVICE), y.to(DEVICE), least, greatest, 4)
    expected = torch.tensor([1.0, -1.0, torch.nan, 2.0])
    torch.testing.assert_close(least.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(greatest.cpu(), torch.fmax(x, y), rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not interpreting(), reason="compilers add bfloat16 as they should")
def test_bfloat16_that_was_not_widened_is_an_error():
    x = torch.ones(4).bfloat16()
    with pytest.raises(Exception, match="widen it to float32 first"):
        add_kernel[(1,)](x, torch.empty_like(x), 4)


def test_where_kernels_are_compiled_the_interpreter_is_left_alone():
    code = "import sys, interpreting; interpreting.install(); assert 'triton' not in sys.modules"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
