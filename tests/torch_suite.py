"""A pytest plugin that puts our classes in the place of torch's in torch's own optimizer tests.

`torch.testing._internal.common_optimizers.optim_db` lists the optimizers that upstream's `test_optim.py` (not in the
wheel; see `--torch-tests`) runs over. The list is replaced before that file is imported.
"""

from copy import deepcopy

import torch

import cases

# Away from 0.003 and 0.002, which upstream uses as sentinels.
LR = 0.01


def inputs(case):
    """Arguments with which upstream constructs the class."""
    from torch.testing._internal.common_optimizers import OptimizerInput

    # Explicitly without decay: a test that asks whether zero gradients do nothing looks for it here.
    kwargs = {**case.kwargs, "lr": LR, "weight_decay": 0.0}
    variants = {
        "default": {},
        "tensor lr": dict(lr=torch.tensor(LR)),
        "weight decay": dict(weight_decay=0.1),
        "l2 decay and maximize": dict(weight_decay=0.1, weight_decay_kind="l2", maximize=True),
        "other betas": dict(betas=(0.8, 0.99), eps=1e-6),
        "clipped": dict(max_update_rms=1.0),
        "split": dict(max_block_size=3),
        "without look-ahead, together": dict(nesterov=False, refresh="together", refresh_every=1),
    }
    chosen = {d: v for d, v in variants.items() if all(case.takes(k) or k in kwargs or k in BASIC for k in v)}
    return [OptimizerInput(params=None, kwargs={**kwargs, **v}, desc=d) for d, v in chosen.items()]


BASIC = ("lr", "betas", "eps", "weight_decay")


def errors(device, dtype):
    """Faulty arguments, in torch's wording."""
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerInput,
        get_error_inputs_for_all_optims,
    )

    ours = {
        "Invalid learning rate: -1.0": dict(lr=-1.0),
        "Invalid epsilon value: -1": dict(eps=-1),
        "Invalid beta parameter at index 0: 1.0": dict(betas=(1.0, 0.0)),
        "Invalid weight_decay value: -1": dict(weight_decay=-1),
    }
    return get_error_inputs_for_all_optims(device, dtype) + [
        ErrorOptimizerInput(
            OptimizerInput(params=None, kwargs=kwargs, desc=message), error_type=ValueError, error_regex=message
        )
        for message, kwargs in ours.items()
    ]


def info(case):
    """What upstream must know of a class."""
    from torch.testing._internal.common_optimizers import OptimizerInfo

    return OptimizerInfo(
        case.cls,
        # The tests change what they are given.
        optim_inputs_func=lambda device=None, dtype=None: deepcopy(inputs(case)),
        optim_error_inputs_func=errors,
        supported_impls=(),
        not_og_supported_flags=(),
        has_capturable_arg=False,
        supports_complex=False,
        supports_sparse=False,
    )


def pytest_configure(config):
    from torch.testing._internal import common_optimizers

    common_optimizers.optim_db[:] = [info(case) for case in cases.OPTIMIZERS]
