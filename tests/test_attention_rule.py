"""Attention taken apart: equal to torch's own layer wherever it may be, and a normal form for its projections."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from secondorder.curvature.layers.attention import DecomposedMultiheadAttention, attention_rule, swap

E, H, N, L, S = 8, 2, 3, 5, 4


class Spy:
    """A tap that keeps what it saw and gives the projections back as new tensors."""

    def __init__(self, active=True):
        self.active, self.calls = active, []

    def __call__(self, module, inputs, projections):
        projections = tuple(p.clone() for p in projections)
        self.calls.append((inputs, projections))
        return projections


def identity_tap(module, inputs, projections):
    return projections


def layer(dtype=torch.float64, **options):
    """A layer with biases away from zero."""
    module = nn.MultiheadAttention(E, H, dtype=dtype, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def twin(module, tap=identity_tap):
    """A swapped copy, tapped."""
    copied = copy.deepcopy(module)
    assert swap(copied) is None
    copied.tap = tap
    return copied


def sequence(length, width, module, batched=True, dtype=torch.float64):
    if not batched:
        return torch.randn(length, width, dtype=dtype)
    return torch.randn((N, length, width) if module.batch_first else (length, N, width), dtype=dtype)


def arguments(module, kind="cross", batched=True, dtype=torch.float64):
    q = sequence(L, E, module, batched, dtype).requires_grad_()
    if kind == "self":
        return q, q, q
    k = sequence(S, module.kdim, module, batched, dtype).requires_grad_()
    return (q, k, k) if kind == "memory" else (q, k, sequence(S, module.vdim, module, batched, dtype).requires_grad_())


def run(module, inputs, **kwargs):
    """Outputs, attention weights, gradients of inputs and parameters."""
    distinct = list({id(x): x for x in inputs}.values())
    out, weights = module(*inputs, **kwargs)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum()
    if weights is not None:
        loss = loss + weights.square().sum()
    float_masks = [m for m in kwargs.values() if isinstance(m, torch.Tensor) and m.requires_grad]
    return out, weights, *torch.autograd.grad(loss, [*distinct, *module.parameters(), *float_masks])


def assert_equal_runs(module, inputs, tolerance=1e-12, **kwargs):
    spy = Spy()
    expected, got = run(module, inputs, **kwargs), run(twin(module, spy), inputs, **kwargs)
    assert len(spy.calls) == 1, "the layer was not taken apart"
    for e, g in zip(expected, got, strict=True):
        torch.testing.assert_close(g, e, atol=tolerance, rtol=tolerance)


def attention_masks(heads, lengths, batched):
    """Boolean and float, of two and three axes; no row forbids everything."""
    first = (N if batched else 1) * heads
    forbidden2, forbidden3 = torch.rand(lengths) < 0.3, torch.rand(first, *lengths) < 0.3
    forbidden2[:, 0] = forbidden3[..., 0] = False
    return {
        "none": None,
        "bool_2d": forbidden2,
        "bool_3d": forbidden3,
        "float_2d": torch.randn(lengths).double().requires_grad_(),
        "float_3d": torch.randn(first, *lengths).double().masked_fill(forbidden3, -math.inf),
    }


def padding_masks(length, batched):
    padded = torch.zeros((N, length) if batched else (length,), dtype=torch.bool)
    padded[..., -1] = True
    return {"none": None, "bool": padded, "float": torch.randn(padded.shape).double().masked_fill(padded, -math.inf)}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("mask", ["none", "bool_2d", "bool_3d", "float_2d", "float_3d"])
def test_masks_give_the_outputs_and_gradients_of_torch(mask, padding, training, batched, batch_first, need_weights):
    module = layer(batch_first=batch_first).train(training)
    assert_equal_runs(
        module,
        arguments(module, batched=batched),
        attn_mask=attention_masks(H, (L, S), batched)[mask],
        key_padding_mask=padding_masks(S, batched)[padding],
        need_weights=need_weights,
    )


@pytest.mark.parametrize(
    "kind, options",
    [
        ("self", {}),
        ("memory", {}),
        ("cross", {}),
        ("self", {"bias": False}),
        ("cross", {"bias": False}),
        ("cross", {"kdim": 6, "vdim": 7}),
        ("memory", {"kdim": 6, "vdim": 6}),
        ("cross", {"kdim": 6, "bias": False}),
    ],
)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("weights", ["none", "averaged", "per_head"])
def test_layouts_and_widths_give_the_outputs_and_gradients_of_torch(kind, options, batched, batch_first, weights):
    module = layer(batch_first=batch_first, **options)
    assert_equal_runs(
        module,
        arguments(module, kind, batched),
        need_weights=weights != "none",
        average_attn_weights=weights == "averaged",
    )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padding", ["none", "bool"])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_the_causal_hint_gives_the_outputs_and_gradients_of_torch(kind, padding, need_weights):
    module = layer(batch_first=True)
    length = L if kind == "self" else S
    assert_equal_runs(
        module,
        arguments(module, kind),
        attn_mask=torch.ones(L, length, dtype=torch.bool).triu(1),
        key_padding_mask=padding_masks(length, True)[padding],
        is_causal=True,
        need_weights=need_weights,
    )


@pytest.mark.parametrize("need_weights", [False, True])
def test_float32_agrees_to_rounding(need_weights):
    module = layer(torch.float32, batch_first=True)
    assert_equal_runs(module, arguments(module, dtype=torch.float32), tolerance=1e-5, need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", [None, "bool_2d"])
def test_autocast_agrees_to_rounding(need_weights, mask):
    module = layer(torch.float32, batch_first=True)
    kwargs = {"attn_mask": attention_masks(H, (L, S), True)[mask] if mask else None, "need_weights": need_weights}
    inputs = arguments(module, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = module(*inputs, **kwargs)[0], twin(module)(*inputs, **kwargs)[0]
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)


def test_dropout_zeroes_and_scales_the_attention_weights_that_are_used():
    module = twin(layer(batch_first=True, dropout=0.4))
    q, k, v = (torch.randn(200, n, E, dtype=torch.float64) for n in (L, S, S))
    out, dropped = module(q, k, v, average_attn_weights=False)
    _, full = module.eval()(q, k, v, average_attn_weights=False)
    zero = dropped == 0
    assert abs(zero.double().mean().item() - 0.4) < 0.03  # 8000 weights: five standard deviations
    torch.testing.assert_close(dropped[~zero], full[~zero] / 0.6)
    values = nn.functional.linear(v, module.in_proj_weight[2 * E :], module.in_proj_bias[2 * E :])
    heads = torch.einsum("nhls,nshd->nlhd", dropped, values.unflatten(-1, (H, -1)))
    torch.testing.assert_close(out, module.out_proj(heads.flatten(2)))


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_leaves_the_expected_output(need_weights):
    module = twin(layer(batch_first=True, dropout=0.4))
    inputs = [x.detach().expand(20_000, -1, -1) for x in (torch.randn(1, n, E, dtype=torch.float64) for n in (L, S, S))]
    draws = module(*inputs, need_weights=need_weights)[0]
    expected = module.eval()(*(x[:1] for x in inputs), need_weights=need_weights)[0]
    deviation = (draws.mean(0) - expected[0]).abs() / (draws.std(0) / math.sqrt(len(draws)))
    assert draws.std(0).min() > 0.01 and deviation.max() < 5


@pytest.mark.parametrize("why", ["no tap", "inactive tap", "no gradients"])
@pytest.mark.parametrize("training", [False, True])
def test_without_an_active_tap_torch_itself_runs(why, training):
    module = layer(torch.float32, batch_first=True, dropout=0.3).train(training)
    swapped = twin(module, None if why == "no tap" else Spy(active=why == "no gradients"))
    fired = []
    swapped.out_proj.register_forward_hook(lambda *args: fired.append(1))
    x = torch.randn(N, L, E)
    with torch.set_grad_enabled(why != "no gradients"):
        torch.manual_seed(1)
        expected = module(x, x, x)
        torch.manual_seed(1)
        got = swapped(x, x, x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not fired


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_what_the_pieces_do_not_cover_is_left_to_torch(options):
    module, spy = layer(**options), Spy()
    forced = copy.deepcopy(module)
    forced.__class__, forced.tap = DecomposedMultiheadAttention, spy
    inputs = arguments(module)
    for expected, got in zip(run(module, inputs), run(forced, inputs), strict=True):
        assert torch.equal(expected, got)
    assert not spy.calls


@pytest.mark.parametrize(
    "q, k, kwargs",
    [
        ((L, N, E), (S, N, E), {"attn_mask": torch.zeros(1, S).double()}),  # would broadcast
        ((L, N, E), (S, N, E), {"attn_mask": torch.zeros(L, S, dtype=torch.long)}),
        ((L, N, E), (S, N, E), {"attn_mask": torch.zeros(H, L, S).double()}),
        ((L, N, E), (S, N, E), {"key_padding_mask": torch.zeros(1, S).double()}),
        ((L, N, E), (S, N, E), {"key_padding_mask": torch.zeros(S).double()}),
        ((L, N, E), (S, N, E), {"is_causal": True}),
        ((L, N, E), (S, N + 1, E), {}),
        ((L, E), (S, N, E), {}),
        ((L, N, 6), (S, N, 6), {}),
    ],
)
def test_what_does_not_fit_raises_the_error_of_torch(q, k, kwargs):
    module, q, k = layer(), torch.randn(q, dtype=torch.float64), torch.randn(k, dtype=torch.float64)
    with pytest.raises((AssertionError, RuntimeError)) as expected:
        module(q, k, k, **kwargs)
    with pytest.raises(expected.type) as got:
        twin(module)(q, k, k, **kwargs)
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "memory", "cross"])
def test_the_tap_sees_samples_first_and_equal_inputs_as_one_object(kind, batch_first):
    spy = Spy()
    module = twin(layer(batch_first=batch_first), spy)
    inputs = arguments(module, kind)
    module(*inputs)
    ((q, k, v), projections) = spy.calls[0]
    assert (k is q) == (inputs[1] is inputs[0]) and (v is k) == (inputs[2] is inputs[1])
    for seen, given, projection in zip((q, k, v), inputs, projections, strict=True):
        assert torch.equal(seen, given if batch_first else given.transpose(0, 1))
        assert projection.shape == (N, seen.shape[1], E)


class InPlace(torch.autograd.Function):
    """An identity that says it changed its arguments, which autograd forbids for several views."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.mark_dirty(*tensors)
        return tensors

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6}])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_tap_may_change_the_projections_in_place(options, batched, batch_first):
    module = layer(batch_first=batch_first, **options)
    tapped = twin(module, lambda m, inputs, projections: InPlace.apply(*projections))
    inputs = arguments(module, batched=batched)
    for expected, got in zip(run(module, inputs), run(tapped, inputs), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)


