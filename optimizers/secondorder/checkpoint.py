"""Checkpoints of training on several ranks that are whole or not there, and loads that happen whole or not at all.

`torch.distributed.checkpoint` writes and reads; state that only some ranks have, such as the factors of the blocks that
a rank owns, goes into the same checkpoint and comes back on any number of ranks. What it leaves open is settled here:

    save    a temporary folder beside the target, a manifest with SHA-256 digests, one rename
    load    digests, then keys, shapes and dtypes, then a fresh copy of everything; the given tensors change last

Every stage ends with all ranks telling each other whether they failed: one rank's failure is everybody's, with one
message, and never half of the ranks with another step's state. `python -m secondorder.checkpoint PATH` verifies.
"""

from __future__ import annotations

import argparse
import copy
import errno
import functools
import math
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from secondorder import _manifest
from secondorder._manifest import CheckpointError, latest, shown, verify
from secondorder._ranks import Ranks

__all__ = ["CheckpointError", "async_save", "full_state_dict", "latest", "load", "save", "verify"]

Where = str | os.PathLike[str]
Keys = tuple[Any, ...]  # from the outermost dict to a leaf

_worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
_in_flight: list[Future[None]] = []  # at most one


def save(path: Where, state: Mapping[str, Any], *, process_group: dist.ProcessGroup | None = None) -> None:
    """Save a checkpoint; every rank of the group calls this, with the same path, on a file system that all share.

    Args:
        path: The folder to be. It appears when all is written, under this name at once.
        state: Nested dict of tensors, DTensors, numbers and what else pickles, such as the state dicts of
            `torch.distributed.checkpoint.state_dict`. Ranks may have different keys; what several have is saved once.
        process_group: The ranks that take part; default: the default group, or this process alone without one.

    Raises:
        FileExistsError: `path` exists. A checkpoint is never written over: half of it could be of another step.
        CheckpointError: A rank failed, on all ranks. Nothing is at `path`, the temporary folder is removed.
    """
    ranks = Ranks(process_group)
    with _quiet():
        _write(ranks, Path(path), _begin(ranks, Path(path), state), state)


def async_save(
    path: Where, state: Mapping[str, Any], *, process_group: dist.ProcessGroup | None = None
) -> Future[None]:
    """As `save`, but only copy the state to the CPU now; files, digests and the rename come from a background thread.

    One save is in flight in a process: a second call waits for the first one's end. The first call for a group makes a
    gloo group of its ranks; where that is a part of all ranks, these must have made the same number of groups before.

    Args:
        path: See `save`.
        state: See `save`; what happens to it later does not reach the disk.
        process_group: See `save`.

    Returns:
        A future, done when the checkpoint is at `path`. Ask for its `result()` before the process groups end; it raises
        what `save` raises for a failure in the background.

    Raises:
        FileExistsError: `path` exists.
        CheckpointError: The save could not begin on one of the ranks.
    """
    wait(_in_flight)
    ranks = Ranks(_background_group(process_group) if dist.is_available() and dist.is_initialized() else None)
    target = Path(path)
    staged = ranks.agree(f"saving {target}", lambda: _on_cpu(state))
    temporary = _begin(ranks, target, staged)
    _in_flight[:] = [_worker.submit(_write, ranks, target, temporary, staged)]
    return _in_flight[0]


def load(
    path: Where, state: dict[str, Any], *, process_group: dist.ProcessGroup | None = None, strict: bool = True
) -> None:
    """Load a checkpoint into the tensors of a state dict; every rank of the group calls this.

    Any number of ranks can load what any number has saved. Below the key `state`, as in the state dict of an optimizer,
    each rank asks for the keys that it has, the others may lack them.

    Args:
        path: The folder.
        state: Says what is wanted, with which shapes and dtypes; tensors are written in place, other values replaced.
        process_group: See `save`.
        strict: Raise for a key of the checkpoint that no rank has, or that some ranks lack outside of an optimizer's
            `state`. False: such keys are left out.

    Raises:
        CheckpointError: On all ranks, with the same message, and nothing has changed on any: a file is missing, damaged
            or of another checkpoint; a key, shape or dtype differs; a rank failed.
    """
    ranks, folder, doing = Ranks(process_group), Path(path), f"loading {path}"
    files = ranks.gather(ranks.agree(doing, lambda: _manifest.read(folder) if ranks.rank == 0 else {}))[0]
    ranks.agree(doing, lambda: _manifest.check(folder, files, sorted(files)[ranks.rank :: ranks.size]))
    flat, places, saved = ranks.agree(doing, lambda: _examined(folder, state))
    if strict:
        _check_coverage(doing, ranks, sorted(saved), flat)
    tensors = [key for key, value in flat.items() if isinstance(value, Tensor)]
    fresh = ranks.agree(doing, lambda: {**flat, **{key: torch.empty_like(flat[key]) for key in tensors}})
    # Keys are flat already. Nested ones would make the planner switch a global of torch for a moment, which an
    # asynchronous save in another thread must not see.
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _quiet():
        ranks.agree(doing, lambda: dcp.load(fresh, checkpoint_id=folder, planner=planner, **ranks.for_dcp()))
    if tensors:
        with torch.no_grad():
            torch._foreach_copy_([_local(flat[key]) for key in tensors], [_local(fresh[key]) for key in tensors])
    for key in flat.keys() - set(tensors):
        _replace(state, places[key], fresh[key])


