"""A key-value store of this incarnation of the processes alone.

torchrun keeps one store over all its restarts: a process that starts fast would read there under which address a dead
one was reached, and hang. How often torchrun has restarted is no name for an incarnation, since every agent counts for
itself. So the processes agree on a name: each announces a number that nobody used before, rank 0 answers to every such
number that it sees, stale ones too, until all who live have confirmed.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from datetime import timedelta

from torch import distributed as dist

from errors import RecipeError

PAUSE = 0.02  # seconds between rank 0's looks
UUID = re.compile(r"([0-9a-f]{8})(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def launch() -> str:
    """What torchrun calls the launch, the same after every restart, or "".

    It is --rdzv-id; --standalone makes up a UUID, of which this is the first part.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's default, for a launch without a name
    uuid_of_one_node = UUID.fullmatch(name)
    return "" if name == "none" else uuid_of_one_node[1] if uuid_of_one_node else name


def warning() -> str:
    """What is to be set for torchrun, not here, so that nodes can join later; "" if they can, or if there is one."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    if not shared or not restarts or UUID.fullmatch(os.environ.get("TORCHELASTIC_RUN_ID", "")):
        return ""
    # torch 2.13: the agent of rank 0 tells a store's address once; one that comes later waits for it in vain.
    return (
        "warning: a node that joins this run later will make torchrun fail; if one is to, start all with\n"
        "    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun ..."
    )


def own_store(rank: int, size: int, timeout: timedelta) -> dist.Store | None:
    """A fresh part of the store that torchrun's agent keeps; None where each start has a store of its own."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, size, is_master=False, timeout=timeout)
    return dist.PrefixStore(agree(store, rank, size, timeout), store)


def agree(store: dist.Store, rank: int, size: int, timeout: timedelta) -> str:
    """The incarnation's name, the same for all ranks and never used before.

    Raises:
        RecipeError: On rank 0, others did not come within `timeout`. On the others the store raises.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"hello/{rank}", own)
        name = store.get(f"answer/{own}").decode()  # waits
        store.set(f"heard/{name}/{rank}", "yes")
        return name
    silent, end = set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while silent:
        for other in tuple(silent):
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", own)
            if store.check([f"heard/{own}/{other}"]):
                silent.remove(other)
        if silent and time.monotonic() > end:
            raise RecipeError(f"after {timeout.total_seconds():g} s there is no sign of ranks {sorted(silent)}")
        time.sleep(PAUSE if silent else 0)
    return own
