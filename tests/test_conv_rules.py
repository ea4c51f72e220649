"""Convolution rules against autograd's single-sample gradients, dense Jacobians and recorded factors, in float64."""

import ast
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secondorder.curvature.layers.conv import conv_rule, conv_transpose_rule
from secondorder.curvature.patches import patches

CORE = Path(__file__).parent / "golden"
FOLDERS = [CORE, *(Path(part) for part in os.environ.get("GOLDEN_DIR", "").split(os.pathsep) if part)]
FILES = {path.stem: path for folder in FOLDERS for path in sorted(folder.rglob("exact_conv*.npz"))}

# layer, shape of one sample
CASES = {
    "1d": (lambda: nn.Conv1d(2, 3, 3), (2, 7)),
    "1d_strided_dilated": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), (2, 9)),
    "1d_kernel_shorter_than_stride": (lambda: nn.Conv1d(2, 3, 2, stride=3), (2, 10)),
    "1d_padding_beyond_the_kernel": (lambda: nn.Conv1d(1, 2, 2, padding=5), (1, 3)),
    "2d": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 6, 5)),
    "2d_one_by_one": (lambda: nn.Conv2d(4, 3, 1, bias=False), (4, 3, 3)),
    "2d_patches_side_by_side": (lambda: nn.Conv2d(3, 4, 2, stride=2), (3, 4, 6)),
    "2d_valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 4, 5)),
    "2d_same": (lambda: nn.Conv2d(2, 3, (3, 5), padding="same", dilation=(2, 1)), (2, 4, 5)),
    "2d_same_even": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same"), (2, 4, 5)),
    "2d_same_even_dilated": (lambda: nn.Conv2d(2, 3, (4, 2), padding="same", dilation=(3, 1)), (2, 4, 5)),
    "2d_same_even_circular": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same", padding_mode="circular"), (2, 4, 5)),
    "2d_circular": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=(2, 1), padding_mode="circular"), (2, 4, 5)),
    "2d_reflect": (lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 5)),
    "2d_replicate": (lambda: nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="replicate", groups=2), (2, 4, 5)),
    "2d_groups": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1, groups=2), (4, 3, 4)),
    "2d_depthwise": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (3, 4, 3)),
    "3d": (lambda: nn.Conv3d(2, 2, (2, 1, 3), stride=(1, 2, 1), padding=(1, 0, 1)), (2, 3, 3, 3)),
    "3d_groups_dilated": (lambda: nn.Conv3d(2, 4, 2, dilation=(1, 2, 1), groups=2), (2, 2, 3, 3)),
    "transposed_1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1, dilation=2), (2, 4)),
    "transposed_1d_cropped": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=3), (2, 6)),
    "transposed_1d_kernel_shorter_than_stride": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=3), (2, 4)),
    "transposed_2d": (
        lambda: nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), output_padding=(1, 0)),
        (2, 3, 4),
    ),
    "transposed_2d_groups": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, groups=2), (4, 2, 3)),
    "transposed_2d_depthwise": (lambda: nn.ConvTranspose2d(3, 3, 4, stride=2, padding=1, groups=3), (3, 2, 3)),
    "transposed_3d": (
        lambda: nn.ConvTranspose3d(2, 4, (2, 1, 3), stride=(1, 2, 2), dilation=(2, 1, 1), groups=2),
        (2, 2, 2, 2),
    ),
}


def made(case, n=3):
    """Layer, its rule and a batch of inputs."""
    make, shape = CASES[case]
    layer = make().double()
    return layer, rule_of(layer), torch.randn(n, *shape, dtype=torch.float64)


def rule_of(layer):
    return conv_transpose_rule(layer) if isinstance(layer, nn.modules.conv._ConvTransposeNd) else conv_rule(layer)


def folded(rule, weight):
    """The weight (or its gradient) in normal form, `(k, d_out, d_in)`."""
    if rule.fold is not None:
        split, order = rule.fold
        weight = weight.reshape(split).permute(order)
    return weight.reshape(rule.groups, rule.d_out, rule.d_in)


def rows(rule, layer, x, g):
    saved = rule.save(layer, x)
    return rule.inputs(*saved), rule.outputs(g, *saved)


