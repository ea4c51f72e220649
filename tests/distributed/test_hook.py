"""`sync="owner_hook"`: DDP's mean gradient, where it is owned; DDP's bytes; the same bits from data to parameters."""

import copy

import pytest
import torch
from torch import nn

import cases
import secondorder
from distributed import hook_ranks, pool
from secondorder.sharding.tree import TreeSums, summed

pytestmark = pytest.mark.dist

# ---------------------------------------------------------------------- from data to parameters

METHODS = {
    "SOAP": {"lr": 1e-2, "refresh_every": 3, "max_block_size": 16},
    "Shampoo": {"lr": 1e-2, "refresh_every": 3},
    "InverseFreeKLShampoo": {"lr": 1e-2, "max_block_size": 16},
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
}
# torch's own reduction is a tree on two processes; FSDP2 adds up a process's micro-batches itself, one by one.
RUNS = [("owner_hook", 1, 4), ("owner_hook", 2, 4), ("owner_hook", 4, 4), ("owner_hook", 2, 8), ("ddp", 2, 4)]
RUNS += [("fsdp", 1, 2), ("fsdp", 2, 4), ("hsdp", 2, 4)]


@pytest.mark.parametrize(("wrap", "world", "batches"), RUNS)
@pytest.mark.parametrize("cls", [pytest.param(cls, marks=[] if cls == "SOAP" else pytest.mark.slow) for cls in METHODS])
def test_training_has_the_bits_of_one_process(cls, wrap, world, batches):
    options = {**METHODS[cls], "reproducible": True}
    alone = hook_ranks.trained(0, 1, "alone", cls, options, batches)
    for found in pool.run(world, hook_ranks.trained, wrap, cls, options, batches):
        cases.assert_same_bits(found, alone)


@pytest.mark.parametrize("world", [1, 2])
def test_zeroed_gradients_begin_a_sum_as_dropped_ones_do(world):
    options = {**METHODS["SOAP"], "reproducible": True}
    alone = hook_ranks.trained(0, 1, "alone", "SOAP", options)
    for found in pool.run(world, hook_ranks.trained, "owner_hook", "SOAP", options, 4, 10, False):
        cases.assert_same_bits(found, alone)


@pytest.mark.parametrize("world", [2, 3])
def test_training_is_that_of_one_process_up_to_rounding(world):
    alone = hook_ranks.trained(0, 1, "alone", "SOAP", {"lr": 1e-3}, world, 5)
    for found in pool.run(world, hook_ranks.trained, "owner_hook", "SOAP", {"lr": 1e-3}, world, 5):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_layer_methods_take_their_gradients_from_the_hook():
    runs = [pool.run(2, hook_ranks.clipped, wrap, None, "KFAC") for wrap in ("owner_hook", "ddp")]
    for ours, plain in zip(*runs, strict=True):
        torch.testing.assert_close(ours["values"], plain["values"], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- bytes


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(("cls", "options"), [("SOAP", {"max_block_size": 32}), ("AdamW", {})])
def test_a_step_sends_as_many_bytes_as_all_reduce(cls, options, world):
    ranks = pool.run(world, hook_ranks.counted, cls, options)
    for found in ranks:
        assert found["sent"] == [found["planned"]] * 3
        assert found["counted"] == found["planned"]
        assert 0 <= found["measured"] - found["predicted"] < 16 * world  # parts are padded to whole words
    elements = ranks[0]["elements"]
    assert elements == 99850
    formula = 2 * (world - 1) / world * elements * 4
    assert sum(found["planned"] - found["words"] for found in ranks) / world == pytest.approx(formula, rel=1e-3)
    for found in ranks:
        assert found["planned"] - found["words"] == pytest.approx(formula, rel=0.02)
        assert found["hook"] == pytest.approx(formula / 2, rel=0.05)


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("world", "view"), [(2, True), (2, False), (3, True), (4, True)])
def test_every_element_of_the_mean_is_left_on_one_process(world, view, dtype):
    ranks = pool.run(world, hook_ranks.odd_gradients, view, dtype)
    for steps in zip(*ranks, strict=True):
        squares = 0.0
        for name, first in steps[0]["left"].items():
            alone = [found[name] for found in steps[0]["alone"]]
            if all(g is None for g in alone):
                assert all(step["left"][name] is None for step in steps)
                continue
            mean = mean_of([torch.zeros_like(first) if g is None else g for g in alone])
            left = torch.stack([step["left"][name] for step in steps])
            if "foreign" in name:
                for g in left:
                    cases.assert_same_bits([g], [mean])
                continue
            squares += float(mean.double().square().sum())
            assert ((left != 0).sum(0) <= 1).all()
            cases.assert_same_bits([left.sum(0)], [mean])
        for step in steps:
            assert step["norm"] == pytest.approx(squares**0.5, rel=1e-5)
            assert step["norm"] == steps[0]["norm"]


def mean_of(terms):
    """As the owner has it: ((g0 + g1) + (g2 + g3)) / W, in the gradients' own precision."""
    world = len(terms)
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], terms[i]) for i in range(0, len(terms), 2)]
    return terms[0] / world


@pytest.mark.parametrize("view", [True, False])
def test_passes_that_are_all_synchronised_add_up(view):
    for ours, plain in pool.run(2, hook_ranks.again, view):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


