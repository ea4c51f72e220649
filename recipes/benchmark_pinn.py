"""How fast optimizers that know all residuals solve differential equations, with the usual ones beside them.

    python recipes/benchmark_pinn.py [--only CASE ...] [--methods NAME ...] [--seeds S ...] [--out PICTURE]

Steps until the relative L2 error (RMSE / RMS of the solution, at points that are never trained on) is below thresholds:
the median over seeds, then each seed's. "-": not reached in the steps or seconds that the run had. A method has one
setting for all problems, printed at the end; gates are upper bounds for medians, and missed ones are said.

Methods with a gate take a fixed number of steps, so that their columns repeat on one machine; the others get, for the
first two seeds, the CPU seconds that the first of them took (the median), with lr on a cosine to 0 over that time, and
every one `--budget` seconds if that is given. CPU seconds are those of the process in optimizer steps, float64, one
thread; points and evaluation are not counted. "rises": steps that raised the loss, on fixed points, of all seeds
together.

`--smoke` has everything in toy size.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import closures
import palette
import pinn
import results
from optimizer import secondorder
from pinn.points import Sampling, evaluation
from runfolder import replacing

THRESHOLDS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
DEEP = (64, 64, 48, 48)
BESIDE = 2  # so many of the seeds are enough for methods without a gate


@dataclass(frozen=True)
class Case:
    """A problem with its network, points and gates.

    Attributes:
        problem: Of `pinn.PROBLEMS`.
        widths: Hidden layers.
        interior: Points inside of the domain.
        boundary: Points for conditions.
        fresh: New points at every step.
        steps: Of methods with a gate; the first of them sets the time for those without.
        gates: For each of these, from a threshold to the most steps that it may take.
    """

    problem: str
    widths: tuple[int, ...]
    interior: int
    boundary: int
    fresh: bool
    steps: dict[str, int]
    gates: dict[str, dict[float, int]] = field(default_factory=dict)
    points: int = 9000

    @property
    def shallow(self) -> bool:
        """One hidden layer."""
        return len(self.widths) == 1


CASES = {
    "poisson2d": Case("poisson2d", (64,), 900, 120, False, {"ENGDW": 120}, {"ENGDW": {1e-4: 35, 1e-6: 80}}),
    "heat1d": Case("heat1d", (64,), 900, 120, False, {"ENGDW": 200}, {"ENGDW": {1e-3: 45, 1e-5: 190}}),
    "poisson2d_fresh": Case(
        "poisson2d", DEEP, 150, 50, True, {"SPRING": 250, "ENGDW": 250}, {"SPRING": {1e-4: 160, 1e-5: 230}}
    ),
    "poisson5d_fresh": Case(
        "poisson5d", DEEP, 500, 100, True, {"ENGDW": 70}, {"ENGDW": {1e-2: 20, 1e-3: 60}}, points=5000
    ),
    "transport": Case("transport", (16, 16), 600, 200, False, {"ENGDW": 60}, points=1000),
    "burgers_fresh": Case("burgers", (20, 20, 20, 20), 1000, 200, True, {"ENGDW": 150}, points=2000),
    "poisson2d_deep": Case("poisson2d", DEEP, 900, 120, False, {"ResidualKFAC": 150}, {"ResidualKFAC": {1e-2: 140}}),
}


@dataclass(frozen=True)
class Method:
    """An optimizer with its setting.

    Attributes:
        make: Of a model; of a shallow network or a deeper one.
        setting: In words.
        descends: It looks at the loss, and should never raise it on fixed points.
        decays: Its lr falls to 0 over the run.
        every: Steps between looks at the error.
    """

    make: Callable[[nn.Module, bool], Any]
    setting: str
    descends: bool = False
    decays: bool = False
    every: int = 1


def methods() -> dict[str, Method]:
    """Those that are there, by name."""
    found = {
        "ENGDW": Method(lambda model, _: secondorder.ENGDW(model.parameters()), "defaults", descends=True),
        "SPRING": Method(lambda model, _: secondorder.SPRING(model.parameters()), "defaults"),
        "SOAP": Method(
            lambda model, shallow: secondorder.SOAP(
                model.parameters(), lr=3e-2 if shallow else 1e-2, weight_decay=0.0, refresh_every=2
            ),
            "lr 3e-2 shallow, 1e-2 deep, cosine; refresh_every 2, no weight decay",
            decays=True,
            every=10,
        ),
        "Adam": Method(
            lambda model, shallow: torch.optim.Adam(model.parameters(), lr=3e-2 if shallow else 3e-3),
            "lr 3e-2 shallow, 3e-3 deep, cosine",
            decays=True,
            every=10,
        ),
        "LBFGS": Method(
            lambda model, _: torch.optim.LBFGS(
                model.parameters(),
                history_size=100,
                line_search_fn="strong_wolfe",
                tolerance_grad=0.0,
                tolerance_change=0.0,
            ),
            "history 100, strong Wolfe; a step is up to 20 iterations on its points",
        ),
    }
    if hasattr(secondorder, "ResidualKFAC"):
        found["ResidualKFAC"] = Method(
            lambda model, _: secondorder.ResidualKFAC(model.parameters(), module=model), "defaults", descends=True
        )
    return found


@dataclass
class Run:
    """What one run came to: after every evaluation the steps, CPU seconds and error."""

    curve: list[tuple[int, float, float]] = field(default_factory=list)
    seconds: float = 0.0
    rises: int = 0

    def reached(self, threshold: float) -> int | None:
        """Steps until the error was below."""
        return next((step for step, _, error in self.curve if error <= threshold), None)

    @property
    def best(self) -> float:
        """The least error."""
        return min((error for _, _, error in self.curve if math.isfinite(error)), default=math.nan)


def solve(case: Case, method: Method, seed: int, steps: int, seconds: float) -> Run:
    """Train a network.

    Args:
        case: The problem.
        method: The optimizer.
        seed: Of the network and the points.
        steps: To take; 0: until the time is over.
        seconds: Of CPU time, where there is no number of steps.
    """
    problem = pinn.load(case.problem)
    sampling = Sampling(problem, case.widths, case.interior, case.boundary, seed, case.fresh)
    torch.manual_seed(seed)
    model = problem.network(case.widths)
    x, u = evaluation(problem, case.points, seed)
    opt = method.make(model, case.shallow)
    rates = [group["lr"] for group in opt.param_groups]
    run, step, before = Run(), 0, math.inf
    while True:
        done = step / steps if steps else run.seconds / seconds
        if step % method.every == 0 or done >= 1:
            with torch.no_grad():
                error = float(((model(x) - u).square().mean() / u.square().mean()).sqrt())
            run.curve.append((step, run.seconds, error))
            if done >= 1 or not math.isfinite(error):
                return run
        if method.decays:
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
        residuals = partial(problem.residuals, model, sampling.at(step), secondorder.taylor)
        begun = time.process_time()
        loss = float(closures.step(opt, residuals)[0])
        run.seconds += time.process_time() - begun
        run.rises += not case.fresh and loss > before
        before, step = loss, step + 1


def row(name: str, case: Case, method: str, runs: Sequence[Run], descends: bool) -> list[str]:
    """A line of the table."""
    cells = [name, method]
    for threshold in THRESHOLDS:
        hits = [run.reached(threshold) for run in runs]
        found = "-" if all(hit is None for hit in hits) else f"{_number(_median(hits))} ({_list(hits)})"
        if bound := case.gates.get(method, {}).get(threshold):
            verdict = f"gate {bound} {'met' if _median(hits) <= bound else 'MISSED'}"
            found = f"{found}, {verdict}"
        cells.append(found)
    best, seconds = (statistics.median(getattr(run, key) for run in runs) for key in ("best", "seconds"))
    steps = statistics.median(run.curve[-1][0] for run in runs)
    rises = str(sum(run.rises for run in runs)) if descends and not case.fresh else ""
    return [*cells, f"{best:.1e}", f"{steps:g}", f"{seconds:.1f}", rises]


HEAD = [
    "problem",
    "method",
    *(f"{threshold:.0e}" for threshold in THRESHOLDS),
    "least error",
    "steps",
    "CPU s",
    "rises",
]


def _median(hits: Sequence[int | None]) -> float:
    return statistics.median(math.inf if hit is None else hit for hit in hits)


def _list(hits: Sequence[int | None]) -> str:
    return ", ".join("-" if hit is None else str(hit) for hit in hits)


def _number(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "-"


def draw(found: dict[str, dict[str, list[Run]]], path: Path) -> None:
    """Errors over steps and over CPU seconds; every seed a thin line, the one of median least error a thick one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(found), figsize=(1.2 + 3.3 * len(found), 6.6), layout="constrained", sharey="col", squeeze=False
    )
    for column, (name, by_method) in enumerate(found.items()):
        for method, runs in by_method.items():
            color = palette.color(method.lower() if hasattr(secondorder, method) else f"torch.{method.lower()}")
            for axis, place in zip(axes[:, column], (0, 1), strict=True):
                for run in runs:
                    points = [(point[place], point[2]) for point in run.curve if point[place] > 0]
                    axis.plot(*zip(*points, strict=True), color=color, linewidth=0.6, alpha=0.35)
                middle = sorted(runs, key=lambda run: run.best)[(len(runs) - 1) // 2]
                points = [(point[place], point[2]) for point in middle.curve if point[place] > 0]
                axis.plot(*zip(*points, strict=True), color=color, linewidth=1.8, label=method)
        for axis, label in zip(axes[:, column], ("steps", "CPU seconds in steps"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.grid(alpha=0.25, linewidth=0.6)
        axes[0, column].set_title(name, fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("relative L2 error")
    handles: dict[str, Any] = {}
    for axis in axes.flat:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    with replacing(path, "the picture") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def toy(case: Case) -> Case:
    """Small enough for a look at every part."""
    return replace(
        case,
        widths=tuple(6 for _ in case.widths),
        interior=12,
        boundary=6,
        points=40,
        steps=dict.fromkeys(case.steps, 3),
        gates={},
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=", ".join(methods()))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4], metavar="S")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of CPU time, for every run")
    parser.add_argument("--out", type=Path, metavar="PICTURE", help="a PNG with all curves")
    parser.add_argument("--smoke", action="store_true", help="toy problems, a few steps")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    known = methods()
    names = args.methods or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--methods: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if not args.budget and not any(name in case.steps for case in CASES.values() for name in names):
        parser.error("--methods: of none of these the number of steps is fixed; give --budget")
    found: dict[str, dict[str, list[Run]]] = {}
    rows = [HEAD]
    print(f"float64, torch {torch.__version__}, 1 thread; seeds {', '.join(map(str, args.seeds))}\n")
    for name in args.only:
        case = toy(CASES[name]) if args.smoke else CASES[name]
        for method, runs in compare(case, {key: known[key] for key in names}, args.seeds, args.budget):
            found.setdefault(name, {})[method] = runs
            rows.append(row(name, case, method, runs, known[method].descends))
            print("  ".join(cell for cell in rows[-1] if cell), flush=True)
        if name not in found:
            print(f"{name}: left out, for want of {' and '.join(case.steps)}")
    print(f"\n{results.markdown(rows)}\n")
    for name in names:
        print(f"- {name}: {known[name].setting}")
    if args.out:
        draw(found, args.out)
        print(f"picture: {args.out}")


def compare(
    case: Case, chosen: dict[str, Method], seeds: Sequence[int], budget: float | None
) -> Iterator[tuple[str, list[Run]]]:
    """The runs of each method: those with a fixed number of steps come first, and set the time of the usual ones."""
    usual = [name for name in chosen if not any(name in other.steps for other in CASES.values())]
    seconds = budget
    for name in [*(name for name in case.steps if name in chosen), *usual]:
        steps = case.steps.get(name, 0) if budget is None else 0
        if not steps and seconds is None:
            return  # nothing that sets the time
        some = seeds[:BESIDE] if name in usual else seeds
        runs = [solve(case, chosen[name], seed, steps, seconds or 0.0) for seed in some]
        seconds = statistics.median(run.seconds for run in runs) if seconds is None else seconds
        yield name, runs


if __name__ == "__main__":
    main()
