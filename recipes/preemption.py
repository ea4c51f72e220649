"""Signals that ask the run to stop: it takes the step to its end, writes a checkpoint and leaves.

SIGUSR1: the whole run stops. SIGTERM: this process, or its machine, is to go. Where torchrun restarts what fails, those
who were not asked themselves leave with an error, so that their agent starts them again without the one that goes.
A process whose torchrun was killed acts as if it had been asked by SIGTERM: nobody would ever restart or end it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOTHING, THIS_PROCESS, ALL = range(3)  # who is asked to stop; of several requests the largest counts
_MEANING = {signal.SIGTERM: THIS_PROCESS, signal.SIGUSR1: ALL}

_received = NOTHING


class Preempted(SystemExit):
    """The run has stopped on request, with a checkpoint."""


@contextmanager
def listening() -> Iterator[None]:
    """Take the signals as requests while the context lasts; outside of the main thread Python allows no handlers."""
    global _received
    _received = NOTHING

    def receive(number: int, frame: Any) -> None:
        global _received
        _received = max(_received, _MEANING[signal.Signals(number)])

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, receive) for number in _MEANING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked(parent: int) -> int:
    """Who was asked to stop: `NOTHING`, `THIS_PROCESS` or `ALL`; by a signal, or since `parent` is gone."""
    return max(_received, NOTHING if os.getppid() == parent else THIS_PROCESS)


def stop(verdict: int, parent: int) -> Preempted:
    """What to raise when the ranks' largest request is `verdict`: exit code 0, or 1 to be started again."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    return Preempted(int(restarts and verdict == THIS_PROCESS and asked(parent) == NOTHING))
