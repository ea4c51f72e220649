"""What structured factors cost: time of their operations and bytes, absolute for dense ones, then relative to these.

    python recipes/benchmark_structures.py [--threads 1] [--rounds 10] [--device cpu] [--sizes 64 256 1024 2048]

`apply` multiplies a factor of dimension d with 256 columns, `project_gram` makes the statistic of 256 columns, and
`product` moves a factor. All structures of a size run in turn, round by round, so that whatever else the machine does
meets them alike; medians are compared. The two dense factors of a square weight have as many numbers as AdamW's two
moments, so that the last column is also the factors' share of AdamW's state.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from secondorder.preconditioner.structures import STRUCTURES, Structure

COLUMNS = 256
WARM_UP = 2  # rounds that are not counted: first allocations, FFT plans
NAMES = ("dense", "diagonal", "block", "hierarchical", "tril_toeplitz", "tril_bottom_right_diag")


def operations(s: Structure, d: int, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """What is timed, on one random element."""
    X = torch.randn(1, d, COLUMNS, device=device)
    K = s.project_gram(X / math.sqrt(COLUMNS))
    return {
        "apply": lambda: s.apply(K, X),
        "project_gram": lambda: s.project_gram(X),
        "product": lambda: s.product(K, K),
    }


def seconds(run: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Wall-clock time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rows(d: int, rounds: int, device: torch.device) -> list[list[str]]:
    """The table's rows of one size."""
    runs = {name: operations(STRUCTURES[name], d, device) for name in NAMES}
    times: dict[tuple[str, str], list[float]] = {(name, op): [] for name in NAMES for op in runs[name]}
    for i in range(rounds + WARM_UP):
        for (name, op), found in times.items():
            spent = seconds(runs[name][op], device)
            if i >= WARM_UP:
                found.append(spent)
    medians = {key: statistics.median(found) for key, found in times.items()}
    table = []
    for name in NAMES:
        numbers = math.prod(STRUCTURES[name].shape(d))
        if name == "dense":
            cells = [f"{1e3 * medians[name, op]:.3f} ms" for op in runs[name]] + [f"{4 * numbers / 2**10:.0f} KiB"]
        else:
            cells = [f"{medians[name, op] / medians['dense', op]:.4f}" for op in runs[name]] + [f"{numbers / d**2:.4f}"]
        table.append([str(d), name, *cells])
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--rounds", type=int, default=10, help="counted rounds")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024, 2048], help="dimensions of the factor")
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device = torch.device(given.device)
    where = f"{platform.machine()}, {given.threads} thread(s)"
    where = torch.cuda.get_device_name() if device.type == "cuda" else where
    print(f"torch {torch.__version__}, {where}, float32; medians of {given.rounds} rounds\n")
    lines = [["d", "structure", "apply", "project_gram", "product", "bytes"], ["---"] * 6]
    for d in given.sizes:
        lines += rows(d, given.rounds, device)
    print("\n".join("| " + " | ".join(cells) + " |" for cells in lines))


if __name__ == "__main__":
    main()
