"""Real models, laid out by torch: FSDP2, HSDP, and FSDP2 over tensor parallelism, against one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import secondorder
from distributed import pool, worlds

pytestmark = pytest.mark.dist

CLASSES = ["SOAP", "InverseFreeKLShampoo", "SIRFShampoo", "Shampoo"]
LAYOUTS = [("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4), ("fsdp2 over tensor parallelism", 4)]
STEPS, WIDTH = 5, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, WIDTH), Block(), Block(), nn.Linear(WIDTH, 3)).double()


def shard(model, layout, world):
    if layout == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards"))
    else:
        both = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
        for block in model[1:3]:
            parallelize_module(block, both["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        mesh = both["data"]
    for block in model[1:3]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def data():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(24, n, generator=generator, dtype=torch.float64) for n in (6, 3))


def trained(rank, world, cls, layout):
    model = network()
    ranks = 1
    if layout != "alone":
        shard(model, layout, world)
        ranks = 2 if "tensor" in layout else world
    optimizer = getattr(secondorder, cls)(model.named_parameters(), lr=0.01, max_block_size=8)
    x, y = data()
    part = rank // (world // ranks) if layout != "alone" else 0
    x, y = x.chunk(ranks)[part], y.chunk(ranks)[part]
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    keys = set()
    if layout != "alone":
        keys = set(get_optimizer_state_dict(model, optimizer)["state"])
        dist.barrier()
    owned = worlds.factor_bytes(optimizer)
    return {"values": [worlds.whole(p) for p in model.parameters()], "bytes": owned, "keys": keys}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("layout", "world"), LAYOUTS, ids=lambda v: str(v).replace(" ", "_"))
def test_training_is_that_of_one_process(cls, layout, world):
    one = trained(0, 1, cls, "alone")
    ranks = pool.run(world, trained, cls, layout)
    for found in ranks:
        assert len(found["keys"]) == len(one["values"])
        for ours, theirs in zip(found["values"], one["values"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    assert sum(found["bytes"] for found in ranks) == one["bytes"]
