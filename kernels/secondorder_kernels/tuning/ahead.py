"""Compiling on several processes what one process then times: compilers keep what they made on disk."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from secondorder_kernels.tuning.case import other_paths, triton_path
from secondorder_kernels.tuning.cases import cases


def compile_ahead(sizes: str, chosen: Sequence[int], workers: int, seconds: float) -> int:
    """Call every candidate of cases once, and what it competes with, so that Triton's cache has it.

    Results are not looked at: whoever times the candidates checks them. Each process keeps a context on the GPU, so
    nothing may be timed meanwhile.

    Args:
        sizes: Which list of cases, see `cases`.
        chosen: Positions in it.
        workers: Processes.
        seconds: All are stopped after.

    Returns:
        How many cases were gone through.
    """
    # "spawn": a GPU that this process has used is of no use to a fork.
    end, done = time.monotonic() + seconds, 0
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        waiting = [pool.apply_async(_call_all, (sizes, number)) for number in chosen]
        with contextlib.suppress(multiprocessing.TimeoutError):
            for result in waiting:
                result.get(max(0.0, end - time.monotonic()))
                done += 1
    return done


def _call_all(sizes: str, number: int) -> None:
    case = cases(sizes)[number]
    path = triton_path(case.operation)
    if path is None:
        return
    device = torch.device("cuda")
    with case.setting():
        call = case.call(device)
        if call.of(path.refuses) is not None:
            return
        runs: list[Callable[..., Any]] = [
            functools.partial(path.launch, config=dict(config)) for config in case.candidates
        ]
        for run in [*runs, *other_paths(case, call).values()]:
            with contextlib.suppress(Exception):  # who times them tells what does not run
                call.of(run)
        torch.cuda.synchronize()
