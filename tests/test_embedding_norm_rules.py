"""Rules of embeddings and normalisation layers: per-sample gradients of autograd, one-hot layers, recorded factors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secondorder.curvature.layers.embedding import EmbeddingRule, embedding_rule
from secondorder.curvature.layers.norm import norm_rule

GOLDEN = Path(__file__).parent / "golden"

# name: layer, shape of the input, positions per sample
NORMS = {
    "layer": (lambda: nn.LayerNorm(4), (5, 4), 1),
    "layer_tokens": (lambda: nn.LayerNorm(4), (3, 6, 4), 6),
    "layer_many_axes": (lambda: nn.LayerNorm((2, 4)), (3, 5, 6, 2, 4), 30),
    "layer_no_bias": (lambda: nn.LayerNorm(4, bias=False), (3, 6, 4), 6),
    "layer_large_eps": (lambda: nn.LayerNorm(4, eps=0.5), (3, 6, 4), 6),
    "rms": (lambda: nn.RMSNorm(4), (3, 6, 4), 6),
    "rms_many_axes": (lambda: nn.RMSNorm((2, 4), eps=0.1), (3, 6, 2, 4), 6),
    "group": (lambda: nn.GroupNorm(2, 6), (3, 6, 2, 5), 10),
    "group_flat": (lambda: nn.GroupNorm(3, 6), (3, 6), 1),
    "batch1d_flat": (lambda: nn.BatchNorm1d(4), (5, 4), 1),
    "batch1d": (lambda: nn.BatchNorm1d(4), (5, 4, 3), 3),
    "batch2d": (lambda: nn.BatchNorm2d(4), (3, 4, 2, 3), 6),
    "batch3d": (lambda: nn.BatchNorm3d(2), (3, 2, 2, 1, 3), 6),
}


def perturbed(make):
    """The layer in float64, away from its initial values, one weight zero, in eval mode."""
    module = make().double().eval()
    with torch.no_grad():
        for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
            tensor.add_(torch.rand_like(tensor))
        module.weight.view(-1)[0] = 0.0
    return module


def forward_backward(module, x, probe=None):
    """What the rule saves in the forward pass, the gradient of the output, the probe that made it."""
    rule = norm_rule(module)
    saved = rule.save(module, x)
    out = module(x)
    probe = torch.randn_like(out) if probe is None else probe
    loss = (probe * out.sin()).sum()
    return rule, saved, loss, torch.autograd.grad(loss, out, retain_graph=True)[0], probe


def affine_gradient(loss, module):  # (d, 1 or 2)
    grads = torch.autograd.grad(loss, list(module.parameters()))
    return torch.stack([g.flatten() for g in grads], dim=-1)


@pytest.mark.parametrize("name", NORMS)
def test_norm_rows_are_the_gradient_of_every_sample_with_a_zero_weight(name):
    make, shape, positions = NORMS[name]
    module = perturbed(make)
    x = torch.randn(shape, dtype=torch.float64)
    rule, saved, _, g, probe = forward_backward(module, x)
    rows = rule.outputs(g, *saved)
    assert rows.shape == (rule.groups, shape[0], positions, rule.d_out)
    for n in range(shape[0]):
        loss = forward_backward(module, x[n : n + 1], probe[n : n + 1])[2]
        torch.testing.assert_close(rows[:, n].sum(1), affine_gradient(loss, module), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in NORMS if name.startswith("batch")])
@pytest.mark.parametrize("running", [True, False])
def test_batch_norm_rows_sum_to_the_batch_gradient_in_training(name, running):
    make, shape, _ = NORMS[name]
    module = perturbed(make)
    if running:
        module.train()
    else:  # without running statistics a batch's own are used in eval mode too
        module.running_mean = module.running_var = None
    rule, saved, loss, g, _ = forward_backward(module, torch.randn(shape, dtype=torch.float64))
    torch.testing.assert_close(
        rule.outputs(g, *saved).sum((1, 2)), affine_gradient(loss, module), atol=1e-12, rtol=1e-12
    )


def test_batch_norm_in_eval_keeps_the_statistics_of_its_forward():
    module = perturbed(lambda: nn.BatchNorm1d(4))
    x = torch.randn(5, 4, dtype=torch.float64)
    rule, saved, loss, g, _ = forward_backward(module, x)
    expected = affine_gradient(loss, module)
    module.train()(10 + 3 * x)
    torch.testing.assert_close(rule.outputs(g, *saved).sum((1, 2)), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm((2, 3)), lambda: nn.RMSNorm((2, 3))])
def test_features_alone_are_one_sample_with_one_position(make):
    module = perturbed(make)
    rule, saved, loss, g, _ = forward_backward(module, torch.randn(2, 3, dtype=torch.float64))
    rows = rule.outputs(g, *saved)
    assert rows.shape[1:3] == (1, 1)
    torch.testing.assert_close(rows[:, 0, 0], affine_gradient(loss, module), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["layer_tokens", "rms", "group", "batch2d"])
def test_low_precision_inputs_are_normalized_in_float32(name, dtype):
    make, shape, _ = NORMS[name]
    module = make()
    # Small enough for eps to matter: RMSNorm without one takes that of float32.
    x = (torch.randn(shape) * 1e-3 + 1e-3).to(dtype)
    rule = norm_rule(module)
    got = rule.outputs(torch.ones(shape, dtype=dtype), *rule.save(module, x))
    assert got.dtype == torch.float32
    exact = make().double()
    if isinstance(exact, nn.RMSNorm):
        exact.eps = torch.finfo(torch.float32).eps
    x_hat = exact(x.double())  # weight 1, bias 0
    features = shape[-1] if name in ("layer_tokens", "rms") else shape[1]
    x_hat = x_hat.movedim(-1 if name in ("layer_tokens", "rms") else 1, 0).reshape(features, shape[0], -1)
    torch.testing.assert_close(got[..., 0], x_hat.float(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", NORMS)
def test_norm_rule_has_no_input_factor_and_is_hashable(name):
    make, shape, positions = NORMS[name]
    module = make()
    rule = norm_rule(module)
    saved = rule.save(module, torch.randn(shape))
    assert rule.d_in == 0 and rule == norm_rule(make()) and hash(rule) == hash(norm_rule(make()))
    assert rule.inputs(*saved).shape == (rule.groups, shape[0], positions, 0)
    assert rule.mean_inputs(*saved).shape == (rule.groups, shape[0], 0)
    assert rule.groups * rule.d_out == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", ["layer_tokens", "rms", "group", "batch2d"])
def test_norm_rules_compile_without_a_graph_break(name):
    make, shape, _ = NORMS[name]
    module, x, g = perturbed(make), torch.randn(shape).double(), torch.randn(shape).double()
    rule = norm_rule(module)

    def rows(x, g):
        return rule.outputs(g, *rule.save(module, x))

    torch.testing.assert_close(torch.compile(rows, fullgraph=True, backend="aot_eager")(x, g), rows(x, g))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: nn.LayerNorm(3, elementwise_affine=False), ValueError, "must have a weight"),
        (lambda: nn.BatchNorm2d(3, affine=False), ValueError, "must have a weight"),
        (lambda: nn.InstanceNorm2d(3), TypeError, "got InstanceNorm2d"),
    ],
)
def test_norm_rule_says_what_it_does_not_take(make, error, message):
    with pytest.raises(error, match=message):
        norm_rule(make())


def golden(name):
    with np.load(GOLDEN / name) as z:
        return {key: torch.from_numpy(z[key]) for key in z.files if key != "meta"}


def captured(net, layers, x):
    """The network's output, and of each layer the rule, what it saves and its output."""
    seen = {}

    def hook(module, args, out):
        rule = norm_rule(module)
        seen[module] = rule, rule.save(module, args[0].detach()), out

    handles = [layer.register_forward_hook(hook) for layer in layers]
    out = net(x)
    for handle in handles:
        handle.remove()
    return out, [seen[layer] for layer in layers]


