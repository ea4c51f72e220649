"""What the kernels take on a GPU beside the best that torch can do, and what the machine could do at best.

    python recipes/benchmark_kernels.py [--only NAME ...] [--sizes quick|all] [--budget SECONDS] [--out FILE.json]
    python recipes/benchmark_kernels.py --steps [--budget SECONDS] [--out FILE.json]
    python recipes/benchmark_kernels.py --launches
    TRITON_INTERPRET=1 python recipes/benchmark_kernels.py [--steps] --smoke
    compute-sanitizer --tool memcheck python recipes/benchmark_kernels.py --once [--only NAME ...]
    compute-sanitizer --tool racecheck python recipes/benchmark_kernels.py --once [--only NAME ...]

First the ceilings of this GPU: bytes of a copy and operations of large products. Then the cases of
`secondorder_kernels.tuning`, each checked against float64 before it is timed, ours and the others in turn in one
process. Configurations are those of the tables, tuned or not; `python -m secondorder_kernels.tune` comes first.

    ours           median of device time, cache cold, better of two rounds
    of the roof    least time by the ceilings (operations, or bytes that must be moved) over ours; and which of them
    against        their time over ours, for each of the others
    graph, host    time per call replayed in a CUDA graph, with a warm cache; and what the host needs for a call
    auto           the path that a user's call takes, by the tables

`--steps`: whole steps and training steps (`benchmark_whole_steps.py`). `--launches`: operations that a step launches,
counted without a GPU (`benchmark_launches.py`). `--smoke`: all three at toy size in Triton's interpreter; no time is
printed. `--once`: every kernel once at toy size on a GPU, for a sanitizer.

Emerging-Optimizers' product takes part where it is installed. It keeps bfloat16 averages, half the bytes of ours.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import benchmark_launches
import benchmark_whole_steps
from benchmark_step import table
from secondorder_kernels import policy
from secondorder_kernels.dispatch import operations
from secondorder_kernels.tuning import measure
from secondorder_kernels.tuning.case import Call, Case, Verifier, alternatives, triton_path
from secondorder_kernels.tuning.cases import SIZES, cases
from secondorder_kernels.tuning.products import RATE
from secondorder_kernels.tuning.table import provenance

Row = dict[str, Any]
HEADER = ["operation", "case", "ours, µs", "of the roof", "bound by", "against", "graph, µs", "host, µs", "auto"]
NOT_TIMED = "–"
OURS = "ours"


class OneLine(argparse.ArgumentParser):
    """A user's mistake is told in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def emerging_optimizers(case: Case, call: Call) -> tuple[Callable[..., Any], Callable[[], Any]] | None:
    """Its average of Gram matrices: once as our operation, to be checked, and once as it is called."""
    if case.operation != "ema_syrk_" or call.args[1].dtype != torch.bfloat16 or call.kwargs:
        return None
    try:
        module = importlib.import_module("emerging_optimizers.triton_kernels.batched_syrk")
    except ImportError:
        return None

    def product(C: torch.Tensor, X: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return module.batched_tsyrk_ex(X, C, alpha=RATE, beta=1 - RATE, out=out)

    def as_ours(C: torch.Tensor, X: torch.Tensor, rate: torch.Tensor) -> None:
        half = C.bfloat16()
        product(half, X, torch.empty_like(half))  # tuned, in place, in its first call
        C.copy_(product(C.bfloat16(), X, torch.empty_like(half)))

    C, X, _ = call.args
    half = C.bfloat16()
    return as_ours, functools.partial(product, half, X, torch.empty_like(half))


def measured(case: Case, device: torch.device, ceilings: Mapping[str, float] | None) -> Row:
    """A row of the table; without ceilings nothing is timed.

    Returns:
        "operation", "case", "auto", "others" by name, "error" by name of what is wrong or does not run; "first_call_s";
        where there are ceilings "us" by name, "spread", "floor_us", "bound", "graph_us" and "host_us". "refused" says
        why the kernel cannot take the case: then there is nothing else.
    """
    with case.setting():
        call, verifier = case.call(device), Verifier(case, device)
        operation, path = operations()[case.operation], triton_path(case.operation)
        row: Row = {"operation": case.operation, "case": case.label, "error": {}}
        row["auto"] = operation.choose(*call.args, **call.kwargs)[0].name
        refusal = None if path is None else call.of(path.refuses)
        if refusal is not None:
            return {**row, "refused": refusal}
        ours = operation if path is None else path.run  # where there is no kernel: what a call takes
        contestants = {OURS: ours, **alternatives(case, call)}
        runs: dict[str, Callable[[], Any]] = {}
        for name, contestant in contestants.items():
            start = time.perf_counter()
            problem = _problem(verifier, contestant, name != OURS)
            if name == OURS:
                row["first_call_s"] = round(time.perf_counter() - start, 2)
            if problem is None:
                runs[name] = functools.partial(call.of, contestant)
            else:
                row["error"][name] = problem
        peer = emerging_optimizers(case, call)
        if peer is not None:
            problem = _problem(verifier, peer[0], True)
            if problem is None:
                runs["Emerging-Optimizers"] = peer[1]
            else:
                row["error"]["Emerging-Optimizers"] = problem
        row["others"] = [name for name in runs if name != OURS]
        if ceilings is not None and OURS in runs:
            _time(row, case, runs, ceilings)
        return row


def _problem(verifier: Verifier, contestant: Callable[..., Any], baseline: bool) -> str | None:
    """What is wrong with results, or why there are none."""
    try:
        return verifier.error(contestant, baseline)
    except Exception as error:  # a peer's bug, or an API that this torch does not have, is a line in the table
        if verifier.device.type == "cuda":
            torch.cuda.synchronize()  # raises if the GPU is of no more use
        return textwrap.shorten(f"{type(error).__name__}: {error}", 120)


def _time(row: Row, case: Case, runs: dict[str, Callable[[], Any]], ceilings: Mapping[str, float]) -> None:
    times = measure.in_turn(runs)
    row["us"] = {name: round(timing.us, 2) for name, timing in times.items()}
    row["spread"] = round(max(timing.spread for timing in times.values()), 3)
    row["floor_us"] = round(case.floor_us(ceilings), 2)
    moved = case.bytes / ceilings["bytes"] > case.flops / ceilings[case.unit]
    row["bound"] = "bytes" if moved else case.unit
    row["host_us"] = round(measure.host_us(runs[OURS]), 1)
    try:
        row["graph_us"] = round(measure.graph_us(runs[OURS]), 2)
    except RuntimeError as error:  # a decomposition that waits for the device
        row["error"]["graph"] = str(error).splitlines()[0]


def cells(row: Row) -> list[str]:
    """A row of the printed table."""
    us = row.get("us")
    if us is None:
        state = "refused" if "refused" in row else "wrong" if OURS in row["error"] else "right"
        against = ", ".join(row.get("others", ())) or NOT_TIMED
        return [row["operation"], row["case"], state, *[NOT_TIMED] * 2, against, *[NOT_TIMED] * 2, row["auto"]]
    mine = us[OURS]
    against = ", ".join(f"{theirs / mine:.2f} {name}" for name, theirs in us.items() if name != OURS)
    graph = f"{row['graph_us']:.1f}" if "graph_us" in row else NOT_TIMED
    roof = f"{100 * row['floor_us'] / mine:.0f} %"
    host = f"{row['host_us']:.0f}"
    return [row["operation"], row["case"], f"{mine:.1f}", roof, row["bound"], against, graph, host, row["auto"]]


def once(chosen: Sequence[Case], device: torch.device) -> int:
    """Run every case with its table's configuration, and with one that shares tiles; how many are wrong."""
    wrong = 0
    for case in chosen:
        path = triton_path(case.operation)
        if path is None:
            continue
        with case.setting():
            verifier = Verifier(case, device)
            runs = [path.run]
            if case.candidates:
                runs.append(functools.partial(path.launch, config=case.candidates[-1]))
            problems = [_problem(verifier, run, False) for run in runs]
        found = [problem for problem in problems if problem is not None]
        wrong += bool(found)
        print(f"{case.operation} {case.label}: {'; '.join(found) if found else 'ok'}", flush=True)
    return wrong


def _problems(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Cases by what is wrong in them."""
    found: dict[str, list[str]] = {}
    for row in rows:
        told = {**row["error"], **({"the kernel": row["refused"]} if "refused" in row else {})}
        for name, problem in told.items():
            found.setdefault(f"{name} of {row['operation']}, {problem}", []).append(row["case"])
    return found


def kernels(given: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure and print all chosen cases."""
    start = time.monotonic()
    ceilings = None if given.smoke else measure.ceilings()
    if ceilings is not None:
        rates = {"bytes": f"copy {ceilings['bytes'] / 1e12:.2f} TB/s"}
        rates |= {unit: f"{unit} {rate / 1e12:.0f} TFLOP/s" for unit, rate in ceilings.items() if unit != "bytes"}
        print(f"\nceilings: {', '.join(rates.values())}")
    chosen = [case for case in cases("tiny" if given.smoke else given.sizes) if case.operation in given.only]
    rows: list[Row] = []
    for case in chosen:
        if time.monotonic() - start > given.budget:
            break
        rows.append(measured(case, device, ceilings))
    rows.sort(key=lambda row: given.only.index(row["operation"]))
    print("\n" + table(HEADER, [cells(row) for row in rows]))
    for problem, places in _problems(rows).items():
        print(f"\nleft out: {problem}: {', '.join(places)}")
    if len(rows) < len(chosen):
        print(f"\nthe budget was spent, {len(chosen) - len(rows)} of {len(chosen)} cases are missing")
    return rows


def _launches(smoke: bool) -> None:
    if smoke:
        print("\n" + benchmark_launches.report((1, 2), ("SOAP", "AdamW"), width=24))
    else:
        print(benchmark_launches.report((1, 6, 12)))


def _parser() -> OneLine:
    parser = OneLine(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(dict.fromkeys(case.operation for case in cases("quick")))
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--steps", action="store_true", help="whole steps instead of kernels")
    what.add_argument("--launches", action="store_true", help="count what a step launches")
    what.add_argument("--once", action="store_true", help="run every kernel once at toy size, for a sanitizer")
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--sizes", choices=SIZES, default="all", help="how many shapes; default: all")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="begin nothing after; 540")
    parser.add_argument("--out", type=Path, metavar="FILE", help="all numbers, as JSON")
    parser.add_argument("--smoke", action="store_true", help="toy sizes on a CPU, nothing timed")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables.

    Returns:
        The exit code: 1 if a kernel of ours gave wrong results.
    """
    parser = _parser()
    given = parser.parse_args(argv)
    everything = given.smoke and given.only is None and not (given.steps or given.launches)
    given.only = given.only or list(dict.fromkeys(case.operation for case in cases("quick")))
    if not given.budget > 0:
        parser.error(f"--budget must be above 0, got {given.budget:g}")
    if given.out is not None and not given.out.parent.is_dir():
        parser.error(f"--out: there is no folder {given.out.parent}")
    if given.launches:
        _launches(given.smoke)
        return 0
    if not given.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU; --smoke runs at toy size without one")
    if not policy.installed() or (given.smoke and not given.steps and not policy.interpreting()):
        parser.error("--smoke needs Triton, and TRITON_INTERPRET=1")
    device = torch.device("cpu" if given.smoke else "cuda")
    torch.manual_seed(0)
    header = provenance(device)
    print(", ".join(f"{name} {value}" for name, value in header.items()))
    if given.once:
        return 1 if once([c for c in cases("tiny") if c.operation in given.only], device) else 0
    rows = [] if given.steps else kernels(given, device)
    if given.steps or everything:
        rows += benchmark_whole_steps.run(device, given.smoke, given.budget)
    if everything:
        _launches(smoke=True)
    if given.out is not None:
        given.out.write_text(json.dumps({**header, "rows": rows}, indent=1))
    return 1 if any(OURS in row.get("error", {}) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
