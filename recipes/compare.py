"""Compare optimizers over several seeds: one table and one picture.

    python recipes/compare.py --config configs/autoencoder.yaml --optimizers soap,soap_reference,torch.muon --tune
    python recipes/compare.py --config configs/autoencoder.yaml --optimizers all --tune

The target is the worst final validation loss among AdamW's seeds, so that AdamW needs its whole budget for it. The
table says how many steps and seconds each run of each optimizer took to get there. AdamW is trained in the same
command, on the same batches. With --tune, each optimizer first gets the learning rate of the grid with the lowest final
loss on the first seed; without, the config's tuned_lr, else the class's default. Nothing else is tuned.

The folder holds comparison.txt, table.md (the table for a README, with its command), curves.png, and a run folder for
each seed and each point of --tune. `--resume FOLDER` goes on where a comparison was killed, or adds to it.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import campaign
import command
import curves
import optimizer
import results
import runfolder
import tasks
import train
import world as processes
from command import Arguments
from config import Config
from convert import convert
from errors import RecipeError
from results import Cell, Result
from world import World

USAGE = """\
usage: python recipes/compare.py [--config FILE]... [--section.key=value]... [the following]

  --optimizers NAMES    classes and variants (configs/optim_<name>.yaml), or all: every class, and torch.muon;
                        adamw is added if it is not among them
  --seeds 1,2,3         one run of each optimizer per seed
  --tune                choose each optimizer's lr on the first seed
  --lrs VALUES          the grid of --tune: 1e-3,3.16e-3,1e-2,3.16e-2,1e-1
  --resume FOLDER       go on with a comparison: its command, and what is given besides; finished runs are kept
  --help                this text; `train.py --help` lists the sections and their keys
