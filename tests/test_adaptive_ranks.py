"""A quadratic model over several ranks, each with its part of the batch."""

import pytest
import torch
from torch import nn

import secondorder
from adapting import BASE, closure_of, tanh

pytestmark = [pytest.mark.slow, pytest.mark.dist]


def told_by_three_steps(rank, store, answers):
    """What a rank of two chooses and finds; of one, if `store` is None."""
    torch.set_num_threads(1)
    model, x, y = tanh()
    network = model
    if store is not None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        network, x, y = nn.parallel.DistributedDataParallel(model), x[rank::2], y[rank::2]
    options = dict(quadratic_model="lr_and_momentum", loss="cross_entropy", adapt_damping=True, adapt_every=1)
    optimizer = secondorder.KFAC(model.parameters(), module=network, **BASE, **options)
    told = []
    for _ in range(3):
        optimizer.step(closure_of(optimizer, network, x, y, "cross_entropy"))
        told.append(optimizer.diagnostics())
    answers.put([[step[key] for key in ("lr", "momentum", "predicted_change", "rho")] for step in told])
    if store is not None:
        torch.distributed.destroy_process_group()


def test_ranks_agree_on_what_one_process_would_choose(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    told_by_three_steps(0, None, answers)
    ranks = [context.Process(target=told_by_three_steps, args=(r, tmp_path / "store", answers)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    alone, one, other = (torch.tensor(answers.get()) for _ in range(3))
    assert torch.equal(one, other)
    torch.testing.assert_close(one, alone, rtol=1e-6, atol=0)
