"""Merge two runs of `train.py` into one model: weights averaged by the Fisher information that training left behind.

    python recipes/merge.py runs/lm/FIRST runs/lm/SECOND --out merged.pt

    W = (F1 W1 + F2 W2) / (F1 + F2),   F_i + floor · mean(F1, F2) in the place of F_i     element by element

A weight that one run depends on and the other does not stays what the first one made of it. F is the diagonal that the
optimizer's state holds (`optimizer.fisher()`): no pass over the data. Both runs must come from the same start and share
model and optimizer; their data may differ. Prints the validation loss, on each run's data, of both, of their plain
average and of the merged model.

Merging: Matena and Raffel, *Merging Models with Fisher-Weighted Averaging* (2022, arXiv:2111.09832); the recycled
Fisher: Li et al., *Fishers for Free?* (2025, arXiv:2507.18807).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import command
import optimizer
import runfolder
import tasks
from config import Config
from errors import RecipeError
from progress import Stopwatch
from train import evaluate, refuse, restore, say
from world import World

CPU = World(0, 1, torch.device("cpu"))


@dataclass
class Run:
    """A trained model with what is needed to judge and to merge it."""

    folder: Path
    config: Config
    task: Any
    model: nn.Module
    fisher: dict[str, Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if it merged, 2 if it was given bad input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="run folder of train.py")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the merged weights are written")
    parser.add_argument("--optimizer", metavar="NAME", help="whose weights, if a run compared some; default: the first")
    parser.add_argument("--kind", choices=["diag"], default="diag", help="of Fisher information; default: diag")
    parser.add_argument("--floor", type=float, default=1e-3, help="pull to the plain average; default: 1e-3")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.floor > 0:
            raise RecipeError(f"--floor: expected a number > 0, got {arguments.floor}")
        first, second = (load(folder, arguments.optimizer, arguments.kind) for folder in arguments.runs)
        check(first, second)
        models = {str(first.folder): first.model, str(second.folder): second.model}
        models["plain average"] = merge(first, second, None)
        models["Fisher average"] = merge(first, second, arguments.floor)
        say(table(models, [first, second]))
        content = {"model": models["Fisher average"].state_dict(), "runs": [str(run.folder) for run in (first, second)]}
        runfolder.save_checkpoint(arguments.out, {**content, "config": command.as_dict(first.config)})
        say(f"merged weights: {arguments.out}")
    except (RecipeError, OSError) as error:
        return refuse(f"error: {error}")
    return 0


def load(folder: Path, name: str | None, kind: str) -> Run:
    """A run's model and Fisher information, from its last checkpoint.

    Raises:
        RecipeError: There is no such run, or its optimizer keeps no Fisher information.
    """
    if not (folder / "config.yaml").is_file():
        raise RecipeError(f"{str(folder)!r} is no run folder: it has no config.yaml")
    config = command.resolve(command.Arguments(resume=folder))
    spec = next((spec for spec in config.optimizers if name in (None, spec.name)), None)
    if spec is None:
        known = ", ".join(spec.name for spec in config.optimizers)
        raise RecipeError(f"--optimizer: {str(folder)!r} has {known}, got {name!r}")
    task = tasks.load(config.task).Task(config.data, config.model, config.seed)
    model = task.build_model()
    opt: Any = optimizer.build(spec, model)
    if not hasattr(opt, "fisher"):
        raise RecipeError(f"{spec.class_name} keeps no Fisher information: train with an optimizer of secondorder")
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0)  # a checkpoint has one
    if not restore(folder / spec.name, model, opt, scheduler, Stopwatch(CPU.device), CPU):
        raise RecipeError(f"{str(folder / spec.name)!r} has no checkpoint: {spec.name} was not trained to one")
    return Run(folder / spec.name, config, task, model, opt.fisher(kind, batch_size=config.train.batch_size))


def check(first: Run, second: Run) -> None:
    """Refuse runs whose weights, or whose Fisher information, cannot be compared."""
    shapes = [{name: tuple(p.shape) for name, p in run.model.named_parameters()} for run in (first, second)]
    if shapes[0] != shapes[1]:
        raise RecipeError(f"{first.folder} and {second.folder} have different models")
    if first.folder.name != second.folder.name:
        raise RecipeError(f"expected runs of one optimizer, got {first.folder.name} and {second.folder.name}")
    if first.config.seed != second.config.seed:
        seeds = f"{first.config.seed} and {second.config.seed}"
        say(f"warning: the runs began at different weights (seeds {seeds})", sys.stderr)


@torch.no_grad()
def merge(first: Run, second: Run, floor: float | None) -> nn.Module:
    """A new model; without a floor, the plain average."""
    model: nn.Module = first.task.build_model()
    others = [dict(run.model.named_parameters()) for run in (first, second)]
    for name, p in model.named_parameters():
        weights = [run.fisher.get(name) if floor is not None else None for run in (first, second)]
        p.copy_(average([other[name] for other in others], weights, floor or 1.0))
    buffers = dict(second.model.named_buffers())
    kept = dict(first.model.named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_((kept[name] + buffers[name]) / 2 if buffer.is_floating_point() else kept[name])
    return model


def average(values: Sequence[Tensor], fishers: Sequence[Tensor | None], floor: float) -> Tensor:
    """The average by these weights, with `floor` of their mean added to each; where there are none, the plain one."""
    known = [f for f in fishers if f is not None]
    if len(known) < len(values):
        return torch.stack(list(values)).mean(0)
    weights = torch.stack(known).double()
    weights = weights + floor * weights.mean() + torch.finfo(torch.float32).tiny
    wide = torch.stack(list(values)).double()
    return ((weights * wide).sum(0) / weights.sum(0)).to(values[0].dtype)


def table(models: Mapping[str, nn.Module], runs: Sequence[Run]) -> str:
    """Validation losses, a column for each run's data."""
    same = runs[0].task.fingerprint == runs[1].task.fingerprint
    judges = runs[:1] if same else runs
    heads = ["val/loss"] if same else [f"on {run.folder.parent.name}" for run in judges]
    width = max(map(len, models))
    lines = [" ".join([" " * width, *(f"{head:>12}" for head in heads)])]
    for name, model in models.items():
        losses = [evaluate(model, run.task, run.config, CPU)["val/loss"] for run in judges]
        cells = (f"{loss:{max(12, len(head))}.6f}" for loss, head in zip(losses, heads, strict=True))
        lines.append(" ".join([f"{name:{width}}", *cells]))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
