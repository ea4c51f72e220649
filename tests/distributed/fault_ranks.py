"""What every rank does in `test_faults.py`: something goes wrong on one of them, and all take it alike.

Functions return what a rank has seen; what all must have seen is judged by the test.
"""

import os
import signal
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist

import cases
from distributed import worlds
from secondorder import SOAP
from secondorder.sharding.plan import ShardedPlan

SHAPES = [(16, 8), (8,), (24, 16), (8, 8)]
PERIOD = 3


def build(layout, world, shapes=SHAPES, cls="SOAP", **options):
    case = next(case for case in cases.OPTIMIZERS if case.cls.__name__ == cls)
    params = worlds.laid_out(cases.parameters(shapes), layout, world)
    more = {"max_block_size": 8} if case.takes("max_block_size") else {}
    return params, worlds.make(case, params, layout, **{"reproducible": True, **more, **options})


def step(params, optimizer, number, spoil=None):
    worlds.feed(params, number)
    if spoil is not None:
        spoil(params)
    optimizer.step()


def local(p):
    return p.to_local() if hasattr(p, "to_local") else p


def copies(params):
    return [local(p.detach()).clone() for p in params]


def snapshot(params, optimizer):
    """All that this rank holds, except for the clocks of calls."""
    state = {key: local(value).clone() for key, value in cases.flat_state(optimizer).items() if "/step" not in key}
    return copies(params), state


def assert_unchanged(before, params, optimizer):
    values, state = snapshot(params, optimizer)
    cases.assert_same_bits(values, before[0])
    cases.assert_same_state(state, before[1])


