"""What was found broken in other implementations works here: one claim per defect, each against an oracle by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import secondorder
from cases import assert_same_state, flat_state

SETTINGS = dict(
    lr=0.1,
    betas=(0.0, 0.9),
    damping=0.03,
    weight_decay=0.0,
    kl_clip=None,
    norm_clip=None,
    max_update_rms=None,
    momentum="update",
    refresh_every=1,
    nesterov=False,
)
BOTH = pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.EKFAC])


def make(model, cls=secondorder.KFAC, **options):
    return cls(model.parameters(), module=model, **{**SETTINGS, **options})


def sequence(*layers, double=True):
    model = nn.Sequential(*layers)
    return model.double() if double else model


def x_and_y(*shape, classes=3, dtype=torch.float64):
    leading = shape[:1] if len(shape) == 4 else shape[:-1]
    return torch.randn(*shape, dtype=dtype), torch.randint(0, classes, leading)


def loss_of(out, y):
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def observed(model, x, y, forward=None, **options):
    """The optimizer after one step."""
    opt = make(model, **options)
    loss_of((forward or model)(x), y).backward()
    opt.step()
    return opt


def rows(model, x, y, at=0):
    """Inputs and output gradients of a layer of a sequence, computed piece by piece; the loss is a mean over rows."""
    twin = copy.deepcopy(model)
    a = twin[:at](x).detach()
    z = twin[at](a).detach().requires_grad_()
    loss_of(twin[at + 1 :](z.clone()), y).backward()
    return a, z.grad


def grams(a, g, bias=True):
    """`A` and `G` of rows whose loss is a mean over them."""
    a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
    a = torch.cat([a, a.new_ones(len(a), 1)], 1) if bias else a
    return a.T @ a / len(a), len(g) * g.T @ g


def assert_holds(opt, layer, A, G, tolerance=1e-12):
    state = opt.state[layer.weight]
    for ours, theirs, name in ((state["covariance_1"], A, "A"), (state["covariance_0"], G, "G")):
        assert ours.shape == theirs.shape, name
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < tolerance, f"{name}: {error:.1e}"


# ---------------------------------------------------------------- kfac-pytorch


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_dilation_is_seen(sharing):
    conv = nn.Conv2d(2, 3, 3, dilation=2, padding=1)
    model = sequence(conv, nn.Tanh(), nn.Flatten(), nn.Linear(3 * 25, 3))
    x, y = x_and_y(4, 2, 7, 7)
    a, g = F.unfold(x, 3, dilation=2, padding=1).mT, rows(model, x, y)[1].flatten(2).mT
    a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
    a, g = (a.mean(1), g.sum(1)) if sharing == "reduce" else (a.flatten(0, 1), g.flatten(0, 1))
    opt = observed(model, x, y, sharing=sharing)
    assert_holds(opt, conv, a.T @ a / len(a), len(x) * g.T @ g)


@BOTH
def test_grouped_convolutions_train(cls):
    first, second = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1, groups=2)
    model = sequence(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(54, 3))
    x, y = x_and_y(8, 4, 5, 5)
    opt = make(model, cls, kl_clip=1e-2)
    losses = []
    for _ in range(20):
        opt.zero_grad()
        loss = loss_of(model(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert not any(row.treatment == "AdamW" for row in opt.coverage())
    assert losses[-1] < 0.7 * losses[0]


def test_transposed_inputs_are_taken_as_they_are():
    model = sequence(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = torch.randn(2, 5, 6, dtype=torch.float64).mT, torch.randint(0, 3, (2, 6))
    expected = grams(*rows(model, x.contiguous(), y))
    assert_holds(observed(model, x, y), model[0], *expected)


@pytest.mark.parametrize("shape", [(6, 5), (2, 6, 5)], ids=["2d", "3d: a view, whose hooks are lost"])
def test_activations_in_place_lose_no_output_gradient(shape):
    model = sequence(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    x, y = x_and_y(*shape)
    plain = sequence(copy.deepcopy(model[0]), nn.ReLU(), copy.deepcopy(model[2]))
    expected = grams(*rows(plain, x, y))
    assert_holds(observed(model, x, y), model[0], *expected)


def test_forward_passes_without_gradients_leave_no_trace():
    model = sequence(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = x_and_y(6, 5)
    expected = grams(*rows(model, x, y))

    def forward(x):
        with torch.no_grad():
            model(100 * x)
        return model(x)

    assert_holds(observed(model, x, y, forward), model[0], *expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_count_once(reentrant):
    model = sequence(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = x_and_y(6, 5)
    expected = grams(*rows(model, x, y))
    opt = observed(model, x.requires_grad_(), y, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert_holds(opt, model[0], *expected)
    assert float(opt.state[model[0].weight]["seen"]) == 1


def test_module_that_runs_twice_is_averaged_once_over_its_uses():
    shared = nn.Linear(5, 5)
    model = sequence(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(5, 3))
    x, y = x_and_y(6, 5)
    (a, g), (b, h) = rows(model, x, y, 0), rows(model, x, y, 2)
    A, G = grams(torch.cat([a, b]), torch.cat([g, h]))
    opt = observed(model, x, y)
    assert_holds(opt, shared, A, G / 2)  # loss terms: 6, not 12
    assert float(opt.state[shared.weight]["seen"]) == 1


class Attentive(nn.Module):
    """Attention, a head, and a layer that nobody calls."""

    def __init__(self):
        super().__init__()
        self.attention, self.unused = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


@BOTH
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_attention_unused_layers_and_eval_mode_do_not_stop_the_step(cls, training):
    model = Attentive().double().train(training)
    x, y = x_and_y(3, 5, 4)
    opt = make(model, cls)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        opt.zero_grad()
        loss_of(model(x), y).backward()
        opt.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("unused"), name
    treatments = {row.name: row.treatment for row in opt.coverage()}
    assert treatments["attention.in_proj_weight"] == treatments["attention.out_proj.weight"] == cls.__name__


def scaled(scaler, model, opt, x, y):
    opt.zero_grad()
    scaler.scale(loss_of(model(x), y)).backward()
    scaler.step(opt)
    scaler.update()


@BOTH
def test_todays_gradient_scaler_drives_it(cls):
    """Statistics are captured with the loss scale on, and stored without it."""
    model = sequence(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), double=False)
    twin = copy.deepcopy(model)
    ours, theirs = make(model, cls), make(twin, cls)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(3):
        x, y = x_and_y(6, 5, dtype=torch.float32)
        scaled(scaler, model, ours, x, y)
        theirs.zero_grad()
        loss_of(twin(x), y).backward()
        theirs.step()
    assert scaler.get_scale() == 2.0**12
    expected = flat_state(theirs)
    for key, value in flat_state(ours).items():
        if "basis" not in key:
            torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4 * float(expected[key].abs().max()))


@BOTH
@pytest.mark.parametrize("zeroed_by", ["optimizer", "model"])
def test_overflow_in_a_skipped_step_does_not_poison_the_averages(cls, zeroed_by):
    """Nor do the finite part of its statistics, where `model.zero_grad()` does not pass by the optimizer."""
    model = sequence(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), double=False)
    opt = make(model, cls, lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    x, y = x_and_y(6, 5, dtype=torch.float32)

    def step(overflow):
        (opt if zeroed_by == "optimizer" else model).zero_grad()
        z = model[0](x)
        if overflow:
            z.register_hook(lambda g: g * float("inf"))
        scaler.scale(loss_of(model[1:](z), y)).backward()
        scaler.step(opt)
        scaler.update()

    step(False)
    before = flat_state(opt)
    step(True)
    assert scaler.get_scale() == 2.0**3
    assert_same_state(flat_state(opt), before)
    step(False)
    after = flat_state(opt)
    assert all((value == 2).all() for key, value in after.items() if key.endswith("seen"))
    for key, value in after.items():
        if "covariance" in key:
            torch.testing.assert_close(value, before[key])


def test_factors_under_bfloat16_autocast_are_float32_sums():
    model = sequence(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), double=False)
    x, y = x_and_y(64, 5, dtype=torch.float32)
    A, G = grams(*rows(model, x, y))

    def forward(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    opt = observed(model, x, y, forward)
    state = opt.state[model[0].weight]
    assert state["covariance_0"].dtype == state["covariance_1"].dtype == torch.float32
    seen = torch.cat([x.bfloat16().float(), torch.ones(64, 1)], 1)  # inputs are rounded, products are not
    assert_holds(opt, model[0], seen.T @ seen / 64, state["covariance_0"], 1e-6)
    assert_holds(opt, model[0], A, G, 2e-2)


def test_layer_with_a_frozen_bias_is_still_preconditioned():
    model = sequence(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].bias.requires_grad_(False)
    x, y = x_and_y(6, 5)
    expected = grams(*rows(model, x, y), bias=False)
    bias = model[0].bias.clone()
    opt = observed(model, x, y)
    assert_holds(opt, model[0], *expected)
    assert torch.equal(model[0].bias, bias)


@pytest.mark.parametrize("kind", ["absolute", "factor"])
def test_change_of_damping_acts_in_the_very_next_step(kind):
    model = sequence(nn.Linear(5, 4))
    x, y = x_and_y(6, 5, classes=4)
    opt = make(model, lr=0.0, betas=(0.0, 0.0), damping_kind=kind)
    sizes = []
    for damping in (1e-2, 1e6):
        opt.param_groups[0]["damping"] = damping
        opt.zero_grad()
        loss_of(model(x), y).backward()
        opt.step()
        opt.param_groups[0].update(refresh_every=1000, refresh="together")  # no refresh any more
        sizes.append(float(opt.state[model[0].weight]["momentum"].norm()))
    W, b = model[0].weight, model[0].bias
    gradient = float(torch.cat([W.grad, b.grad[:, None]], 1).norm())
    assert sizes[0] > 1e-1 * gradient
    assert sizes[1] == pytest.approx(gradient * (1e-6 if kind == "absolute" else 1e-12), rel=1e-4)


# ---------------------------------------------------------------- ASDL


def test_ekfac_is_not_the_identity():
    model = sequence(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    opt = make(model, secondorder.EKFAC, lr=0.0)
    for _ in range(3):
        opt.zero_grad()
        loss_of(model(x := torch.randn(6, 5, dtype=torch.float64)), torch.randint(0, 3, (len(x),))).backward()
        opt.step()
    W, b = model[0].weight, model[0].bias
    ours, g = opt.state[W]["momentum"].flatten(), torch.cat([W.grad, b.grad[:, None]], 1).flatten()
    assert float(F.cosine_similarity(ours, g, dim=0)) < 0.95


def test_monte_carlo_fisher_does_not_shrink_with_the_number_of_samples():
    model = sequence(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, y = x_and_y(400, 5)

    def trace(kind, samples):
        opt = make(model, lr=0.0)
        outputs = model(x)
        opt.fisher_backward(outputs, "cross_entropy", kind, samples)
        loss_of(outputs, y).backward()
        opt.step()
        return float(opt.state[model[0].weight]["covariance_0"].trace())

    exact = trace("type-2", 1)
    for samples in (1, 4, 16):
        assert trace("mc", samples) == pytest.approx(exact, rel=0.15), samples


def test_factors_of_sequences_have_the_scale_of_their_rows():
    """Not S² times as much: A has the trace of one row, and G ⊗ A that of the Fisher of all rows if S = 1."""
    model = sequence(nn.Linear(5, 3))
    x, y = x_and_y(2, 7, 5)
    in_rows = observed(copy.deepcopy(model), x.flatten(0, 1), y.flatten(), lr=0.0)
    (flat,) = (p for p in in_rows.param_groups[0]["params"] if p.ndim == 2)
    state = in_rows.state[flat]
    opt = observed(model, x, y)
    assert_holds(opt, model[0], state["covariance_1"], state["covariance_0"])
    assert float(state["covariance_1"].trace()) == pytest.approx(1 + float(x.square().sum(-1).mean()))


def test_norm_layers_need_no_division_by_their_weight():
    norm = nn.LayerNorm(4)
    model = sequence(norm, nn.Linear(4, 3))
    with torch.no_grad():
        norm.weight[1] = 0
    x, y = x_and_y(6, 4)
    g = rows(model, x, y)[1]
    opt = observed(model, x, y)
    normal = F.layer_norm(x, (4,))
    E = torch.stack([normal * g, g], -1)  # (n, feature, 2)
    expected = len(x) * torch.einsum("nfi,nfj->fij", E, E)
    torch.testing.assert_close(opt.state[norm.weight]["covariance_0"].view(4, 2, 2), expected)


# ---------------------------------------------------------------- curvlinops, singd, BackPACK


class Tied(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_tied_weight_is_averaged_over_its_uses_not_doubled():
    model = Tied().double()
    x, y = x_and_y(6, 5)
    chain = nn.Sequential(model.first, nn.Tanh(), model.second, nn.Tanh(), model.head)
    uses = [rows(chain, x, y, at) for at in (0, 2)]
    A, G = grams(*(torch.cat(parts) for parts in zip(*uses, strict=True)), bias=False)
    assert_holds(observed(model, x, y), model.first, A, G / 2)


def test_groups_have_factors_of_their_own_channels():
    conv = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    model = sequence(conv, nn.Tanh(), nn.Flatten(), nn.Linear(54, 3))
    x, y = x_and_y(4, 4, 5, 5)
    g = rows(model, x, y)[1].flatten(2).mT
    state = observed(model, x, y, sharing="expand").state[conv.weight]
    for j in range(2):
        a = F.unfold(x[:, 2 * j : 2 * j + 2], 3).mT
        A, G = grams(a, g[..., 3 * j : 3 * j + 3], bias=False)
        torch.testing.assert_close(state["covariance_1"][j], A)
        torch.testing.assert_close(state["covariance_0"][j], G * len(x) / (len(x) * 9))  # terms are samples
    assert (state["covariance_1"][0] - state["covariance_1"][1]).norm() > 0.1 * state["covariance_1"][0].norm()


def test_input_and_output_factors_of_a_convolution_are_of_one_kind():
    """Where there is one position, expand and reduce are the same; where there are more, G follows A."""
    conv = nn.Conv2d(2, 3, 3)
    model = sequence(conv, nn.Flatten(), nn.Linear(27, 3))
    x, y = x_and_y(4, 2, 5, 5)
    g = rows(model, x, y)[1].flatten(2).mT
    expected = {"expand": g.flatten(0, 1), "reduce": g.sum(1)}
    patches = F.unfold(x, 3).mT
    inputs = {"expand": patches.flatten(0, 1), "reduce": patches.mean(1)}
    for sharing in ("expand", "reduce"):
        opt = observed(copy.deepcopy(model), x, y, sharing=sharing)
        (weight,) = (p for p in opt.state if p.ndim == 4)
        a, h = inputs[sharing], expected[sharing]
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        torch.testing.assert_close(opt.state[weight]["covariance_1"], a.T @ a / len(a))
        torch.testing.assert_close(opt.state[weight]["covariance_0"], len(x) * h.T @ h)


def test_input_changed_in_place_under_autocast_is_seen_as_the_layer_saw_it():
    first, last = nn.Linear(5, 5), nn.Linear(5, 3)
    model = nn.ModuleList([first, last])
    x, y = x_and_y(6, 5, dtype=torch.float32)

    def forward(x):
        stream = x.clone()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = first(stream)
            stream.add_(100)
            return last(torch.tanh(z))

    opt = observed(model, x, y, forward)
    seen = torch.cat([x.bfloat16().float(), torch.ones(6, 1)], 1)
    assert_holds(opt, first, seen.T @ seen / 6, opt.state[first.weight]["covariance_0"], 1e-6)
