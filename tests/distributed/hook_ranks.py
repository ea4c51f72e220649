"""What workers of the pool do: train small networks end to end, with micro-batches that have numbers of their own."""

import gc
import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import secondorder
from distributed.worlds import whole

ROWS, INPUTS, OUTPUTS = 8, 16, 8
SHARED = {"fsdp", "hsdp"}


def network(width=32):
    """Sides of whole cache lines: on some CPUs a batched product rounds by a matrix's address."""
    torch.manual_seed(0)
    layers = [nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, OUTPUTS)]
    return nn.Sequential(*layers)


def loss_of(model, step, number):
    """On the micro-batch of this number in a step."""
    g = torch.Generator().manual_seed(1000 * step + number)
    x, y = torch.randn(ROWS, INPUTS, generator=g), torch.randn(ROWS, OUTPUTS, generator=g)
    return (model(x) - y).square().mean()


def wrapped(net, wrap, world, **ddp):
    """The module to call, and the options with which an optimizer works on it."""
    if wrap in SHARED:
        shape, names = ((world,), ("shards",)) if wrap == "fsdp" else ((world, 1), ("replicas", "shards"))
        fully_shard(net, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
        return net, {}
    if wrap == "alone":
        return net, {}
    module = DistributedDataParallel(net, **{"bucket_cap_mb": 0.002, **ddp})  # several buckets
    return module, {"sharding": "owners", "sync": wrap, "module": module}


def backward(module, wrap, step, numbers):
    """All micro-batches of a process; they are added up before gradients travel, once."""
    for number in numbers:
        last = number == numbers[-1]
        if wrap in SHARED:
            module.set_requires_gradient_sync(last)
        with module.no_sync() if wrap in ("ddp", "owner_hook") and not last else nullcontext():
            (loss_of(module, step, number) / len(numbers)).backward()


def numbers(rank, world, batches):
    """Of a process's micro-batches."""
    return range(rank * batches // world, (rank + 1) * batches // world)


def trained(rank, world, wrap, cls, options, batches=4, steps=10, set_to_none=True):
    """Parameters after training."""
    net = network()
    module, more = wrapped(net, wrap, world)
    optimizer = getattr(secondorder, cls)(net.named_parameters(), **options, **more)
    for step in range(steps):
        optimizer.zero_grad(set_to_none)
        backward(module, wrap, step, numbers(rank, world, batches))
        optimizer.step()
    return [whole(p) for p in net.parameters()]


# ---------------------------------------------------------------------- what travels


def counted(rank, world, cls, options, steps=3):
    """Bytes to others in every step: as the collectives see them, as counted, and as planned."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 128, bias=False), nn.Tanh(), nn.Linear(128, 10))
    module = DistributedDataParallel(net, bucket_cap_mb=0.1)
    optimizer = getattr(secondorder, cls)(
        net.named_parameters(), sharding="owners", sync="owner_hook", module=module, **options
    )
    sent, real = [], dist.all_to_all_single

    def watched(received, send, out_splits, in_splits, **more):
        sent[-1] += send.element_size() * (sum(in_splits) - in_splits[rank])
        return real(received, send, out_splits, in_splits, **more)

    dist.all_to_all_single = watched
    try:
        for step in range(steps):
            optimizer.zero_grad()
            sent.append(0)
            module(torch.randn(4, 256, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
    finally:
        dist.all_to_all_single = real
    hook, plan = optimizer._hook, optimizer._current().plan
    return {
        "sent": sent,
        "counted": hook.counted / steps + plan.inward.sent + plan.outward.sent,
        "planned": hook.sent + plan.inward.sent + plan.outward.sent,
        "hook": hook.sent,
        "measured": sum(plan.report().measured),
        "predicted": sum(plan.report().sent[rank]),
        "words": 8 * (world - 1) * (5 + 1),
        "elements": sum(p.numel() for p in net.parameters()),
    }


# ---------------------------------------------------------------------- gradients


class Odd(nn.Module):
    """A convolution, a scalar, a layer that not every process uses, one that nobody uses, one of another optimizer."""

    def __init__(self, dtype):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(16, 6)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.sometimes, self.never, self.foreign = (nn.Linear(6, 6) for _ in range(3))
        self.to(dtype, memory_format=torch.channels_last)

    def forward(self, x, use):
        y = self.linear(self.conv(x).flatten(1)[:, :16]).tanh() * self.scale
        return self.foreign(y + self.sometimes(y) if use else y)


def odd_loss(model, dtype, step, number):
    g = torch.Generator().manual_seed(100 * step + number)
    x = torch.randn(4, 3, 5, 5, generator=g).to(dtype)
    return model(x, (number + step) % 2 == 0).float().square().mean()


def lone_gradients(net, dtype, step, numbers):
    """The sum over micro-batches of one process, without others."""
    net.zero_grad()
    for number in numbers:
        odd_loss(net, dtype, step, number).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def odd_gradients(rank, world, view, dtype):
    """For every step and parameter: the gradient of each process alone, and what the hook leaves here.

    Steps: one pass; two passes with one synchronisation.
    """
    torch.manual_seed(0)
    net = Odd(dtype)
    copies = Odd(dtype)
    module = DistributedDataParallel(
        net, bucket_cap_mb=0.0005, gradient_as_bucket_view=view, find_unused_parameters=True
    )
    mine = [(name, p) for name, p in net.named_parameters() if "foreign" not in name]
    optimizer = secondorder.SOAP(mine, max_block_size=4, lr=0.0, sharding="owners", sync="owner_hook", module=module)
    out = []
    for step, passes in enumerate((1, 1, 2, 2)):
        optimizer.zero_grad()
        net.zero_grad()
        copies.load_state_dict(net.state_dict())
        every = [range(k, k + passes * world, world) for k in range(world)]
        alone = [lone_gradients(copies, dtype, step, every[k]) for k in range(world)]
        for number in every[rank]:
            with nullcontext() if number == every[rank][-1] else module.no_sync():
                odd_loss(module, dtype, step, number).backward()
        left = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
        optimizer.step()
        norm = optimizer._layout.gradient_norm
        out.append({"alone": alone, "left": left, "norm": None if norm is None else float(norm)})
    return out


def gathered(net, wrap):
    """Gradients, put together from all processes where each has a part."""
    grads = [p.grad.clone() for p in net.parameters()]
    if wrap == "owner_hook":
        for g in grads:
            dist.all_reduce(g)
    return grads


def again(rank, world, view):
    """Gradients of two backward passes, both synchronised, and the same in DDP's own way."""
    found = []
    for wrap in ("owner_hook", "ddp"):
        net = network()
        module, more = wrapped(net, wrap, world, gradient_as_bucket_view=view)
        optimizer = secondorder.SOAP(net.named_parameters(), lr=0.0, **more)
        for step in range(4):
            if step != 1:  # where nobody drops them, gradients go on adding up after a step
                optimizer.zero_grad(set_to_none=step != 2)
            for k in range(2):
                loss_of(module, step, world * k + rank).backward()
            found.append(gathered(net, wrap))
            optimizer.step()
    return found[:4], found[4:]


def relaid(rank, world):
    """Parameters after steps before which the layout changed, and the same in DDP's own way."""
    found = []
    for wrap in ("owner_hook", "ddp"):
        net = network()
        module, more = wrapped(net, wrap, world)
        first, last = [list(net[i].named_parameters(f"{i}")) for i in (0, 4)]
        optimizer = secondorder.SOAP(first, lr=1e-2, weight_decay_kind="l2", **more)
        for step in range(4):
            module.zero_grad()
            loss_of(module, step, rank).backward()
            if step == 1:
                optimizer.add_param_group({"params": last})
            if step == 2:
                optimizer.param_groups[0]["weight_decay"] = 0.1
            optimizer.step()
        found.append([whole(p) for p in net.parameters()])
    return found


def poisoned(rank, world):
    """Steps that were refused, and whether parameters stayed, with a nan on the last process."""
    net = network()
    module, more = wrapped(net, "owner_hook", world)
    optimizer = secondorder.SOAP(net.named_parameters(), lr=1e-2, **more)
    before = [whole(p) for p in net.parameters()]
    loss = loss_of(module, 0, rank)
    (loss * float("nan") if rank == world - 1 else loss).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()
        refused = optimizer.diagnostics()["refused_steps"]
    return refused, all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def clipped(rank, world, wrap, how, cls="SOAP"):
    """Parameters, clipped gradients, norms before, and warnings."""
    net = network()
    module, more = wrapped(net, wrap, world)
    optimizer = getattr(secondorder, cls)(net.named_parameters(), lr=1e-2, **more)
    norms, grads = [], []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(4):
            optimizer.zero_grad()
            loss_of(module, step, rank).backward()
            if how == "ours":
                norms.append(float(optimizer.clip_grad_norm_(0.05)))
            elif how == "torch":
                norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.05)))
            grads.append(gathered(net, wrap))
            optimizer.step()
    told = [str(w.message) for w in seen if "clip_grad_norm_" in str(w.message)]
    return {"values": [whole(p) for p in net.parameters()], "grads": grads[0], "norms": norms, "told": told}


