"""What every rank does in `test_layers.py`: a network of all kinds of layers, stored in some way, and trained.

One process that has all data is the oracle: with `SINGLE` there is no group, and nothing is stored in parts.
"""

import contextlib
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from cases import flat_state
from layer_cases import batch, make, zoo

SINGLE, OWNERS, HOOK, FSDP, LAYERED, HSDP = "single", "owners", "hook", "fsdp", "layered", "hsdp"
SIZE = 12  # samples, for two, three and four ranks
STEPS = 4
CALLS = 6  # of which `traffic` tells


def stored(model, how, world):
    """The network as it is called, and options of the optimizer."""
    if how in (OWNERS, HOOK):
        return DistributedDataParallel(model), {"sharding": "owners", "sync": "owner_hook" if how == HOOK else "ddp"}
    if how == LAYERED:
        for part in (model.conv, model.embed, model.attention, model.hidden, model.head):
            fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
    if how in (FSDP, LAYERED):
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    if how == HSDP:
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicas", "shards")))
    return model, {}


def whole(t):
    t = t.detach()
    return (t.full_tensor() if isinstance(t, DTensor) else t).clone()


def found(model, optimizer):
    """Parameters, and the state of the blocks that are ours."""
    named = {f"parameter {name}": whole(p) for name, p in model.named_parameters()}
    return {**named, **{key: t for key, t in flat_state(optimizer).items() if not isinstance(t, DTensor)}}


def passes(step, rank, world, micro):
    """The micro-batches of a rank: of `world * micro` parts, those that follow each other."""
    parts = [t.tensor_split(world * micro) for t in batch(step, SIZE, torch.float64)]
    return [tuple(part[rank * micro + k] for part in parts) for k in range(micro)]


@contextlib.contextmanager
def unsynchronised(outer, last):
    if isinstance(outer, DistributedDataParallel):
        with contextlib.nullcontext() if last else outer.no_sync():
            yield
    else:
        if hasattr(outer, "set_requires_gradient_sync"):
            outer.set_requires_gradient_sync(last)
        yield


@torch.enable_grad()
def train(rank, world, how, row, micro=1, fisher=False, quiet=True, options=None, **more):
    """Some steps, and what came out; `quiet`: only the last pass of a step synchronises gradients."""
    model = zoo(torch.float64)
    outer, stores = stored(model, how, world)
    optimizer = make(row, outer, list(model.named_parameters()), **stores, **(options or more))
    for step in range(STEPS):
        optimizer.zero_grad()
        for k, (images, tokens, labels) in enumerate(passes(step, rank, world, micro)):
            with unsynchronised(outer, not quiet or k + 1 == micro):
                outputs = outer(images, tokens)
                if fisher:
                    optimizer.fisher_backward(outputs, "cross_entropy", "type-2")
                (F.cross_entropy(outputs, labels) / micro).backward()
        optimizer.step()
    return found(model, optimizer)


@torch.enable_grad()
def traffic(rank, world, how, row, options=None):
    """What the exchanges of a step sent, and how much the copies of eigenbases cost."""
    model = zoo(torch.float64)
    outer, stores = stored(model, how, world)
    optimizer = make(row, outer, list(model.named_parameters()), **stores, **(options or {}))
    frames = []
    for step in range(CALLS):
        backward(outer, optimizer, step, rank, world)
        optimizer.step()
        frames.append(optimizer._frames.exchanges)
    plan, layout = optimizer._layout.plan, optimizer._layout
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        "owners": {(names[id(layout.params[c.piece.index])], c.piece.at): plan.owner(c) for c in layout.candidates},
        "sent": optimizer._reduction.sent,
        "exchanges": optimizer._reduction.exchanges,
        "frames": frames,
        "copied": optimizer._frames.copied,
        "bases_sent": optimizer._frames.sent,
    }


def backward(outer, optimizer, step, rank, world, scale=1):
    ((images, tokens, labels),) = passes(step, rank, world, 1)
    optimizer.zero_grad()
    (scale * F.cross_entropy(outer(images, tokens), labels)).backward()


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.up, self.down, self.head = nn.Linear(6, 4), nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)) + self.down(torch.tanh(self.up(torch.tanh(self.first(x))))))


