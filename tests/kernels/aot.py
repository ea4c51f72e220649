"""Compile every kernel for GPUs that are not there, as the tables of their families configure it, and judge the result.

    python tests/kernels/aot.py --targets sm90 --compare tests/kernels/aot_report.json
    python tests/kernels/aot.py --write tests/kernels/aot_report.json

Every case of `aot_cases.py` calls an operation with meta tensors, once for each entry of the target's family table that
it can select. The exit code is 1 if a kernel does not compile, spills registers, takes more shared memory than there
is, lacks the matrix instruction or the wide loads that it should have; if it got worse than in the report; or if an
entry of a table is selected by no case. Compiled kernels stay in Triton's cache. Neither a GPU nor a toolkit is needed.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import sys
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported: what is interpreted is not compiled
sys.path.insert(0, str(Path(__file__).parents[2] / "kernels"))

import aot_findings  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from aot_cases import CASES  # noqa: E402
from aot_compile import TARGETS, WANTED, assembled, compiling, standing_in  # noqa: E402

from secondorder_kernels import dispatch, policy, tables  # noqa: E402


@contextlib.contextmanager
def selecting(target):
    """Send every call to its kernel, as the target's family table configures it: yields a list of configurations."""
    selected = []

    def config(operation, kind, sizes, device):
        selected.append((operation, tables.family_config(operation, kind, sizes, target)))
        return selected[-1][1]

    with (
        mock.patch.object(tables, "config", config),
        mock.patch.object(policy, "refuses", lambda *args, **kwargs: None),  # it refuses meta tensors
        dispatch.use_kernels("triton"),
    ):
        yield selected


def planned(target):
    """Which cases to call with which sizes so that every entry is compiled once, and what cannot be compiled so."""
    entries = tables._read(tables._SHIPPED / f"{target}.json")
    sizes = {}
    for (operation, _), rows in entries.items():
        sizes.setdefault(operation, set()).update(row.sizes for row in rows)
    plan, reached, findings = [], [], []
    for number, case in enumerate(CASES):
        if case.precision == "high" and TARGETS[target][0].backend == "hip":
            continue  # AMD's compiler has no "tf32x3": the same as "highest"
        seen = []
        for size in sorted(sizes.get(case.operation, ())):
            with standing_in(target, lambda *args, **kwargs: None), selecting(target) as selected:
                try:
                    case.run(size)
                except Exception as error:
                    findings.append(f"{target} {case.name(size)}: {_line(error)}")
                    continue
            if selected not in seen:
                seen.append(selected)
                plan.append((target, number, size))
        reached += sum(seen, [])
    for operation in dispatch.operations().values():
        if operation.triton is not None and not any(name == operation.name for name, _ in reached):
            findings.append(f"{target} {operation.name}: no case calls its kernel with an entry of {target}.json")
    for (operation, kind), rows in entries.items():
        findings += [
            f"{target} {operation}: no case selects {target}.json's entry for {kind} {row.sizes}"
            for row in rows
            if row.config is not None and (operation, row.config) not in reached
        ]
    return plan, findings


def compiled(target, number, size):
    """Compile one case: its name, the numbers of its kernels, findings."""
    case = CASES[number]
    name = case.name(size)
    try:
        with selecting(target), compiling(target) as kernels:
            case.run(size)
    except Exception as error:
        return name, [], [f"{target} {name}: {_line(error)}"]
    rows = [dataclasses.asdict(assembled(kernel, target)) for kernel in kernels]
    found = [
        f"{target} {name}: {row['kernel']} {what}"
        for row in rows
        for what in aot_findings.judged(row, TARGETS[target][1], WANTED[target], wide=case.wide, spill=case.spill)
    ]
    return name, rows, found


def _line(error):
    while error.__cause__ is not None:  # the compiler shows the place, and its cause what is wrong there
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:200]}"


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="some of %(default)s")
    parser.add_argument("--only", default="", help="only cases with this in their name")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--compare", type=Path, metavar="REPORT", help="fail where this report was better")
    parser.add_argument("--write", type=Path, metavar="REPORT", help="replace the targets' part of this report")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    if not set(targets) <= set(TARGETS):
        parser.error(f"targets are {', '.join(TARGETS)}, got {options.targets}")
    torch.set_num_threads(1)
    plan, findings = [], []
    for target in targets:
        tasks, errors = planned(target)
        plan += [task for task in tasks if options.only in CASES[task[1]].name(task[2])]
        findings += [error for error in errors if options.only in error]
    if not plan:
        parser.error(f"no case has {options.only!r} in its name")
    report = {target: {"triton": triton.__version__, "cases": {}} for target in targets}
    print(f"{len(plan)} cases, triton {triton.__version__}")
    print(f"{'regs':>5} {'spill':>6} {'smem':>7} {'mma':>8} {'loads':>8} {'stores':>8}  kernel and case")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        for (target, *_), (name, rows, found) in zip(plan, pool.map(compiled, *zip(*plan, strict=True)), strict=True):
            findings += found
            report[target]["cases"][name] = rows
            for row in rows:
                wide = [f"{a}/{b}" for a, b in (row["loads"], row["stores"])]
                numbers = f"{row['regs']:5} {row['spill']:6} {row['smem']:7} {row['mma']:>8} {wide[0]:>8} {wide[1]:>8}"
                print(f"{numbers}  {row['kernel']}, {target} {name}", flush=True)
    if options.compare:
        findings += aot_findings.against(report, aot_findings.read(options.compare), complete=not options.only)
    if options.write:
        kept = aot_findings.read(options.write) if options.write.exists() else {}
        aot_findings.write(options.write, {**kept, **report})
    print(f"{len(findings)} findings")
    for finding in findings:
        print(f"  {finding}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