def full_state_dict(
    optimizer: torch.optim.Optimizer, *, process_group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """The optimizer's state dict with what all ranks have; every rank of the group calls this.

    Entries travel one by one. What several ranks have is taken from the lowest one, DTensors are gathered on their
    mesh, nested dicts of different ranks are merged.

    Args:
        optimizer: Its state dict has the same parameter ids on all ranks.
        process_group: See `save`.

    Returns:
        On rank 0 of the group, copies on the CPU that a single process can load; `{}` on the others.

    Raises:
        CheckpointError: `state_dict()` failed on a rank, on all ranks.
    """
    ranks = Ranks(process_group)
    own = ranks.agree("gathering the optimizer's state", optimizer.state_dict)
    entries = dict(_entries(own["state"]))
    source: dict[Keys, int] = {}
    for rank, paths in enumerate(ranks.gather(list(entries))):
        for path in paths:
            source.setdefault(path, rank)
    merged: dict[Any, Any] = {}
    for path in sorted(source, key=lambda path: [(isinstance(key, str), key) for key in path]):
        value: Any = entries.get(path)
        if isinstance(value, DTensor):
            value = value.full_tensor()  # a collective operation
        if ranks.rank == source[path]:
            value = _on_cpu(value)
        value = ranks.sent(value, source[path])
        if ranks.rank == 0:
            functools.reduce(lambda inner, key: inner.setdefault(key, {}), path[:-1], merged)[path[-1]] = value
    return {**_on_cpu({k: v for k, v in own.items() if k != "state"}), "state": merged} if ranks.rank == 0 else {}


@functools.cache
def _gloo_twin(group: dist.ProcessGroup, partial: bool) -> dist.ProcessGroup:
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=partial)


def _background_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Collectives of a background thread must not meet those of the training loop in one group."""
    Ranks(group)  # raises for a group of other ranks
    return _gloo_twin(group or dist.group.WORLD, group is not None)


def _begin(ranks: Ranks, path: Path, state: Mapping[str, Any]) -> Path:
    """Make the temporary folder, if the save can begin at all."""
    doing = f"saving {path}"
    ranks.agree(doing, lambda: _flat(state))
    paths = ranks.gather(str(path))
    if len(set(paths)) > 1:
        raise CheckpointError(f"saving a checkpoint: ranks must give one path, got {shown(dict.fromkeys(paths))}")
    if any(ranks.gather(os.path.lexists(path))):
        raise FileExistsError(errno.EEXIST, "a checkpoint is never written over", str(path))
    temporary = path.parent / ranks.gather(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")[0]
    ranks.agree(doing, lambda: temporary.mkdir(parents=True) if ranks.rank == 0 else None)
    return temporary


def _write(ranks: Ranks, path: Path, temporary: Path, state: Mapping[str, Any]) -> None:
    doing = f"saving {path}"

    def publish() -> None:
        if ranks.rank == 0:
            _manifest.write(temporary, ranks.size, files)
            os.rename(temporary, path)
            _manifest.sync_folder(path.parent)

    try:
        ranks.agree(doing, lambda: _check_shared(temporary))
        metadata = ranks.agree(doing, lambda: dcp.save(dict(state), checkpoint_id=temporary, **ranks.for_dcp()))
        ranks.agree(doing, lambda: _check_whole(metadata))
        described = ranks.agree(doing, lambda: _manifest.described(temporary, _written(temporary, ranks.rank)))
        files = {name: entry for own in ranks.gather(described) for name, entry in own.items()}
        ranks.agree(doing, publish)
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _check_shared(temporary: Path) -> None:
    if not temporary.is_dir():
        raise CheckpointError(f"does not see {str(temporary)!r}, which rank 0 made; the folder must be a shared one")


def _check_whole(metadata: Metadata) -> None:
    """A DTensor whose mesh reaches beyond the group would be saved in part; torch sees that in a larger group only."""
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise CheckpointError(f"{key!r} has parts on ranks that are not in the group")


def _written(folder: Path, rank: int) -> list[str]:
    """Names of the files that a rank has written."""
    names = [path.name for path in folder.glob(f"__{rank}_*")]
    return [*names, _manifest.METADATA] if rank == 0 else names


def _flat(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Keys]]:
    """The leaves of a state dict, and their places in it, by the names that torch saves them under."""
    planner = dcp.DefaultSavePlanner(flatten_sharded_tensors=False)
    planner.set_up_planner(dict(state))
    for key, value in planner.state_dict.items():
        if not isinstance(value, Tensor) and isinstance(value, Stateful):
            raise TypeError(f"state must hold state dicts, {key!r} is a {type(value).__name__} itself")
    return planner.state_dict, planner.mappings


def _examined(folder: Path, state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Keys], Mapping[str, Any]]:
    """The template's leaves and places, and what is saved; all that the template wants is there."""
    flat, places = _flat(state)
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    missing = [key for key in flat if key not in saved]
    unfit = [f"{key!r} {fault}" for key in flat if key in saved and (fault := _difference(flat[key], saved[key]))]
    told = [f"the checkpoint has no {shown(missing)}"] if missing else []
    if unfit:
        told.append("; ".join(unfit[:5]) + (f"; and {len(unfit) - 5} more" if len(unfit) > 5 else ""))
    if told:
        raise CheckpointError("; ".join(told))
    return flat, places, saved


