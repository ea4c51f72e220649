"""Train one optimizer at many settings: a grid over any keys, or random draws.

    python recipes/sweep.py --config configs/autoencoder.yaml --optimizer.name=sirfshampoo \
        --sweep.optimizer.lr=1e-3,3e-3,1e-2 --sweep.optimizer.factor_rate=0.1,0.2 --seeds 1,2
    python recipes/sweep.py --config configs/autoencoder.yaml --random 10 --sweep.optimizer.lr=1e-4..1e-1

All settings are checked before the first is trained; one that fails then does not stop the others. The folder holds
sweep.txt (a table, the lowest final validation loss first), sweep.png, and a run folder per setting and seed.
`--resume FOLDER` goes on where a sweep was killed, tries what failed again, or adds more: values, seeds, draws.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import statistics
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import campaign
import command
import results
import runfolder
import space
import train
import world as processes
from command import Arguments
from config import Config
from convert import convert
from errors import RecipeError
from results import Cell, Result
from space import Axis, Point
from world import World

USAGE = """\
usage: python recipes/sweep.py [--config FILE]... [--section.key=value]... [the following]

  --sweep.KEY=V1,V2     values of a key of train.py (--sweep.optimizer.lr=1e-3,1e-2); several keys span a grid
  --sweep.KEY=V1;V2     the same, for values that hold commas themselves
  --sweep.KEY=LOW..HIGH a range, for --random: log-uniform; whole numbers where both ends are
  --random NUMBER       so many random points instead of the grid
  --seed 0              of these draws
  --seeds 1,2           one run of each point per seed; the config's one seed if absent
  --resume FOLDER       go on with a sweep: its command, and what is given besides; finished runs are kept
  --help                this text; `train.py --help` lists the sections and their keys