def norm_net(z):
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.RMSNorm(5), nn.Linear(5, 3)).double()
    net.load_state_dict({key.removeprefix("param/"): value for key, value in z.items() if key.startswith("param/")})
    return net


def test_golden_empirical_blocks_of_layer_norm_and_rms_norm():
    z = golden("norm_layers_ce.npz")
    net = norm_net(z)
    logits, layers = captured(net, [net[1], net[3]], z["X"])
    loss = nn.functional.cross_entropy(logits, z["y"], reduction="sum")
    grads = torch.autograd.grad(loss, [out for *_, out in layers])
    layer, rms = (rule.outputs(g, *saved).sum(2) for (rule, saved, _), g in zip(layers, grads, strict=True))
    blocks = layer.mT @ layer / 6  # (5, 2, 2)
    torch.testing.assert_close(blocks, z["ef/unitwise_ln"], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(blocks[:, 0, 0], z["ef/diag_ln_weight"], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(blocks[:, 1, 1], z["ef/diag_ln_bias"], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close((rms.mT @ rms / 6).flatten(), z["ef/diag_rms_weight"], atol=1e-10, rtol=1e-10)


def test_golden_gauss_newton_of_layer_norm_and_rms_norm():
    z = golden("norm_layers_ce.npz")
    net = norm_net(z)
    logits, layers = captured(net, [net[1], net[3]], z["X"])
    p = logits.detach().softmax(-1)
    total = 0
    for j in range(3):  # columns of the root of the Hessian of the cross entropy
        column = p[:, j : j + 1].sqrt() * (nn.functional.one_hot(torch.tensor(j), 3) - p)
        grads = torch.autograd.grad(logits, [out for *_, out in layers], column, retain_graph=True)
        rows = [rule.outputs(g, *saved).sum(2) for (rule, saved, _), g in zip(layers, grads, strict=True)]
        per_sample = torch.cat([rows[0][..., 0], rows[0][..., 1], rows[1][..., 0]])  # (15, 6)
        total = total + per_sample @ per_sample.T / 6
    torch.testing.assert_close(total, z["ggn/full"], atol=1e-10, rtol=1e-10)


def embedding_case(shape, padding_idx, vocabulary=7, d=3):
    module = nn.Embedding(vocabulary, d, padding_idx=padding_idx, dtype=torch.float64)
    return module, embedding_rule(module), torch.randint(vocabulary, shape)


@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 2, 5), ()])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding_normal_form_is_the_gradient_of_every_sample(shape, padding_idx):
    module, rule, ids = embedding_case(shape, padding_idx)
    samples = shape[0] if shape else 1
    out = module(ids)
    probe = torch.randn_like(out)
    saved = rule.save(module, ids)
    g, a = rule.outputs(probe, *saved), rule.inputs(*saved).double()
    assert g.shape == (1, samples, ids.numel() // samples, 3)
    for n in range(samples):
        part = (out * probe)[n : n + 1] if shape else out * probe
        (expected,) = torch.autograd.grad(part.sum(), module.weight, retain_graph=True)
        torch.testing.assert_close((g[0, n].T @ a[0, n]).T, expected, atol=1e-12, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_counts_are_the_diagonals_of_one_hot_factors(data):
    vocabulary = data.draw(st.integers(1, 6))
    shape = data.draw(st.sampled_from([(4,), (3, 5), (2, 3, 2), (1, 8), (2, 0), ()]))
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9999))))
    padding_idx = data.draw(st.none() | st.integers(0, vocabulary - 1))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9999)))) < 0.7
    mask = data.draw(st.sampled_from([None, mask, mask.double()]))
    rule = EmbeddingRule(vocabulary, 3, padding_idx)

    rows = ids.reshape(shape[0] if shape else 1, int(np.prod(shape[1:])))
    takes_part = torch.ones(rows.shape, dtype=torch.bool) if mask is None else mask.reshape(rows.shape) != 0
    one_hot = nn.functional.one_hot(rows, vocabulary).double() * takes_part.unsqueeze(-1)
    if padding_idx is not None:
        one_hot = one_hot * (rows != padding_idx).unsqueeze(-1)
    expand = (one_hot.flatten(0, 1).T @ one_hot.flatten(0, 1)).diag()
    mean = one_hot.sum(1) / one_hot.sum((1, 2)).clamp(min=1).unsqueeze(-1)
    reduce = (mean.T @ mean).diag()

    assert torch.equal(rule.token_counts(ids, mask).double(), expand)
    assert rule.token_counts(ids, mask).dtype == torch.float32
    got = rule.reduced_counts(ids, mask, dtype=torch.float64)
    torch.testing.assert_close(got, reduce, atol=1e-12, rtol=1e-12)
    if mask is not None:
        assert torch.equal(rule.token_sums(mask.reshape(1, *rows.shape), True, ids, dtype=torch.float64), got)
        assert torch.equal(rule.token_sums(mask.reshape(1, *rows.shape), False, ids).double(), expand)
    if mask is None:
        torch.testing.assert_close(rule.mean_inputs(ids)[0].double(), mean, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 2, 5)])
