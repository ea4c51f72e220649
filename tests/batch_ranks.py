"""Root-free methods that count their batches, on two processes or one: `python tests/batch_ranks.py FOLDER RANK`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import secondorder

# With B in the step: SIRFShampoo's default (`normalize`) divides it out again.
METHODS = {
    "RFAdamW": dict(lr=0.05),
    "RFRMSProp": dict(lr=0.01),
    "SIRFShampoo": dict(lr=0.05, normalize=False, max_update_rms=None),
    "IFShampoo": dict(lr=0.05, normalize=False, max_update_rms=None),
    "SpectralFactorized": dict(lr=0.01, exponent=1.0),
}
SIZES = [12, 12, 4, 8]  # of the batches


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batch(step, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(0, 3, (size,), generator=generator)


def trained(name, rank=0, world=1, micro=1, wrapped=True, **options):
    """Parameters after some steps on equal parts of every batch, on so many ranks."""
    model = network()
    outer = model if world == 1 else DistributedDataParallel(model)
    options = {"module": outer if wrapped else model, "batch_size": "count", **METHODS[name], **options}
    optimizer = getattr(secondorder, name)(model.parameters(), **options)
    for step, size in enumerate(SIZES):
        optimizer.zero_grad()
        x, y = (t[rank::world] for t in batch(step, size))
        for k in range(micro):
            (F.cross_entropy(outer(x[k::micro]), y[k::micro]) / micro).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def main(folder, rank, world=2):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{Path(folder).resolve()}/meeting", rank=rank, world_size=world)
    every = [*((name, 2, True) for name in METHODS), ("RFAdamW", 1, True), ("RFAdamW", 2, False)]
    results = {how: trained(how[0], rank, world, micro=how[1], wrapped=how[2]) for how in every}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
