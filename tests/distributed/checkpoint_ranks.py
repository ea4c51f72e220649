"""What every rank does in `test_checkpoint.py`: states with owners, and what can go wrong with a checkpoint of them.

Nothing in the library shards state yet, so an optimizer's tiles are dropped from its state dict where a rank is not
their owner. All ranks train the same network; what they ought to have is known without any checkpoint.
"""

import errno
import json
import os
import re
import resource
import shutil
import signal
import threading
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import secondorder
from secondorder import checkpoint

FLAT = (False, True)  # flatten_optimizer_state_dict
STEPS = 4


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))
    return model, secondorder.SOAP(model.parameters(), lr=0.01, max_block_size=4, refresh_every=3)


@torch.enable_grad()
def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()


def trained(steps=STEPS):
    model, optimizer = network()
    train(model, optimizer, range(steps))
    return model, optimizer


def state_dicts(model, optimizer, flat):
    return get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))


def pruned(state, mine, above=""):
    """Without the tiles that are not mine: dicts in nested state dicts, parts of the key in flat ones."""
    out = {}
    for key, value in state.items():
        tile = re.search(r".*\.tile_\w+", f"{above}.{key}")
        if tile is None or mine(tile[0]):
            out[key] = pruned(value, mine, f"{above}.{key}") if isinstance(value, Mapping) else value
    return out


def owned(rank, world, shift):
    """Tiles go round the ranks, in the order in which they come up; another shift, other owners."""
    numbers = {}
    return lambda tile: (numbers.setdefault(tile, len(numbers)) + shift) % world == rank


def rows(world, value=None):
    """Five rows on `world` ranks: not the same on all, none on some."""
    full = torch.arange(15.0).reshape(5, 3) if value is None else torch.full((5, 3), value)
    return distribute_tensor(full, init_device_mesh("cpu", (world,)), [Shard(0)])


def whole(rank, world, flat, shift):
    """The state of one rank: the model, the tiles that it owns, rows of a DTensor, a number."""
    model, optimizer = state_dicts(*trained(), flat)
    optimizer = pruned(optimizer, owned(rank, world, shift))
    return {"model": model, "optimizer": optimizer, "rows": rows(world), "step": STEPS}