def test_token_moment_is_the_sum_of_squared_row_gradients(shape):
    module, rule, ids = embedding_case(shape, 2)
    probe = torch.randn(*shape, 3, dtype=torch.float64)
    squares = torch.zeros_like(module.weight)
    for token, row in zip(ids.flatten(), probe.reshape(-1, 3), strict=True):
        (gradient,) = torch.autograd.grad((module(token) * row).sum(), module.weight)
        squares += gradient.square()
    torch.testing.assert_close(rule.token_moment(rule.outputs(probe, ids).square(), ids), squares.detach())


def test_the_weight_in_normal_form_is_transposed():
    module, rule, _ = embedding_case((4,), None)
    split, order = rule.fold
    assert torch.equal(module.weight.view(split).permute(order), module.weight.T)


def test_no_tensor_of_samples_times_vocabulary_is_made():
    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if isinstance(out, torch.Tensor):
                self.largest = max(self.largest, out.numel())
            return out

    vocabulary = 50_000
    rule, ids = EmbeddingRule(vocabulary, 8, 0), torch.randint(vocabulary, (16, 32))
    with Sizes() as sizes:
        rule.token_counts(ids)
        rule.reduced_counts(ids)
    assert sizes.largest == vocabulary + 1


def test_golden_embedding_equals_a_one_hot_linear_layer():
    z = golden("embedding_ce_mean.npz")
    ids, (n, s) = z["ids"], z["ids"].shape
    module = nn.Embedding.from_pretrained(z["emb_weight"], freeze=False)
    rule = embedding_rule(module)
    out = module(ids)
    logits = nn.functional.linear(out.tanh().mean(1), z["out_weight"], z["out_bias"])
    expand = rule.token_counts(ids, dtype=torch.float64) / (n * s)
    reduce = rule.reduced_counts(ids, dtype=torch.float64) / n
    p = logits.detach().softmax(-1)
    labels = nn.functional.one_hot(z["y"], 3)
    vectors = {
        "empirical": [p - labels],
        "type-2": [p[:, j : j + 1].sqrt() * (nn.functional.one_hot(torch.tensor(j), 3) - p) for j in range(3)],
    }
    for kind, columns in vectors.items():
        rows = [rule.outputs(torch.autograd.grad(logits, out, v, retain_graph=True)[0], ids)[0] for v in columns]
        for sharing, diagonal, G in (
            ("expand", expand, sum(g.flatten(0, 1).T @ g.flatten(0, 1) for g in rows) / n),
            ("reduce", reduce, sum(g.sum(1).T @ g.sum(1) for g in rows) / n),
        ):
            key = f"{kind}/{sharing}/emb.weight"
            torch.testing.assert_close(diagonal, z[f"{key}/A"].diag(), atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(G, z[f"{key}/G"], atol=1e-10, rtol=1e-10)
    means = rule.mean_inputs(ids)[0]
    torch.testing.assert_close(means.T @ means / n, z["type-2/reduce/emb.weight/A"].float())
    loss = nn.functional.cross_entropy(logits, z["y"])
    (g,) = torch.autograd.grad(loss, out)
    a = nn.functional.one_hot(ids, 7).double()
    torch.testing.assert_close(torch.einsum("nsd,nsv->vd", rule.outputs(g, ids)[0], a), z["grad/emb"])


def test_embedding_rule_compiles_without_a_graph_break():
    _, rule, ids = embedding_case((4, 6), 2)
    mask, g = torch.rand(4, 6) < 0.5, torch.randn(4, 6, 3)

    def everything(ids, mask, g):
        return rule.token_counts(ids, mask), rule.reduced_counts(ids, mask), rule.outputs(g, ids)

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, mask, g), everything(ids, mask, g))


def test_embedding_rule_says_what_it_does_not_take():
    with pytest.raises(ValueError, match="scale_grad_by_freq=False"):
        embedding_rule(nn.Embedding(3, 2, scale_grad_by_freq=True))
    with pytest.raises(TypeError, match="got Linear"):
        embedding_rule(nn.Linear(3, 2))
