"""The pool: every case has its own group; what raises, hangs or dies is named, and leaves the next case alone."""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distributed import pool

pytestmark = pytest.mark.dist


def summed(rank, world, x):
    total = x * (rank + 1)
    dist.all_reduce(total)
    return {"total": total, "rank": dist.get_rank(), "world": dist.get_world_size(), "threads": torch.get_num_threads()}


@pytest.mark.parametrize("world", [1, 2, 3, 4, 2])
def test_ranks_form_a_group(world):
    x = torch.arange(6, dtype=torch.float64).view(2, 3)
    results = pool.run(world, summed, x)
    assert [(r["rank"], r["world"], r["threads"]) for r in results] == [(rank, world, 1) for rank in range(world)]
    for r in results:
        assert torch.equal(r["total"], x * sum(range(1, world + 1)))


@torch.enable_grad()
def gradient(rank, world):
    w = torch.randn(3, requires_grad=True)
    (rank * w.square().sum()).backward()
    dist.all_reduce(w.grad)
    return w.detach(), w.grad


def test_ranks_run_backward_passes_and_start_from_one_seed():
    torch.ones(1, requires_grad=True).sum().backward()
    (w, grad), (v, _) = pool.run(2, gradient)
    assert torch.equal(w, v)
    assert torch.equal(grad, 2 * w)


def process(rank, world):
    return os.getpid()


def test_workers_serve_many_cases():
    first = pool.run(3, process)
    assert len({*first, os.getpid()}) == 4
    assert pool.run(2, process) == first[:2]
    assert pool.run(3, process) == first


def views(rank, world):
    whole = torch.zeros(4, 5)
    return [*whole]


def test_results_keep_what_tensors_share():
    (rows,) = pool.run(1, views)
    rows[0].fill_(1)
    assert rows[1].data_ptr() == rows[0].data_ptr() + 5 * 4
    assert torch.equal(torch.stack(rows).sum(), torch.tensor(5.0))


def failing(rank, world, bad):
    if rank == bad:
        pytest.fail("the lamp is out")
    dist.barrier()


@pytest.mark.parametrize("bad", [0, 1])
def test_exception_comes_back_with_its_traceback_and_others_do_not_wait(bad):
    start = time.monotonic()
    with pytest.raises(AssertionError) as caught:
        pool.run(2, failing, bad)
    message = str(caught.value)
    assert message.startswith(f"rank {bad} of 2 raised\nTraceback")
    assert "in failing" in message and "the lamp is out" in message
    assert f"rank {1 - bad} of 2 raised" in message
    assert time.monotonic() - start < 10  # of 20
    assert [r["rank"] for r in pool.run(2, summed, torch.ones(1))] == [0, 1]


def unable(rank, world):
    return lambda: rank


def test_result_that_cannot_travel_is_an_exception():
    with pytest.raises(AssertionError, match="rank 0 of 1 raised(.|\n)*pickle"):
        pool.run(1, unable)


def hanging(rank, world):
    while rank == 1:
        pass


def test_hang_is_killed_and_shows_where():
    before = pool.run(2, process)
    with pytest.raises(AssertionError, match="^rank 1 of 2 did not end(.|\n)*in hanging"):
        pool.run(2, hanging, timeout=2.0)
    after = pool.run(2, process)
    assert not {*before} & {*after}
    for number in before:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def stopping(rank, world):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.slow
def test_stopped_process_is_killed():
    with pytest.raises(AssertionError, match="^rank 0 of 2 did not end"):
        pool.run(2, stopping, timeout=2.0)
    pool.run(2, process)


def missing(rank, world):
    if rank == 0:
        dist.all_reduce(torch.ones(1))


def test_operation_without_the_others_says_where_it_waited():
    with pytest.raises(AssertionError, match="^rank 0 of 2 raised(.|\n)*in missing(.|\n)*[Tt]imed out"):
        pool.run(2, missing, timeout=2.0)


def dying(rank, world, number):
    if rank == 1:
        os.kill(os.getpid(), number)
    dist.barrier()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_death_is_reported_and_heals(number):
    with pytest.raises(AssertionError) as caught:
        pool.run(3, dying, number)
    message = str(caught.value)
    assert f"rank 1 of 3 died by {number.name}" in message
    assert "rank 0 of 3 raised" in message and "rank 2 of 3 raised" in message
    assert ("in dying" in message.partition("died by")[2].partition("rank ")[0]) == (number == signal.SIGABRT)
    assert len({*pool.run(3, process)}) == 3


def test_worker_that_died_between_cases_is_replaced():
    first, second = pool.run(2, process)
    os.kill(second, signal.SIGKILL)
    pool._pools[0].workers[1].process.join()
    again = pool.run(2, process)
    assert again[0] == first and again[1] != second


def test_function_must_be_importable():
    with pytest.raises(TypeError, match="function must be a module's own.*lambda"):
        pool.run(1, lambda rank, world: None)


SESSION = """
from distributed import pool, test_pool
print(pool._pools or pool.run(2, test_pool.process), pool._pools[0].folder, sep="\\n", flush=True)
input()
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
def test_nothing_outlives_the_session(killed):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", SESSION], env=environment, **pipes) as session:
        numbers, folder = eval(session.stdout.readline()), Path(session.stdout.readline().strip())
        ends = [os.pidfd_open(number) for number in numbers]
        assert folder.is_dir()
        if killed:
            session.kill()
        else:
            session.stdin.write("\n")
            session.stdin.flush()
        for end in ends:
            assert select.select([end], [], [], 30)[0], "a worker still runs"
            os.close(end)
        session.wait(30)
        assert killed or not folder.exists()
        shutil.rmtree(folder, ignore_errors=True)
