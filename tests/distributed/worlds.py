"""What workers of the pool do: train parameters that are laid out in some way, on the fixed gradients of `cases`."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import cases

# Blocks of whole cache lines: on some CPUs a batched product rounds by a matrix's address.
ALIGNED = [(16, 8), (16,), (8, 64), (8, 4, 2, 2), (), (24, 16), (16, 8)]
LAYOUTS = {
    "owners": (1, 2, 3, 4),
    "rows": (1, 2, 3, 4),
    "columns": (2,),
    "replicas of rows": (4,),
    "rows and columns": (4,),
    "strided rows": (4,),
}


def laid_out(values, layout, world):
    """The same parameters on every rank: plain tensors, or as FSDP2, HSDP and tensor parallelism lay them out."""
    if layout == "owners":
        return [nn.Parameter(value.clone()) for value in values]
    flat = layout in ("rows", "columns")
    mesh = init_device_mesh("cpu", (world,) if flat else (2, world // 2))
    return [nn.Parameter(distribute_tensor(v, mesh, placements(layout, v), src_data_rank=None)) for v in values]


def placements(layout, value):
    """How a tensor is placed on the layout's mesh. Only the first axis need not divide by the number of ranks."""
    if value.ndim == 0:
        return [Replicate()] * (1 if layout in ("rows", "columns") else 2)
    column = Shard(1) if value.ndim > 1 else Shard(0)
    return {
        "rows": [Shard(0)],
        "columns": [column],
        "replicas of rows": [Replicate(), Shard(0)],
        "rows and columns": [Shard(0), column],
        "strided rows": [_StridedShard(0, split_factor=2), Shard(0)],
    }[layout]


def ranges(chosen):
    """Ascending indices as ranges."""
    spans = []
    for i in chosen:
        if spans and spans[-1][1] == i:
            spans[-1] = (spans[-1][0], i + 1)
        else:
            spans.append((i, i + 1))
    return tuple(spans)


def feed(params, step, mask=None):
    """Give every parameter (of which `mask` says so) its gradient of a step."""
    for index, p in enumerate(params):
        grad = cases.gradient(tuple(p.shape), step, index, p.dtype)
        if isinstance(p, DTensor):
            grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
        p.grad = grad if mask is None or mask[index] else None


def whole(p):
    """All of a parameter."""
    p = p.detach()
    return (p.full_tensor() if isinstance(p, DTensor) else p).clone()


def named(params):
    return [(f"layer{i}.weight", p) for i, p in enumerate(params)]


def make(case, params, layout, **options):
    more = {"sharding": "owners"} if layout == "owners" else {}
    return case.make(named(params), **options, **more)


def factor_bytes(optimizer):
    """Bytes of blocks' state on this rank."""
    from secondorder.layout.buckets import Bucket

    stacked = [b for b in optimizer._current().buckets if isinstance(b, Bucket)]
    return sum(t.numel() * t.element_size() for b in stacked for t in b.s.values())


def trained(rank, world, cls, layout, options, steps=8, shapes=ALIGNED, masks=None, dtype=torch.float32):
    """Parameters after training, and what the plan counted."""
    case = next(case for case in cases.OPTIMIZERS if case.cls.__name__ == cls)
    params = laid_out(cases.parameters(shapes, dtype=dtype), layout, world)
    optimizer = make(case, params, layout, **options)
    for step in range(steps):
        feed(params, step, None if masks is None else masks[step])
        optimizer.step()
    plan = optimizer._current().plan
    wires = [wire for wire in (getattr(plan, "inward", None), getattr(plan, "outward", None)) if wire is not None]
    return {
        "values": [whole(p) for p in params],
        "bytes": factor_bytes(optimizer),
        "exchanges": [wire.exchanges for wire in wires],
        "norm": optimizer.diagnostics()["gradient_norm"],
        "state": sorted(cases.flat_state(optimizer)),
    }