@torch.enable_grad()
def tensor_parallel(rank, world, hidden):
    """Two layers in parts, the others whole on every rank; `hidden`: the optimizer sees it in a forward pass alone."""
    model = Halves()
    mesh = init_device_mesh("cpu", (world,))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if hidden:
        model.__class__ = type("FSDPModule", (Halves,), {})
    optimizer = make("KFAC", model, list(model.named_parameters()), weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*without their forward pass")
        for step in range(2):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    return str(optimizer.coverage())


@torch.enable_grad()
def branches(rank, world, how):
    """A layer that rank 0 alone uses, and not in every step."""
    torch.manual_seed(0)
    trunk, branch, head = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
    model = nn.ModuleDict({"trunk": trunk, "branch": branch, "head": head}).double()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x, taken):
            x = torch.tanh(self.parts["trunk"](x))
            return self.parts["head"](
                torch.tanh(self.parts["branch"](x))
                if taken
                else x + 0 * sum(p.sum() for p in self.parts["branch"].parameters())
            )

    outer = network = Network()
    more = {}
    if how == OWNERS:
        outer, more = DistributedDataParallel(network), {"sharding": "owners"}
    elif how == FSDP:
        fully_shard(network, mesh=init_device_mesh("cpu", (world,)))
    optimizer = make("split", outer, list(network.named_parameters()), **more)
    for step in range(STEPS):
        x, _, labels = batch(step, SIZE, torch.float64)
        x = x.flatten(1)[:, :6]
        optimizer.zero_grad()
        ranks = range(2) if how == SINGLE else [rank]
        outputs = torch.cat([outer(x.tensor_split(2)[r], r == 0 and step % 2 == 1) for r in ranks])
        F.cross_entropy(outputs, torch.cat([labels.tensor_split(2)[r] for r in ranks])).backward()
        optimizer.step()
    return found(network, optimizer)


@torch.enable_grad()
def lone(rank, world, how, row):
    """One layer: all ranks but one have no block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3)).double()
    outer, stores = stored(model, how, world)
    optimizer = make(row, outer, list(model.named_parameters()), **stores)
    for step in range(STEPS):
        ((images, _, labels),) = passes(step, rank, world, 1)
        optimizer.zero_grad()
        F.cross_entropy(outer(images.flatten(1)[:, :6]), labels).backward()
        optimizer.step()
    return found(model, optimizer)


class Tied(nn.Module):
    """The embedding is the head, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.hidden = nn.Embedding(5, 6), nn.LayerNorm(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 5)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(x + torch.tanh(self.hidden(self.norm(x))))


@torch.enable_grad()
def tied(rank, world, how, row):
    """A weight used both ways, and biases in a group of their own."""
    model = Tied().double()
    outer, stores = stored(model, how, world)
    apart = [model.norm.bias, model.hidden.bias]
    others = [p for p in model.parameters() if all(p is not q for q in apart)]
    optimizer = make(row, outer, [{"params": others}, {"params": apart, "lr": 0.01}], **stores)
    for step in range(STEPS):
        ((_, tokens, _),) = passes(step, rank, world, 1)
        optimizer.zero_grad()
        F.cross_entropy(outer(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    return found(model, optimizer)


@torch.enable_grad()
def scaled(rank, world, how):
    """A loss scale, which the gradients do not carry any more."""
    model = zoo(torch.float64)
    outer, stores = stored(model, how, world)
    optimizer = make("KFAC", outer, list(model.named_parameters()), **stores)
    for step in range(2):
        backward(outer, optimizer, step, rank, world, 1024)
        for p in model.parameters():
            p.grad.div_(1024)
        optimizer.step()
    return found(model, optimizer)


@torch.enable_grad()
def skipping(rank, world, how, skips):
    model = zoo(torch.float64)
    outer, stores = stored(model, how, world)
    optimizer = make("KFAC", outer, list(model.named_parameters()), **stores)
    for step in range(2):
        if skips:
            backward(outer, optimizer, 10 + step, rank, world)
            model.zero_grad()
        backward(outer, optimizer, step, rank, world)
        optimizer.step()
    return found(model, optimizer)


@torch.enable_grad()
def refused(rank, world, options):
    model = zoo(torch.float64)
    outer, more = stored(model, OWNERS, world)
    optimizer = make("KFAC", outer, list(model.named_parameters()), **more, **options, weight_decay=0.0)
    images, tokens, labels = batch(0, SIZE, torch.float64)

    def closure():
        loss = F.cross_entropy(outer(images, tokens), labels)
        loss.backward()
        return loss

    try:
        optimizer.step(closure)
    except ValueError as error:
        return str(error)
    finally:
        dist.barrier()
    return None
