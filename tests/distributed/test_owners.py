"""Owners of blocks: every block once, the same whoever asks, balanced for the models that people train."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secondorder import SOAP
from secondorder.layout.blocks import matrix_blocks
from secondorder.sharding import owners
from secondorder.sharding.owners import Item, assign, balance

# ---------------------------------------------------------------------- any blocks

FREE = st.builds(
    lambda cost, size, units, held: (cost, size, tuple(units), held),
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.lists(st.tuples(st.just(4), st.integers(0, 3), st.integers(0, 100)), max_size=2),
    st.none() | st.dictionaries(st.integers(0, 99), st.integers(0, 50), max_size=4),
)


@st.composite
def problems(draw, same_owners=True):
    """Items with whole costs, whose sums are exact; a number of ranks; owners of some of them."""
    world = draw(st.integers(1, 12))
    items = []
    for i, (cost, size, units, held) in enumerate(draw(st.lists(FREE, max_size=30))):
        stored = None if held is None else tuple({rank % world: n for rank, n in held.items()}.items())
        items.append(Item((f"p{i // 3}", (i % 3, 0)), float(cost), size, units, stored))
    chosen = draw(st.lists(st.sampled_from(items), unique=True)) if items else []
    return items, world, {item.key: draw(st.integers(0, world - 1)) for item in chosen}


def sums(items, world, found, what):
    total = [0.0] * world
    for item in items:
        total[found[item.key]] += getattr(item, what)
    return total


@given(problems())
@settings(max_examples=300, deadline=None)
def test_every_item_has_one_owner_within_the_bound(problem):
    items, world, known = problem
    found = assign(items, world, known)
    assert found.keys() == {item.key for item in items}
    assert all(0 <= rank < world for rank in found.values())
    assert found.items() >= known.items()
    if items:
        mean = sum(item.cost for item in items) / world
        before = sums([item for item in items if item.key in known], world, found, "cost")
        bound = max(1.05 * mean, mean + max(item.cost for item in items), *before)
        assert max(sums(items, world, found, "cost")) <= bound * (1 + 1e-12)


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_order_in_which_items_come_does_not_matter(problem, generator):
    items, world, known = problem
    shuffled = generator.sample(items, len(items))
    pairs = generator.sample([*known.items()], len(known))
    turned = [replace(item, held=item.held and item.held[::-1]) for item in shuffled]
    assert assign(turned, world, dict(pairs)) == assign(items, world, known)


@given(problems())
@settings(max_examples=100, deadline=None)
def test_owners_are_kept_when_all_are_known(problem):
    items, world, _ = problem
    found = assign(items, world)
    assert assign(items, world, found) == found


HASHED = """
import json, runpy, sys
module = runpy.run_path(sys.argv[1])
names = {f"layer{i}.{kind}.weight" for i in range(20) for kind in "qkvo"}
items = [module["Item"]((name, (0, 0)), float(len(name) * ord(name[-8])), ord(name[5])) for name in names]
print(list(names)[0], json.dumps(sorted((key[0], rank) for key, rank in module["assign"](items, 7).items())), sep="\\n")
"""


def test_seed_of_hashes_does_not_matter():
    def found(seed):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", HASHED, owners.__file__]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()

    first, second = found(1), found(2)
    assert first[0] != second[0]  # the sets were in another order
    assert first[1] == second[1]
    assert len(json.loads(first[1])) == 80


# ---------------------------------------------------------------------- what is preferred


def equal_items(count, **more):
    return [Item((f"p{i:03}", (0, 0)), 10.0, 4, **more) for i in range(count)]


def test_equal_items_are_spread_evenly():
    found = assign(equal_items(24), 8)
    assert Counter(found.values()) == {rank: 3 for rank in range(8)}


def test_bytes_decide_between_ranks_of_equal_load():
    sizes = [300, 299, 301]
    items = [Item((f"p{i}", (0, 0)), 100.0, size) for i, size in enumerate(sizes)]
    new = Item(("q", (0, 0)), 1.0, 1)
    assert assign([*items, new], 3, {item.key: rank for rank, item in enumerate(items)})[new.key] == 1


@pytest.mark.parametrize("world", [2, 8, 32])
def test_items_stay_where_they_are_stored_if_that_is_balanced(world):
    generator = random.Random(0)
    homes = [*range(world)] * 5
    generator.shuffle(homes)
    items = [replace(item, held=((home, 4),)) for item, home in zip(equal_items(len(homes)), homes, strict=True)]
    assert assign(items, world) == {item.key: home for item, home in zip(items, homes, strict=True)}


def test_item_goes_to_the_rank_that_holds_most_of_it():
    items = [replace(item, held=((0, 1), (3, 5), (2, 4))) for item in equal_items(8)]
    found = assign(items, 4)
    assert [found[item.key] for item in items] == [3, 3, 2, 2, 0, 0, 1, 1]


def test_items_leave_a_rank_that_holds_all_of_them_for_the_balance_alone():
    items = [replace(item, held=((1, 4),)) for item in equal_items(400)]
    load = sums(items, 4, assign(items, 4), "cost")
    assert balance(load) <= 1.05
    assert load[1] == 1050.0


@pytest.mark.parametrize(("world", "period"), [(2, 10), (8, 10), (16, 4)])
def test_refreshes_are_spread_within_every_owner(world, period):
    """Units get their phases in turn, as the schedule gives them; owners must not end up with those of one call."""
    items = [
        replace(item, phases=((period, i % period, 3.0), (period, (i // period) % period, 3.0)))
        for i, item in enumerate(equal_items(5 * world * period))
    ]
    work = phase_work(items, world, assign(items, world), period)
    for calls in work:
        assert balance(calls) <= 1.25


def phase_work(items, world, found, period):
    """Operations of refreshes by rank and call of the period."""
    work = [[0.0] * period for _ in range(world)]
    for item in items:
        for _, phase, operations in item.phases:
            work[found[item.key]][phase] += operations
    return work


def test_new_items_fill_what_known_ones_leave():
    items = equal_items(12)
    known = {item.key: 0 for item in items[:4]}
    found = assign(items, 3, known)
    assert Counter(found.values()) == {0: 4, 1: 4, 2: 4}


def test_more_ranks_than_items():
    assert sorted(assign(equal_items(3), 5).values()) == [0, 1, 2]
    assert assign([], 5) == {}


# ---------------------------------------------------------------------- models

LAYERS = {
    "124M": (12, [(2304, 768), (768, 768), (3072, 768), (768, 3072)]),
    "1B": (16, [(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)]),
    "8B": (32, [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)]),
}


@cache
def model(name, size):
    """Blocks of SOAP, with phases in turn; embeddings, head and vectors are not in blocks."""
    soap = SOAP([torch.nn.Parameter(torch.zeros(2, 2))], max_block_size=size)
    hp = soap.param_groups[0]
    method, period = soap._method(hp), hp["refresh_every"]
    calls = itertools.cycle(range(period))
    count, shapes = LAYERS[name]
    items = []
    for layer, (i, shape) in itertools.product(range(count), enumerate(shapes)):
        treatment = matrix_blocks(shape, hp, "hidden")
        for _, region in treatment.tiles():
            block = tuple(r.stop - r.start for r in region)
            units = [(mode, method.refresh_cost(block, mode)) for mode in treatment.modes]
            cost = sum(work / period + 4.0 * math.prod(block) * block[mode] for mode, work in units)
            state = sum(4 * math.prod(spec.shape) for spec in method.specs(block, treatment.modes, hp).values())
            phases = tuple((period, next(calls), work) for _, work in units)
            items.append(Item((f"{layer:02}.{i}", tuple(r.start for r in region)), cost, state, phases))
    return items


BALANCED = [("124M", 512, w) for w in (*range(1, 30), 32, 48, 64)]
BALANCED += [("1B", 512, w) for w in (1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)]
BALANCED += [("8B", 1024, w) for w in (8, 12, 64, 100, 128, 256, 384, 512)]


@pytest.mark.parametrize(("name", "size", "world"), BALANCED)
def test_models_are_balanced(name, size, world):
    items = model(name, size)
    found = assign(items, world)
    assert balance(sums(items, world, found, "size")) <= 1.05
    assert balance(sums(items, world, found, "cost")) <= 1.0527


@pytest.mark.parametrize("world", range(30, 64))
def test_few_blocks_for_many_ranks_are_almost_balanced(world):
    """216 blocks, 4 to 7 a rank. On 60 ranks bytes within 5 % are impossible; for nine more they are not found."""
    items = model("124M", 512)
    found = assign(items, world)
    assert balance(sums(items, world, found, "size")) <= 1.11
    assert balance(sums(items, world, found, "cost")) <= 1.11


@pytest.mark.parametrize(("name", "size"), [("124M", 512), ("1B", 1024), ("8B", 1024), ("8B", 512)])
@pytest.mark.parametrize("world", [256, *(pytest.param(world, marks=pytest.mark.slow) for world in (1024, 4096))])
def test_many_ranks_are_planned_in_seconds_and_within_the_bound(name, size, world):
    items = model(name, size)
    start = time.process_time()
    found = assign(items, world)
    assert time.process_time() - start < 20
    load = sums(items, world, found, "cost")
    mean, largest = sum(load) / world, max(item.cost for item in items)
    assert max(load) <= max(1.05 * mean, mean + largest)
    if len(items) >= world:
        assert min(load) > 0


@pytest.mark.parametrize(("name", "size", "world"), [("124M", 512, 4), ("1B", 512, 16), ("8B", 1024, 64)])
def test_refreshes_of_models_are_spread_within_every_owner(name, size, world):
    items = model(name, size)
    for calls in phase_work(items, world, assign(items, world), 10):
        assert balance(calls) <= 1.5


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 0), r"world must be an int >= 1, got 0"),
        (([Item(("a", (0,)), 1.0, 1)] * 2, 2), r"2 items with 1 keys"),
        (([Item(("a", (0,)), -1.0, 1)], 2), r"cost must be a number >= 0, got -1.0 of \('a', \(0,\)\)"),
        (([Item(("a", (0,)), math.nan, 1)], 2), r"cost must be a number >= 0, got nan"),
        (([Item(("a", (0,)), math.inf, 1)], 2), r"cost must be a number >= 0, got inf"),
        (([Item(("a", (0,)), 1.0, -1)], 2), r"size must be a number >= 0, got -1"),
        (([Item(("a", (0,)), 1.0, 1, held=((2, 5),))], 2), r"held must name ranks in range\(2\), got 2"),
        (([], 2, {("a", (0,)): 0}), r"known must name items, got \('a', \(0,\)\)"),
        (([Item(("a", (0,)), 1.0, 1)], 2, {("a", (0,)): 2}), r"known must name ranks in range\(2\), got 2"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        assign(*arguments)


def test_balance():
    assert balance([1.0, 2.0, 3.0]) == 1.5
    assert balance([0, 0]) == 1.0
    with pytest.raises(ValueError, match="values must not be empty"):
        balance([])
