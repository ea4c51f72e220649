"""What users see of `sync="owner_hook"`: when it can be had, how gradients are clipped then, what is warned about."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def attach_hook(optimizer: Any, module: nn.Module | None) -> None:
    """Give DDP the hook, where the options ask for it and there is more than one process.

    Args:
        optimizer: Has its options and groups.
        module: What it was given as `module`.

    Raises:
        ValueError: If something is missing, or DDP has a hook already.
    """
    if optimizer._sharing.sync == "ddp":
        return
    sharing, who = optimizer._sharing, type(optimizer).__name__
    if sharing.sharding != "owners":
        raise ValueError(f'{who}: sync="owner_hook" needs sharding="owners", got sharding={sharing.sharding!r}')
    while module is not None and not isinstance(module, nn.parallel.DistributedDataParallel):
        module = getattr(module, "_orig_mod", None)
    if module is None:
        raise ValueError(f'{who}: sync="owner_hook" needs the DistributedDataParallel module as module=')
    group = module.process_group
    if sharing.process_group not in (None, group):
        raise ValueError(f'{who}: sync="owner_hook" needs process_group=None or that of the DDP module')
    optimizer._sharing = sharing._replace(process_group=group)
    world = dist.get_world_size(group)
    if sharing.reproducible and world & (world - 1):
        raise ValueError(f'{who}: sync="owner_hook" with reproducible=True needs 1, 2, 4, ... processes, got {world}')
    if world == 1:
        return
    # Imported here, as the plan is.
    from secondorder.sharding.hook import OwnerHook

    optimizer._hook = hook = OwnerHook(optimizer, group)
    with torch.no_grad():
        optimizer._current()  # who owns what, before the first backward pass
    try:
        # DDP looks at a hook's annotations, and knows no strings.
        module.register_comm_hook(hook, lambda state, bucket: state.reduce(bucket))
    except RuntimeError as error:
        raise ValueError(
            f'{who}: sync="owner_hook" needs a DDP module without a communication hook, and DDP takes one in its life: '
            f"wrap the network in another DistributedDataParallel ({error})"
        ) from error


def warn_uneven(optimizer: Any, wait: bool) -> None:
    """Warn once where gradients were scaled as if they were whole; `wait`: also where a device must be asked."""
    hook = optimizer._hook
    if hook is None or hook.warned or not hook.told(wait):
        return
    hook.warned = True
    warnings.warn(
        f"{type(optimizer).__name__}: gradients were scaled between backward() and step() by factors that differ over "
        'the processes. With sync="owner_hook" each has a part of the gradients, and torch.nn.utils.clip_grad_norm_ '
        "takes the norm of that part: call the optimizer's own clip_grad_norm_",
        stacklevel=5,
    )


def clip_grad_norm_(optimizer: Any, max_norm: float) -> Tensor:
    """Scale all gradients down to a common length of at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

    With `sync="owner_hook"` that function would take the length of a part of the gradients, another one on every
    process. All processes must call this one. Its bits depend on the number of processes, `reproducible` or not.

    Args:
        optimizer: The optimizer.
        max_norm: The largest length; a number >= 0.

    Returns:
        The length before, 0-d.
    """
    with torch.no_grad():
        layout, hook = optimizer._current(), optimizer._hook
        params = [p for p in layout.params if p.grad is not None]
        if hook is None:
            return nn.utils.clip_grad_norm_(params, max_norm)
        norm = hook.norm([p.grad for p in layout.params])
        nn.utils.clip_grads_with_norm_(params, max_norm, norm)
        return norm
