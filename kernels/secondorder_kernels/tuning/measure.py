"""Clocks of a GPU: device time with a cold cache, time in a graph, time of the host, and the machine's ceilings."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FLUSH = 512 * 2**20  # bytes; more than any cache holds
_ROUND = 0.03  # seconds that all calls of a round take together, roughly
_COPIED = 2**30
_SIDE = 8192


@dataclass(frozen=True)
class Timing:
    """Microseconds of device time: the better of two medians, and by what the other one is longer, relatively."""

    us: float
    spread: float


Calls = Mapping[str, Callable[[], Any]]


def in_turn(calls: Calls) -> dict[str, Timing]:
    """Time several calls on the current GPU, one after another, in two rounds.

    Args:
        calls: By name; to be called many times over.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(2):
        for name, call in calls.items():
            found[name].append(_median_us(call))
    return {name: Timing(min(times), max(times) / min(times) - 1) for name, times in found.items()}


def host_us(call: Callable[[], Any], calls: int = 10) -> float:
    """Microseconds that the host needs to enqueue a call: the least of three means."""
    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):  # few: a full queue would make the host wait
            call()
        found.append(1e6 * (time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return min(found)


def graph_us(call: Callable[[], Any], calls: int = 20) -> float:
    """Microseconds per call as a CUDA graph replays it: nothing between launches, and the cache as it is."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return statistics.median(_elapsed_us(graph.replay) for _ in range(5)) / calls


def ceilings() -> dict[str, float]:
    """What the current GPU reaches: bytes per second of a copy, operations per second of a product by dtype."""
    found = {"bytes": _copied()}
    before = torch.get_float32_matmul_precision()
    for unit, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(_SIDE, _SIDE, device="cuda").to(dtype) for _ in range(2))  # zeros would draw less power
        out = torch.empty_like(a)
        found[unit] = 2e6 * _SIDE**3 / _median_us(functools.partial(torch.mm, a, b, out=out))
    torch.set_float32_matmul_precision(before)
    found["tf32x3"] = found["tf32"] / 3
    return found


def _copied() -> float:
    source = torch.zeros(_COPIED, dtype=torch.uint8, device="cuda")
    return 2e6 * _COPIED / _median_us(functools.partial(torch.empty_like(source).copy_, source))


@functools.cache
def _flusher(device: int) -> tuple[Tensor, float]:
    """Memory to write over, and the seconds that it takes."""
    buffer = torch.empty(_FLUSH, dtype=torch.int8, device=device)
    buffer.zero_()
    return buffer, 1e-6 * min(_elapsed_us(buffer.zero_) for _ in range(5))


def _elapsed_us(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def _median_us(call: Callable[[], Any]) -> float:
    for _ in range(3):
        call()
    waiting = 1e-6 * host_us(call, 5)
    buffer, flushing = _flusher(torch.cuda.current_device())
    # Long enough for the host to enqueue the whole call meanwhile: else gaps between its launches would be counted.
    fills = 1 + int(2 * waiting / flushing)
    estimate = 1e-6 * min(_elapsed_us(call) for _ in range(3))
    count = int(min(200, max(10, _ROUND / estimate)))
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
    for start, end in events:
        for _ in range(fills):
            buffer.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in events)
