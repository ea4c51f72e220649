"""ZeroRedundancyOptimizer around our classes: `python tests/zero_ranks.py FOLDER RANK WORLD` saves what a rank has."""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import cases

SHAPES = [(6, 5), (6,), (3, 14), (6, 5), (4, 3, 2, 2)]


def options(case):
    # Each rank has a part of the parameters: phases that are spread over all of them would depend on the part.
    return {**case.kwargs, **({"refresh": "together"} if case.takes("refresh") else {})}


def trained(case):
    """Parameters after seven steps, with a checkpoint on rank 0 and a load on all after the fourth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import ZeroRedundancyOptimizer  # uses torch.jit
    params = cases.parameters(SHAPES)
    optimizer = ZeroRedundancyOptimizer(params, optimizer_class=case.build, **options(case))
    cases.train(optimizer, params, range(4))
    optimizer.consolidate_state_dict(to=0)
    saved = [optimizer.state_dict() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    optimizer = ZeroRedundancyOptimizer(params, optimizer_class=case.build, **options(case))
    optimizer.load_state_dict(saved[0])
    cases.train(optimizer, params, range(4, 7))
    return cases.values(params), sum(len(entry) > 0 for entry in optimizer.optim.state.values())


def straight(case):
    """The same without a wrapper, a checkpoint or other ranks."""
    params = cases.parameters(SHAPES)
    cases.train(case.build(params, **options(case)), params, range(7))
    return cases.values(params)


def start(folder, rank, world):
    meeting = f"file://{Path(folder).resolve()}/meeting{world}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)


def main(folder, rank, world):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start(folder, rank, world)
    torch.save({case.cls.__name__: trained(case) for case in cases.OPTIMIZERS}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
