"""Damping, learning rate and momentum from a quadratic model of the loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cases
import secondorder
from adapting import BASE, CLASSES, LOSSES, closure_of, least_squares, linear, normal, optimize, tanh
from secondorder._quadratic import minimum

# ---------------------------------------------------------------------- the quadratic model


@pytest.mark.parametrize("mode", ["lr", "lr_and_momentum"])
def test_a_quadratic_problem_is_solved_in_one_step(mode):
    model, x, y = linear()
    optimizer = optimize(model, quadratic_model=mode, loss="mse", damping=0.0)
    optimizer.step(closure_of(optimizer, model, x, y))
    assert optimizer.diagnostics()["lr"] == pytest.approx(1, abs=1e-10)  # Newton's step
    torch.testing.assert_close(F.mse_loss(model(x), y), least_squares(x, y), rtol=1e-12, atol=0)


def test_on_a_quadratic_the_model_makes_conjugate_gradients():
    """A fixed preconditioner (no refresh: a diagonal one), d unknowns: d steps."""
    model, x, y = linear(3, 1)
    x = x @ (torch.eye(3) + 1.0).double()  # correlated inputs, for which a diagonal is a poor preconditioner
    diagonal = dict(damping=0.0, refresh_every=1000, refresh="together")
    optimizer = optimize(model, quadratic_model="lr_and_momentum", loss="mse", **diagonal)
    for step in range(4):
        off = float((F.mse_loss(model(x), y) - least_squares(x, y)).detach())
        assert off > 1e-5, step
        optimizer.step(closure_of(optimizer, model, x, y))
    assert abs(float((F.mse_loss(model(x), y) - least_squares(x, y)).detach())) < 1e-10


def jacobian(model, x):
    """`(outputs, parameters)` of all outputs flattened, and the outputs."""
    names, params = zip(*model.named_parameters(), strict=True)

    def outputs(*tensors):
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,))

    parts = torch.autograd.functional.jacobian(outputs, params)
    return torch.cat([J.flatten(2) for J in parts], -1).flatten(0, 1), model(x).detach()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("loss", "mode"), [("cross_entropy", "lr_and_momentum"), ("bce", "lr"), ("mse", "lr")])
def test_rate_and_momentum_minimize_the_damped_quadratic_model(cls, loss, mode):
    """Against the dense Gauss-Newton matrix, with relative damping block by block and L2 decay; no other option."""
    model, x, y = tanh(loss)
    decay = dict(weight_decay=0.05, weight_decay_kind="l2")
    ignored = dict(lr=1e3, kl_clip=1e-3, nesterov=True)
    optimizer = optimize(model, cls, quadratic_model=mode, loss=loss, damping=0.3, **decay, **ignored)
    layers = [model[0], model[2]]
    last = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    for _ in range(3):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        J, f = jacobian(model, x)
        H = torch.autograd.functional.hessian(lambda f: LOSSES[loss](f, y), f).flatten(0, 1).flatten(1)
        optimizer.step(closure_of(optimizer, model, x, y, loss))
        told = optimizer.diagnostics()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]) + 0.05 * before
        applied, ridge = [], []
        for layer in layers:
            W = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            W += 0.05 * before_of(before, model, layer)
            operator = optimizer.preconditioner(layer.weight)
            u = operator @ W
            applied += [u[:, :-1].flatten(), u[:, -1]]
            spectrum = optimizer.state[layer.weight]
            mean = (
                spectrum["moment"].mean()
                if cls is secondorder.EKFAC
                else spectrum["eigenvalues_0"].mean() * (spectrum["eigenvalues_1"].mean())
            )
            ridge += [0.3 * mean.expand(layer.weight.numel()), 0.3 * mean.expand(layer.bias.numel())]
        V = torch.stack([torch.cat(applied), last])  # directions to go against
        C = J.T @ H @ J + 0.05 * torch.eye(len(before), dtype=torch.float64)
        M, b = V @ (C + torch.diag(torch.cat(ridge))) @ V.T, V @ gradient
        if mode == "lr":
            wanted = torch.stack([(b[0] - 0.9 * M[0, 1]) / M[0, 0], torch.tensor(0.9, dtype=torch.float64)])
        else:
            wanted = torch.linalg.lstsq(M, b, driver="gelsd").solution
        now = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(torch.tensor([told["lr"], told["momentum"]]).double(), wanted, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(before - now, wanted @ V, rtol=1e-9, atol=1e-12)
        change = -wanted @ b + wanted @ (V @ C @ V.T) @ wanted / 2
        assert told["predicted_change"] == pytest.approx(float(change), rel=1e-9)
        last = before - now
        momenta = [optimizer.state[layer.weight]["momentum"] for layer in layers]
        kept = torch.cat([part for m in momenta for part in (m[:, :-1].flatten(), m[:, -1])])
        torch.testing.assert_close(kept, last, rtol=1e-9, atol=1e-12)  # momentum: the last step's opposite


def before_of(flat, model, layer):
    """`[W | b]` of a layer, out of all parameters laid end to end."""
    parts, start = {}, 0
    for p in model.parameters():
        parts[p] = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    return torch.cat([parts[layer.weight], parts[layer.bias][:, None]], 1)


class Zoo(nn.Module):
    """Grouped and transposed convolutions, an embedding, norms, a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(5, 16)
        self.grouped, self.up = nn.Conv2d(2, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 2, groups=2)
        self.square, self.norm, self.head = nn.Linear(18, 18), nn.LayerNorm(18), nn.Linear(18, 3, bias=False)
        self.grouped.to(memory_format=torch.channels_last)
        self.double()

    def forward(self, t):
        x = self.up(torch.tanh(self.grouped(self.tokens(t).view(-1, 2, 4, 4)))).flatten(1)
        return self.head(self.norm(self.square(torch.tanh(self.square(x)))))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("options", [{}, {"max_block_size": 7}], ids=["whole", "cut"])