"""
FAILURE = "error.txt"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What sweep.py is asked for, beside what train.py takes."""

    axes: list[Axis]
    points: list[Point]
    seeds: tuple[int, ...]  # none: the config's one


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a point came to: a result per seed, or what went wrong."""

    point: Point
    results: list[Result]
    error: str = ""

    @property
    def loss(self) -> float:
        """The median of the final losses; infinite where a run diverged or failed."""
        losses = [math.inf if math.isnan(result.final_loss) else result.final_loss for result in self.results]
        return math.inf if self.error else statistics.median(losses)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0, 1 if points failed, 2 if it was given bad input, 130 if it was interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        train.say(USAGE)
        return 0
    folder: Path | None = None
    try:
        words, folder = campaign.recall(words)
        wanted, arguments = parse(words)
        config = [setting(arguments, point) for point in wanted.points][0]  # all are checked
        with processes.join(config.device) as world:
            folder = campaign.begin(words, folder, config, "sweep", world)
            outcomes = [run(point, wanted.seeds or (config.seed,), arguments, folder, world) for point in wanted.points]
            if world.is_main:
                summarise(wanted, outcomes, folder)
    except (RecipeError, OSError) as error:
        return train.refuse(f"error: {error}")
    except KeyboardInterrupt:
        train.say(f"interrupted; sweep.py --resume {folder} goes on", file=sys.stderr)
        return 130
    return int(any(outcome.error for outcome in outcomes))


def parse(words: Sequence[str]) -> tuple[Sweep, Arguments]:
    """Take this program's options out of the command line; the rest is train.py's.

    Raises:
        RecipeError: An option has no or a wrong value, or makes no sense here.
    """
    arguments = command.parse(words)
    if arguments.compare:
        raise RecipeError("--compare is an option of train.py; to sweep several, --sweep.optimizer.name=soap,kfac")
    hints = {"random": int, "seed": int, "seeds": tuple[int, ...]}
    own: dict[str, Any] = {"random": 0, "seed": 0, "seeds": ()}
    axes: dict[str, Axis] = {}
    kept = [("log.wandb", "disabled")]  # dozens of short runs: no one looks at each, but who wants to can
    for key, value in arguments.overrides:
        if key.startswith("sweep."):
            swept = key.removeprefix("sweep.")
            axes[swept] = space.axis(swept, value)
        elif key in hints:
            own[key] = convert(value, hints[key], f"--{key}")
        elif key == "sweep":
            raise RecipeError("--sweep: the key belongs to the option, as in --sweep.optimizer.lr=1e-3,1e-2")
        else:
            kept.append((key, value))
    if own["random"] < 0:
        raise RecipeError(f"--random must be >= 1, got {own['random']}")
    if "seed" in axes:
        raise RecipeError("--sweep.seed: seeds are repetitions, not settings; give --seeds 1,2")
    both = sorted(set(axes) & {key for key, _ in kept})
    if both:
        raise RecipeError(f"--{both[0]} is given, and swept as well")
    points = space.points(list(axes.values()), own["random"], own["seed"])
    arguments = dataclasses.replace(arguments, overrides=kept, compare=[])
    return Sweep(list(axes.values()), points, own["seeds"]), arguments


def setting(arguments: Arguments, point: Point, *more: tuple[str, str]) -> Config:
    """The config of a point."""
    return command.resolve(dataclasses.replace(arguments, overrides=[*arguments.overrides, *point.items(), *more]))


def name(point: Point, seed: int) -> str:
    """The folder of a run: readable, and different for different settings."""
    words = space.short(list(point))
    text = ",".join(f"{words[key]}={value}" for key, value in point.items()) + f",seed={seed}"
    plain = re.sub(r"[^\w.,=+-]", "_", text)
    if plain != text or len(plain) > 120:
        plain = f"{plain[:120]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return plain


def run(point: Point, seeds: Sequence[int], arguments: Arguments, folder: Path, world: World) -> Outcome:
    """Train a point with all seeds, as far as that is not done."""
    found: list[Result] = []
    for seed in seeds:
        here = folder / name(point, seed)
        try:
            more = [("seed", str(seed)), ("out", str(folder)), ("name", here.name)]
            found += train.run_once(setting(arguments, point, *more), world, here)
            (here / FAILURE).unlink(missing_ok=True)
        except Exception as error:  # whatever a setting does, the others have their turn
            if world.size > 1:
                raise  # the other processes may wait for this one
            line = f"{type(error).__name__}: {' '.join(str(error).split())}"
            train.say(f"{here.name}: {line}", file=sys.stderr)
            here.mkdir(exist_ok=True)
            (here / FAILURE).write_text(traceback.format_exc(), encoding="utf-8")
            return Outcome(point, found, line)
    return Outcome(point, found)


def summarise(wanted: Sweep, outcomes: list[Outcome], folder: Path) -> None:
    """The table, what the best point says, and the picture."""
    ranked = sorted(outcomes, key=lambda outcome: outcome.loss)
    lines = [results.align(table(wanted, ranked)), "", *advice(wanted, ranked)]
    runfolder.write_text(folder / "sweep.txt", "\n".join(lines) + "\n")
    picture = draw(wanted.axes, ranked, folder / "sweep.png")
    train.say("\n" + "\n".join([*lines, f"picture: {picture}", f"all of this: {folder}"]))
    train.say(f"all curves on one page: python recipes/report.py {folder}")


def table(wanted: Sweep, ranked: list[Outcome]) -> list[list[Cell]]:
    """A head and a row per point; values at an edge are marked in the first."""
    words = space.short([axis.key for axis in wanted.axes])
    rows: list[list[Cell]] = [[*words.values(), "final loss", "best loss", "steps", "ms/step"]]
    for rank, outcome in enumerate(ranked):
        row: list[Cell] = []
        for axis in wanted.axes:
            value = outcome.point[axis.key]
            row.append(f"{value}*" if rank == 0 and math.isfinite(outcome.loss) and axis.at_edge(value) else value)
        row.append(outcome.error[:60] or [results.spell(result.final_loss) for result in outcome.results])
        row.append([results.spell(result.best_loss) for result in outcome.results] or "-")
        row.append([str(result.steps) for result in outcome.results] or "-")
        speeds = [1e3 * result.seconds / max(result.steps, 1) for result in outcome.results]
        row.append(f"{statistics.median(speeds):.1f}" if speeds else "-")
        rows.append(row)
    return rows


def advice(wanted: Sweep, ranked: list[Outcome]) -> list[str]:
    """The best setting as options of train.py, and where to look further."""
    best = ranked[0]
    if not math.isfinite(best.loss):
        return ["no point ended with a finite loss"]
    options = " ".join(f"--{key}={value}" for key, value in best.point.items())
    lines = [f"best: {options} (median final loss {results.spell(best.loss)}, {len(best.results)} seeds)"]
    edges = [axis.key for axis in wanted.axes if axis.at_edge(best.point[axis.key])]
    if edges:
        lines.append(f"* {', '.join(edges)}: the best value lies at the edge of what was tried; look beyond")
    return lines


def draw(axes: list[Axis], ranked: list[Outcome], path: Path) -> str:
    """One panel per key: the final loss of every run over the key's value, a line through the best of each value."""
    try:
        import matplotlib
    except ImportError:
        return "none: matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [outcome for outcome in ranked if math.isfinite(outcome.loss)]
    if not good:
        return "none: no point ended with a finite loss"
    columns = min(len(axes), 3)
    lines = math.ceil(len(axes) / columns)
    size = (4.6 * columns + 0.6, 3.6 * lines + 0.4)
    figure, panels = pyplot.subplots(lines, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, panel in zip(axes, panels.flat, strict=False):
        values = list(dict.fromkeys(outcome.point[axis.key] for outcome in good))
        numbers = {value: number for value in values if (number := space.number(value)) is not None}
        numeric = len(numbers) == len(values)
        places = numbers if numeric else {value: float(place) for place, value in enumerate(sorted(values))}
        for outcome in good:
            x = places[outcome.point[axis.key]]
            finals = [result.final_loss for result in outcome.results]
            panel.plot([x] * len(finals), finals, "o", color="#1f77d0", alpha=0.35, markersize=5, markeredgewidth=0)
        best = {value: min(o.loss for o in good if o.point[axis.key] == value) for value in values}
        if axis.ends is None:  # in a range every draw is its own value
            ordered = sorted(values, key=lambda value: places[value])
            envelope = [best[value] for value in ordered]
            panel.plot([places[value] for value in ordered], envelope, "-", color="#1f77d0", label="best at each value")
        panel.plot([places[good[0].point[axis.key]]], [good[0].loss], "*", color="#d62728", markersize=13, label="best")
        if numeric:
            if min(places.values()) > 0 and max(places.values()) >= 10 * min(places.values()):
                panel.set_xscale("log")
        else:
            panel.set_xticks(list(places.values()), list(places), rotation=20 if len(values) > 4 else 0)
        panel.set_xlabel(axis.key)
        panel.grid(alpha=0.25, linewidth=0.6)
    for panel in panels.flat[len(axes) :]:
        panel.set_visible(False)
    losses = [result.final_loss for outcome in good for result in outcome.results]
    if min(losses) > 0 and max(losses) >= 10 * min(losses):
        panels[0][0].set_yscale("log")
    for row in panels:
        row[0].set_ylabel("final validation loss")
    panels.flat[0].legend(loc="best", fontsize=8)
    with runfolder.replacing(path, "the picture") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    pyplot.close(figure)
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
