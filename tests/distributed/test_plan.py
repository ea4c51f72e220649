"""The plan over several processes: owners, routes and byte counts for any shapes, layouts, and masks of gradients.

Fake worlds: the plans of all ranks in one process, with what each stores given as index sets, and the collectives done
by copying between their buffers. Real ones: the pool, against one process.
"""

import json
import math
import os
import random
import subprocess
import sys
from collections import defaultdict
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import cases
from distributed import pool, worlds
from secondorder import SOAP
from secondorder.layout.buckets import Bucket
from secondorder.layout.faces import Layout
from secondorder.layout.plan import Flags
from secondorder.sharding.plan import ShardedPlan
from secondorder.sharding.regions import everything
from secondorder.sharding.routes import sources

WORDS_IN, WORDS_OUT = 4, 1  # float64, to every other rank

# ---------------------------------------------------------------------- fake worlds


def indices(spans):
    return torch.tensor([i for start, stop in spans for i in range(start, stop)], dtype=torch.int64)


def part(full, held):
    """What a process stores that holds these ranges of every axis."""
    for axis, spans in enumerate(held):
        full = full.index_select(axis, indices(spans))
    return full


class Stored:
    """Stands for the meeting: parameters in the same order everywhere, what each rank stores of them."""

    def __init__(self, shapes, held, rank):
        self.positions, self.shapes, self.held = list(range(len(shapes))), shapes, held
        self.first = [stored.index(stored[rank]) == rank for stored in held]


class FakePlan(ShardedPlan):
    """The plan of one rank; parameters are whole tensors outside and what the rank stores inside."""

    def __init__(self, rank, world, shapes, held):
        with (
            mock.patch.object(dist, "get_rank", return_value=rank),
            mock.patch.object(dist, "get_world_size", return_value=world),
        ):
            super().__init__("fake", False)
        self.meeting = Stored(shapes, held, rank)
        self.parts = {}

    def local(self, p):
        if all(stored == everything(p.shape) for stored in self.meeting.held[p.number]):
            return p
        if id(p) not in self.parts:
            self.parts[id(p)] = part(p.detach(), self.meeting.held[p.number][self.rank]).contiguous()
        return self.parts[id(p)]


class FakeWorld:
    """All ranks of a world: their plans and layouts, for parameters of these shapes, held so by the ranks."""

    def __init__(self, shapes, held, world, **options):
        self.shapes, self.held = shapes, held
        self.params = cases.parameters(shapes, dtype=torch.float64)
        for number, p in enumerate(self.params):
            p.number = number
        self.plans, self.layouts = [], []
        self.optimizer = SOAP(self.params, **options)
        for rank in range(world):
            plan = FakePlan(rank, world, shapes, held)
            layout = Layout(plan)
            layout.current(self.optimizer.param_groups, defaultdict(dict), self.optimizer._treat, lambda layout: None)
            self.plans.append(plan)
            self.layouts.append(layout)

    def travel(self, which):
        """The collective: what each rank has laid out for another is what that one expects, and it is copied."""
        wires = [getattr(plan, which) for plan in self.plans]
        for rank, wire in enumerate(wires):
            for other, theirs in enumerate(wires):
                assert wire._in_splits[other] == theirs._out_splits[rank]
                sent, expected = wire.outgoing[other], theirs.incoming[rank]
                assert [(t.shape, t.dtype) for t in sent] == [(t.shape, t.dtype) for t in expected]
                assert rank != other or not sent
                for view, value in zip(expected, sent, strict=True):
                    view.copy_(value)

    def owner_of_elements(self):
        """For every parameter, the owner of each of its entries; -1 where it is left to the fallback."""
        at = [torch.full(shape, -1) for shape in self.shapes]
        for rank, layout in enumerate(self.layouts):
            for bucket in stacked(layout):
                for piece in bucket.pieces:
                    for strand in piece.strands:
                        place = strand.cut(at[strand.index])
                        assert (place == -1).all(), "a block with two owners"
                        place.fill_(rank)
        return at


def stacked(layout):
    return [bucket for bucket in layout.buckets if isinstance(bucket, Bucket)]


