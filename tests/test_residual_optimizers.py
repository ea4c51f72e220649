"""What optimizers that step by residuals promise: no increase, resuming, failures, closures with a loss, groups."""

import copy
import dataclasses
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from cases import assert_same_state, flat_state
from residual_cases import dense, flat, off, small
from secondorder.adamw import AdamW
from secondorder.engdw import ENGDW
from secondorder.residuals import system as step_module
from secondorder.residuals.terms import least_squares, residual_terms, term
from secondorder.spring import SPRING

# Promises -------------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 100),
    search=st.sampled_from(["geodesic", "bracket", "grid"]),
    damping=st.sampled_from([(1e-12, "relative"), (1e-2, "relative"), (0.0, "absolute"), (1e-8, "adaptive")]),
    lr=st.sampled_from([1.0, 0.3, 3.0]),
    memory=st.sampled_from([None, 0.5, 0.95, "adaptive"]),
)
def test_the_loss_never_increases(seed, search, damping, lr, memory):
    net, closure = small(seed)
    kind = {"damping": damping[0], "damping_kind": damping[1]}
    if memory is None:
        opt = ENGDW(net.parameters(), lr, line_search=search, **kind)
    else:
        opt = SPRING(net.parameters(), lr, line_search=search, momentum=memory, **kind)
    losses = [float(opt.step(closure)) for _ in range(8)]
    assert all(after <= before for before, after in zip(losses, losses[1:], strict=False)), losses
    assert opt.diagnostics()["refused_steps"] == 0


def test_points_drawn_in_the_closure_stay_through_a_step():
    net, _ = small()
    seen = []

    def closure():
        x = torch.rand(12, 2, dtype=torch.float64)
        seen.append(x)
        return [net(x)[:, 0] - x.prod(1)]

    opt = ENGDW(net.parameters())
    torch.manual_seed(3)
    opt.step(closure)
    first = len(seen)
    opt.step(closure)
    torch.manual_seed(3)
    expected = [torch.rand(12, 2, dtype=torch.float64) for _ in range(2)]
    assert first > 2 and len(seen) > first + 1
    assert all(torch.equal(x, expected[0]) for x in seen[:first])
    assert all(torch.equal(x, expected[1]) for x in seen[first:])


def make(name, net, **options):
    if name == "ENGDW":
        return ENGDW(net.parameters(), damping=1e-8, damping_kind="adaptive", **options)
    if name == "CG":
        return ENGDW(net.parameters(), damping=1e-6, solver="cg", **options)
    if name == "adaptive":
        return SPRING(net.parameters(), **options)
    if name == "Nystrom":
        return ENGDW(net.parameters(), damping=1e-3, solver="nystrom", **options)
    return SPRING(net.parameters(), momentum=0.8, damping=1e-6, **options)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("way", ["state_dict", "file", "deepcopy", "pickle", "dcp"])
@pytest.mark.parametrize("name", ["ENGDW", "SPRING", "adaptive", "CG", "Nystrom"])
def test_resume_bit_for_bit(name, way, tmp_path):
    net, closure = small()
    opt = make(name, net)
    for _ in range(4):
        opt.step(closure)
    if way == "deepcopy":
        net2, opt2 = copy.deepcopy((net, opt))
        assert opt2.param_groups[0]["params"][0] is net2[0].weight
    elif way == "pickle":
        net2, opt2 = pickle.loads(pickle.dumps((net, opt)))
    elif way == "dcp":
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        dcp.save(get_optimizer_state_dict(net, opt, options=options), checkpoint_id=tmp_path, no_dist=True)
        net2 = copy.deepcopy(net)
        opt2 = make(name, net2)
        target = get_optimizer_state_dict(net2, opt2, options=options)
        dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(net2, opt2, target, options=options)
    else:
        saved = {"net": net.state_dict(), "opt": opt.state_dict()}
        if way == "file":
            torch.save(saved, file := io.BytesIO())
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        saved = copy.deepcopy(saved)
        net2 = small()[0]
        net2.load_state_dict(saved["net"])
        opt2 = make(name, net2)
        opt2.load_state_dict(saved["opt"])
    _, closure2 = small(net=net2)
    for _ in range(4):
        assert torch.equal(opt.step(closure), opt2.step(closure2))
    assert torch.equal(flat(net.parameters()), flat(net2.parameters()))