def test_nothing_is_lost_when_the_layout_changes_after_backward():
    for ours, plain in pool.run(2, hook_ranks.relaid):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_one_process_with_a_nan_stops_all():
    assert pool.run(2, hook_ranks.poisoned) == [(1.0, True)] * 2


def test_clipping_by_parts_is_told_once():
    for found in pool.run(2, hook_ranks.clipped, "owner_hook", "torch"):
        assert len(found["told"]) == 1
        assert "SOAP: gradients were scaled between backward() and step()" in found["told"][0]
    assert not any(found["told"] for found in pool.run(2, hook_ranks.clipped, "owner_hook", None))


def test_own_clipping_is_that_of_the_whole_gradient():
    ways = ("owner_hook", "ours"), ("ddp", "torch"), ("ddp", "ours")
    runs = [pool.run(2, hook_ranks.clipped, *way) for way in ways]
    for ours, plain, other in zip(*runs, strict=True):
        assert not ours["told"]
        assert ours["norms"] == pytest.approx(plain["norms"], rel=1e-5)
        assert other["norms"] == plain["norms"]
        torch.testing.assert_close(ours["grads"], plain["grads"], rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------------- start and end


def test_constructor_names_what_is_missing():
    for found in pool.run(3, hook_ranks.refusals):
        sharding, module, unwrapped, group, unknown, three, good = found
        assert sharding == 'SOAP: sync="owner_hook" needs sharding="owners", got sharding=\'auto\''
        assert module == unwrapped
        assert "needs the DistributedDataParallel module as module=" in module
        assert "needs process_group=None or that of the DDP module" in group
        assert unknown == "Invalid sync: 'all_reduce' ('ddp' or 'owner_hook')"
        assert "with reproducible=True needs 1, 2, 4, ... processes, got 3" in three
        assert good is None


def test_second_hook_of_a_module_is_refused():
    for found in pool.run(2, hook_ranks.refusals):
        assert found[5] is None
        assert "takes one in its life" in found[6]


def test_gradients_are_whole_where_the_optimizer_is_gone():
    for ours, plain in pool.run(2, hook_ranks.orphaned):
        torch.testing.assert_close(ours, plain)


def test_numbers_of_threads_must_agree():
    for found in pool.run(2, hook_ranks.threads_apart):
        assert found == "SOAP: number of threads differs: 1 on process 0, 2 on process 1"


# ---------------------------------------------------------------------- sums


def tree(terms):
    """The definition, with as many terms as there are: a full tree of the most, then of what is left."""
    if len(terms) == 1:
        return terms[0]
    half = 1 << (len(terms) - 1).bit_length() - 1
    return tree(terms[:half]) + tree(terms[half:])


def terms(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(65, generator=g) * 10 ** torch.randn(65, generator=g) for _ in range(count)]


@pytest.mark.parametrize("count", range(1, 18))
def test_summed_is_the_tree(count):
    found = terms(count)
    cases.assert_same_bits([summed(torch.stack(found))], [tree(found)])


def follow(p):
    sums = TreeSums(True)
    sums.follow([p])
    return sums


def give(p, *gradients):
    for g in gradients:
        (p * g).sum().backward()


@pytest.mark.parametrize("count", range(1, 18))
def test_passes_add_up_as_the_tree(count):
    p, found = nn.Parameter(torch.zeros(65)), terms(count)
    sums = follow(p)
    give(p, *found)
    cases.assert_same_bits([p.grad], [tree(found)])
    sums.forget()
    p.grad = None
    give(p, *found[::-1])
    cases.assert_same_bits([p.grad], [tree(found[::-1])])


def test_fixed_order_matters():
    found = terms(4)
    assert not torch.equal(((found[0] + found[1]) + found[2]) + found[3], tree(found))


def drop(p, sums):
    p.grad = None
    return 0.0


def zero(p, sums):
    p.grad.zero_()
    return 0.0


def scale(p, sums):
    p.grad.mul_(0.5)
    return p.grad.clone()


def replace(p, sums):
    p.grad = torch.ones_like(p)
    return p.grad.clone()


def step(p, sums):
    sums.forget()
    return p.grad.clone()


@pytest.mark.parametrize("what", [drop, zero, scale, replace, step])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_sum_begins_anew_where_somebody_took_part(what, passes):
    p, found = nn.Parameter(torch.zeros(65)), terms(7)
    sums = follow(p)
    give(p, *found[:passes])
    start = what(p, sums)
    give(p, *found[3:])
    cases.assert_same_bits([p.grad], [tree([start + found[3], *found[4:]])])


def test_memory_of_partial_sums_goes_with_the_step():
    p = nn.Parameter(torch.zeros(65))
    sums = follow(p)
    give(p, *terms(4))
    assert not sums._sums[p].partial  # p.grad is all there is
    give(p, *terms(3))
    assert sorted(sums._sums[p].partial) == [0, 1, 2]
    sums.forget()
    assert not sums._sums[p].partial and sums._sums[p].grad is None


def test_hooks_go_with_the_optimizer_and_come_with_its_copy():
    net, found = nn.Linear(65, 1, bias=False), terms(4)
    p = net.weight
    optimizer = secondorder.AdamW(net.parameters(), reproducible=True)
    both = copy.deepcopy([net, optimizer])
    give(both[0].weight, *found)
    cases.assert_same_bits([both[0].weight.grad[0]], [tree(found)])
    del optimizer
    give(p, *found)
    cases.assert_same_bits([p.grad[0]], [((found[0] + found[1]) + found[2]) + found[3]])
