"""Residuals whose samples are spread over processes (gloo): what one process does that has all of them."""

import pytest
import torch

import residual_ranks
from distributed import pool
from residual_ranks import CALLED, EMPTY, EQUAL, GIVEN, MODULE, UNEVEN, UNUSED

pytestmark = pytest.mark.dist


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def assert_agree(ranks):
    """All ranks hold the same bits."""
    for other in ranks[1:]:
        assert other.keys() == ranks[0].keys()
        for key, value in ranks[0].items():
            same = torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
            assert same, key


def assert_close(found, wanted, tolerance):
    """Relative to the largest entry of a tensor."""
    for key, value in wanted.items():
        if torch.is_tensor(value):
            assert found[key].shape == value.shape, key
            error = float((found[key] - value).abs().max() / value.abs().max().clamp_min(1e-30))
            assert error <= tolerance, f"{key}: {error:.1e}"


# Linearizations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "shares"), [(2, UNEVEN), (2, EMPTY), *(slow(4, shares) for shares in (EQUAL, UNEVEN, EMPTY))]
)
@pytest.mark.parametrize("operator", ["expand", "coupled on one", "coupled"])
def test_linearization_is_that_of_all_samples(world, shares, operator):
    ranks = pool.run(world, residual_ranks.linear, shares, operator)
    assert_agree(ranks)
    wanted = residual_ranks.by_algebra(world, shares, operator)
    assert_close(ranks[0], {**wanted, **{f"again {key}": value for key, value in wanted.items()}}, 1e-12)
    kernel = ranks[0]["kernel"]
    assert torch.equal(kernel, kernel.T)
    coupled = operator == "coupled" or (operator == "coupled on one" and shares != EMPTY)
    backend = "matvec" if coupled else "expand"
    assert ranks[0]["layers"] == ([[0], [1], [2], [3], [4], [5]] if backend == "matvec" else [[0], [1], [2, 3], [4, 5]])
    assert ranks[0]["backend"] == ranks[0]["again backend"] == backend


# Steps ----------------------------------------------------------------------------------------------------------------


STEPS = [(2, UNEVEN, method, GIVEN) for method in ("ENGDW", "primal", "bracket", "SPRING", "layerwise")]
STEPS += [(2, EMPTY, "SPRING", CALLED), slow(4, UNEVEN, "ENGDW", CALLED)]
STEPS += [slow(2, UNEVEN, method, GIVEN) for method in ("fixed momentum", "cg", "nystrom")]
STEPS += [slow(4, shares, method, GIVEN) for shares in (EQUAL, UNEVEN, EMPTY) for method in residual_ranks.METHODS]
# Rounding decides when iterations end, and a sketch sees the order of rows: ranks agree with each other alone.
AGREE = {"cg", "nystrom"}


@pytest.mark.parametrize(("world", "shares", "method", "how"), STEPS)
def test_steps_are_those_of_one_process_that_has_all_samples(world, shares, method, how):
    ranks = pool.run(world, residual_ranks.trained, world, method, shares, how)
    assert_agree(ranks)
    if method not in AGREE:
        assert_close(ranks[0], residual_ranks.trained(0, 1, world, method, shares, how), 1e-8)


@pytest.mark.parametrize("how", [MODULE, CALLED, UNUSED])
def test_a_wrapper_serves_losses_and_residuals_in_turn(how):
    """DDP waits for backward passes, and sends buffers: both would mix up processes."""
    ranks = pool.run(2, residual_ranks.around_a_wrapper, 2, how)
    assert_agree(ranks)
    assert_close(ranks[0], residual_ranks.around_a_wrapper(0, 1, 2, how), 1e-8)


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_what_is_not_finite_on_one_rank_is_refused_by_all(policy):
    ranks = pool.run(2, residual_ranks.not_finite, policy)
    assert_agree(ranks)
    moved = [entry for entry in ranks[0]["told"] if isinstance(entry, bool)]
    assert moved == [True, True, False, True, True]
    assert len(ranks[0]["told"]) - len(moved) == (policy == "raise")
    assert ranks[0]["refused"] == (policy == "skip")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), slow(2, 4)])
def test_another_number_of_ranks_goes_on(before, after):
    parts = [max(2, before), max(2, after)]  # in which samples come, by one process or several

    def run(world, count, saved=None):
        if world == 1:
            return residual_ranks.resumed(0, 1, count, saved)
        return pool.run(world, residual_ranks.resumed, count, saved)[0]

    found = run(after, parts[1], run(before, parts[0])["saved"])
    assert_close(found, run(1, parts[1], run(1, parts[0])["saved"]), 1e-8)


@pytest.mark.parametrize("what", ["fails", "loss", "weights", "parameters"])
def test_processes_that_do_not_belong_together_say_so(what):
    ranks = pool.run(2, residual_ranks.one_of_two, what)
    says = {
        "fails": "closures raised, or returned no residuals, on ranks [1] and not on others",
        "loss": "closures raised, or returned no residuals, on ranks [1] and not on others",
        "weights": "must have the same terms (names, weights, reductions, shapes)",
        "parameters": "must have the same values of parameters: ranks [1] and 0 differ",
    }
    for step, kind, text, same in ranks:
        assert (step, same) == (what in ("fails", "loss"), True)
        assert kind == ("RuntimeError" if step else "ValueError") and says[what] in text


@pytest.mark.slow
def test_a_closure_that_fails_in_a_search_on_one_rank_stops_all():
    ranks = pool.run(2, residual_ranks.fails_in_a_search)
    assert [raised for raised, _, _ in ranks] == [
        "RuntimeError: the closure raised on another process while a step size was searched",
        "KeyError: 'points'",
    ]
    assert all(same for _, same, _ in ranks)
    assert_agree([after for _, _, after in ranks])
    losses = ranks[0][2]["losses"]
    assert losses[2] < losses[1] < losses[0]


def test_one_process_alone_waits_for_nobody():
    found, nothing = pool.run(2, residual_ranks.only_one_steps)
    assert nothing is None
    assert_close(found, residual_ranks.only_one_steps(0, 1), 0.0)


def test_a_group_of_one_process_changes_nothing():
    (found,) = pool.run(1, residual_ranks.in_a_group_of_one)
    assert_agree(found)


@pytest.mark.parametrize("given", [True, False], ids=["process_group given", "not given"])
def test_sharded_parameters_are_refused(given):
    for kind, text in pool.run(2, residual_ranks.sharded, given):
        assert kind == "ValueError" and "one process keeps whole" in text


def test_blocks_of_columns_may_end_within_parameters():
    ranks = pool.run(2, residual_ranks.in_blocks)
    assert_agree(ranks)
    assert_close(ranks[0], residual_ranks.by_algebra(2, UNEVEN, "expand"), 1e-12)


@pytest.mark.parametrize("shares", [UNEVEN, EMPTY])
def test_kernel_by_products_of_uses(shares):
    ranks = pool.run(2, residual_ranks.by_uses, shares)
    assert_agree(ranks)
    assert_close(ranks[0], residual_ranks.by_algebra(2, shares, "expand"), 1e-12)


def test_a_network_in_single_precision():
    ranks = pool.run(2, residual_ranks.linear, UNEVEN, "expand", torch.float32)
    assert_agree(ranks)
    assert_close(ranks[0], residual_ranks.by_algebra(2, UNEVEN, "expand", torch.float32), 1e-5)