def attempt(work):
    """What it raises, in words."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# ---------------------------------------------------------------------- differences between ranks


def options_that_differ(rank, world):
    """Everything that must be the same, other on the last rank: what the first step raises."""
    base = {"lr": 0.01, "max_block_size": 8}
    told = {}

    def meet(name, shapes=SHAPES, dtype=torch.float32, cls=SOAP, names=None, **options):
        params = cases.parameters(shapes, dtype=dtype)
        names = [f"layer{i}.weight" for i in range(len(params))] if names is None else names
        optimizer = cls(zip(names, params, strict=True), sharding="owners", **{**base, **options})
        worlds.feed(params, 0)
        before = copies(params)
        told[name] = attempt(optimizer.step)
        cases.assert_same_bits(copies(params), before)
        assert not any(optimizer.state.values())
        dist.barrier()  # nobody waits in a collective operation of the step

    odd = rank == world - 1
    meet("shape", shapes=[*SHAPES[:2], (24, 17), (8, 8)] if odd else SHAPES)
    meet("dtype", dtype=torch.float64 if odd else torch.float32)
    meet("block size", max_block_size=4 if odd else 8)
    meet("lr", lr=0.02 if odd else 0.01)
    meet("tensor lr", lr=torch.tensor(0.02 if odd else 0.01))
    meet("betas", betas=(0.8, 0.95) if odd else (0.9, 0.95))
    meet("method", cls=worlds.cases.secondorder.KLSOAP if odd else SOAP)
    meet("missing", shapes=SHAPES[:3] if odd else SHAPES)
    meet("more", shapes=[*SHAPES, (4, 4)] if odd else SHAPES)
    meet("name", names=[f"layer{i}.{'kernel' if odd and i == 2 else 'weight'}" for i in range(4)])
    return told


def other_order(rank, world):
    """The parameters of one rank come in another order; gradients by name."""
    params = cases.parameters(SHAPES)
    pairs = worlds.named(params)
    order = [2, 0, 3, 1] if rank > 0 else [0, 1, 2, 3]
    optimizer = SOAP([pairs[i] for i in order], lr=0.01, sharding="owners", max_block_size=8, refresh_every=PERIOD)
    for number in range(6):
        step(params, optimizer, number)
    return copies(params)


# ---------------------------------------------------------------------- steps that all refuse


def refused_steps(rank, world, layout, cls, options):
    """Steps that one rank cannot take: nobody does. Then training goes on, the same everywhere."""
    params, optimizer = build(layout, world, cls=cls, **options)
    odd = rank == world - 1
    seen = {}

    def refuse(name, number, spoil=None):
        before, count = snapshot(params, optimizer), optimizer.diagnostics()["refused_steps"]
        step(params, optimizer, number, spoil if odd else None)
        assert optimizer.diagnostics()["refused_steps"] == count + 1, name
        assert_unchanged(before, params, optimizer)
        dist.barrier()

    def put(value):
        def spoil(params):
            grad = local(params[2].grad)
            grad[-1, -1] = value

        return spoil

    def drop(params):
        params[0].grad = None

    def drop_all(params):
        for p in params:
            p.grad = None

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(params, optimizer, 0)
        step(params, optimizer, 1)
        for number, value in enumerate((float("nan"), float("inf"), 1e30), 2):
            refuse(value, number, put(value))
        step(params, optimizer, 5)
        seen["after bad gradients"] = [worlds.whole(p) for p in params]
        rate = optimizer.param_groups[0]["lr"]
        if odd:
            optimizer.param_groups[0]["lr"] = 3 * rate  # a scheduler that one rank alone steps
        refuse("rate", 6)
        optimizer.param_groups[0]["lr"] = rate
        refuse("missing", 7, drop)
        refuse("all missing", 8, drop_all)
        step(params, optimizer, 9)
        step(params, optimizer, 10)
    seen["last"] = [worlds.whole(p) for p in params]
    seen["warnings"] = [str(w.message) for w in caught if "refused" in str(w.message)]
    return seen


def first_step_with_other_masks(rank, world, layout, cls):
    """The very first gradients differ; later ones do not."""
    params, optimizer = build(layout, world, cls=cls)
    before = copies(params)
    step(params, optimizer, 0, (lambda params: setattr(params[0], "grad", None)) if rank == 0 else None)
    cases.assert_same_bits(copies(params), before)
    for number in range(1, 6):
        step(params, optimizer, number)
    return [worlds.whole(p) for p in params], optimizer.diagnostics()["refused_steps"]


def masks_that_nobody_asks_about(rank, world, layout):
    """As on a device, where no process reads what the others said: a step of zeros."""
    params, optimizer = build(layout, world, [*SHAPES, (6, 10)], weight_decay=0.1)  # the last has a bucket of its own
    flags = ShardedPlan.flags

    def unread(*args):
        return replace(flags(*args), differ=False)

    with mock.patch.object(ShardedPlan, "flags", unread):
        for number in range(6):
            before = snapshot(params, optimizer)
            other = number in (2, 4)
            drop = (lambda params: setattr(params[number], "grad", None)) if rank == 0 and other else None  # noqa: B023
            step(params, optimizer, number, drop)
            if other:
                assert_unchanged(before, params, optimizer)
    return [worlds.whole(p) for p in params], optimizer.diagnostics()["refused_steps"]


def raises_on_nonfinite(rank, world):
    """`on_nonfinite="raise"`: what each rank is told, for a gradient of one rank, and for masks that differ."""
    told = []
    for layout in ("owners", "rows"):
        params, optimizer = build(layout, world, on_nonfinite="raise")
        step(params, optimizer, 0)
        before = snapshot(params, optimizer)
        for spoil in (
            lambda params: local(params[2].grad).fill_(float("nan")),
            lambda params: setattr(params[0], "grad", None),
        ):
            odd = rank == world - 1
            told.append(attempt(lambda: step(params, optimizer, 1, spoil if odd else None)))  # noqa: B023
            assert_unchanged(before, params, optimizer)
            dist.barrier()
        step(params, optimizer, 1)
    return told


def few_rows(rank, world):
    """Fewer rows than ranks, ranks that own nothing, no gradient at all, empty parameters."""
    out = []
    for layout in ("owners", "rows"):
        for shapes, masks in (
            ([(3, 2)], None),
            ([(2, 5), (1, 4), (1,)], None),
            ([(8, 8)], [[True], [False], [True], [True]]),
            ([(0, 4), (5,), ()], None),
            ([(3, 2), (4, 4)], [[False, True], [True, True], [False, False], [True, False]]),
        ):
            options = {"reproducible": True, "max_block_size": 8}
            one = "owners" if world == 1 else layout
            out.append(worlds.trained(rank, world, "SOAP", one, options, 4, shapes, masks)["values"])
    return out


# ---------------------------------------------------------------------- owners that fail


@contextmanager
def failing_decompositions():
    """LAPACK converges for no matrix."""

    def fails(*args, **more):
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    with mock.patch.object(torch.linalg, "eigh", fails), mock.patch.object(torch.linalg, "householder_product", fails):
        yield


def refresh_that_fails(rank, world, layout, victim):
    """No decomposition succeeds on one rank during one period; `victim` None: on none, -1: on all (of one process)."""
    params, optimizer = build(layout, world, refresh_every=PERIOD)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(12):
            bad = number in range(4, 4 + PERIOD) and victim == rank
            with failing_decompositions() if bad else nullcontext():
                step(params, optimizer, number)
        failures = optimizer.diagnostics()["refresh_failures"]
    text = [str(w.message) for w in caught if "decomposition failed" in str(w.message)]
    return [worlds.whole(p) for p in params], failures, text


def update_that_is_nan(rank, world, layout):
    """One owner's update of one block is nan: what becomes of the parameters."""
    params, optimizer = build(layout, world, weight_decay=0.0)
    for number in range(3):
        step(params, optimizer, number)
    before = [worlds.whole(p) for p in params]
    buckets = [b for b in optimizer._current().buckets if hasattr(b, "shape") and b.fallback is False]
    apply = type(buckets[0].method).apply
    mine = rank == 0

    def spoiled(self, s, moment, x, c):
        out = apply(self, s, moment, x, c).clone()
        out[0] = float("nan")
        return out

    with mock.patch.object(type(buckets[0].method), "apply", spoiled) if mine else nullcontext():
        step(params, optimizer, 3)
    after = [worlds.whole(p) for p in params]
    return before, after, optimizer.diagnostics()


