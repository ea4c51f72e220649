"""The ranks of a group as one: what fails on one of them fails on all, at the same point and with one message.

A rank that raised alone would leave the others waiting in their next collective operation; one that went on alone would
hold another step's state than they do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from secondorder._manifest import CheckpointError

T = TypeVar("T")


class Ranks:
    """The ranks of a group, or one process without any."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.together = dist.is_available() and dist.is_initialized()
        self.group = (group or dist.group.WORLD) if self.together else None
        self.rank = dist.get_rank(self.group) if self.together else 0
        self.size = dist.get_world_size(self.group) if self.together else 1
        if self.rank < 0:
            raise ValueError("process_group must be a group of this process, it belongs to other ranks")

    def for_dcp(self) -> dict[str, Any]:
        return {"process_group": self.group, "no_dist": not self.together}

    def gather(self, value: T) -> list[T]:
        """What every rank has, on every rank."""
        values: list[Any] = [value] * self.size
        if self.together:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, doing: str, work: Callable[[], T]) -> T:
        """Do something on all ranks: if it fails on one, it fails on all, with one message."""
        failures: dict[int, str] = {}
        cause: BaseException | None = None
        try:
            done = work()
        except CheckpointException as error:  # a BaseException; torch raises it on all ranks
            failures, cause = {rank: _said(fault) for rank, (fault, _) in error.failures.items()}, error
        except Exception as error:
            failures, cause = {self.rank: _said(error)}, error
        everybodys: dict[int, str] = {}
        for found in self.gather(failures):
            everybodys |= found
        if everybodys:
            told = "; ".join(f"rank {rank}: {fault}" for rank, fault in sorted(everybodys.items()))
            raise CheckpointError(f"{doing}: {told}") from cause
        return done

    def sent(self, value: T, source: int) -> T:
        """The value of rank `source`, on rank 0; the others keep theirs."""
        if source != 0 and self.rank in (0, source):
            assert self.group is not None
            other, box = dist.get_global_rank(self.group, source if self.rank == 0 else 0), [value]
            if self.rank == 0:
                dist.recv_object_list(box, src=other, group=self.group)
            else:
                dist.send_object_list(box, dst=other, group=self.group)
            return box[0]
        return value


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
