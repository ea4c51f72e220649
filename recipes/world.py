"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import RecipeError


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The one process that writes files and talks."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward averages the gradients over the processes."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def gradients_stay(self, model: nn.Module) -> AbstractContextManager[None]:
        """Backward passes in this context do not exchange gradients: it is done once per step, by the last."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

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


def rank() -> int:
    """This process's rank, known before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """The number of processes, known before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join(device: str) -> Iterator[World]:
    """Set up the process group if there are several processes (nccl on CUDA, gloo on CPU), and take it down.

    Args:
        device: "cpu", "cuda", or "auto".

    Raises:
        RecipeError: CUDA is asked for where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device=cuda, but torch sees no CUDA device")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    chosen = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else "cpu")
    if kind == "cuda":
        torch.cuda.set_device(chosen)
    if size() > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(rank(), size(), chosen)
    finally:
        if size() > 1:
            dist.destroy_process_group()