def masks(shape, held):
    """For every rank, which entries it stores."""
    out = torch.zeros(len(held), *shape, dtype=torch.bool)
    full = torch.arange(math.prod(shape)).reshape(shape)
    for rank, stored in enumerate(held):
        out[rank].view(-1)[part(full, stored).flatten()] = True
    return out


SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 11, 13, 16])
SHAPES = st.lists(st.lists(SIZES, max_size=3).map(tuple), min_size=1, max_size=4)


@st.composite
def fake(draw, most=64):
    """Shapes, a world, and what each of its ranks holds: a mesh of ranks, axes of a parameter dealt out along it."""
    shapes = draw(SHAPES)
    world = draw(st.sampled_from([w for w in (1, 2, 3, 4, 6, 16, 64) if w <= most]))
    across = draw(st.sampled_from([n for n in (1, 2, 3) if world % n == 0]))
    generator = draw(st.randoms(use_true_random=False))
    kind = draw(st.sampled_from(["replicas", "rows", "rows of replicas", "rows and columns"]))
    held = []
    for shape in shapes:
        grid = [everything(shape)] * world
        if kind != "replicas" and shape:
            along = world if kind == "rows" else world // across
            axes = [dealt(generator, shape[0], along)]
            if kind == "rows and columns" and len(shape) > 1:
                axes.append(dealt(generator, shape[1], across))
            where = [(rank % along, rank // along % across) for rank in range(world)]
            rest = everything(shape)[len(axes) :]
            grid = [(*(axis[i] for axis, i in zip(axes, at, strict=False)), *rest) for at in where]
        held.append(grid)
    return shapes, held, world, draw(st.sampled_from([1, 2, 3, 5, 8, None]))


def dealt(generator, n, count):
    """Indices of an axis dealt out to so many: in runs as torch does it, in uneven runs, or any to any."""
    kind = generator.choice(["even", "uneven", "any"])
    owner = [i // max(1, -(-n // count)) for i in range(n)]
    if kind == "uneven":
        owner = sorted(generator.randrange(count) for _ in range(n))
    elif kind == "any":
        owner = [generator.randrange(count) for _ in range(n)]
    return [worlds.ranges(i for i in range(n) if owner[i] == k) for k in range(count)]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(fake())
def test_routes_of_any_world(problem):
    """One owner for a block; gradients come to it whole; what it sends back reaches all who store it, and only once."""
    shapes, held, count, limit = problem
    world = FakeWorld(shapes, held, count, max_block_size=limit, lr=1.0)
    assert all(plan.owners == world.plans[0].owners for plan in world.plans)
    owner = world.owner_of_elements()
    candidates = world.layouts[0].candidates
    assert sum(len(b.pieces) for layout in world.layouts for b in stacked(layout)) == len(candidates)
    matrices = {c.piece.index for c in candidates}
    assert all(bool((at >= 0).all()) == (i in matrices) for i, at in enumerate(owner) if at.numel())

    grads = [cases.normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    flags = []
    for plan in world.plans:
        local = [part(g, world.held[i][plan.rank]) for i, g in enumerate(grads)]
        flags.append(Flags(local, {torch.device("cpu"): torch.ones((), dtype=torch.bool)}, None, []))
        plan.traffic.load(local, world.params)
    world.travel("inward")
    hp = {"lr": 1.0, "weight_decay": 0.0, "weight_decay_kind": "decoupled"}
    stored = []
    for plan, layout, flag in zip(world.plans, world.layouts, flags, strict=True):
        stored.append([torch.zeros_like(g) for g in flag.grads])
        for bucket in stacked(layout):
            bucket.work["grad"].fill_(math.nan)
            plan.stage(bucket, stored[-1], flag)
            for place, (_, strand) in zip(bucket.work_rows["grad"], bucket.strands, strict=True):
                assert torch.equal(place, strand.cut(grads[strand.index]))
            bucket.work["update"].copy_(bucket.work["grad"])
            plan.commit(bucket, stored[-1], flag, hp, range(len(bucket.pieces)))
    world.travel("outward")
    for plan, flag, values in zip(world.plans, flags, stored, strict=True):
        with mock.patch.object(plan.outward, "exchange", lambda words: words[None]):
            plan.finish(values, flag, [hp], [1] * len(shapes))
        for i, (value, grad) in enumerate(zip(values, flag.grads, strict=True)):
            assert torch.equal(value, -grad if i in matrices else torch.zeros_like(grad))

    check_bytes(world, owner)


def check_bytes(world, owner):
    """Each entry that is not on its owner moves there once, and back to each other rank that stores it: no more."""
    count = len(world.plans)
    inward, outward = 0, [0] * count
    for shape, held, at in zip(world.shapes, world.held, owner, strict=True):
        mine = masks(shape, held)
        for rank in range(count):
            inward += int(((at == rank) & ~mine[rank]).sum())
            outward[rank] += int((mine & (at == rank)).sum() - (mine[rank] & (at == rank)).sum())
    others = count - 1
    assert sum(plan.inward.sent for plan in world.plans) == 8 * (inward + count * others * WORDS_IN)
    for plan in world.plans:
        assert plan.outward.sent == 8 * (outward[plan.rank] + others * WORDS_OUT)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(fake(most=6), st.data())
def test_what_nobody_stores_is_found(problem, data):
    shapes, held, count, limit = problem
    world = FakeWorld(shapes, held, count, max_block_size=limit)
    for c in world.layouts[0].candidates:
        strand = c.piece.strands[0]
        shape, stored = shapes[strand.index], held[strand.index]
        lost = data.draw(st.integers(0, count - 1))
        without = [((),) * len(shape) if rank == lost else have for rank, have in enumerate(stored)]
        region = strand.cut(masks(shape, without).any(0))
        with nullcontext() if region.all() else pytest.raises(ValueError, match="does not tile it"):
            sources(strand, shape, without, 0, 0)


# ---------------------------------------------------------------------- who owns what, whoever asks

HASHED = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from distributed.test_plan import FakeWorld, ranges
from secondorder.sharding.regions import everything
shapes = [(24, 16), (16, 24), (16,), (40, 8), (24, 16)]
held = [[(worlds.ranges(range(r, s[0], 3)), *everything(s)[1:]) for r in range(3)] for s in shapes]
plans = FakeWorld(shapes, held, 3, max_block_size=8).plans
print(hash("a"), json.dumps(sorted(map(list, plans[2].owners.items()))), sep="\\n")
"""


@pytest.mark.slow
def test_seed_of_hashes_does_not_matter():
    def start(seed):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", HASHED, json.dumps(sys.path)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    runs = [start(seed) for seed in (1, 2)]
    (first, owners), (second, again) = (run.communicate()[0].splitlines() for run in runs)
    assert first != second  # strings were hashed otherwise
    assert owners == again
    assert len(json.loads(owners)) == 19


def owners_by_name(rank, world, shuffled):
    """Owners by the parameters' names; rank 1 has the parameters in another order, and its groups' keys too."""
    params = worlds.named(worlds.laid_out(cases.parameters(worlds.ALIGNED), "owners", world))
    group = {"params": params, "lr": 0.1, "max_block_size": 8}
    if rank == 1 and shuffled:
        group = {"max_block_size": 8, "lr": 0.1, "params": params[::-1]}
    layout = SOAP([group], sharding="owners")._current()
    names = {id(p): name for name, p in params}
    by_position = {layout.plan.position(i): names[id(p)] for i, p in enumerate(layout.params)}
    found = {(by_position[at], start): owner for (at, start), owner in layout.plan.owners.items()}
    own = {(names[id(layout.params[piece.index])], piece.at) for b in stacked(layout) for piece in b.pieces}
    assert own == {key for key, owner in found.items() if owner == rank}
    return found


@pytest.mark.dist
def test_order_of_parameters_does_not_matter():
    plain, shuffled = pool.run(2, owners_by_name, False), pool.run(2, owners_by_name, True)
    assert plain[0] == plain[1] == shuffled[0] == shuffled[1]
    assert len(plain[0]) > 10


# ---------------------------------------------------------------------- against one process

METHODS = ["SOAP", "Shampoo", "EigenvalueCorrectedShampoo", "KLShampoo", "KLSOAP", "SIRFShampoo", "SpectralFactorized"]
METHODS += ["InverseFreeKLShampoo", "RFAdamW", "AdamW"]
STEPS = 4


def random_cases(world, seed):
    """Shapes, options and masks for every method in turn, each in one of the world's layouts."""
    generator = random.Random(seed)
    layouts = [layout for layout, sizes in worlds.LAYOUTS.items() if world in sizes]
    out = []
    for i, cls in enumerate(METHODS):
        layout = layouts[i % len(layouts)]
        sizes = [1, 2, 4, 6, 8] if layout in ("columns", "rows and columns") else [1, 2, 3, 5, 7, 8, 11]
        rows = [0, 1, 2, 3, 5, 7, 8, 13]
        shapes = [(generator.choice(rows), *generator.choices(sizes, k=generator.randint(0, 2))) for _ in range(5)]
        shapes += [(), (7, 4)]
        case = next(case for case in cases.OPTIMIZERS if case.cls.__name__ == cls)
        options = {"max_block_size": generator.choice([3, 4, 8])} if case.takes("max_block_size") else {}
        options |= generator.choice([{}, {"weight_decay": 0.1}, {"max_update_rms": 0.5}])
        if options.get("weight_decay") and generator.random() < 0.5:
            options["weight_decay_kind"] = "coupled"
        given_ = [[generator.random() < 0.7 for _ in shapes] for _ in range(STEPS)]
        out.append((cls, layout, options, shapes, given_ if i % 2 else None))
    return out


def train_all(rank, world, several):
    return [
        worlds.trained(rank, world, cls, layout, options, STEPS, shapes, given_, torch.float64)["values"]
        for cls, layout, options, shapes, given_ in several
    ]


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3, 4])
def test_random_shapes_and_missing_gradients_as_in_one_process(world):
    several = random_cases(world, seed=world)
    ranks = pool.run(world, train_all, several, timeout=120.0)
    for number, (cls, layout, options, shapes, given_) in enumerate(several):
        (one,) = train_all(0, 1, [(cls, "owners", options, shapes, given_)])
        for found in ranks:
            for value, same, expected in zip(found[number], ranks[0][number], one, strict=True):
                assert torch.equal(value, same), (cls, layout)
                assert torch.isfinite(value).all()
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- bytes


def traffic(rank, world):
    """Bytes of a step, as the plan counts them and as they were sent; who owns and who stores each entry."""
    shapes = [(128, 128)] * 6
    params = worlds.laid_out(cases.parameters(shapes), "rows", world)
    optimizer = SOAP(worlds.named(params), lr=0.01, max_block_size=64)
    exchange, sent = dist.all_to_all_single, []

    def counted(output, input, outs, ins, **more):
        sent.append(sum(ins) - ins[rank])
        return exchange(output, input, outs, ins, **more)

    worlds.feed(params, 0)
    optimizer._current()
    with mock.patch.object(dist, "all_to_all_single", counted):
        optimizer.step()
    layout = optimizer._current()
    owned = [torch.zeros(shape, dtype=torch.bool) for shape in shapes]
    for bucket in stacked(layout):
        for piece in bucket.pieces:
            for strand in piece.strands:
                strand.cut(owned[strand.index]).fill_(True)
    height = -(-128 // world)
    stored = torch.zeros(128, 128, dtype=torch.bool)
    stored[rank * height : (rank + 1) * height] = True
    away = sum(int((own & ~stored).sum()) for own in owned)
    return sent, [layout.plan.inward.sent, layout.plan.outward.sent], away, sum(int(own.sum()) for own in owned)


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_of_a_step_are_near_the_least_possible(world):
    ranks = pool.run(world, traffic)
    words = 8 * world * (world - 1)
    assert sum(elements for *_, elements in ranks) == 6 * 128 * 128
    least = 4 * sum(away for _, _, away, _ in ranks)
    for which, count in enumerate((WORDS_IN, WORDS_OUT)):
        assert all(sent[which] == told[which] for sent, told, _, _ in ranks)
        assert len(ranks[0][0]) == 2
        assert sum(sent[which] for sent, *_ in ranks) <= 1.02 * least + words * count
    assert least < 4 * 6 * 128 * 128 * (1 - 1 / world)  # owners keep some of what they store
