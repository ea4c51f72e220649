"""Layer methods trained by several processes, and by one: `torchrun tests/layer_ranks.py FOLDER` saves what came out.

Every scenario is a function of the rank and the number of ranks, and returns parameters and state. With one rank there
is no wrapper, and the batch is whole.
"""

import contextlib
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cases import flat_state
from layer_cases import batch, make, zoo

SIZE = 12  # samples, for two and for three ranks
STEPS = 4


def wrapped(model, world, **more):
    return model if world == 1 else DistributedDataParallel(model, **more)


def part(tensors, rank, world):
    return tuple(t[rank::world] for t in tensors)


def found(model, optimizer):
    """Everything to be compared, by name."""
    named = {f"parameter {name}": p.detach().clone() for name, p in model.named_parameters()}
    return {**named, **flat_state(optimizer), "coverage": str(optimizer.coverage())}


def mean(rank, world, row="KFAC", dtype=torch.float64, given=True, **options):
    """Everything given, or found: the wrapper alone, or nothing but the network inside."""
    model = zoo(dtype)
    outer = wrapped(model, world)
    more = {"process_group": dist.group.WORLD} if given and world > 1 else {}
    optimizer = make(row, model if not given else outer, model.parameters(), **more, **options)
    for step in range(STEPS):
        images, tokens, labels = part(batch(step, SIZE, dtype), rank, world)
        optimizer.zero_grad()
        F.cross_entropy(outer(images, tokens), labels).backward()
        optimizer.step()
        if rank == 0 and world > 1:  # one rank alone may look, and save
            optimizer.state_dict(), optimizer.diagnostics(), optimizer.curvature(model.hidden.weight)
    return found(model, optimizer)


def inside(rank, world):
    return mean(rank, world, given=False)


def factors(rank, world):
    """Of a network that stays where it is."""
    return mean(rank, world, lr=0.0)


def factors_in_single_precision(rank, world):
    return mean(rank, world, lr=0.0, dtype=torch.float32)


def ekfac(rank, world):
    return mean(rank, world, "split")


def singd(rank, world):
    return mean(rank, world, "SINGD")


def total(rank, world, row="KFAC"):
    """A sum, multiplied by the number of ranks, since the wrapper averages gradients."""
    model = zoo(torch.float64)
    outer = wrapped(model, world)
    optimizer = make(row, outer, model.parameters(), loss_reduction="sum")
    for step in range(STEPS):
        images, tokens, labels = part(batch(step, SIZE, torch.float64), rank, world)
        optimizer.zero_grad()
        (world * F.cross_entropy(outer(images, tokens), labels, reduction="sum")).backward()
        optimizer.step()
    return found(model, optimizer)


def ikfac_total(rank, world):
    return total(rank, world, "structured")


def accumulation(rank, world, row="split"):
    """Two backward passes a step, the first one without synchronisation; one rank takes the batch whole."""
    model = zoo(torch.float64)
    outer = wrapped(model, world)
    optimizer = make(row, outer, model.parameters())
    micro = 1 if world == 1 else 2
    for step in range(STEPS):
        mine = part(batch(step, SIZE, torch.float64), rank, world)
        optimizer.zero_grad()
        for k in range(micro):
            images, tokens, labels = part(mine, k, micro)
            with outer.no_sync() if world > 1 and k + 1 < micro else contextlib.nullcontext():
                (F.cross_entropy(outer(images, tokens), labels) / micro).backward()
        optimizer.step()
    return found(model, optimizer)


def ikfac_accumulation(rank, world):
    return accumulation(rank, world, "structured")


def fisher(rank, world):
    model = zoo(torch.float64)
    outer = wrapped(model, world)
    optimizer = make("KFAC", outer, model.parameters())
    for step in range(STEPS):
        images, tokens, labels = part(batch(step, SIZE, torch.float64), rank, world)
        optimizer.zero_grad()
        outputs = outer(images, tokens)
        optimizer.fisher_backward(outputs, "cross_entropy", "type-2")
        F.cross_entropy(outputs, labels).backward()
        optimizer.step()
    return found(model, optimizer)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.branch, self.head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x, taken):
        x = torch.tanh(self.trunk(x))
        return self.head(torch.tanh(self.branch(x)) if taken else x)


def branches(rank, world):
    """The samples of rank r take the branch in the steps whose number leaves no remainder by r + 1."""
    model = Branches().double()
    outer = wrapped(model, world, find_unused_parameters=True)
    optimizer = make("KFAC", outer, model.parameters())
    for step in range(STEPS):
        optimizer.zero_grad()
        images, _, labels = batch(step, SIZE, torch.float64)
        x = images.flatten(1)[:, :6]
        if world == 1:
            parts = [part((x, labels), r, WORLD) for r in range(WORLD)]
        else:
            parts = [part((x, labels), rank, world)]
        outputs = torch.cat([outer(x, (step + 1) % (r + 1) == 0) for r, (x, _) in enumerate(parts, start=rank)])
        F.cross_entropy(outputs, torch.cat([y for _, y in parts])).backward()
        optimizer.step()
    return found(model, optimizer)


class Shortcuts(nn.Module):
    """`seen` is called on rank 0 alone, `unseen` on none: elsewhere their parameters are used without a call."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.seen, self.unseen, self.rank = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3), rank

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = self.seen(x) if self.rank == 0 else F.linear(x, self.seen.weight, self.seen.bias)
        return F.linear(torch.tanh(x), self.unseen.weight, self.unseen.bias)


def shortcuts(rank, world):
    model = Shortcuts(rank).double()
    outer = wrapped(model, world)
    optimizer = make("KFAC", outer, model.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*without their forward pass")
        for step in range(STEPS):
            images, _, labels = part(batch(step, SIZE, torch.float64), rank, world)
            optimizer.zero_grad()
            F.cross_entropy(outer(images.flatten(1)[:, :6]), labels).backward()
            optimizer.step()
    return found(model, optimizer)


def alone(rank, world):
    """No wrapper: every process trains a network of its own."""
    model = zoo(torch.float64)
    optimizer = make("KFAC", model)
    for step in range(STEPS):
        images, tokens, labels = batch(10 * rank + step, SIZE, torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(model(images, tokens), labels).backward()
        optimizer.step()
    return found(model, optimizer)


SCENARIOS = (mean, inside, factors, factors_in_single_precision, ekfac, total, accumulation, fisher, branches)
SCENARIOS += (shortcuts, alone, singd, ikfac_total, ikfac_accumulation)
WORLD = 2  # the number of ranks that one process stands for in `branches`


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {scenario.__name__: scenario(rank, world) for scenario in SCENARIOS}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
