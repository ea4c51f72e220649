"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import preemption
import rendezvous
from errors import RecipeError


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    parent: int = 0  # the process that started this one

    @property
    def is_main(self) -> bool:
        """The one process that writes files and talks."""
        return self.rank == 0

    def wrap(self, model: nn.Module, parallel: str = "ddp", replicas: int = 2) -> nn.Module:
        """The model whose backward averages the gradients over the processes.

        Args:
            model: On the device. Sharding replaces its parameters: the optimizer is built afterwards.
            parallel: "ddp" copies the model to every process; "fsdp2" cuts every parameter into shards, one per
                process; "hsdp" does that within each of `replicas` groups of processes.
            replicas: Copies of the model in "hsdp".

        Raises:
            RecipeError: The processes do not make `replicas` groups.
        """
        if self.size == 1:
            return model
        if parallel == "ddp":
            return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)
        mesh = self._mesh(replicas if parallel == "hsdp" else 1)
        for part in [block for stack in model.modules() if isinstance(stack, nn.ModuleList) for block in stack]:
            fully_shard(part, mesh=mesh)  # gathered when it runs, not earlier
        return fully_shard(model, mesh=mesh)

    def _mesh(self, replicas: int) -> DeviceMesh:
        if self.size % replicas:
            raise RecipeError(f"replicas={replicas} does not divide the {self.size} processes")
        if replicas == 1:
            return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))
        shape = (replicas, self.size // replicas)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def gradients_stay(self, model: nn.Module) -> AbstractContextManager[None]:
        """Backward passes in this context do not exchange gradients: it is done once per step, by the last."""
        if isinstance(model, FSDPModule):
            return _unsynchronised(model)
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def vote(self) -> Callable[[], int]:
        """Ask all processes whether one was asked to stop; the result tells, and waits for what is still missing.

        It travels while the step computes, on the CPU: nothing waits for the device.
        """
        largest = torch.tensor(preemption.asked(self.parent))
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True) if self.size > 1 else None

        def result() -> int:
            if work:
                work.wait()
            return int(largest)

        return result

    def mean(self, value: Tensor) -> float:
        """Mean of a 0-d tensor over the processes."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return float(value) / self.size

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in the order of their ranks."""
        values: list[Any] = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def _unsynchronised(model: FSDPModule) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def rank() -> int:
    """This process's rank, known before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """The number of processes, known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join(device: str, timeout: float = 120.0) -> Iterator[World]:
    """Set up the process group if there are several processes (nccl on CUDA, gloo on CPU), and take it down.

    In between, SIGTERM and SIGUSR1 are requests (preemption.py).

    Args:
        device: "cpu", "cuda", or "auto".
        timeout: Seconds that a process waits for another before it gives up.

    Raises:
        RecipeError: CUDA is asked for where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device=cuda, but torch sees no CUDA device")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    chosen = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else "cpu")
    if kind == "cuda":
        torch.cuda.set_device(chosen)
    if rank() == 0 and rendezvous.warning():
        print(rendezvous.warning(), file=sys.stderr)
    with preemption.listening():
        parent = os.getppid()
        if size() > 1:
            wait = timedelta(seconds=timeout)
            backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
            store = rendezvous.own_store(rank(), size(), wait)
            dist.init_process_group(backend, store=store, rank=rank(), world_size=size(), timeout=wait)
        try:
            yield World(rank(), size(), chosen, parent)
        finally:
            if size() > 1:
                dist.destroy_process_group()