def blank(value):
    """A template: other numbers in every place."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, Mapping):
        return {key: blank(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [blank(inner) for inner in value]
    return "to be replaced"


def copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


def assert_same(found, wanted, where=""):
    """The same keys, values, dtypes and bits."""
    if isinstance(wanted, Mapping):
        assert set(found) == set(wanted), where
        for key, value in wanted.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for i, value in enumerate(wanted):
            assert_same(found[i], value, f"{where}.{i}")
    elif isinstance(wanted, torch.Tensor):
        found, wanted = (t.to_local() if hasattr(t, "to_local") else t for t in (found, wanted))
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), where
    else:
        assert type(found) is type(wanted) and found == wanted, (where, found, wanted)


def save_with_owners(rank, world, folder):
    for flat in FLAT:
        state = whole(rank, world, flat, shift=0)
        checkpoint.save(Path(folder) / f"{world}-{flat}", state)
    return sorted(key for key in state["optimizer"] if ".tile_" in key)


def load_with_other_owners(rank, world, folder, worlds):
    for flat in FLAT:
        wanted = whole(rank, world, flat, shift=1)
        for saved in worlds:
            state = blank(wanted)
            tensors = dict(state["model"])
            checkpoint.load(Path(folder) / f"{saved}-{flat}", state)
            assert_same(state, wanted)
            assert all(state["model"][key] is tensor for key, tensor in tensors.items())  # in place


# Faults of a load: three ranks, each with a key of its own below `state`.


def simple(rank, step=0):
    own = {f"tile_{rank}": {"basis": torch.full((4, 4), rank + step + 0.5)}}
    return {"model": {"w": torch.arange(6.0) + step}, "optim": {"state": {"w": own}, "lr": 0.1 + step}}


def alter(name, change):
    def damage(path, other):
        file = path / name
        file.write_bytes(change(file.read_bytes()))

    return damage


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]


def swap(path, other):
    a, b = path / "__0_0.distcp", path / "__1_0.distcp"
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)


def foreign(path, other):
    shutil.rmtree(path)
    dcp.save(simple(0), checkpoint_id=path, no_dist=True)


DAMAGES = {
    "truncated": alter("__1_0.distcp", lambda data: data[:-10]),
    "flipped": alter("__1_0.distcp", flip),
    "missing": lambda path, other: (path / "__1_0.distcp").unlink(),
    "swapped": swap,
    "of another step": lambda path, other: shutil.copy(other / "__1_0.distcp", path),
    "no manifest": lambda path, other: (path / "manifest.json").unlink(),
    "half a manifest": alter("manifest.json", lambda data: data[: len(data) // 2]),
    "future manifest": alter("manifest.json", lambda data: json.dumps({**json.loads(data), "format": 9}).encode()),
    "manifest of another step": lambda path, other: shutil.copy(other / "manifest.json", path),
    "no metadata": lambda path, other: (path / ".metadata").unlink(),
    "metadata flipped": alter(".metadata", flip),
    "foreign": foreign,
    "absent": lambda path, other: shutil.rmtree(path),
}


def bfloat16(state):
    state["model"]["w"] = state["model"]["w"].bfloat16()


def other_shape(state):
    state["model"]["w"] = torch.zeros(2, 3)


def meta(state):
    state["model"]["w"] = torch.zeros(6, device="meta")


ON_RANK_1 = {
    "dtype": bfloat16,
    "shape": other_shape,
    "meta": meta,
    "extra": lambda state: state["model"].update(bias=torch.zeros(3)),
    "key of the model missing": lambda state: state["model"].pop("w"),
    "tile that nobody asks for": lambda state: state["optim"]["state"]["w"].pop("tile_1"),
    "number": lambda state: state["model"].update(w=0.5),
    "tensor": lambda state: state["optim"].update(lr=torch.tensor(0.5)),
    "object": lambda state: state["model"].update(w=nn.Linear(2, 2)),
}
FAILURES = {
    "reading": (FileSystemReader, "read_data", OSError(errno.EIO, os.strerror(errno.EIO))),
    "allocating": (torch, "empty_like", MemoryError("no memory")),
}


def faulty_loads(rank, world, folder):
    """What loads raise, by the fault; after each the template is as it was."""
    good, other = Path(folder) / "step-1", Path(folder) / "step-2"
    checkpoint.save(good, simple(rank))
    checkpoint.save(other, simple(rank, step=1))
    told = {}

    def attempt(name, path, spoil=lambda state: None):
        state = simple(rank, step=7)
        spoil(state)
        before, objects = copied(state), dict(state["model"])
        try:
            checkpoint.load(path, state)
            told[name] = "loaded"
        except checkpoint.CheckpointError as error:
            told[name] = str(error)
        assert state["model"] == objects or name == "meta"
        if name != "meta":
            assert_same(state, before)
        dist.barrier()

    for name, damage in DAMAGES.items():
        path = Path(folder) / "damaged"
        if rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(good, path)
            damage(path, other)
        dist.barrier()
        attempt(name, path)
    for name, spoil in ON_RANK_1.items():
        attempt(name, good, spoil if rank == 1 else lambda state: None)
    for name, (place, function, error) in FAILURES.items():
        with mock.patch.object(place, function, side_effect=error) if rank == 1 else nullcontext():
            attempt(name, good)
    state, wanted = simple(rank, step=7), simple(rank)
    for some in (state, wanted) if rank == 1 else ():
        del some["optim"]["state"]["w"]["tile_1"], some["model"]["w"]
    checkpoint.load(good, state, strict=False)
    assert_same(state, wanted)
    return told


def killed_while_loading(rank, world, folder):
    """The one that is left says what it found by raising: its answer would be lost with the other's."""
    checkpoint.save(Path(folder) / "step-1", simple(rank))
    state = simple(rank, step=7)
    if rank == 1:
        mock.patch.object(FileSystemReader, "read_data", killed).start()
    try:
        checkpoint.load(Path(folder) / "step-1", state)
    except Exception as error:
        assert_same(state, simple(rank, step=7))
        raise AssertionError(f"nothing has changed after {error!r}") from error


def killed(*args, **more):
    os.kill(os.getpid(), signal.SIGKILL)


# Faults of a save.


