"""Workers for tests that need several processes: started once, each case with a gloo group of its own.

    results = run(2, function, *args)       # [function(0, 2, *args), function(1, 2, *args)], each in its own process

Workers are forked from a server process that has imported torch, and nothing else: a fork of the test process itself
would inherit its threads' locks, and could not run a backward pass once the test process has run one beside a GPU.
They serve the whole session, so a function must leave global settings as it found them; it finds torch's seed at 0.
When a case fails, its workers are killed, and the next case starts new ones.
"""

import atexit
import faulthandler
import importlib.util
import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
import torch.distributed as dist

START = 120.0  # seconds for a worker to start and to import the function's module, on a busy machine
GRACE = 5.0  # seconds that the others have to end as well, once one has failed
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch.distributed.fsdp", "secondorder", "hypothesis", "pytest"])


class Worker:
    """One process of the pool, as seen from the test's."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank = rank
        self.stack = folder / f"stack{rank}"  # where the process writes what it was doing when it was aborted
        self.pipe, theirs = SERVER.Pipe()
        self.process = SERVER.Process(target=serve, args=(theirs, rank, self.stack), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, message: Any) -> None:
        with suppress(OSError):  # a worker that has died says so when its answer is read
            self.pipe.send(message)

    def end(self, number: int = signal.SIGKILL) -> None:
        """Send a signal that it does not survive; SIGABRT makes it say what it is doing."""
        if self.process.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, number)
        self.process.join(GRACE)

    def epitaph(self) -> str:
        self.process.join(GRACE)
        code = self.process.exitcode
        how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
        return f"died {how}\n{self.stack.read_text() if self.stack.exists() else ''}"


class Pool:
    """Workers of ranks 0, 1, ...: a case of `world` processes uses the first so many."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pool-"))
        self.workers: dict[int, Worker] = {}
        self.cases = 0
        atexit.register(self.close)

    def close(self) -> None:
        self.kill(list(self.workers.values()))
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self, workers: list[Worker]) -> None:
        for worker in workers:
            self.workers.pop(worker.rank, None)
            worker.end()
            worker.pipe.close()

    def team(self, world: int) -> list[Worker]:
        for rank in range(world):
            if rank in self.workers and not self.workers[rank].process.is_alive():
                self.kill([self.workers[rank]])
            if rank not in self.workers:
                self.workers[rank] = Worker(rank, self.folder)
        return [self.workers[rank] for rank in range(world)]

    def run(self, world: int, function: FunctionType, args: tuple, timeout: float) -> list[Any]:
        team = self.team(world)
        self.cases += 1
        store = self.folder / f"store{self.cases}"
        done = False
        try:
            for worker in team:
                worker.send((function.__module__, sys.modules[function.__module__].__file__))
            answers(team, START)
            call = (function.__qualname__, world, str(store), timeout, packed(args))
            for worker in team:
                worker.send(call)
            results = answers(team, timeout)
            for worker in team:
                worker.send("all have answered")
            done = True
        finally:
            store.unlink(missing_ok=True)
            if not done:
                self.kill(team)
        return [unpacked(result) for result in results]


def answers(team: list[Worker], seconds: float) -> list[Any]:
    """What every worker sent; an AssertionError that names those which raised, died, or were too slow, in that order.

    Those that wait for one that has failed are not worth their full time.
    """
    found, failures = {}, []
    deadline = time.monotonic() + seconds
    waiting = {worker.pipe: worker for worker in team}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            worker = waiting.pop(pipe)
            try:
                good, value = pipe.recv()
            except (EOFError, OSError):
                good, value = False, worker.epitaph()
            if good:
                found[worker.rank] = value
            else:
                failures.append(f"rank {worker.rank} of {len(team)} {value}")
                deadline = min(deadline, time.monotonic() + GRACE)
    for worker in waiting.values():
        worker.end(signal.SIGABRT)
        last = worker.stack.read_text()
        failures.append(f"rank {worker.rank} of {len(team)} did not end, and was killed\n{last}")
    if failures:
        raise AssertionError("\n".join(failures))
    return [found[worker.rank] for worker in team]


def packed(value: Any) -> bytes:
    """As `torch.save` writes it: views of one storage carry it once."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def serve(pipe: Connection, rank: int, stack: Path) -> None:
    """A worker's life: for every case import, call, wait for the others, leave the group."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted session ends its workers itself
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=leave_with_the_session, daemon=True).start()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    faulthandler.enable(stack.open("w"))
    with suppress(EOFError):
        while True:
            try:
                module = imported(*pipe.recv())
                pipe.send((True, None))
                name, world, store, timeout, args = pipe.recv()
                pipe.send((True, called(getattr(module, name), rank, world, store, timeout, args)))
            except EOFError:
                raise
            except BaseException:  # pytest's own failures are no Exception
                pipe.send((False, f"raised\n{traceback.format_exc()}"))
                os._exit(1)  # closes its sockets, which the others notice at once
            pipe.recv()  # a group that is destroyed earlier can break the last operation of another rank
            if dist.is_initialized():
                dist.destroy_process_group()


def leave_with_the_session() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def imported(name: str, file: str) -> Any:
    """The module of that name: pytest imports a test's by its file, from a folder that is no package."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, file)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def called(function: Any, rank: int, world: int, store: str, timeout: float, args: bytes) -> bytes:
    # An operation that waits for nobody gives up before the pool does: its traceback says more than a killed process.
    patience = timedelta(seconds=0.75 * timeout)
    meeting = dist.FileStore(store, world)
    dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world, timeout=patience)
    torch.manual_seed(0)
    return packed(function(rank, world, *unpacked(args)))


_pools: list[Pool] = []


def run(world: int, function: Any, *args: Any, timeout: float = 20.0) -> list[Any]:
    """Call `function(rank, world, *args)` in `world` processes, which are a gloo default group.

    Args:
        world: Number of processes.
        function: A function of a module's top level, in a file.
        args: What torch can save.
        timeout: Seconds until the case has failed; an operation of the group gives up after three quarters of them.

    Returns:
        Results by rank: copies, as through `torch.save`.

    Raises:
        AssertionError: Where a rank raised (with its traceback), died (with the signal) or did not end (with its
            stack), the first one first.
    """
    if not isinstance(function, FunctionType) or function.__qualname__ != function.__name__:
        raise TypeError(f"function must be a module's own, which others can import by name, got {function!r}")
    if not _pools:
        _pools.append(Pool())
    return _pools[0].run(world, function, args, timeout)
