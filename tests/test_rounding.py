"""Stochastic rounding: unbiased, a function of integers alone, and what state of a low precision is written through."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secondorder.preconditioner.protocol import Context, ema_, put_
from secondorder_kernels import mix, row_keys, stochastic_round


def keys(n, seed=0):
    return row_keys([torch.arange(n, dtype=torch.float32)], seed)


def mix_of_unsigned(h: int) -> int:
    """The specification, in exact integers."""
    h ^= h >> 16
    h = h * 0x21F0AAAD % 2**32
    h ^= h >> 15
    h = h * 0x735A2D97 % 2**32
    return h ^ h >> 15


def round_of_unsigned(x: float, position: int, key: int) -> float:
    (bits,) = torch.tensor([x]).view(torch.int32).tolist()
    bits = (bits % 2**32 + (mix_of_unsigned(position ^ key) >> 16)) // 2**16 * 2**16
    return float(torch.tensor([bits - 2**32 if bits >= 2**31 else bits], dtype=torch.int32).view(torch.float32))


class TestHash:
    @given(st.lists(st.integers(0, 2**32 - 1), min_size=1))
    def test_mix_is_that_of_unsigned_integers(self, values):
        assert mix(torch.tensor(values)).tolist() == [mix_of_unsigned(v) for v in values]

    def test_every_bit_of_the_input_turns_half_of_the_output(self):
        inputs = torch.randint(0, 2**32, (4096,))
        for bit in range(32):
            turned = mix(inputs) ^ mix(inputs ^ (1 << bit))
            shares = torch.stack([(turned >> k & 1).double().mean() for k in range(16, 32)])  # those that are used
            assert (shares - 0.5).abs().max() < 0.06, bit

    def test_keys_depend_on_every_counter_and_the_seed_but_not_on_the_place(self):
        a, b = torch.tensor([3.0, 4.0, 3.0]), torch.tensor([4.0, 3.0, 4.0])
        found = row_keys((a, b), 7)
        assert found[0] == found[2] != found[1]
        others = [row_keys((b, a), 7), row_keys((a, b), 8), row_keys((a, b + 1), 7), row_keys((a,), 7)]
        assert len({int(k[0]) for k in (found, *others)}) == 5

    def test_errors_are_uncorrelated_in_time_place_and_among_seeds(self):
        noise = [(mix(torch.arange(512) ^ keys(512, seed)[:, None]) >> 16).double() / 2**16 - 0.5 for seed in (0, 1)]
        pairs = [(noise[0], noise[1]), (noise[0], noise[0].T)]
        for lag in (1, 2, 3, 8, 64):
            pairs += [(noise[0][lag:], noise[0][:-lag]), (noise[0][:, lag:], noise[0][:, :-lag])]
        for x, y in pairs:
            off = ~torch.eye(*x.shape, dtype=torch.bool)  # the transpose shares its diagonal
            assert abs(float((x * y)[off].mean()) * 12) < 5 / 512
        assert abs(float(noise[0].mean())) < 5 / math.sqrt(12) / 512


class TestRounding:
    @settings(max_examples=200)
    @given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 1000), st.integers(0, 2**32 - 1))
    def test_bits_are_those_of_the_specification(self, x, position, key):
        row = torch.zeros(1, position + 1)
        row[0, position] = x
        ours = stochastic_round(row, torch.tensor([key]))[0, position]
        assert ours.dtype == torch.bfloat16 and float(ours) == round_of_unsigned(x, position, key)

    @pytest.mark.parametrize("x", [1.001, -1.003, 3.14159e-20, -2.7e19, 1e-40])
    def test_mean_is_the_number_itself_and_values_are_its_neighbours(self, x):
        n = 20000
        exact = float(torch.tensor(x))
        found = stochastic_round(torch.full((n, 1), x), keys(n)).double()
        ulp = found.max() - found.min()
        assert len(found.unique()) == 2 and found.min() < exact < found.max()
        assert abs(float(found.mean()) - exact) < 4 * float(ulp) * 0.5 / math.sqrt(n)

    def test_numbers_that_bfloat16_has_stay(self):
        x = torch.randn(100, 30).to(torch.bfloat16)
        assert torch.equal(stochastic_round(x.float(), keys(100)), x)
        assert torch.equal(stochastic_round(torch.zeros(100, 30), keys(100)), torch.zeros(100, 30).bfloat16())

    def test_what_is_not_finite_stays_so(self):
        x = torch.tensor([math.nan, math.inf, -math.inf, -math.nan]).expand(500, 4)
        found = stochastic_round(x, keys(500))
        assert found[:, [0, 3]].isnan().all() and (found[:, 1] == math.inf).all() and (found[:, 2] == -math.inf).all()

    def test_a_row_is_rounded_alike_wherever_it_is(self):
        x, k = torch.randn(50, 3, 7), keys(50)
        order = torch.randperm(50)
        assert torch.equal(stochastic_round(x[order], k[order]), stochastic_round(x, k)[order])
        assert torch.equal(stochastic_round(x[4:5].mT, k[4:5]), stochastic_round(x[4:5].mT.contiguous(), k[4:5]))


def context(count, gate=None):
    gate = torch.ones_like(count) if gate is None else gate
    return Context({}, (), gate, gate, count, count)


class TestState:
    def test_an_average_in_bfloat16_follows_what_rounding_to_nearest_would_lose(self):
        """4000 steps of 2^-10 of the way: each is below half an ulp of what is stored."""
        stored, lost = (torch.ones(1, 400, dtype=torch.bfloat16) for _ in range(2))
        for t in range(4000):
            ema_(stored, torch.full((1, 400), 2.0), torch.tensor([2.0**-10]), context(torch.tensor([float(t)])))
            lost.lerp_(torch.full_like(lost, 2.0), 2.0**-10)
        assert (lost == 1).all()
        assert abs(float(stored.double().mean()) - (2 - (1 - 2**-10) ** 4000)) < 5e-3

    @pytest.mark.parametrize("write", [ema_, put_])
    def test_rows_with_gate_zero_keep_their_bits(self, write):
        stored = torch.randn(6, 3, 5).to(torch.bfloat16)
        before, gate = stored.clone(), torch.tensor([1.0, 0, 1, 0, 0, 1])
        write(stored, torch.randn(6, 3, 5), gate, context(torch.zeros(6), gate))
        changed = (stored != before).flatten(1).any(1)
        assert torch.equal(changed, gate > 0)

    def test_other_dtypes_are_written_as_they_are(self):
        for dtype in (torch.float32, torch.float64):
            stored, new = torch.zeros(2, 3, dtype=dtype), torch.randn(2, 3, dtype=dtype)
            assert torch.equal(put_(stored, new, torch.ones(2), context(torch.zeros(2))), new)
