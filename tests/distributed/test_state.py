"""State of blocks with owners: what one world saves, every other one loads, and goes on with the same bits."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import cases
from distributed import pool, worlds
from secondorder import SOAP

pytestmark = pytest.mark.dist

SHAPES = [(16, 8), (8,), (24, 16), (3, 8), (8, 8, 2, 1), ()]
OPTIONS = {"lr": 0.01, "refresh_every": 3, "max_block_size": 8, "reproducible": True, "weight_decay": 0.1}
SAVED, LAST = 4, 8  # steps; 4 is in the middle of a period
WORLDS = (1, 2, 3, 4)
LAYOUTS = {world: [layout for layout, sizes in worlds.LAYOUTS.items() if world in sizes] for world in WORLDS}


def network(layout, world, dtype=torch.float32, seed=0):
    """A module with parameters of this layout, and its optimizer."""
    params = worlds.laid_out(cases.parameters(SHAPES, dtype=dtype, seed=seed), layout, world)
    model = nn.Module()
    for i, p in enumerate(params):
        model.add_module(f"layer{i}", nn.Module())
        getattr(model, f"layer{i}").weight = p
    more = {"sharding": "owners"} if layout == "owners" else {}
    return model, SOAP(model.named_parameters(), **OPTIONS, **more)


def train(model, optimizer, steps):
    params = list(model.parameters())
    for step in steps:
        worlds.feed(params, step)
        optimizer.step()
    for p in params:
        p.grad = None


def whole(model):
    return [worlds.whole(p) for p in model.parameters()]


def alone(dtype=torch.float32):
    """What becomes of it in one process that nothing interrupts."""
    model, optimizer = network("owners", 1, dtype)
    train(model, optimizer, range(LAST))
    return whole(model)


# ---------------------------------------------------------------------- distributed checkpoints


def states(model, optimizer, flat):
    return get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))


def file(folder, world, layout, flat):
    return Path(folder) / f"{world}-{layout}-{'flat' if flat else 'nested'}"


@torch.no_grad()
def save_all(rank, world, folder):
    """Keys of the optimizer's state, nested as in `state_dict()`, of this rank."""
    keys = {}
    for layout in LAYOUTS[world]:
        model, optimizer = network(layout, world)
        train(model, optimizer, range(SAVED))
        for flat in (False, True):
            module, state = states(model, optimizer, flat)
            dcp.save({"model": module, "optimizer": state}, checkpoint_id=file(folder, world, layout, flat))
        keys[layout] = sorted(key for key in state if ".tile_" in key or ".exp_avg" in key)
    return keys


@torch.no_grad()
def load_all(rank, world, folder, saved):
    """What training goes on to be, from every checkpoint."""
    out = {}
    for before, theirs, flat in saved:
        for layout in LAYOUTS[world]:
            model, optimizer = network(layout, world, seed=1)
            train(model, optimizer, range(7, 9))  # there is other state already
            module, state = states(model, optimizer, flat)
            dcp.load({"model": module, "optimizer": state}, checkpoint_id=file(folder, before, theirs, flat))
            set_state_dict(
                model,
                optimizer,
                model_state_dict=module,
                optim_state_dict=state,
                options=StateDictOptions(flatten_optimizer_state_dict=flat),
            )
            train(model, optimizer, range(SAVED, LAST))
            out[before, theirs, flat, layout] = whole(model)
    return out


@pytest.mark.parametrize("sizes", [(1, 2), pytest.param(WORLDS, marks=pytest.mark.slow)], ids=str)
def test_every_world_loads_what_any_world_saves(sizes, tmp_path):
    keys = {}
    for world in sizes:
        found = pool.run(world, save_all, str(tmp_path), timeout=60.0)
        for layout in LAYOUTS[world]:
            every = [key for rank in found for key in rank[layout]]
            keys[world, layout] = sorted(set(every))
            tiles = [key for key in every if ".tile_" in key]
            assert len(tiles) == len(set(tiles))  # an owner alone saves its blocks
    assert all(found == keys[1, "owners"] for found in keys.values())
    expected = alone()
    for world in sizes:
        # Nested ones from some worlds, flat ones from the others: both from every layout to every layout.
        numbered = [(w, layout, n) for w in sizes for n, layout in enumerate(LAYOUTS[w])]
        saved = [(w, layout, (w + world + n) % 2 == 1) for w, layout, n in numbered]
        for found in pool.run(world, load_all, str(tmp_path), saved, timeout=120.0):
            for values in found.values():
                cases.assert_same_bits(values, expected)


# ---------------------------------------------------------------------- files of all ranks


def gathered(value):
    if isinstance(value, dict):
        return {key: gathered(inner) for key, inner in value.items()}
    if isinstance(value, torch.Tensor):
        return worlds.whole(value)
    return value