def test_hooks_of_out_proj_fire_with_samples_first():
    module, seen = twin(layer(batch_first=False)), []
    module.out_proj.register_forward_hook(lambda m, args, out: seen.append((args[0].shape, out.shape)))
    module(*arguments(module))
    assert seen == [((N, L, E), (N, L, E))]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_the_normal_form_is_the_gradient_of_every_sample(kind, batch_first, batched):
    spy = Spy()
    module = twin(layer(batch_first=batch_first), spy)
    rule = attention_rule(module)
    inputs = arguments(module, kind, batched)
    out = module(*inputs)[0]
    out = out if batched and batch_first else out.transpose(0, 1) if batched else out.unsqueeze(0)
    probe = torch.randn_like(out)
    seen, projections = spy.calls[0]
    g = rule.outputs(torch.autograd.grad((out * probe).sum(), projections, retain_graph=True), *seen)
    a = rule.inputs(*rule.save(module, seen))
    means = rule.mean_inputs(*seen)
    for n in range(len(out)):
        w, b = torch.autograd.grad(
            (out * probe)[n].sum(), [module.in_proj_weight, module.in_proj_bias], retain_graph=True
        )
        normal = torch.stack([gj[n].T @ aj[n] for gj, aj in zip(g, a, strict=True)])
        torch.testing.assert_close(normal, w.view(rule.groups, rule.d_out, rule.d_in), atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(torch.cat([gj[n].sum(0) for gj in g]), b, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(means[:, n], torch.stack([aj[n].mean(0) for aj in a]))


def test_three_weights_are_three_linear_layers():
    spy = Spy()
    module = twin(layer(kdim=6, vdim=7), spy)
    with pytest.raises(ValueError, match="got 6, 7 and 8: use a linear rule"):
        attention_rule(module)
    out = module(*arguments(module))[0]
    inputs, projections = spy.calls[0]
    weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    found = torch.autograd.grad(out.square().sum(), [*projections, *weights])
    for x, g, expected in zip(inputs, found[:3], found[3:], strict=True):
        torch.testing.assert_close(torch.einsum("nso,nsi->oi", g, x), expected, atol=1e-12, rtol=1e-12)


class Named(nn.MultiheadAttention):
    """A subclass that leaves the forward pass alone."""


class Scaled(nn.MultiheadAttention):
    """A subclass with a forward pass of its own."""

    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


def swapped_pair(cls=nn.MultiheadAttention):
    module = cls(E, H)
    swapped = copy.deepcopy(module)
    assert swap(swapped) is None
    swapped.tap = lambda *args: args[-1]  # can be neither copied with its closure nor pickled
    return module, swapped


def by_torch(module):
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("cls", [nn.MultiheadAttention, Named])
def test_a_swapped_layer_keeps_its_type_its_object_and_its_state(cls):
    module, swapped = swapped_pair(cls)
    assert isinstance(swapped, cls)
    assert list(swapped.state_dict()) == list(module.state_dict())
    assert [name for name, _ in swapped.named_modules()] == [name for name, _ in module.named_modules()]
    swapped.load_state_dict(module.state_dict())
    parameters = list(swapped.parameters())
    assert swap(swapped) is None and all(a is b for a, b in zip(swapped.parameters(), parameters, strict=True))
    x = torch.randn(L, N, E)
    for a, b in zip(swapped(x, x, x), module(x, x, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cls", [nn.MultiheadAttention, Named])
def test_subclasses_are_swapped_once_per_class(cls):
    assert type(swapped_pair(cls)[1]) is type(swapped_pair(cls)[1])


@pytest.mark.parametrize("cls", [nn.MultiheadAttention, Named])
@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, by_pickle, by_torch])
def test_a_copy_or_a_pickle_is_the_layer_before_the_swap(again, cls):
    module, swapped = swapped_pair(cls)
    copied = again(swapped)
    assert type(copied) is cls and "tap" not in copied.__dict__
    assert copied.__dict__.keys() == module.__dict__.keys()
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), module.parameters(), strict=True))
    assert swapped.tap is not None and isinstance(swapped, DecomposedMultiheadAttention)
    assert swap(copied) is None
    holder = again(nn.Sequential(swapped))
    assert list(holder.state_dict()) == list(nn.Sequential(module).state_dict())


