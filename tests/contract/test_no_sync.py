"""No step waits for the device: on the meta device, where any host read of a value raises, training runs."""

import pytest
import torch
from torch import nn

import cases
from cases import SHAPES


@cases.variants(
    default={},
    split={"max_block_size": 3},
    together={"refresh": "together"},
    eigh={"refresh_by": "eigh"},
    skip={"first": "skip"},
    clipped={"max_update_rms": 1.0},
    l2={"weight_decay_kind": "l2", "weight_decay": 0.1},
    coupled={"weight_decay_kind": "coupled", "weight_decay": 0.1, "maximize": True},
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_steps_past_refreshes_read_nothing(case, options, tensor_lr):
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    more = {"lr": torch.tensor(0.1, device="meta")} if tensor_lr else {}
    optimizer = case.make(params, **{**options, **more})
    for step in range(8):
        for i, p in enumerate(params):
            p.grad = None if i == 1 and step == 3 else torch.empty_like(p)
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [8, 7, *[8] * (len(SHAPES) - 2)]


def test_the_meta_device_would_notice(case):
    """Asking for an exception reads the device, and says so."""
    params = [nn.Parameter(torch.empty(4, 3, device="meta"))]
    optimizer = case.make(params, on_nonfinite="raise")
    params[0].grad = torch.empty_like(params[0])
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimizer.step()


def test_state_and_reports_of_meta_parameters(case):
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = case.make(params)
    assert len(optimizer.coverage()) == len(SHAPES)
    assert optimizer.memory_report().total > 0
    optimizer.state_dict()
