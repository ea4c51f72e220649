"""Layer methods where every block has one owner: many processes do what one process does on the whole batch."""

from functools import cache

import pytest
import torch

from distributed import layer_workers as workers
from distributed.layer_workers import FSDP, HOOK, HSDP, LAYERED, OWNERS, SINGLE
from distributed.pool import run
from secondorder.sharding.statistics import packed, tree, unpacked

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
]

STORED = [(OWNERS, 2), (HOOK, 3), (FSDP, 3), (LAYERED, 2), (HSDP, 4)]
each_way = pytest.mark.parametrize(("how", "world"), STORED, ids=[f"{how}-{world}" for how, world in STORED])


@cache
def alone(row, **options):
    return workers.train(0, 1, SINGLE, row, **options)


def assert_union(ranks, wanted, tolerance):
    """Every rank has the parameters, and some rank each state; eigenvectors are left out, whose signs are free.

    `tolerance`: relative to the largest entry of a tensor; None: the same bits.
    """
    for key, value in wanted.items():
        held = [found[key] for found in ranks if key in found]
        assert held or "exp_avg" in key, key  # the fallback's lies as the parameter does
        assert len(held) == len(ranks) or not key.startswith("parameter"), key
        for other in held[1:]:
            assert torch.equal(held[0], other), key
        if held and (tolerance is None or "basis" not in key):
            error = (held[0] - value).abs().max() / value.abs().max().clamp_min(1e-30)
            assert torch.equal(held[0], value) if tolerance is None else error < tolerance, f"{key}: {error:.1e}"


# ---------------------------------------------------------------------- one process and many


@each_way
@pytest.mark.parametrize("row", ["KFAC", "split", "SINGD", "structured"])
def test_many_processes_do_what_one_does_on_the_whole_batch(row, how, world):
    assert_union(run(world, workers.train, how, row), alone(row), 1e-9)


@pytest.mark.parametrize(("how", "world"), [(HOOK, 2), (FSDP, 2), (LAYERED, 2)])
@pytest.mark.parametrize(("row", "fisher"), [("split", False), ("KFAC", True)])
@pytest.mark.parametrize("quiet", [True, False], ids=["last pass synchronises", "all synchronise"])
def test_micro_batches_add_up(how, world, row, fisher, quiet):
    ranks = run(world, workers.train, how, row, 3 - fisher, fisher, quiet)
    assert_union(ranks, alone(row, fisher=fisher), 1e-9)


@pytest.mark.parametrize("how", [OWNERS, FSDP])
def test_layer_that_some_ranks_leave_out(how):
    assert_union(run(2, workers.branches, how), workers.branches(0, 1, SINGLE), 1e-9)


@pytest.mark.parametrize("row", ["KFAC", "split"])
@pytest.mark.parametrize("how", [OWNERS, FSDP])
def test_ranks_without_a_block(how, row):
    assert_union(run(3, workers.lone, how, row), workers.lone(0, 1, SINGLE, row), 1e-9)


@pytest.mark.parametrize("row", ["KFAC", "split", "SINGD"])
@pytest.mark.parametrize("how", [OWNERS, FSDP])
def test_weight_that_is_used_both_ways_and_biases_apart(how, row):
    assert_union(run(3, workers.tied, how, row), workers.tied(0, 1, SINGLE, row), 1e-9)


@pytest.mark.parametrize("how", [OWNERS, HOOK, FSDP, HSDP])
def test_loss_scale_is_found_in_the_parts_of_a_gradient(how):
    ranks = run(4 if how == HSDP else 2, workers.scaled, how)
    assert_union(ranks, workers.scaled(0, 1, SINGLE), 1e-9)


@pytest.mark.parametrize("how", [SINGLE, FSDP])
def test_statistics_go_with_the_gradients_of_a_skipped_step(how):
    """A gradient scaler skips a step, and `model.zero_grad()` does not pass by the optimizer."""
    kept, skipped = (run(2, workers.skipping, how, skips)[0] for skips in (False, True))
    assert_union([skipped], kept, None)


# ---------------------------------------------------------------------- bits


@pytest.mark.parametrize(
    ("how", "world", "row"),
    [(OWNERS, 2, "KFAC"), (FSDP, 2, "split"), (FSDP, 2, "structured"), (HOOK, 4, "split"), (HOOK, 4, "SINGD")],
)
def test_bits_do_not_depend_on_the_number_of_processes(how, world, row):
    """Micro-batches in one process, or one in each of as many."""
    options = {"reproducible": True}
    one = workers.train(0, 1, SINGLE, row, world, **options)
    assert_union(run(world, workers.train, how, row, 1, False, True, options), one, None)