def forward(layer, x):
    with warnings.catch_warnings():  # torch's advice on the speed of even kernels
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel")
        return layer(x)


def assert_reproduces_gradients(layer, rule, x):
    """`Σ_s g_s a_sᵀ` is autograd's weight gradient, sample by sample; also the layer is linear in `a`."""
    z = forward(layer, x)
    v = torch.randn_like(z)
    a, g = rows(rule, layer, x, v)
    k, d_out, d_in = rule.groups, rule.d_out, rule.d_in
    positions = z[0, 0].numel()
    assert a.shape == (k, len(x), positions, d_in) and g.shape == (k, len(x), positions, d_out)
    found = torch.einsum("knso,knsi->nkoi", g, a)
    for n in range(len(x)):
        (wanted,) = torch.autograd.grad(forward(layer, x[n : n + 1]), layer.weight, v[n : n + 1])
        torch.testing.assert_close(found[n], folded(rule, wanted), rtol=1e-12, atol=1e-12)
    product = torch.einsum("knsi,koi->nkos", a, folded(rule, layer.weight)).flatten(1, 2)
    bias = 0 if layer.bias is None else layer.bias[:, None]
    torch.testing.assert_close(product + bias, z.flatten(2), rtol=1e-12, atol=1e-12)


def assert_mean_is_the_mean(rule, x):
    wanted = rule.inputs(x).mean(2)
    torch.testing.assert_close(rule.mean_inputs(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_rows_reproduce_the_gradient_of_every_sample(case):
    assert_reproduces_gradients(*made(case))


@pytest.mark.parametrize("case", CASES)
def test_mean_inputs_are_the_mean_of_the_inputs(case):
    _, rule, x = made(case)
    assert_mean_is_the_mean(rule, x)


@st.composite
def axes(draw, transposed):
    """Kernel, stride, padding, dilation, output padding and size of one axis such that the layer has an output."""
    k, s, d = (draw(st.integers(1, 4)) for _ in range(3))
    p = draw(st.integers(0, 4))
    span = (k - 1) * d + 1
    if transposed:
        extra = draw(st.integers(0, max(s, d) - 1))
        least = max(1, -(-(2 * p + 1 - extra - span) // s) + 1)  # (i - 1)·s - 2p + span + extra >= 1
    else:
        extra, least = 0, max(1, span - 2 * p)
    return k, s, p, d, extra, least + draw(st.integers(0, 3))


@st.composite
def layers(draw, transposed):
    dims = draw(st.integers(1, 3))
    k, s, p, d, extra, size = zip(*(draw(axes(transposed)) for _ in range(dims)), strict=True)
    groups, per_in, per_out = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kinds = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d") if transposed else ("Conv1d", "Conv2d", "Conv3d")
    options = {"output_padding": extra} if transposed else {}
    kind = getattr(nn, kinds[dims - 1])
    layer = kind(groups * per_in, groups * per_out, k, s, p, dilation=d, groups=groups, dtype=torch.float64, **options)
    return layer, torch.randn(2, groups * per_in, *size, dtype=torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
def test_every_convolution_is_exact(transposed):
    @settings(max_examples=60, deadline=None, database=None)
    @given(layers(transposed))
    def check(drawn):
        layer, x = drawn
        rule = rule_of(layer)
        assert_reproduces_gradients(layer, rule, x)
        assert_mean_is_the_mean(rule, x)

    check()


def layer_from(text):
    """The layer whose `repr` was recorded; there the string `same` stands without quotes."""
    call = ast.parse(text, mode="eval").body

    def value(node):
        return node.id if isinstance(node, ast.Name) else ast.literal_eval(node)

    keywords = {word.arg: value(word.value) for word in call.keywords}
    return getattr(nn, call.func.id)(*map(value, call.args), **keywords, dtype=torch.float64)


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_recorded_factors_and_gradients_are_reproduced(path, golden_counts):
    with np.load(path, allow_pickle=False) as z:
        data = {key: torch.tensor(z[key]) for key in z.files if key != "meta"}
        layer = layer_from(json.loads(str(z["meta"]))["layer"])
    layer.load_state_dict({key[len("param/0.") :]: data[key] for key in data if key.startswith("param/")})
    rule, x = rule_of(layer), data["X"]
    for setting in ("expand", "reduce"):
        for reduction in ("mean", "sum"):
            out = layer(x)
            f = out.flatten(2) if setting == "expand" else out.flatten(2).sum(2)
            here = f"{setting}/{reduction}"

            loss = nn.functional.mse_loss(f, data[f"{here}/y"], reduction=reduction)
            (v,) = torch.autograd.grad(loss, out, retain_graph=True)
            a, g = rows(rule, layer, x, v)
            compare = {"rtol": 1e-10, "atol": 1e-12}
            torch.testing.assert_close(torch.einsum("knso,knsi->koi", g, a), data[f"{here}/grad_matrix"], **compare)

            # Columns of the loss's Hessian root, √2 e_c per loss term; the mean also divides by channels and terms.
            channels, terms = f.shape[1], len(x) * f[0, 0].numel()
            G = torch.zeros_like(data[f"{here}/G"])
            for c in range(channels):
                column = torch.zeros_like(f)
                column[:, c] = (2 / channels if reduction == "mean" else 2) ** 0.5
                g = rule.outputs(torch.autograd.grad(f, out, column, retain_graph=True)[0], x)
                g = g.flatten(1, 2) if setting == "expand" else g.sum(2)
                G += g.mT @ g / (terms if reduction == "mean" else 1)
            torch.testing.assert_close(G, data[f"{here}/G"], **compare)

            a = rule.inputs(x).flatten(1, 2) if setting == "expand" else rule.mean_inputs(x)
            if layer.bias is not None:
                a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
            assert a.shape[2] == rule.d_in + (layer.bias is not None)
            torch.testing.assert_close(a.mT @ a / a.shape[1], data[f"{here}/A"], **compare)
    golden_counts["files"] += 1


def test_core_files_are_there():
    assert {"exact_conv1d", "exact_conv2d_groups", "exact_convT2d"} <= FILES.keys()


@pytest.mark.parametrize("case", ["2d_groups", "2d_depthwise", "transposed_2d_groups"])
def test_grouped_convolution_is_exact_per_group_and_not_averaged_over_groups(case):
    """The Gauss-Newton matrix of ½‖z‖² is JᵀJ; per group it is I ⊗ Σ a aᵀ, and zero between groups."""
    layer, rule, x = made(case)
    k, d_out = rule.groups, rule.d_out
    J = torch.autograd.functional.jacobian(
        lambda weight: torch.func.functional_call(layer, {"weight": weight}, (x,)).flatten(), layer.weight.detach()
    )
    J = torch.stack([folded(rule, row) for row in J]).flatten(2)  # (outputs, groups, d_out·d_in)
    dense = torch.einsum("rjp,rlq->jlpq", J, J)
    a = rule.inputs(x).flatten(1, 2)
    A = a.mT @ a
    for j in range(k):
        for i in range(k):
            wanted = torch.kron(torch.eye(d_out, dtype=A.dtype), A[j]) if i == j else torch.zeros_like(dense[i, j])
            torch.testing.assert_close(dense[i, j], wanted, rtol=1e-12, atol=1e-12)
        averaged = torch.kron(torch.eye(d_out, dtype=A.dtype), A.mean(0))
        assert (averaged - dense[j, j]).norm() > 0.1 * dense[j, j].norm()


def test_one_group_has_the_weights_rows():
    """Columns in the order of `weight.flatten(1)`: KFAC factors can be compared with other implementations."""
    layer, rule, _ = made("2d")
    assert torch.equal(folded(rule, layer.weight)[0], layer.weight.flatten(1))


def test_dilation_is_respected():
    dense, dilated = (nn.Conv2d(1, 1, 2, dilation=d, dtype=torch.float64) for d in (1, 2))
    x = torch.arange(9, dtype=torch.float64).view(1, 1, 3, 3)
    assert rule_of(dense).inputs(x)[0, 0, 0].tolist() == [0, 1, 3, 4]
    assert rule_of(dilated).inputs(x)[0, 0].tolist() == [[0, 2, 6, 8]]


@pytest.mark.parametrize("case", ["2d", "2d_groups", "2d_circular", "transposed_2d", "transposed_2d_groups"])
def test_memory_layout_does_not_matter(case):
    layer, rule, x = made(case)
    v = torch.randn_like(layer(x))
    plain = *rows(rule, layer, x, v), rule.mean_inputs(x)
    for moved in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.mT.contiguous().mT,
        lambda t: t.repeat_interleave(2, 1)[:, ::2],
    ):
        x2, v2 = moved(x), moved(v)
        assert not x2.is_contiguous() and not v2.is_contiguous()
        torch.testing.assert_close((*rows(rule, layer, x2, v2), rule.mean_inputs(x2)), plain, rtol=1e-13, atol=1e-13)
    weight = layer.weight.detach()
    assert torch.equal(folded(rule, weight.to(memory_format=torch.channels_last)), folded(rule, weight))


def test_gradient_of_a_sum_is_taken():
    """Gradients that autograd expands from one number have no storage of their own."""
    layer, rule, x = made("2d")
    g = torch.ones((), dtype=torch.float64).expand(layer(x).shape)
    assert torch.equal(rule.outputs(g, x), rule.outputs(g.contiguous(), x))


@pytest.mark.parametrize("case", ["1d", "2d_reflect", "3d", "transposed_1d", "transposed_2d_groups"])
def test_an_input_without_batch_axis_is_one_sample(case):
    layer, rule, x = made(case, n=1)
    v = torch.randn_like(layer(x))
    wanted = *rows(rule, layer, x, v), rule.mean_inputs(x)
    found = *rows(rule, layer, x[0], v[0]), rule.mean_inputs(x[0])
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("case", ["2d_groups", "transposed_2d"])
def test_an_empty_batch_has_no_rows(case):
    layer, rule, x = made(case, n=0)
    a, g = rows(rule, layer, x, layer(x).detach())
    assert a.shape[1] == g.shape[1] == rule.mean_inputs(x).shape[1] == 0


@pytest.mark.parametrize("case", ["2d_same", "transposed_2d"])
def test_mean_does_not_overflow_in_half_precision(case):
    make, shape = CASES[case]
    x = torch.full((1, shape[0], 64, 64), 100.0, dtype=torch.float16)
    mean = rule_of(make()).mean_inputs(x)
    assert x.float().sum((2, 3)).max() > torch.finfo(torch.float16).max
    assert mean.dtype == torch.float16 and mean.isfinite().all()


def test_patches_are_a_view_of_the_padded_input():
    x = torch.randn(2, 3, 8, 8)
    view = patches(x, (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    assert view.shape == (2, 3, 8, 8, 3, 3)
    assert view.untyped_storage().nbytes() == 2 * 3 * 10 * 10 * 4


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (7, 8)])
def test_output_size_of_a_transposed_convolution_is_followed(size):
    """As U-Nets call it: what the call adds to `output_padding` only the output tells."""
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1).double()
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    out = layer(x, output_size=size)
    v = torch.randn_like(out)
    rule = rule_of(layer).bound(out.shape, x)
    (gradient,) = torch.autograd.grad(out, layer.weight, v)
    a, g = rule.inputs(x), rule.outputs(v, x)
    split, order = rule.fold
    expected = gradient.reshape(split).permute(order).reshape(1, rule.d_out, rule.d_in)
    torch.testing.assert_close(torch.einsum("knso,knsi->koi", g, a), expected)
    torch.testing.assert_close(rule.mean_inputs(x), a.mean(2))


@pytest.mark.parametrize("case", ["2d_groups", "2d_reflect", "transposed_2d_groups"])
def test_rules_trace_without_a_graph_break_for_any_batch_size(case):
    torch._dynamo.reset()  # or fields that differ from the case before become symbolic, which takes seconds
    layer, rule, x = made(case)
    v = torch.randn_like(layer(x)).detach()
    for tensor in (x, v):
        torch._dynamo.mark_dynamic(tensor, 0)

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x, v):
        saved = rule.save(layer, x)
        return rule.inputs(*saved), rule.mean_inputs(*saved), rule.outputs(v, *saved)

    torch.testing.assert_close(traced(x, v), (rule.inputs(x), rule.mean_inputs(x), rule.outputs(v, x)))


@pytest.mark.parametrize("case", CASES)
def test_equal_layers_have_equal_rules(case):
    make, _ = CASES[case]
    assert rule_of(make()) == rule_of(make()) and len({rule_of(make()), rule_of(make())}) == 1
