"""Checkpoints of one optimizer's run: everything that the next step depends on.

One process writes a file, `checkpoint.pt`. Several write a folder each time, `step-000123`, every process its part of
the state; the last two are kept. Any number of processes, however they share the model, resume from either. Neither
holds generators of random numbers: the training loop seeds them for every micro-batch.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

import runfolder
from errors import RecipeError
from optimizer import secondorder
from world import World

# What several processes need; without secondorder one still trains.
parts: Any = importlib.import_module("secondorder.checkpoint") if secondorder else None

FILE = "checkpoint.pt"
KEPT = 2  # folders


def save(folder: Path, step: int, model: nn.Module, opt: Any, trainer: dict[str, Any], world: World) -> None:
    """Write a checkpoint; the previous one stays until the new one is whole.

    Args:
        folder: Of the optimizer, in the run folder.
        step: Steps taken.
        model: As the optimizer knows its parameters: sharded or not, but not wrapped.
        opt: The optimizer.
        trainer: Plain values that the training loop wants back.
        world: The processes; all call this.
    """
    trainer = {"step": step, **trainer}
    if world.size == 1:
        content = {"model": model.state_dict(), "optimizer": opt.state_dict(), **trainer}
        runfolder.save_checkpoint(folder / FILE, content)
        outdated = _folders(folder)
    else:
        path = folder / f"step-{step:06d}"
        if not world.gather(path.exists())[0]:  # else it is from before a restart: the same bits
            parts.save(path, {**_state(model, opt), "trainer": trainer})
        outdated = [*_folders(folder)[:-KEPT], folder / FILE]
    if world.is_main:
        for path in outdated:
            _remove(path)


def restore(folder: Path, model: nn.Module, opt: Any, trainer: dict[str, Any], world: World) -> dict[str, Any]:
    """Bring back the newest checkpoint that is not damaged; returns what `save` was given as `trainer`, and the step.

    Args:
        folder: Of the optimizer, in the run folder.
        model: As for `save`.
        opt: The optimizer.
        trainer: Returned where there is no checkpoint, with step 0; its keys are those of `save`.
        world: The processes; all call this.

    Raises:
        RecipeError: There are checkpoints, but all are damaged or of something else.
    """
    trainer = {"step": 0, **trainer}
    folders, is_file = world.gather((_folders(folder), (folder / FILE).exists()))[0]
    error = None
    for path in reversed(folders):
        state = {**_state(model, opt), "trainer": trainer}
        try:
            parts.load(path, state)
        except parts.CheckpointError as fault:  # on all processes
            error = fault
            if world.is_main:
                print(f"warning: {path} is skipped: {fault}", file=sys.stderr)
            continue
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return state["trainer"]
    if error:
        raise RecipeError(f"no checkpoint in {str(folder)!r} can be read: {error}")
    if not is_file:
        return trainer
    content = runfolder.load_checkpoint(folder / FILE)
    if world.size == 1:
        model.load_state_dict(content["model"])
        opt.load_state_dict(content["optimizer"])
    else:
        state = _state(model, opt)
        _take(state, {"model": content["model"], "optimizer": _by_name(content["optimizer"], model, opt)})
        set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return {key: content[key] for key in trainer}


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def _state(model: nn.Module, opt: Any) -> dict[str, Any]:
    return dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))


def _by_name(state: dict[str, Any], model: nn.Module, opt: Any) -> dict[str, Any]:
    """An optimizer's state dict with parameters' names in the place of their numbers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in opt.param_groups for parameter in group["params"]]
    groups = [{**group, "params": [order[number] for number in group["params"]]} for group in state["param_groups"]]
    return {"state": {order[number]: value for number, value in state["state"].items()}, "param_groups": groups}


@torch.no_grad()
def _take(own: Any, whole: Any) -> None:
    """Fill this process's nested state from that of a process which had everything: its entries, its shards."""
    for key, value in own.items() if isinstance(own, dict) else enumerate(own):
        if isinstance(value, (dict, list)):
            _take(value, whole[key])
        elif isinstance(value, DTensor):
            value.copy_(distribute_tensor(whole[key].to(value.device), value.device_mesh, value.placements))
        elif isinstance(value, Tensor):
            value.copy_(whole[key])
        else:
            own[key] = whole[key]


def _remove(path: Path) -> None:
    """A folder first loses its name, so that half of it is never taken for a checkpoint."""
    if path.is_dir():
        shutil.rmtree(path.rename(path.with_name(f".{path.name}")))
    else:
        path.unlink(missing_ok=True)