def test_sums_of_four_ranks_are_those_of_two_with_two_micro_batches_each():
    options = {"reproducible": True}
    found = [run(world, workers.train, HOOK, "KFAC", 4 // world, False, True, options) for world in (2, 4)]
    of_two, of_four = ({k: v for rank in ranks for k, v in rank.items()} for ranks in found)
    assert_union([of_four], of_two, None)


@pytest.mark.parametrize("d", [1, 2, 3, 4, 7, 32, 33])
def test_triangles_hold_symmetric_matrices(d):
    x = torch.randn(3, d, d)
    x[0, 0, 0], x[1, -1, 0] = torch.nan, torch.inf
    wanted = x.tril() + x.tril(-1).mT
    assert packed(x).shape == (3, d * (d + 1) // 2)
    assert torch.equal(unpacked(packed(x)).nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("world", range(1, 9))
def test_sums_are_made_by_neighbours(world):
    x = torch.randn(world, 2, 5)

    def summed(low, high):
        if high - low == 1:
            return x[low]
        half = 1 << (high - low - 1).bit_length() - 1
        return summed(low, low + half) + summed(low + half, high)

    assert torch.equal(torch.stack(tree([list(part) for part in x])), summed(0, world))


# ---------------------------------------------------------------------- what travels

# By weight of the network: groups, sizes of the dense factors on the input and on the output side; a diagonal's length.
FACTORS = {
    "conv.weight": (1, [19, 6], 0),
    "grouped.weight": (2, [12, 3], 0),
    "embed.weight": (1, [6], 5),
    "norm.weight": (6, [2], 0),
    "attention.in_proj_weight": (3, [7, 6], 0),
    "attention.out_proj.weight": (1, [7, 6], 0),
    "hidden.weight": (1, [7, 7], 0),
    "head.weight": (1, [8, 3], 0),
}
GROUPS = sum(k for k, _, _ in FACTORS.values())
REFERENCES = [6, 7, 3]  # outputs of linear layers


@pytest.mark.parametrize(("how", "world"), [(OWNERS, 2), (FSDP, 2), (OWNERS, 3)])
def test_sums_travel_to_owners_alone_as_triangles_and_once(how, world):
    for rank, found in enumerate(run(world, workers.traffic, how, "KFAC")):
        others = [FACTORS[name] for (name, _), owner in found["owners"].items() if owner != rank]
        matrices = sum(k * (sum(d * (d + 1) // 2 for d in sizes) + diagonal) for k, sizes, diagonal in others)
        # to everybody: rows; of references loss terms, captured and applied gradients; what came, and Fisher terms
        vectors = GROUPS + sum(1 + 2 * d for d in REFERENCES) + len(FACTORS) + 1
        assert found["sent"] == 8 * (matrices + (world - 1) * vectors)
        assert found["exchanges"] == workers.CALLS
        assert found["frames"] == [0] * workers.CALLS


def test_nothing_travels_in_calls_that_observe_nothing():
    for found in run(2, workers.traffic, OWNERS, "KFAC", {"statistics_every": 3}):
        assert found["exchanges"] == 1 + (workers.CALLS - 1) // 3


def test_eigenbases_travel_when_they_were_refreshed():
    options = {"max_block_size": None, "refresh": "together", "refresh_every": 4}
    moments = {name: k * sum(d * d for d in sizes) for name, (k, sizes, _) in FACTORS.items() if name != "norm.weight"}
    for rank, found in enumerate(run(2, workers.traffic, OWNERS, "split", options)):
        own = sum(moments.get(name, 0) for (name, _), owner in found["owners"].items() if owner == rank)
        assert found["copied"] == 8 * (sum(moments.values()) - own)
        assert found["bases_sent"] == 8 * (own + 1)
        assert found["frames"] == [0, 0, 0, 1, 1, 1]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("hidden", [False, True], ids=["seen before", "seen in the forward pass"])
def test_tensor_parallel_layers_are_left_to_the_fallback(hidden):
    for coverage in run(2, workers.tensor_parallel, hidden):
        treated = {line.split()[0]: line for line in coverage.splitlines()[1:]}
        for name, line in treated.items():
            assert ("KFAC" in line) == name.startswith(("first", "head")), line
            assert "KFAC" in line or "parallel" in line


@pytest.mark.parametrize("options", [{"adapt_damping": True}, {"quadratic_model": "lr", "loss": "mse"}])
def test_models_of_the_loss_are_refused(options):
    for message in run(2, workers.refused, options):
        assert "need the directions of all blocks in every process" in message