def test_predicted_change_is_the_exact_models_for_every_kind_of_layer(cls, options):
    torch.manual_seed(0)
    model = Zoo()
    x, y = torch.randint(0, 5, (12,)), torch.randint(0, 3, (6,))
    kind = dict(quadratic_model="lr_and_momentum", loss="cross_entropy", damping=1.0)
    optimizer = optimize(model, cls, **kind, **options)
    assert not any(row.treatment == "AdamW" for row in optimizer.coverage())
    for call in range(4):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        closure = closure_of(optimizer, model, x, y, "cross_entropy", None)

        def partial(closure=closure, missing=call == 3):
            found = closure()
            for p in model.square.parameters() if missing else ():
                p.grad = None
            return found

        optimizer.step(partial)
        if call == 3:
            assert torch.equal(model.square.weight, before["square.weight"])
        step = {name: p.detach() - before[name] for name, p in model.named_parameters()}
        f, Jd = torch.func.jvp(lambda w: torch.func.functional_call(model, w, (x,)), (before,), (step,))
        H = torch.autograd.functional.hessian(lambda f: F.cross_entropy(f, y), f.detach())
        slope = sum((p.grad * step[name]).sum() for name, p in model.named_parameters() if p.grad is not None)
        change = slope + torch.einsum("ni,nimj,mj->", Jd, H, Jd) / 2
        assert optimizer.diagnostics()["predicted_change"] == pytest.approx(float(change), rel=1e-7)
        assert float(change) < -1e-4