REFUSED = {
    "bias_k": (lambda m: m.__init__(E, H, add_bias_kv=True), "add_bias_kv"),
    "zero": (lambda m: m.__init__(E, H, add_zero_attn=True), "add_zero_attn"),
    "subclass": (lambda m: setattr(m, "__class__", Scaled), "its own forward"),
    "quantizable": (lambda m: setattr(m, "__class__", torch.ao.nn.quantizable.MultiheadAttention), "its own forward"),
    "patched": (lambda m: setattr(m, "forward", m.forward), "its own forward"),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m, "in_proj_weight", nn.Identity()),
        "in_proj_weight is computed",
    ),
    "pruned": (lambda m: prune.l1_unstructured(m, "in_proj_weight", amount=2), "in_proj_weight is computed"),
    "pruned_bias": (lambda m: prune.l1_unstructured(m, "in_proj_bias", amount=2), "in_proj_bias is computed"),
    "pruned_out": (lambda m: prune.l1_unstructured(m.out_proj, "weight", amount=2), "out_proj is not a plain linear"),
    "replaced_out": (lambda m: setattr(m, "out_proj", nn.Sequential(m.out_proj)), "out_proj is not a plain linear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_cannot_be_taken_apart_is_left_alone_with_a_reason(name):
    change, reason = REFUSED[name]
    module = nn.MultiheadAttention(E, H)
    change(module)
    cls = type(module)
    assert reason in swap(module)
    assert type(module) is cls


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_transformer_layer_works_with_swapped_attention(mode, norm_first, padded):
    block = nn.TransformerEncoderLayer(
        E, H, 16, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64
    ).train(mode == "train")
    spy, swapped = Spy(), copy.deepcopy(block)
    assert swap(swapped.self_attn) is None
    swapped.self_attn.tap = spy
    x = torch.randn(N, L, E, dtype=torch.float64)
    kwargs = {"src_key_padding_mask": padding_masks(L, True)["bool"]} if padded else {}
    with torch.set_grad_enabled(mode != "no_grad"):
        expected, got = block(x, **kwargs), swapped(x, **kwargs)
    if mode == "no_grad":
        assert torch.equal(got, expected) and not spy.calls
        return
    assert len(spy.calls) == 1
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    gradients = (torch.autograd.grad(y.square().sum(), m.parameters()) for y, m in ((expected, block), (got, swapped)))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, atol=1e-11, rtol=1e-11)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_with_nested_tensors_works_with_swapped_attention():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, batch_first=True), 2).eval()
    swapped = copy.deepcopy(encoder)
    for block in swapped.layers:
        assert swap(block.self_attn) is None
        block.self_attn.tap = Spy()
    x, padded = torch.randn(N, L, E), torch.zeros(N, L, dtype=torch.bool)
    padded[:, -1] = True
    with torch.no_grad():
        assert torch.equal(swapped(x, src_key_padding_mask=padded), encoder(x, src_key_padding_mask=padded))


@pytest.mark.parametrize("need_weights, kind", [(False, "self"), (True, "cross")])
def test_a_tapped_layer_compiles_without_a_graph_break(need_weights, kind):
    class Doubling:
        active = True

        def __call__(self, module, inputs, projections):
            q, k, v = projections
            return q, k, 2 * v

    module = twin(layer(batch_first=True), Doubling())
    inputs = arguments(module, kind)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    kwargs = {"need_weights": need_weights, "key_padding_mask": padding_masks(inputs[1].shape[1], True)["bool"]}
    for expected, got in zip(run(module, inputs, **kwargs), run(compiled, inputs, **kwargs), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    module.tap.active = False
    for expected, got in zip(run(module, inputs, **kwargs), run(compiled, inputs, **kwargs), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