# ---------------------------------------------------------------------- start and end


def refusals(rank, world):
    """What the constructor says to options that do not fit."""
    net = network()
    module = DistributedDataParallel(net)
    other = dist.new_group(list(range(world)))
    out = []
    for options in (
        {"sync": "owner_hook", "module": module},
        {"sync": "owner_hook", "sharding": "owners"},
        {"sync": "owner_hook", "sharding": "owners", "module": net},
        {"sync": "owner_hook", "sharding": "owners", "module": module, "process_group": other},
        {"sync": "all_reduce"},
        {"sync": "owner_hook", "sharding": "owners", "module": module, "reproducible": True},
        {"sync": "owner_hook", "sharding": "owners", "module": module},
    ):
        try:
            secondorder.SOAP(net.named_parameters(), **options)
            out.append(None)
        except ValueError as error:
            out.append(str(error))
    return out


def orphaned(rank, world):
    """Gradients of a module whose optimizer is gone, and DDP's own."""
    found = []
    for wrap in ("owner_hook", "ddp"):
        net = network()
        module, more = wrapped(net, wrap, world)
        optimizer = secondorder.SOAP(net.named_parameters(), **more)
        loss_of(module, 0, rank).backward()
        optimizer.step()
        module.zero_grad()
        del optimizer
        more.clear()
        gc.collect()
        loss_of(module, 1, rank).backward()
        found.append([p.grad.clone() for p in net.parameters()])
    return found


def threads_apart(rank, world):
    """What a reproducible optimizer says where processes have different numbers of threads."""
    torch.set_num_threads(1 + rank)
    try:
        optimizer = secondorder.SOAP(network().named_parameters(), sharding="owners", reproducible=True)
        optimizer.state_dict()
    except ValueError as error:
        return str(error)
    finally:
        torch.set_num_threads(1)
    return None
