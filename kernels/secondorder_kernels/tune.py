"""`python -m secondorder_kernels.tune`: find out on this GPU which Triton kernels pay, and with which tiles.

    python -m secondorder_kernels.tune [--operations NAME ...] [--sizes quick|all] [--budget SECONDS] [--out FOLDER]
                                       [--workers N]
    TRITON_INTERPRET=1 python -m secondorder_kernels.tune --smoke [--out FOLDER]

Every candidate's results are compared with float64 before it is timed, on memory that holds NaN where results are to
go; one that is wrong is reported and never timed, and the exit code is 1. The others take turns with the operation's
other paths, which a call takes where it does not take the kernel: medians of device time with a cold cache, in two
rounds. What is found goes into this GPU's table in the user's cache (`tables.py` says where; `--out` names another
folder), after every case, so that a run may be stopped. A kernel that is not faster than the best other path by
`LEAST_GAIN` is written down as not worth it. (Torch's compiler and other libraries are not asked here, since no call
would go on with them: `recipes/benchmark_kernels.py` has them beside ours.)

Most of a first run is compiling; `--workers` has that done on several processes before anything is timed.

Nothing in the package calls this; without it, and without a table for the GPU among the package's own, all operations
go on with torch. On several processes copy the table to all machines: other tiles round otherwise.

`--smoke` checks the candidates on tiny shapes in Triton's interpreter, on a CPU. It times nothing; a table is written
only to a folder named by `--out`, and nothing in it is trusted. In the interpreter bfloat16 is wrong, so it has none.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from secondorder_kernels import policy, tables
from secondorder_kernels.tables import Config
from secondorder_kernels.tuning import measure, table
from secondorder_kernels.tuning.ahead import compile_ahead
from secondorder_kernels.tuning.case import Case, Verifier, other_paths, triton_path
from secondorder_kernels.tuning.cases import SIZES, cases

LEAST_GAIN = 1.05  # what a kernel must save for its table entry to say that it pays
_NOISY = 0.1  # a difference between two rounds that is worth a word

Clock = Callable[[measure.Calls], Mapping[str, measure.Timing]]
Run = Callable[..., Any]


@dataclass
class Finding:
    """What came of a case.

    Attributes:
        entry: For the table; None where the kernel cannot take the case.
        wrong: Candidates that gave wrong results, and how they are wrong.
        absent: Candidates and other paths that do not run here or are wrong, and why.
        times: Of all that was timed, by name.
        summary: In a line.
    """

    entry: table.Entry | None = None
    wrong: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    times: Mapping[str, measure.Timing] = field(default_factory=dict)
    summary: str = ""


def tune(case: Case, device: torch.device, clock: Clock | None) -> Finding:
    """Check, time and judge all candidates of a case.

    Args:
        case: The case.
        device: Where to run it.
        clock: Times calls by name; None: nothing is timed, and the entry says nothing about gains.
    """
    path = triton_path(case.operation)
    if path is None:
        return Finding(summary="there is no Triton kernel")
    with case.setting():
        call = case.call(device)
        refusal = call.of(path.refuses)
        if refusal is not None:
            return Finding(summary=f"the kernel does not take it: {refusal}")
        kind, sizes = call.of(path.shape)
        found, verifier = Finding(), Verifier(case, device)
        found.entry = {"op": case.operation, "kind": kind, "sizes": list(sizes), "config": None}
        configs = {words(config): dict(config) for config in case.candidates}
        launches = {name: functools.partial(path.launch, config=config) for name, config in configs.items()}
        right, found.wrong, found.absent = _sorted(verifier, launches, baseline=False)
        others, wrong, absent = _sorted(verifier, other_paths(case, call), baseline=True)
        found.absent.update({**wrong, **absent})
        if clock is None:
            # Never measured: a config without a ratio is not taken in mode "auto".
            found.entry.update(config=configs[next(iter(right))] if right else None, ratio=None)
            found.summary = f"{len(right)} of {len(launches)} candidates are right, {len(others)} other paths"
        else:
            calls = {name: functools.partial(call.of, run) for name, run in {**others, **right}.items()}
            found.times = clock(calls)
            best = _best_still_right(verifier, right, found)
            _judge(found, configs, best, min(others, key=lambda name: found.times[name].us, default=None))
    return found


def _sorted(
    verifier: Verifier, runs: Mapping[str, Run], baseline: bool
) -> tuple[dict[str, Run], dict[str, str], dict[str, str]]:
    """Who gives right results, who wrong ones and how, and who does not run at all and why."""
    right: dict[str, Run] = {}
    wrong: dict[str, str] = {}
    absent: dict[str, str] = {}
    for name, run in runs.items():
        try:
            error = verifier.error(run, baseline)
        except Exception as error:  # too much shared memory, an API that this torch does not have …
            if verifier.device.type == "cuda":
                torch.cuda.synchronize()  # raises if the GPU is of no more use to this process: then nothing goes on
            absent[name] = textwrap.shorten(f"{type(error).__name__}: {error}", 120)
            continue
        if error is None:
            right[name] = run
        else:
            wrong[name] = error
    return right, wrong, absent


def _best_still_right(verifier: Verifier, right: Mapping[str, Run], found: Finding) -> str | None:
    """The fastest candidate whose results are right once more, after all those calls."""
    for name in sorted(right, key=lambda name: found.times[name].us):
        error = verifier.error(right[name])
        if error is None:
            return name
        found.wrong[name] = f"in a later call {error}"
    return None


def _judge(found: Finding, configs: Mapping[str, dict[str, Any]], ours: str | None, theirs: str | None) -> None:
    """Complete the entry and say what came out."""
    assert found.entry is not None
    if ours is None or theirs is None:
        found.entry["ratio"] = 0.0  # so it was measured, and is not to be used
        found.summary = "no candidate is right" if ours is None else "no other path runs, so nothing can be said"
        return
    us, best_us = found.times[ours].us, found.times[theirs].us
    ratio = best_us / us
    pays = ratio >= LEAST_GAIN
    found.entry.update(us=round(us, 2), best_us=round(best_us, 2), best=theirs, ratio=round(ratio, 3))
    found.entry["config"] = configs[ours] if pays else None
    found.summary = f"{us:.1f} us with {ours}, {best_us:.1f} us {theirs}, ratio {ratio:.2f}"
    found.summary += "" if pays else ": not worth it"


def words(config: Config) -> str:
    """A configuration in a few words."""
    return " ".join(f"{name}={value}" for name, value in config.items())


def _least(entry: table.Entry, written: dict[Any, table.Entry]) -> table.Entry:
    """The entry with the least gain of those that a table does not tell apart: options are not looked up."""
    key = table.key(entry)
    known = written.get(key)
    if known is not None and known["ratio"] is not None and known["ratio"] < entry["ratio"]:
        return known
    written[key] = entry
    return entry


class OneLine(argparse.ArgumentParser):
    """Its users' mistakes are told in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> OneLine:
    parser = OneLine(
        prog="python -m secondorder_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = sorted({case.operation for case in cases("tiny")})
    parser.add_argument("--operations", nargs="+", choices=known, default=known, metavar="NAME", help=", ".join(known))
    parser.add_argument("--sizes", choices=SIZES, default="quick", help="how many shapes; default: quick")
    parser.add_argument("--budget", type=float, default=900.0, metavar="SECONDS", help="start no case after; 900")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the table, instead of the user's cache")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that compile ahead; default: 1")
    parser.add_argument("--smoke", action="store_true", help="check tiny shapes on a CPU, time nothing")
    return parser


def _check(parser: OneLine, given: argparse.Namespace) -> None:
    if not given.budget > 0:
        parser.error(f"--budget must be above 0, got {given.budget:g}")
    if given.workers < 1:
        parser.error(f"--workers must be at least 1, got {given.workers}")
    if given.smoke and given.workers > 1:
        parser.error("--workers compiles for a GPU, --smoke compiles nothing")
    if not policy.installed():
        parser.error("triton is not installed")
    if given.smoke and not policy.interpreting():
        parser.error("--smoke runs in Triton's interpreter: set TRITON_INTERPRET=1")
    if not given.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU; --smoke checks the kernels without one")
    if not given.smoke and policy.interpreting():
        parser.error("TRITON_INTERPRET is set: what the interpreter takes says nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, print and write.

    Returns:
        The exit code: 1 if a candidate gave wrong results.
    """
    parser = _parser()
    given = parser.parse_args(argv)
    _check(parser, given)
    device = torch.device("cpu") if given.smoke else torch.device("cuda", torch.cuda.current_device())
    folder = given.out or (None if given.smoke else tables.user_folder())
    if not given.smoke:
        # Other paths are made of operations too, and take their kernels by what was found so far.
        os.environ["SECONDORDER_KERNELS_CONFIG_DIR"] = str(folder)
    sizes = "tiny" if given.smoke else given.sizes
    chosen = [case for case in cases(sizes) if case.operation in given.operations]
    written: dict[Any, table.Entry] = {}
    if folder is not None:
        try:
            table.merge(folder, device, [])  # what is in the way is told before anything is measured
        except (OSError, ValueError) as failure:
            parser.error(f"no table can be written to {folder}: {failure}")
    start, wrong, path = time.monotonic(), 0, None
    if given.workers > 1:
        numbers = [number for number, case in enumerate(cases(sizes)) if case.operation in given.operations]
        done = compile_ahead(sizes, numbers, given.workers, given.budget / 2)
        print(f"compiled {done} of {len(chosen)} cases ahead in {time.monotonic() - start:.0f} s", flush=True)
    for number, case in enumerate(chosen):
        if time.monotonic() - start > given.budget:
            print(f"the budget is spent, {len(chosen) - number} of {len(chosen)} cases are left out")
            break
        found = tune(case, device, None if given.smoke else measure.in_turn)
        print(f"{case.operation} {case.label}: {found.summary}", flush=True)
        for name, reason in found.wrong.items():
            print(f"  WRONG: {name}: {reason}")
        for name, reason in found.absent.items():
            print(f"  left out: {name}: {reason}")
        for name, timing in found.times.items():
            if timing.spread > _NOISY:
                print(f"  unsteady: {name}: the rounds differ by {timing.spread:.0%}")
        wrong += len(found.wrong)
        if folder is not None and found.entry is not None:
            path = table.merge(folder, device, [_least(found.entry, written)])
    if path is not None:
        print(f"written: {path}")
    if wrong:
        print(f"{wrong} candidates gave wrong results")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