@pytest.mark.parametrize("name", ["ENGDW", "SPRING"])
def test_a_failed_step_changes_nothing(name):
    net, closure = small()
    opt = make(name, net)
    opt.step(closure)
    before, groups, state = flat(net.parameters()), copy.deepcopy(opt.state_dict()["param_groups"]), flat_state(opt)

    def broken():
        found = closure()
        return {**found, "interior": found["interior"] * math.nan}

    with pytest.warns(UserWarning, match="refused"):
        assert math.isnan(float(opt.step(broken)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(broken)
    assert torch.equal(flat(net.parameters()), before)
    assert opt.state_dict()["param_groups"] == groups
    assert_same_state(flat_state(opt), state, but="step")
    assert opt.diagnostics()["refused_steps"] == 2
    opt.step(closure)
    assert not torch.equal(flat(net.parameters()), before)
    raising = make(name, net, on_nonfinite="raise")
    with pytest.raises(RuntimeError, match="not finite"):
        raising.step(broken)


def test_a_failed_solve_changes_nothing(monkeypatch):
    net, closure = small()
    opt, raising = ENGDW(net.parameters()), ENGDW(net.parameters(), on_nonfinite="raise")
    opt.step(closure)
    before, state = flat(net.parameters()), flat_state(opt)
    factorize = step_module.factorize
    monkeypatch.setattr(
        step_module, "factorize", lambda *args: dataclasses.replace(factorize(*args), ok=torch.tensor(False))
    )
    with pytest.warns(UserWarning, match="could not be solved"):
        opt.step(closure)
    with pytest.raises(RuntimeError, match="could not be solved"):
        raising.step(closure)
    assert torch.equal(flat(net.parameters()), before)
    assert_same_state(flat_state(opt), state, but="step")
    assert opt.diagnostics()["refused_steps"] == 1


def test_an_error_in_the_search_restores_parameters():
    net, closure = small()
    opt = ENGDW(net.parameters())
    opt.step(closure)
    before, calls = flat(net.parameters()), []

    def failing():
        calls.append(None)
        if len(calls) == 3:
            raise KeyError("data")
        return closure()

    with pytest.raises(KeyError, match="data"):
        opt.step(failing)
    assert torch.equal(flat(net.parameters()), before)


@pytest.mark.parametrize("name", ["ENGDW", "SPRING"])
@pytest.mark.parametrize(
    "option",
    [
        {"maximize": True},
        {"weight_decay_kind": "l2"},
        {"max_update_rms": 1.0},
        {"param_rounding": "stochastic"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_only_adamw_has_are_refused_in_a_step_by_residuals(name, option):
    net, closure = small()
    opt = make(name, net, **option)
    before, state = flat(net.parameters()), flat_state(opt)
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be .* residuals"):
        opt.step(closure)
    assert torch.equal(flat(net.parameters()), before)
    assert_same_state(flat_state(opt), state)
    with pytest.warns(UserWarning, match="AdamW takes the step"):
        opt.step(loss_closure(net, closure, opt.zero_grad))
    assert not torch.equal(flat(net.parameters()), before)


# Where there are no residuals -----------------------------------------------------------------------------------------


def loss_closure(net, closure, zero):
    def plain():
        zero()
        loss = residual_terms(closure()).loss()
        loss.backward()
        return loss

    return plain


@pytest.mark.parametrize(("name", "scale"), [("ENGDW", 1e-3), ("SPRING", 0.01)])
def test_a_loss_trains_by_adamw(name, scale):
    net, closure = small()
    twin, twins = small()
    opt = make(name, net)
    reference = AdamW(twin.parameters(), lr=opt.defaults["lr"] * scale, weight_decay=0.0)
    with pytest.warns(UserWarning, match="AdamW takes the step"):
        first = opt.step(loss_closure(net, closure, opt.zero_grad))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(loss_closure(net, closure, opt.zero_grad))
        opt.zero_grad()
        residual_terms(closure()).loss().backward()
        assert opt.step() is None
    for _ in range(3):
        reference.step(loss_closure(twin, twins, reference.zero_grad))
    assert first.requires_grad and torch.allclose(flat(net.parameters()), flat(twin.parameters()), rtol=1e-12)


@pytest.mark.parametrize("name", ["ENGDW", "SPRING"])
def test_a_least_squares_loss_trains_by_adamw(name):
    """The loop without a closure; the state that is read before it takes no step, and says nothing."""
    net, closure = small()
    opt = make(name, net, fallback_lr_scale=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        get_optimizer_state_dict(net, opt)
    losses = []
    with pytest.warns(UserWarning, match=f"{name}: .*AdamW takes the step") as caught:
        for _ in range(60):
            opt.zero_grad()
            loss = least_squares(**closure())
            loss.backward()
            opt.step()
            losses.append(float(loss.detach()))
    assert len(caught) == 1 and losses[-1] < 0.9 * losses[0]
    assert losses[0] == pytest.approx(residual_terms(small()[1]()).loss().item(), rel=1e-12)


def test_a_loss_after_residuals_counts_once():
    """A closure that adds to gradients, where the optimizer expected residuals: it is called again, after nothing."""
    net, closure = small()
    opt = ENGDW(net.parameters())
    opt.step(closure)
    calls = []

    def plain():
        calls.append(None)
        loss = residual_terms(closure()).loss() + net[2].bias.exp().sum()
        loss.backward()
        return loss

    before = flat(p.grad for p in net.parameters())
    loss = residual_terms(closure()).loss() + net[2].bias.exp().sum()
    expected = before + flat(torch.autograd.grad(loss, list(net.parameters())))
    with pytest.warns(UserWarning, match="AdamW takes the step"):
        opt.step(plain)
    assert off(flat(p.grad for p in net.parameters()), expected) < 1e-12 and len(calls) == 2
    opt.step(plain)
    assert len(calls) == 3


# Interface ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"line_search": "golden"}, ValueError, "line_search"),
        ({"damping": -1.0}, ValueError, "damping"),
        ({"damping_kind": "none"}, ValueError, "damping_kind"),
        ({"form": "both"}, ValueError, "form"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"solver": "lu"}, ValueError, "solver"),
        ({"rank": 0}, ValueError, "rank"),
        ({"solver": "cg", "form": "dual"}, ValueError, "form must be 'auto' with solver='cg'"),
    ],
)
def test_refused_options(options, error, text):
    with pytest.raises(error, match=text):
        ENGDW(small()[0].parameters(), **options)


def test_groups_share_one_system():
    net, _ = small()
    with pytest.raises(ValueError, match="damping must be"):
        ENGDW([{"params": net[0].parameters()}, {"params": net[2].parameters(), "damping": 1.0}])


@pytest.mark.parametrize("name", ["ENGDW", "SPRING"])
def test_reports(name):
    net, closure = small()
    opt = make(name, net)
    opt.track()
    opt.step(closure)
    rows = opt.coverage().rows
    assert {row.treatment for row in rows} == {name} and "AdamW" in rows[0].reason
    found = opt.diagnostics()
    moved = {"loss", "damping", "increment_norm", "step_size", "update_norm"}
    assert all(found[key] > 0 for key in moved) and found["refused_steps"] == 0
    assert opt.memory_report().total > 0


@pytest.mark.parametrize("name", ["ENGDW", "SPRING"])
def test_lr_of_zero_and_a_group_that_comes_later(name):
    net, closure = small()
    opt = (ENGDW if name == "ENGDW" else SPRING)([{"params": net[0].parameters(), "lr": 0.0}], damping=1e-6)
    before = flat(net.parameters())
    loss = opt.step(closure)
    assert torch.equal(flat(net.parameters()), before)
    assert net[0].weight.grad.norm() > 0 and net[2].weight.grad is None
    opt.add_param_group({"params": net[2].parameters(), "lr": 1.0 if name == "ENGDW" else 0.05})
    losses = [loss, *(opt.step(closure) for _ in range(3))]
    assert torch.equal(flat(net[0].parameters()), before[: net[0].weight.numel() + net[0].bias.numel()])
    assert losses[0] == losses[1] > losses[2] > losses[3]


def test_autocast_around_the_step():
    """All evaluations of a step see it, or a search compares losses of different precisions."""
    net, closure = small(dtype=torch.float32)
    seen = []

    def noticing():
        seen.append(torch.is_autocast_enabled("cpu"))
        return {name: r.float() for name, r in closure().items()}

    with torch.autocast("cpu", torch.bfloat16):
        ENGDW(net.parameters(), damping=1e-3).step(noticing)
    assert len(seen) > 3 and all(seen)


def test_scheduler_and_float32():
    net, closure = small(dtype=torch.float32)
    opt = ENGDW(net.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    losses = []
    for _ in range(30):
        losses.append(float(opt.step(closure)))
        schedule.step()
    assert losses[-1] < 0.05 * losses[0] and losses == sorted(losses, reverse=True), losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ENGDW", "SPRING"])
def test_half_precision(name, dtype):
    """Products are rounded, the system is float64: with a damping that rounding allows, training goes on."""
    net, closure = small(dtype=dtype)
    opt = ENGDW(net.parameters(), damping=1e-2) if name == "ENGDW" else SPRING(net.parameters(), damping=1e-1)
    losses = [float(opt.step(closure)) for _ in range(20)]
    assert min(losses) < 0.7 * losses[0] and all(p.dtype == dtype and p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", ["ENGDW", "SPRING"])
def test_a_parameter_that_is_unfrozen(name):
    """From then on it is one of the system's; what was learned of the others stays."""
    net, closure = small()
    net[0].weight.requires_grad_(False)
    opt = make(name, net, lr=0.1) if name == "SPRING" else make(name, net)
    before = net[0].weight.clone()
    losses = [float(opt.step(closure)) for _ in range(3)]
    assert torch.equal(net[0].weight, before) and net[0].weight.grad is None
    net[0].weight.requires_grad_(True)
    losses += [float(opt.step(closure)) for _ in range(3)]
    assert not torch.equal(net[0].weight, before) and losses[-1] < losses[3] < losses[0]
    assert opt.param_groups[0]["residual_steps"] == 6 and int(opt.state[net[0].weight]["step"]) == 3


@pytest.mark.parametrize("name", ["ENGDW", "SPRING"])
def test_gradients_are_left_for_clipping(name):
    net, closure = small()
    r, J = dense(closure, list(net.parameters()))
    opt = make(name, net)
    opt.step(closure)
    gradient = flat(p.grad for p in net.parameters())
    assert off(gradient, J.mT @ r) < 1e-12
    assert float(nn.utils.clip_grad_norm_(net.parameters(), 1e-3)) == pytest.approx(float(gradient.norm()), rel=1e-12)
    before = flat(net.parameters())
    opt.step(closure)
    assert not torch.equal(flat(net.parameters()), before)


def test_a_network_that_changes_its_mode_is_linearised_anew():
    """Batch normalisation couples samples in training alone: rows that were right in `eval()` are wrong then."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double()
    x = torch.rand(12, 2, dtype=torch.float64)
    opt = ENGDW(net.parameters(), line_search=None, damping=1e-3, module=net)

    def closure():
        return {"data": net(x)[:, 0] - x.prod(1)}

    for mode in (False, True, False):
        net.train(mode)
        statistics = copy.deepcopy(net[1].state_dict())
        r, J = dense(closure, list(net.parameters()))
        shift = 1e-3 * J.square().sum() / len(r)
        step = torch.linalg.solve(J.mT @ J + shift * torch.eye(J.shape[1], dtype=J.dtype), J.mT @ r)
        net[1].load_state_dict(statistics)
        before = flat(net.parameters())
        opt.step(closure)
        assert off(before - flat(net.parameters()), step) < 1e-7, mode


def test_a_penalty_is_a_residual_of_its_own():
    """As the refusal of l2 decay says."""
    net, closure = small()
    x = torch.rand(9, 2, dtype=torch.float64)
    opt = ENGDW(net.parameters())
    loss = opt.step(lambda: [net(x)[:, 0], *(term(p, 0.1, "sum") for p in net.parameters())])
    decay = 0.05 * flat(net.parameters()).square().sum()
    twin, _ = small()
    assert loss.item() == pytest.approx(
        (0.5 * twin(x).square().mean() + 0.05 * flat(twin.parameters()).square().sum()).item()
    )
    assert opt.diagnostics()["step_size"] > 0 and decay < 0.05 * flat(twin.parameters()).square().sum()


@pytest.mark.parametrize("coupled", [False, True])
def test_a_compiled_network_is_called_as_it_was_written(coupled):
    """A compiled graph shows no calls to be recorded, has no second derivatives, and its loss rounds differently."""
    (net, _), (twin, _) = small(), small()
    x, calls = torch.rand(8, 2, dtype=torch.float64), []

    def counting(graph, inputs):
        return lambda *args: calls.append(None) or graph.forward(*args)

    def closure_of(called):
        return lambda: [(u := called(x)[:, 0]) - x.prod(1) - coupled * u.mean()]

    compiled = torch.compile(net, backend=counting)
    opt, reference = ENGDW(net.parameters()), ENGDW(twin.parameters())
    for _ in range(2):
        assert opt.step(closure_of(compiled)) == reference.step(closure_of(twin))
        assert len(calls) == 1  # when nobody knew that there would be residuals
    assert off(flat(net.parameters()), flat(twin.parameters())) < 1e-10
    assert opt.diagnostics()["increment_norm"] > 0 and opt.diagnostics()["step_size"] > 0


def test_a_group_that_joins_takes_part_in_the_clock():
    net, closure = small()
    opt = SPRING(net[0].parameters(), damping=1e-6)
    opt.step(closure)
    opt.step(closure)
    opt.add_param_group({"params": net[2].parameters()})
    opt.step(closure)
    assert [g["residual_steps"] for g in opt.param_groups] == [3, 3]


def test_autograd_notices_the_step():
    net, closure = small()
    loss = residual_terms(closure()).loss()
    ENGDW(net.parameters()).step(closure)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_how_rows_are_had_is_told():
    net, closure = small()
    opt = ENGDW(net.parameters())
    assert all("J by" not in row.reason for row in opt.coverage())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure)
    assert all(row.reason.endswith("; J by 'expand'") for row in opt.coverage())

    def coupled():
        found = closure()
        return {**found, "interior": found["interior"] - found["interior"].square().mean()}

    opt = ENGDW(net.parameters())
    with pytest.warns(UserWarning, match="pass of autograd: rows do not give"):
        opt.step(coupled)
    assert all(row.reason.endswith("; J by 'matvec'") for row in opt.coverage())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(coupled)