@torch.no_grad()
def parts(rank, world, layout, folder, dtype, full):
    model, optimizer = network(layout, world, dtype)
    train(model, optimizer, range(SAVED))
    if full:
        module, state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        named = {name: i for i, name in enumerate(state["param_groups"][0]["params"])}
        state["state"] = {named[name]: entries for name, entries in state["state"].items()}
        state["param_groups"][0]["params"] = [*range(len(named))]
        saved = {"params": list(module.values()), "optimizer": state}
    else:
        saved = {"params": whole(model), "optimizer": gathered(optimizer.state_dict())}
    torch.save(saved, Path(folder) / f"{rank}.pt")


def union(into, more):
    """Entries of both; of what both have, all is the same."""
    for key, value in more.items():
        if isinstance(value, dict):
            union(into.setdefault(key, {}), value)
        elif key in into:
            assert torch.equal(torch.as_tensor(into[key]), torch.as_tensor(value)), key
        else:
            into[key] = value
    return into


@pytest.mark.parametrize("full", [False, True], ids=["state_dict", "full_state_dict"])
@pytest.mark.parametrize(("layout", "world"), [("owners", 3), ("rows", 2), ("rows", 4), ("replicas of rows", 4)])
def test_files_of_all_ranks_are_one_state(layout, world, full, tmp_path):
    pool.run(world, parts, layout, str(tmp_path), torch.float32, full)
    saved = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    state = {"state": {}, "param_groups": saved[0]["optimizer"]["param_groups"]}
    for found in saved:
        union(state["state"], found["optimizer"]["state"])
        cases.assert_same_bits(found["params"], saved[0]["params"])
    model, optimizer = network("owners", 1, seed=1)
    with torch.no_grad():
        for p, value in zip(model.parameters(), saved[0]["params"], strict=True):
            p.copy_(value)
    optimizer.load_state_dict(state)
    train(model, optimizer, range(SAVED, LAST))
    cases.assert_same_bits(whole(model), alone())


@torch.no_grad()
def load_whole(rank, world, layout, values, state):
    """The state of one process, given whole to every rank."""
    model, optimizer = network(layout, world, seed=1)
    for p, value in zip(model.parameters(), worlds.laid_out(values, layout, world), strict=True):
        p.copy_(value)
    optimizer.load_state_dict(state)
    tiles = [key for key in cases.flat_state(optimizer) if "/tile_" in key]
    train(model, optimizer, range(SAVED, LAST))
    return whole(model), tiles


@pytest.mark.parametrize(("layout", "world"), [("owners", 2), ("rows", 3), ("strided rows", 4)])
def test_ranks_take_what_is_theirs_from_the_state_of_one_process(layout, world):
    model, optimizer = network("owners", 1)
    train(model, optimizer, range(SAVED))
    tiles = [key for key in cases.flat_state(optimizer) if "/tile_" in key]
    expected = alone()
    found = pool.run(world, load_whole, layout, whole(model), optimizer.state_dict())
    assert sorted(key for _, theirs in found for key in theirs) == sorted(tiles)
    for values, _ in found:
        cases.assert_same_bits(values, expected)


# ---------------------------------------------------------------------- half precision, dry runs


@torch.no_grad()
def half(rank, world, layout):
    """bfloat16 parameters: dtypes and bits through a save and a load."""
    model, optimizer = network(layout, world, torch.bfloat16)
    train(model, optimizer, range(SAVED))
    _, state = states(model, optimizer, True)
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    kept = {key: value.clone() for key, value in tensors.items()}
    other, again = network(layout, world, torch.bfloat16, seed=1)
    set_state_dict(
        other,
        again,
        model_state_dict=model.state_dict(),
        optim_state_dict=state,
        options=StateDictOptions(flatten_optimizer_state_dict=True),
    )
    _, loaded = states(other, again, True)
    for key, value in kept.items():
        assert torch.equal(worlds.whole(loaded[key]), worlds.whole(value)), key
        assert loaded[key].dtype == torch.float32, key
    train(other, again, range(SAVED, LAST))
    return whole(other)


@pytest.mark.parametrize(("layout", "world"), [("owners", 2), ("rows", 2)])
def test_factors_of_half_precision_parameters(layout, world):
    for values in pool.run(world, half, layout):
        cases.assert_same_bits(values, alone(torch.bfloat16))


@torch.no_grad()
def dry_run(rank, world, layout):
    """The step by which torch makes state before it loads one: lr 0 and zero gradients."""
    model, optimizer = network(layout, world)
    params = list(model.parameters())
    train(model, optimizer, range(SAVED))
    before = whole(model), {key: worlds.whole(value) for key, value in cases.flat_state(optimizer).items()}
    optimizer.param_groups[0]["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    cases.assert_same_bits(whole(model), before[0])
    cases.assert_same_state({key: worlds.whole(value) for key, value in cases.flat_state(optimizer).items()}, before[1])
    optimizer.param_groups[0]["lr"] = OPTIONS["lr"]
    train(model, optimizer, range(SAVED, LAST))
    dist.barrier()
    return whole(model)


@pytest.mark.parametrize(("layout", "world"), [("owners", 2), ("rows", 3)])
def test_dry_run_changes_nothing(layout, world):
    for values in pool.run(world, dry_run, layout):
        cases.assert_same_bits(values, alone())