@contextmanager
def small_disk(size):
    """Files cannot grow beyond a size: the nearest to a full disk that needs no disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def faulty_saves(rank, world, folder, save):
    """What saves raise, by the fault; after each there is the older checkpoint, and nothing else."""
    folder = Path(folder)
    old = folder / "step-1"
    checkpoint.save(old, simple(rank))
    (folder / "file").write_text("")
    dist.barrier()
    big = {"model": {"w": torch.zeros(100_000)}, "optim": {"state": {"w": {f"tile_{rank}": torch.zeros(100_000)}}}}
    told = {}

    def attempt(name, path, state):
        try:
            result = getattr(checkpoint, save)(path, state)
            if result is not None:
                result.result()
            told[name] = "saved"
        except (checkpoint.CheckpointError, FileExistsError) as error:
            told[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
        assert sorted(path.name for path in folder.iterdir()) == ["file", "step-1"]
        assert checkpoint.verify(old) == []
        assert checkpoint.latest(folder) == old
        dist.barrier()

    attempt("exists", old, simple(rank, step=1))
    attempt("paths", folder / f"step-{rank + 2}", simple(rank))
    attempt("no folder", folder / "file" / "step-2", simple(rank))
    attempt("object", folder / "step-2", {"model": nn.Linear(2, 2)} if rank == 1 else simple(rank))
    attempt("does not pickle", folder / "step-2", {**simple(rank), **({"f": lambda: 0} if rank == 1 else {})})
    with small_disk(100_000) if rank == 1 else nullcontext():
        attempt("disk full", folder / "step-2", big)
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with mock.patch("os.rename", side_effect=read_only) if rank == 0 else nullcontext():
        attempt("read-only", folder / "step-2", simple(rank))
    return told


def killed_while_saving(rank, world, folder, victim, moment):
    folder = Path(folder)
    checkpoint.save(folder / "step-1", simple(rank))
    if rank == victim:
        place, function = {"writing": (FileSystemWriter, "write_data"), "publishing": (os, "rename")}[moment]
        mock.patch.object(place, function, killed).start()
    checkpoint.save(folder / "step-2", simple(rank, step=1))


# Saves in the background.


def background(rank, world, folder):
    folder, release, write = Path(folder), threading.Event(), FileSystemWriter.write_data

    def held(*args, **more):
        assert release.wait(30)
        return write(*args, **more)

    state, wanted = whole(rank, world, False, 0), whole(rank, world, False, 0)
    with mock.patch.object(FileSystemWriter, "write_data", held):
        first = checkpoint.async_save(folder / "step-1", state)
        for tensor in state["model"].values():
            tensor.zero_()  # training goes on, and so do its collective operations
            dist.all_reduce(tensor)
        state["rows"].to_local().zero_()
        second = []
        waiting = threading.Thread(target=lambda: second.append(checkpoint.async_save(folder / "step-2", state)))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive() and not first.done()  # one save is in flight
        assert not (folder / "step-1").exists()
        release.set()
        waiting.join()
        assert first.done()
        first.result()
        second[0].result()
    for step, expected in (("step-1", wanted), ("step-2", state)):
        found = blank(expected)
        checkpoint.load(folder / step, found)
        assert_same(found, expected)
    dist.barrier()
    return sorted(path.name for path in folder.iterdir())


# Groups, and all state on one rank.


def part_of_the_ranks(rank, world, folder):
    """Ranks 1 and 2 save and load among themselves; rank 0 has no part in it."""
    folder = Path(folder)
    group = dist.new_group([1, 2])
    beyond = {"rows": rows(world)}
    if rank == 0:
        try:
            checkpoint.save(folder / "step-1", simple(rank), process_group=group)
        except ValueError as error:
            return str(error)
    checkpoint.save(folder / "step-1", simple(rank), process_group=group)
    checkpoint.async_save(folder / "step-2", simple(rank, step=1), process_group=group).result()
    state = simple(rank, step=7)
    checkpoint.load(folder / "step-1", state, process_group=group)
    assert_same(state, simple(rank))
    checkpoint.load(folder / "step-2", state, process_group=group)
    assert_same(state, simple(rank, step=1))
    told = []
    for ranks in ([1, 2], [rank]):
        alone = dist.new_group(ranks, use_local_synchronization=True) if len(ranks) == 1 else group
        try:
            checkpoint.save(folder / f"beyond-{ranks[0]}-{len(ranks)}", beyond, process_group=alone)
            told.append("saved")
        except checkpoint.CheckpointError as error:
            told.append(str(error))
    return told


class Owner:
    """Stands for an optimizer that holds its own tiles only, and two moments as DTensors on these meshes."""

    def __init__(self, rank, world, meshes):
        self.full = trained()[1].state_dict()
        self.mine, self.meshes = owned(rank, world, shift=1), meshes

    def state_dict(self):
        state = pruned(self.full["state"], self.mine)
        for i, mesh in self.meshes.items():
            state[i] = {**state[i], "exp_avg": distribute_tensor(state[i]["exp_avg"], mesh, [Shard(0)])}
        return {**self.full, "state": state}


def gathered(rank, world, ranks):
    """One mesh has all ranks of the group, the other does not have its rank 0, which holds an empty DTensor there."""
    group, meshes = dist.new_group(ranks), {1: ranks, 3: ranks[1:]}
    meshes = {i: DeviceMesh("cpu", members) for i, members in meshes.items()}
    if rank in ranks:
        return checkpoint.full_state_dict(Owner(ranks.index(rank), len(ranks), meshes), process_group=group)


def cannot_be_gathered(rank, world):
    broken = mock.Mock(state_dict=mock.Mock(side_effect=RuntimeError("half a step") if rank == 1 else None))
    try:
        checkpoint.full_state_dict(broken)
    except checkpoint.CheckpointError as error:
        return str(error)
