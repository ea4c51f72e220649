"""What sharing the blocks out costs and saves: state, bytes, collectives and time of a step on 1, 2 and 4 processes.

    python recipes/benchmark_sharding.py [--worlds 1 2 4] [--layers 4] [--width 256] [--steps 30] [--optimizer SOAP]
    python recipes/benchmark_sharding.py --paper

Processes are started here (gloo, one thread each). All contestants take their turns in the same processes, a refresh
period each, round by round; each has the same GPT-like list of parameters. Gradients are given, so that what is timed
is the step alone; plain AdamW is torch's, with its state on every process.

    replicated   every process does all the work, as under DDP without sharding
    owners       `sharding="owners"`: parameters on every process, blocks shared out
    rows         parameters stored by rows, as `fully_shard` does

    state        bytes of the blocks' state, of the process with most; of AdamW, all its state
    sent         bytes that the process with most sends in a step
    ms           median over the rounds of the mean over a period, of the slowest process
    to AdamW     time relative to plain AdamW in the same processes

`--paper`: how evenly state and work of SOAP spread for large models, without any process.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import secondorder
from secondorder.sharding.paper import on_paper

PERIOD, WARM_UP = 10, 2
Shape = tuple[int, ...]


def gpt(layers: int, width: int, hidden: int, kv: int, gated: bool) -> list[Shape]:
    """Matrices of a transformer's blocks."""
    mlp = [(hidden, width)] * (1 + gated) + [(width, hidden)]
    packed = [(3 * width, width), (width, width)]
    attention = [(width, width), (kv, width), (kv, width), (width, width)] if gated else packed
    return [*attention, *mlp] * layers


PAPER = {
    "GPT-2, 124M": (gpt(12, 768, 3072, 768, gated=False), 512, (8, 64)),
    "Llama 3.2, 1B": (gpt(16, 2048, 8192, 512, gated=True), 512, (8, 64, 128)),
    "Llama 3, 8B": (gpt(32, 4096, 14336, 1024, gated=True), 1024, (8, 64, 512)),
}


def paper() -> None:
    """Print the table of plans on paper."""
    print("| model | blocks of at most | processes | state per process, most (GB) | over mean | work, over mean |")
    print("|---|---|---|---|---|---|")
    for name, (shapes, size, worlds) in PAPER.items():
        params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
        optimizer = secondorder.SOAP(params, max_block_size=size)
        candidates = optimizer.plan.candidates
        for world in worlds:
            plan = on_paper(candidates, world)
            print(
                f"| {name} | {size} | {world} | {max(plan.state_bytes) / 1e9:.3f} | {plan.state_balance:.3f} | "
                f"{plan.work_balance:.3f} |"
            )


class Contestant:
    """An optimizer with parameters of its own."""

    def __init__(self, name: str, shapes: Sequence[Shape], kind: str, storage: str, world: int) -> None:
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator) * 0.02 for shape in shapes]
        self.name, self.world = name, world
        if storage == "rows":
            mesh = init_device_mesh("cpu", (world,))
            values = [distribute_tensor(v, mesh, [Shard(0)], src_data_rank=None) for v in values]
        self.params = [nn.Parameter(v) for v in values]
        if kind == "AdamW":
            self.optimizer: Any = torch.optim.AdamW(self.params, lr=1e-3, foreach=True)
        else:
            sharding = "owners" if storage == "owners" else "auto"
            self.optimizer = getattr(secondorder, kind)(self.params, lr=1e-3, refresh_every=PERIOD, sharding=sharding)

    def give(self, step: int) -> None:
        """Draw the gradients of a step."""
        generator = torch.Generator().manual_seed(step)
        for p in self.params:
            grad = torch.randn(p.shape, generator=generator)
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad

    def period(self, start: int) -> float:
        """Mean seconds of the steps of a period."""
        spent = 0.0
        for step in range(start, start + PERIOD):
            self.give(step)
            if self.world > 1:
                dist.barrier()
            begin = time.perf_counter()
            self.optimizer.step()
            spent += time.perf_counter() - begin
        return spent / PERIOD

    def state_bytes(self) -> int:
        """State on this process."""
        return sum(_bytes(entry) for entry in self.optimizer.state.values())

    def traffic(self) -> tuple[int, int]:
        """Bytes that this process sends in a step, and collectives."""
        plan = getattr(self.optimizer, "plan", None)
        wires = [w for w in (getattr(plan, "inward", None), getattr(plan, "outward", None)) if w is not None]
        return sum(w.sent for w in wires), sum(w.exchanges > 0 for w in wires)


def _bytes(entry: Any) -> int:
    if isinstance(entry, DTensor):
        entry = entry.to_local()
    if isinstance(entry, Tensor):
        return entry.numel() * entry.element_size()
    return sum(map(_bytes, entry.values())) if isinstance(entry, dict) else 0


def work(rank: int, world: int, options: argparse.Namespace, folder: str) -> None:
    """What every process does."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    matrices = gpt(options.layers, options.width, 4 * options.width, 0, gated=False)
    shapes = [*matrices, *[(options.width,)] * options.layers]
    kinds = [("AdamW", "AdamW", "replicated"), (f"{options.optimizer}, replicated", options.optimizer, "replicated")]
    if world > 1:
        kinds += [(f"{options.optimizer}, {storage}", options.optimizer, storage) for storage in ("owners", "rows")]
    contestants = [Contestant(name, shapes, kind, storage, world) for name, kind, storage in kinds]
    times: dict[str, list[float]] = {c.name: [] for c in contestants}
    rounds = WARM_UP + max(1, options.steps // PERIOD)
    for number in range(rounds):
        for c in contestants:
            took = torch.tensor(c.period(number * PERIOD))
            dist.all_reduce(took, op=dist.ReduceOp.MAX)
            if number >= WARM_UP:
                times[c.name].append(float(took))
    base = statistics.median(times["AdamW"])
    for c in contestants:
        facts = torch.tensor([float(c.state_bytes()), *map(float, c.traffic())])
        dist.all_reduce(facts, op=dist.ReduceOp.MAX)
        if rank == 0:
            ms = statistics.median(times[c.name])
            state, sent, collectives = facts.tolist()
            print(
                f"| {world} | {c.name} | {state / 1e6:.2f} | {sent / 1e6:.3f} | {collectives:.0f} | {1e3 * ms:.1f} | "
                f"{ms / base:.2f} |",
                flush=True,
            )
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Read the command line, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--optimizer", default="SOAP")
    parser.add_argument("--paper", action="store_true", help="plans of large models, without processes")
    options = parser.parse_args()
    if options.paper:
        paper()
        return
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores")
    print("| processes | contestant | state (MB) | sent (MB) | collectives | ms | to AdamW |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for world in options.worlds:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(work, (world, options, str(Path(folder))), nprocs=world, start_method="spawn")


if __name__ == "__main__":
    main()