"""
BASELINE = "adamw"
LOWER_IS_BETTER = ("steps to target", "seconds to target", "final loss")


@dataclasses.dataclass
class Comparison:
    """What compare.py is asked for, beside what train.py takes."""

    optimizers: tuple[str, ...] = ("soap", "torch.muon")
    seeds: tuple[int, ...] = (1, 2, 3)
    lrs: tuple[float, ...] = (1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1)
    tune: bool = False

    def __post_init__(self) -> None:
        named: list[str] = []
        for name in map(str.lower, self.optimizers):
            named += every_optimizer() if name == "all" else [name]
        others = [name for name in dict.fromkeys(named) if name != BASELINE]
        self.optimizers = (*others[:1], BASELINE, *others[1:])  # the second is what a run's own summary compares with
        for name in ("seeds", "lrs"):
            if not getattr(self, name):
                raise RecipeError(f"--{name}: expected at least one value")


def every_optimizer() -> list[str]:
    """All classes of the suite, and torch's Muon."""
    return [*(name for name in optimizer.classes() if not name.startswith("torch.")), "torch.muon"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 if it compared, 2 if it was given bad input, 130 if it was interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        train.say(USAGE)
        return 0
    folder: Path | None = None
    try:
        words, folder = campaign.recall(words)
        wanted, arguments = parse(words)
        config = setting(arguments, wanted.optimizers, wanted.seeds[0], arguments.overrides)
        with processes.join(config.device) as world:
            folder = campaign.begin(words, folder, config, "compare", world)
            compare(wanted, arguments, folder, words, world)
    except (RecipeError, OSError) as error:
        return train.refuse(f"error: {error}")
    except KeyboardInterrupt:
        train.say(f"interrupted; compare.py --resume {folder} goes on", file=sys.stderr)
        return 130
    return 0


def parse(words: list[str]) -> tuple[Comparison, Arguments]:
    """Take this program's options out of the command line; the rest is train.py's.

    Raises:
        RecipeError: An option has no or a wrong value, or makes no sense here.
    """
    tune = "--tune" in words
    arguments = command.parse([word for word in words if word != "--tune"])
    if arguments.compare:
        raise RecipeError("--compare is an option of train.py; here --optimizers names all that is trained")
    hints = {"optimizers": tuple[str, ...], "seeds": tuple[int, ...], "lrs": tuple[float, ...]}
    given = {key: convert(value, hints[key], f"--{key}") for key, value in arguments.overrides if key in hints}
    for key, _ in arguments.overrides:
        if key == "seed" or key.split(".")[0] == "optimizer":
            raise RecipeError(f"--{key}: expected --seeds and --optimizers, with settings in configs/optim_<name>.yaml")
    # Dozens of short runs: no one looks at each in wandb, but who wants to can.
    kept = [("log.wandb", "disabled"), *(pair for pair in arguments.overrides if pair[0] not in hints)]
    return Comparison(tune=tune, **given), dataclasses.replace(arguments, overrides=kept)


def setting(arguments: Arguments, names: Sequence[str], seed: int, more: Sequence[tuple[str, str]]) -> Config:
    """The config of one run folder: these optimizers, this seed."""
    overrides = [*arguments.overrides, *more, ("optimizer", names[0]), ("seed", str(seed))]
    return command.resolve(dataclasses.replace(arguments, overrides=overrides, compare=list(names[1:])))


def compare(wanted: Comparison, arguments: Arguments, folder: Path, words: Sequence[str], world: World) -> None:
    """Tune, train, summarise: all in one folder."""
    names = list(wanted.optimizers)
    tuned: list[tuple[str, str]] = []
    notes = []
    for name in wanted.optimizers if wanted.tune else ():
        lr, note = tune(wanted, arguments, name, folder, world)
        notes.append(note)
        if lr is None:
            names.remove(name)
        else:
            tuned.append((f"tuned_lr.{name}", repr(lr)))
    trained: list[Result] = []
    for seed in wanted.seeds:
        more = [*tuned, ("out", str(folder)), ("name", f"seed-{seed}")]
        config = setting(arguments, names, seed, more)
        trained += train.run_once(config, world, folder / f"seed-{seed}")
    if not world.is_main:
        return
    target = worst([result.final_loss for result in trained if result.name == BASELINE])
    rates = {spec.name: spec.arguments.get("lr") for spec in config.optimizers}
    cells = table(trained, rates, target, config.train.steps)
    device = str(runfolder.facts(folder / f"seed-{wanted.seeds[-1]}")["device"])
    holds_for = facts(config, world, target, device)
    lines = [results.align(cells), "", *notes, *holds_for]
    picture = curves.draw(
        trained,
        f"{config.task}, {len(wanted.seeds)} seeds",
        folder / "curves.png",
        (target, f"{BASELINE}'s worst final loss"),
        tasks.measured(config.task),
    )
    page = [f"`python recipes/compare.py {shlex.join(words)}`", *holds_for, results.markdown(cells, LOWER_IS_BETTER)]
    runfolder.write_text(folder / "comparison.txt", "\n".join(lines) + "\n")
    runfolder.write_text(folder / "table.md", "\n\n".join([*page, *notes]) + "\n")
    train.say("\n" + "\n".join([*lines, f"curves: {picture}", f"all of this: {folder}"]))


def tune(wanted: Comparison, arguments: Arguments, name: str, folder: Path, world: World) -> tuple[float | None, str]:
    """The lr of the grid with the lowest final loss on the first seed (None: all diverged), and a line about all.

    Raises:
        RecipeError: It is the baseline that diverged with every lr: there is no target.
    """
    losses = {}
    for lr in wanted.lrs:
        title = f"tune-{name}-{lr:g}"
        more = [(f"tuned_lr.{name}", repr(lr)), ("out", str(folder)), ("name", title)]
        (result,) = train.run_once(setting(arguments, [name], wanted.seeds[0], more), world, folder / title)
        losses[lr] = result.final_loss
    finite = {lr: loss for lr, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        line = f"{name} diverged with every lr of {', '.join(f'{lr:g}' for lr in wanted.lrs)}"
        if name == BASELINE:
            raise RecipeError(line)
        return None, line
    best = min(finite, key=lambda lr: finite[lr])
    edge = " (the grid's edge)" if best in (min(losses), max(losses)) else ""
    listed = ", ".join(f"{lr:g} -> {results.spell(loss)}" for lr, loss in losses.items())
    return best, f"tuned_lr of {name}: {best:g}{edge} of {listed}"


def worst(losses: list[float]) -> float:
    """The largest; a run that diverged makes it infinite, which every other run reaches at once."""
    return max(math.inf if math.isnan(loss) else loss for loss in losses)


def table(trained: list[Result], rates: dict[str, float | None], target: float, steps: int) -> list[list[Cell]]:
    """A head and one row per optimizer, with a number per seed where seeds differ; the best first."""
    head: list[Cell] = ["optimizer", "lr", "steps to target", "of budget", "seconds to target", "final loss"]
    head += ["ms/step", "state MB"]
    accurate = any(result.accuracy is not None for result in trained)
    rows: list[tuple[tuple[float, float], list[Cell]]] = []
    for name, lr in rates.items():
        runs = [result for result in trained if result.name == name]
        hits = [result.reached(target) for result in runs]
        median = statistics.median(hit[0] if hit else math.inf for hit in hits)
        final = statistics.median(worst([result.final_loss]) for result in runs)
        row: list[Cell] = [name, "default" if lr is None else f"{lr:g}"]
        row.append([str(hit[0]) if hit else "-" for hit in hits])
        row.append(f"{median / steps:.0%}" if math.isfinite(median) else "-")
        row.append([f"{hit[1]:.1f}" if hit else "-" for hit in hits])
        row.append([f"{loss:.3f}" if not 0 < loss < 0.1 else f"{loss:.2e}" for loss in (r.final_loss for r in runs)])
        row.append(f"{statistics.median(1e3 * result.seconds / max(result.steps, 1) for result in runs):.1f}")
        row.append(f"{runs[0].state_bytes / 1e6:.2f}")
        if accurate:
            row.append(["-" if result.accuracy is None else f"{result.accuracy:.1%}" for result in runs])
        rows.append(((median, final), row))
    if accurate:
        head.append("accuracy")
    return [head, *(row for _, row in sorted(rows, key=lambda row: row[0]))]


def facts(config: Config, world: World, target: float, device: str) -> list[str]:
    """What the numbers hold for."""
    return [
        f"target: {results.spell(target)}, the worst of {BASELINE}'s final validation losses; "
        f"of budget: the median run's part of {config.train.steps} steps",
        f"{device} ({platform.machine()}), {world.size} processes, torch {torch.__version__}, "
        f"python {platform.python_version()}, {time.strftime('%Y-%m-%d')}",
    ]


if __name__ == "__main__":
    sys.exit(main())