# ---------------------------------------------------------------------- loads that do not fit


def loads_that_do_not_fit(rank, world):
    """A state dict that is wrong on one rank: what all are told; nothing has changed anywhere."""
    told = {}
    for layout in ("owners", "rows"):
        params, optimizer = build(layout, world)
        for number in range(3):
            step(params, optimizer, number)

        def spoilt(change):
            state = optimizer.state_dict()  # noqa: B023
            state = {"state": {k: dict(v) for k, v in state["state"].items()}, "param_groups": state["param_groups"]}
            change(state)
            return state

        def truncated(state):
            for entries in state["state"].values():
                for key, value in entries.items():
                    if key.startswith("tile_"):
                        entries[key] = {**value, "exp_avg_sq": value["exp_avg_sq"][:-1]}
                        return
            entry = state["state"][0]
            name = next(key for key, value in entry.items() if getattr(value, "ndim", 0) > 0)
            entry[name] = entry[name][:-1]

        def without_counter(state):
            del state["state"][1]["count"]

        def fewer_groups(state):
            state["param_groups"] = []

        def bad_rate(state):
            state["param_groups"] = [{**state["param_groups"][0], "lr": -1.0}]

        def other_betas(state):
            state["param_groups"] = [{**state["param_groups"][0], "betas": (0.5, 0.5)}]

        before, groups = snapshot(params, optimizer), dict(optimizer.param_groups[0])
        for change in (truncated, without_counter, fewer_groups, bad_rate, other_betas):
            good = lambda state: None  # noqa: E731
            state = spoilt(change if rank == world - 1 else good)
            told[layout, change.__name__] = attempt(lambda: optimizer.load_state_dict(state))  # noqa: B023
            assert_unchanged(before, params, optimizer)
            assert optimizer.param_groups[0] == groups
            dist.barrier()
        step(params, optimizer, 3)
        told[layout, "after"] = [worlds.whole(p) for p in params]
    return told


# ---------------------------------------------------------------------- ranks that are gone


def raising_before_its_step(rank, world, layout):
    """The ones that are left say what they found by raising: their answers would be lost with the other's."""
    params, optimizer = build(layout, world)
    step(params, optimizer, 0)
    before = snapshot(params, optimizer)
    worlds.feed(params, 1)
    if rank == 0:
        raise RuntimeError("the loader has no more data")
    try:
        optimizer.step()
    except Exception as error:
        assert_unchanged(before, params, optimizer)
        raise AssertionError(f"nothing has changed after {error!r}") from error


def killed_between_the_collectives(rank, world, layout):
    params, optimizer = build(layout, world)
    step(params, optimizer, 0)
    if rank == world - 1:
        mock.patch.object(ShardedPlan, "finish", lambda *args: os.kill(os.getpid(), signal.SIGKILL)).start()
    step(params, optimizer, 1)
