"""What a plan says about itself is what happens."""

import pytest
import torch
from torch import nn

import cases
from distributed import pool, worlds
from secondorder import SOAP
from secondorder.sharding.paper import on_paper

pytestmark = pytest.mark.dist

SHAPES = [(64, 32), (64,), (48, 48), (32, 96), (48, 48)]


def told(rank, world, layout):
    params = worlds.laid_out(cases.parameters(SHAPES), layout, world)
    optimizer = SOAP(worlds.named(params), max_block_size=16, sharding="owners" if layout == "owners" else "auto")
    for step in range(2):
        worlds.feed(params, step)
        optimizer.step()
    plan = optimizer.plan
    report = plan.report()
    return {
        "owners": [row.owner for row in report.blocks],
        "state": (report.state_bytes[rank], worlds.factor_bytes(optimizer)),
        "sent": (report.sent[rank], (plan.inward.sent, plan.outward.sent)),
        "bound": sum(report.bound),
        "over": report.over_bound,
        "balance": report.state_balance,
        "text": str(report),
        "measured": (report.measured, report.steps),
    }


@pytest.mark.parametrize(("layout", "world"), [("owners", 2), ("owners", 4), ("rows", 2), ("rows", 3)])
def test_state_and_bytes_are_as_told(layout, world):
    ranks = pool.run(world, told, layout)
    numel = sum(torch.Size(shape).numel() for shape in SHAPES if len(shape) > 1)
    kept = [found["state"][1] for found in ranks]
    for found in ranks:
        assert found["owners"] == ranks[0]["owners"]
        assert found["state"][0] == found["state"][1]
        assert found["sent"][0] == found["sent"][1]
        assert found["measured"] == (found["sent"][1], 2)
        assert "layer0.weight  tile_r0_c0" in found["text"]
        assert found["balance"] == pytest.approx(max(kept) * world / sum(kept))
        assert found["over"] == pytest.approx(1 + 8 * 5 * world * (world - 1) / found["bound"])
    if layout == "owners":  # nothing comes in, every update goes to all others
        assert ranks[0]["bound"] == 4 * numel * (world - 1)


def test_a_plan_on_paper_is_that_of_the_processes():
    optimizer = SOAP([nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES], max_block_size=16)
    paper = on_paper(optimizer.plan.candidates, 4)
    ranks = pool.run(4, told, "owners")
    assert list(paper.state_bytes) == [found["state"][1] for found in ranks]
