"""The registry of tasks: every file in this folder is one, found by its name.

A task's file defines two frozen dataclasses, `Data` and `Model` (its sections of the config), and a class `Task`
with what the training loop asks for:

    Task(data, model, seed)               reads the data; raises RecipeError if it cannot
    .summary                              one line about the data, for the log
    .fingerprint                          SHA-256 of the data
    .samples_unit, .units_per_sample      what throughput is counted in ("tokens", 128)
    .build_model() -> Module              a freshly initialised model; the caller has seeded torch
    .batch(step, first, count) -> batch   samples first … first+count-1 of this step's global batch: a function of the
                                          seed, the step and the sample's index, never of the number of processes
    .validation(first, count, total)      the same for a fixed validation set of `total` samples
    .loss(model, batch) -> Tensor         mean over the samples of the batch (0-d)
    .measure(model, batch) -> dict        what validation reports, by name: such means, "loss" among them

and may define more:

    .residuals(model, batch) -> dict      in the place of `loss`: residuals by name, the samples in their first axis;
                                          the loop gives optimizers a closure that returns them. A batch has all points
                                          of the step then, of which each process takes its part;
                                          one micro-batch, no clipping
    .summarise(means) -> dict             what validation reports, of the means over all samples (roots, ratios)
    .measured                             what `loss` of `measure` is, if it is no loss; of the class
    .draw(model, title, folder) -> str    a picture of the trained model; says where it is

A batch is a tuple of tensors on the CPU; the loop moves it.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from convert import suggestion
from errors import RecipeError


def names() -> list[str]:
    """All tasks."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def measured(name: str) -> str:
    """What a task's validation compares."""
    return str(getattr(load(name).Task, "measured", "loss"))


def load(name: str) -> ModuleType:
    """The file of a task.

    Raises:
        RecipeError: There is no such task.
    """
    if name not in names():
        raise RecipeError(f"task: expected one of {', '.join(names())}, got {name!r}{suggestion(name, names())}")
    return importlib.import_module(f"tasks.{name}")