def test_the_momentum_of_a_layer_that_sits_a_step_out_is_not_in_the_model():
    """Two layers of one shape, which are worked on together."""
    told, (_, x, y) = [], tanh()
    for factor in (1.0, 1e3):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
        optimizer = optimize(model, quadratic_model="lr_and_momentum", loss="cross_entropy", damping=1.0)
        closure = closure_of(optimizer, model, x, y, "cross_entropy")
        optimizer.step(closure)
        optimizer.state[model[0].weight]["momentum"].mul_(factor)

        def partial(closure=closure, model=model):
            found = closure()
            model[0].weight.grad = model[0].bias.grad = None
            return found

        optimizer.step(partial)
        told.append([optimizer.diagnostics()[key] for key in ("lr", "momentum", "predicted_change")])
    assert told[0] == told[1]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_minimum_does_not_hang_on_the_length_of_a_direction(seed, length):
    V, b = normal(2, 5, seed=seed), normal(2, seed=seed + 1)
    scale = torch.tensor([1.0, length], dtype=torch.float64)
    M = V @ V.T + 1e-3 * torch.eye(2, dtype=torch.float64)
    plain, scaled = minimum(M, b, None, 1e-16), minimum(scale[:, None] * M * scale, scale * b, None, 1e-16)
    torch.testing.assert_close(M @ plain, b, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(scaled * scale, plain, rtol=1e-6, atol=1e-9)


def test_directions_that_are_zero_or_equal_need_no_special_case():
    one = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([3.0, 0.0], dtype=torch.float64)
    assert minimum(one, b, None, 1e-16).tolist() == [1.5, 0.0]
    assert minimum(0 * one, 0 * b, None, 1e-16).tolist() == [0.0, 0.0]
    assert minimum(0 * one, 0 * b, 0.9, 1e-16).tolist() == [0.0, 0.0]
    assert minimum(one * math.nan, b, None, 1e-16).tolist() == [0.0, 0.0]
    equal = minimum(torch.full((2, 2), 2.0).double(), torch.full((2,), 3.0).double(), None, 1e-16)
    torch.testing.assert_close(equal, torch.tensor([0.75, 0.75]).double())


def test_the_fallback_and_groups_without_a_model_take_their_own_step():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 5).double(), nn.Linear(5, 2).double()
            self.scale = nn.Parameter(torch.ones(5, dtype=torch.float64))

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)) * self.scale)

    def trained(**last):
        torch.manual_seed(0)
        model = Scaled()
        groups = [
            {"params": [*model.first.parameters(), model.scale]},
            {"params": list(model.last.parameters()), "quadratic_model": None, **last},
        ]
        optimizer = secondorder.KFAC(groups, module=model, quadratic_model="lr_and_momentum", loss="mse", **BASE)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, model, normal(12, 4, seed=3), normal(12, 2, seed=4)))
        return model, optimizer

    model, optimizer = trained(lr=0.0)
    twin = trained(lr=0.1)[0]
    torch.manual_seed(0)
    start = Scaled()
    cases.assert_same_bits(model.last.parameters(), start.last.parameters())
    assert not torch.equal(model.first.weight, start.first.weight)
    assert not torch.equal(twin.last.weight, start.last.weight)
    assert not torch.equal(model.scale, start.scale)
    assert "exp_avg" in optimizer.state[model.scale]


# ---------------------------------------------------------------------- Levenberg and Marquardt


EXACT = {
    "plain": {},
    "momentum": {"nesterov": False},
    "nesterov": {"nesterov": True},
    "l2": {"weight_decay": 0.1, "weight_decay_kind": "l2"},
    "decoupled": {"weight_decay": 0.1},
    "coupled": {"weight_decay": 0.1, "weight_decay_kind": "coupled", "nesterov": True},
    "clipped": {"kl_clip": 1e-3, "max_update_rms": 0.5},
    "lr on the device": {"lr": torch.tensor(0.1, dtype=torch.float64)},
    "model": {"quadratic_model": "lr_and_momentum", "loss": "mse", "weight_decay": 0.1, "weight_decay_kind": "l2"},
    "sum": {"loss_reduction": "sum", "lr": 0.02},
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_rho_is_one_where_the_model_is_exact(options):
    """A quadratic loss, whose Kronecker-factored curvature is exact: whatever becomes of the direction is foreseen."""
    model, x, y = linear()
    optimizer = optimize(model, adapt_damping=True, adapt_every=1, **options)
    reduction = options.get("loss_reduction", "mean")

    def closure():
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.fisher_backward(outputs, "mse", "type-2")
        loss = F.mse_loss(outputs, y, reduction=reduction)
        loss.backward(retain_graph=True)
        return loss, outputs

    for _ in range(4):
        optimizer.step(closure)
        assert optimizer.diagnostics()["rho"] == pytest.approx(1, rel=1e-6)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-2 * 0.9**4)