def _difference(value: Any, saved: Any) -> str | None:
    if isinstance(value, Tensor) is not isinstance(saved, TensorStorageMetadata):
        article = "no" if isinstance(value, Tensor) else "a"
        return f"is {article} tensor in the checkpoint, expected {type(value).__name__}"
    if not isinstance(value, Tensor):
        return None
    if value.is_meta:
        return "is on the meta device and cannot take what is loaded"
    if saved.size != value.size():
        return f"has shape {tuple(saved.size)} in the checkpoint, expected {tuple(value.size())}"
    if saved.properties.dtype != value.dtype:
        return f"is {saved.properties.dtype} in the checkpoint, expected {value.dtype}"
    return None


def _check_coverage(doing: str, ranks: Ranks, saved: list[str], flat: Mapping[str, Any]) -> None:
    """Whether everything that was saved is asked for: the same on all ranks, so they need not agree again."""
    asked = torch.stack(ranks.gather(torch.tensor([key in flat for key in saved], dtype=torch.bool)))
    some, every = asked.any(0).tolist(), asked.all(0).tolist()
    nobodys = [key for key, one in zip(saved, some, strict=True) if not one]
    if nobodys:
        raise CheckpointError(f"{doing}: no rank asks for {shown(nobodys)}, which the checkpoint has; see strict=False")
    partly = [i for i, key in enumerate(saved) if not every[i] and "state" not in key.split(".")]
    if partly:
        rank = asked[:, partly[0]].tolist().index(False)
        lacking = [saved[i] for i in partly if not asked[rank, i]]
        raise CheckpointError(f"{doing}: rank {rank}: does not ask for {shown(lacking)}, others do; see strict=False")


def _replace(state: Any, place: Keys, value: Any) -> None:
    for key in place[:-1]:
        state = state[_own_key(state, key)]
    state[_own_key(state, place[-1])] = value


def _own_key(container: Any, key: Any) -> Any:
    """A dict's key from what torch made of it: a string."""
    if isinstance(container, list) or key in container:
        return key
    return next(own for own in container if str(own) == key)


def _entries(state: Mapping[Any, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Leaves of nested dicts with their paths; an empty dict is a leaf."""
    for key, value in state.items():
        if isinstance(value, Mapping) and value:
            yield from _entries(value, (*above, key))
        elif not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is not None:
            yield (*above, key), value


def _on_cpu(value: Any) -> Any:
    """A copy on the CPU, of tensors without the storage that they are views of."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_on_cpu, value))
    return copy.deepcopy(value)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _quiet(warnings.catch_warnings):  # noqa: N801 -- used as a function
    """Without torch's warning that there is no process group: saving and loading in one process is meant so."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", "torch.distributed is disabled")


def main() -> int:
    """Print what is wrong with a checkpoint; the exit code is 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m secondorder.checkpoint", description="Verify a checkpoint.")
    parser.add_argument("path", help="the checkpoint's folder")
    problems = verify(parser.parse_args().path)
    print("\n".join(problems) or "the checkpoint is complete and as it was saved")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