@pytest.mark.parametrize(
    ("share", "factor"), [(0.9, 0.9**2), (0.6, 1.0), (0.1, 0.9**-2), (-3.0, 0.9**-2), (math.nan, 0.9**-2)]
)
def test_damping_follows_the_share_of_the_predicted_decrease(share, factor):

    def two_steps(after):
        model, x, y = linear()
        optimizer = optimize(model, adapt_damping=True, adapt_every=2)
        closure = closure_of(optimizer, model, x, y, after=after)
        losses = [float(optimizer.step(closure).detach()) for _ in range(2)]
        return optimizer, losses[1], optimizer.diagnostics()["predicted_change"]

    _, start, predicted = two_steps(after=lambda loss: loss)
    optimizer, _, _ = two_steps(after=lambda loss: start + share * predicted)
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-2 * factor)
    assert optimizer.diagnostics()["rho"] == pytest.approx(share, nan_ok=True)


def test_damping_rises_where_the_model_overpredicts_and_stays_above_its_floor():
    """Steps of twice Newton's length on a curved network overshoot; on a quadratic the model is right."""
    model, x, y = linear()
    optimizer = optimize(model, adapt_damping=True, adapt_every=1, damping=1.05e-8)
    optimizer.step(closure_of(optimizer, model, x, y))
    assert optimizer.param_groups[0]["damping"] == 1e-8
    model, x, y = tanh("mse")
    optimizer = optimize(model, adapt_damping=True, adapt_every=1, lr=2.0, damping=1e-3)
    for _ in range(4):
        optimizer.step(closure_of(optimizer, model, x, 5 * y))
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-3 / 0.9**4)


@pytest.mark.filterwarnings("ignore:.*a step was refused")
@pytest.mark.parametrize("options", [{}, dict(quadratic_model="lr_and_momentum", loss="mse")], ids=["lm", "model"])
def test_a_loss_that_is_nan_raises_damping_and_poisons_nothing(options):
    model, x, y = linear()
    optimizer = optimize(model, adapt_damping=True, adapt_every=1, **options)
    optimizer.step(closure_of(optimizer, model, x, y))
    before, state = cases.values(model.parameters()), cases.flat_state(optimizer)
    damping = optimizer.param_groups[0]["damping"]
    optimizer.step(closure_of(optimizer, model, x * math.nan, y))
    cases.assert_same_bits(model.parameters(), before)
    cases.assert_same_state(cases.flat_state(optimizer), state, but="step")
    assert optimizer.param_groups[0]["damping"] == pytest.approx(damping / 0.9)
    optimizer.step(closure_of(optimizer, model, x, y, after=lambda loss: loss * math.nan))
    assert optimizer.param_groups[0]["damping"] == pytest.approx(damping / 0.9**2)
    for _ in range(30):
        optimizer.step(closure_of(optimizer, model, x, y))
    torch.testing.assert_close(F.mse_loss(model(x), y), least_squares(x, y), rtol=0.05, atol=0)


def test_a_step_of_no_length_says_nothing_of_damping():
    model, x, y = linear()
    optimizer = optimize(model, adapt_damping=True, adapt_every=1, lr=0.0)
    optimizer.step(closure_of(optimizer, model, x, y))
    assert optimizer.param_groups[0]["damping"] == 1e-2


def test_the_second_evaluation_leaves_no_trace():
    """No gradients, no statistics, no change of `p.grad`; parameters are those of a twin until damping differs."""
    states = []
    for adapt in (False, True):
        model, x, y = tanh()
        seen, optimizer = [], optimize(model, adapt_damping=adapt, adapt_every=3)
        for call in range(1, 4):
            optimizer.step(closure_of(optimizer, model, x, y, "cross_entropy", None, seen))
            assert all(p.grad is not None for p in model.parameters())
            if call == 3:
                assert seen[3:] == ([(False, False)] if adapt else [])
        assert seen[:3] == [(True, True)] * 3
        states.append((cases.flat_state(optimizer), cases.values(p.grad for p in model.parameters())))
    cases.assert_same_state(states[0][0], states[1][0])
    cases.assert_same_bits(states[0][1], states[1][1])


def test_the_closures_own_backward_is_the_usual_one():
    """A closure that knows of no model, and returns its loss alone, serves damping."""
    model, x, y = tanh()
    optimizer = optimize(model, adapt_damping=True, adapt_every=2)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert optimizer.param_groups[0]["damping"] != 1e-2


def test_calls_that_are_not_judged_do_not_wait_for_the_device():
    """On the meta device a read of a value raises."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to("meta")
    optimizer = optimize(model, adapt_damping=True, adapt_every=4)
    x, y = torch.empty(6, 4, device="meta"), torch.empty(6, 3, device="meta")
    for _ in range(3):
        optimizer.step(closure_of(optimizer, model, x, y, kind=None))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        optimizer.step(closure_of(optimizer, model, x, y, kind=None))


@pytest.mark.parametrize("cls", CLASSES)
def test_resume_is_bitwise_equal(cls):
    options = dict(adapt_damping=True, adapt_every=3, quadratic_model="lr_and_momentum", loss="cross_entropy")
    finals = []
    for interrupted in (False, True):
        model, x, y = tanh()
        optimizer = optimize(model, cls, burn_in=1, refresh_every=2, **options)
        for step in range(9):
            if interrupted and step == 4:
                saved = (model.state_dict(), optimizer.state_dict())
                model, x, y = tanh()
                optimizer = optimize(model, cls, burn_in=1, refresh_every=2, **options)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
            inputs = x + 0.1 * normal(*x.shape, seed=100 + step)
            optimizer.step(closure_of(optimizer, model, inputs, y, "cross_entropy"))
        finals.append((cases.values(model.parameters()), optimizer.param_groups[0]["damping"]))
    cases.assert_same_bits(finals[0][0], finals[1][0])
    assert finals[0][1] == finals[1][1]
    assert cls is not secondorder.KFAC or finals[0][1] != 1e-2


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(adapt_damping=True), TypeError, "closure that returns the loss"),
        (dict(quadratic_model="lr", loss="mse"), TypeError, r"closure that returns \(loss, outputs\)"),
    ],
)
def test_a_missing_closure_is_named(options, error, message):
    model, x, y = linear()
    optimizer = optimize(model, **options)
    F.mse_loss(model(x), y).backward()
    with pytest.raises(error, match=message):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "loss='cross_entropy'"),
        (dict(loss="mse", weight_decay=0.1), "weight_decay_kind='l2'"),
        (dict(loss="mse", maximize=True), "maximize must be False"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, message):
    model, x, y = linear()
    optimizer = optimize(model, quadratic_model="lr", **options)
    with pytest.raises(ValueError, match=message):
        optimizer.step(closure_of(optimizer, model, x, y))


@pytest.mark.parametrize("kind", ["loss alone", "no graph", "freed"])
def test_a_closure_that_does_not_serve_leaves_everything_as_it_was(kind):
    model, x, y = linear()
    optimizer = optimize(model, quadratic_model="lr", loss="mse")

    def closure():
        optimizer.zero_grad()
        outputs = model(x)
        loss = F.mse_loss(outputs, y)
        loss.backward()
        outputs = outputs.tanh() if kind == "freed" else outputs.detach()
        return loss if kind == "loss alone" else (loss, outputs)

    before, state = cases.values(model.parameters()), cases.flat_state(optimizer)
    error, message = (RuntimeError, "retain_graph=True") if kind == "freed" else (TypeError, "retain_graph=True")
    with pytest.raises(error, match=message):
        optimizer.step(closure)
    cases.assert_same_bits(model.parameters(), before)
    cases.assert_same_state(cases.flat_state(optimizer), state)
    twin, _, _ = linear()
    for m, o in ((model, optimizer), (twin, optimize(twin, quadratic_model="lr", loss="mse"))):
        o.step(closure_of(o, m, x, y, kind=None))
    cases.assert_same_bits(model.parameters(), twin.parameters())


def test_a_closure_without_backward_is_no_step():
    model, x, y = linear()
    optimizer = optimize(model, quadratic_model="lr", loss="mse", adapt_damping=True, adapt_every=1)
    before = cases.values(model.parameters())
    optimizer.step(lambda: (F.mse_loss(model(x), y), model(x)))
    cases.assert_same_bits(model.parameters(), before)


@pytest.mark.parametrize(
    ("option", "value"), [("adapt_every", 0), ("quadratic_model", "momentum"), ("loss", "nll"), ("burn_in", -1)]
)
def test_values_that_are_not_allowed_are_named(option, value):
    model, _, _ = linear()
    with pytest.raises(ValueError, match=f"Invalid {option}: {value!r}"):
        optimize(model, **{option: value})
