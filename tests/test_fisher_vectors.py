"""Vectors of the true Fisher against Hessians and gradients of torch's own losses, by autograd in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.functional import hessian, hvp

from secondorder.curvature.fisher import fisher_vectors, hessian_product, terms

LOSSES = ["cross_entropy", "mse", "bce"]
KINDS = ["type-2", "mc", "curvature_prop"]
REDUCTIONS = ["mean", "sum"]
SHAPES = {"one row": (4,), "rows": (5, 3), "tokens": (2, 3, 4), "one output": (3, 1)}
DRAWS = 20_000


def outputs(shape, seed=0):
    return 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def random_mask(shape, seed=3):
    """About half of the terms, but at least one: of none, torch's mean is NaN."""
    mask = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(seed)) < 0.5
    mask.view(-1)[0] = True
    return mask


def torch_loss(loss, shape, reduction, mask=None, seed=1, **options):
    """The loss as a user writes it, a function of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    if loss == "cross_entropy":
        target = torch.randint(shape[-1], shape[:-1], generator=generator)
        if mask is not None:
            target = target.masked_fill(~mask, -100)
        return lambda f: F.cross_entropy(
            f.reshape(-1, shape[-1]), target.reshape(-1), reduction=reduction, ignore_index=-100, **options
        )
    function = F.mse_loss if loss == "mse" else F.binary_cross_entropy_with_logits
    target = torch.rand(shape, dtype=torch.float64, generator=generator)
    keep = torch.ones(shape[:-1], dtype=torch.bool) if mask is None else mask
    return lambda f: function(f[keep], target[keep], reduction=reduction)


def curvature(f, loss, kind="type-2", reduction="mean", mask=None, **options):
    """ρ Σ Δ Δᵀ of every term, as the matrix of all outputs."""
    vectors = list(fisher_vectors(f, loss, kind, reduction=reduction, mask=mask, **options))
    assert all(v.shape == f.shape for v in vectors)
    V = torch.stack(vectors, -1).reshape(-1, f.shape[-1], len(vectors))
    rho = 1 / terms(f, mask) if reduction == "mean" else 1
    return rho * torch.block_diag(*(V @ V.mT))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_type_2_vectors_are_a_root_of_the_hessian_of_torchs_loss(loss, reduction, shape):
    f = outputs(shape)
    expected = hessian(torch_loss(loss, shape, reduction), f).reshape(f.numel(), -1)
    close(curvature(f, loss, reduction=reduction), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_masked_terms_are_those_that_torchs_loss_ignores(loss, reduction):
    f, mask = outputs((2, 4, 3)), torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    expected = hessian(torch_loss(loss, f.shape, reduction, mask), f).reshape(f.numel(), -1)
    close(curvature(f, loss, reduction=reduction, mask=mask), expected)
    assert terms(f, mask) == 4 and terms(f) == 8


def test_label_smoothing_leaves_the_hessian_as_it_is():
    f = outputs((4, 3))
    smoothed = torch_loss("cross_entropy", f.shape, "mean", label_smoothing=0.3)
    close(curvature(f, "cross_entropy"), hessian(smoothed, f).reshape(12, 12))


# random vectors: every draw is one of finitely many, each with its probability, or Gaussian


def rows(f, loss, kind, reduction, samples=1):
    """Vectors `(samples, DRAWS, C)` of as many terms with the same outputs `f (C,)`."""
    generator = torch.Generator().manual_seed(7)
    return torch.stack(list(fisher_vectors(f.expand(DRAWS, -1), loss, kind, samples, reduction, generator=generator)))


def assert_drawn_from(drawn, values, probabilities):
    """Every row of `drawn (DRAWS, C)` is one of `values (k, C)`, as often as the probabilities `(k,)` say."""
    distance, which = (drawn[:, None] - values).abs().amax(-1).min(1)
    assert distance.max() < 1e-12
    frequencies = which.bincount(minlength=len(values)).to(drawn.dtype) / DRAWS
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=4 * 0.5 / math.sqrt(DRAWS))  # 4 σ


def term_hessian(f, loss, reduction):
    """Of the loss of one term, where `mean` divides by nothing but what it does within the term."""
    return hessian(torch_loss(loss, (1, *f.shape), reduction), f[None]).reshape(f.numel(), -1)


def test_mc_vectors_of_cross_entropy_are_gradients_at_labels_drawn_from_the_model():
    f = outputs((4,)).requires_grad_()
    losses = [F.cross_entropy(f, torch.tensor(label)) for label in range(4)]
    gradients = torch.stack([torch.autograd.grad(loss, f)[0] for loss in losses])
    p = f.detach().softmax(0)
    assert_drawn_from(rows(f, "cross_entropy", "mc", "mean")[0], gradients, p)
    close(gradients.T * p @ gradients, term_hessian(f.detach(), "cross_entropy", "mean"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_mc_vectors_of_bce_are_root_c_times_the_gradient_at_labels_drawn_from_the_model(reduction):
    f = outputs((3,)).requires_grad_()
    c = 1 / 3 if reduction == "mean" else 1
    labels = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)
    likelihoods = [F.binary_cross_entropy_with_logits(f, y, reduction="sum") for y in labels]
    gradients = math.sqrt(c) * torch.stack([torch.autograd.grad(nll, f)[0] for nll in likelihoods])
    p = torch.stack(likelihoods).neg().exp().detach()
    assert_drawn_from(rows(f, "bce", "mc", reduction)[0], gradients, p)
    close(gradients.T * p @ gradients, term_hessian(f.detach(), "bce", reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_curvature_propagation_over_all_signs_is_the_hessian(loss, reduction):
    f = outputs((3,))
    drawn = rows(f, loss, "curvature_prop", reduction)[0]
    _, which = torch.unique(drawn.mul(1e9).round(), dim=0, return_inverse=True)
    assert which.max() + 1 == 2**3
    values = torch.stack([drawn[which == k][0] for k in range(8)])
    assert_drawn_from(drawn, values, torch.full((8,), 1 / 8, dtype=torch.float64))
    close(values.T @ values / 8, term_hessian(f, loss, reduction))


@pytest.mark.parametrize("samples", [1, 4, 16])
@pytest.mark.parametrize("kind", ["mc", "curvature_prop"])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_expectation_is_the_hessian_whatever_the_number_of_samples(loss, kind, samples):
    for reduction in REDUCTIONS:
        f = outputs((3,), seed=2) / 2
        drawn = rows(f, loss, kind, reduction, samples)
        assert drawn.shape[0] == samples
        H = term_hessian(f, loss, reduction)
        estimate = torch.einsum("mni,mnj->ij", drawn, drawn) / DRAWS
        assert torch.linalg.matrix_norm(estimate - H) < 0.03 * torch.linalg.matrix_norm(H)


@pytest.mark.parametrize("kind", ["mc", "curvature_prop"])
@pytest.mark.parametrize("loss", LOSSES)
def test_terms_outputs_and_samples_are_drawn_independently(loss, kind):
    drawn = rows(torch.zeros(2, dtype=torch.float64), loss, kind, "sum", samples=2)
    for x, y in [(drawn[0], drawn[1]), (drawn[0, 1:], drawn[0, :-1])]:
        correlation = x.T @ y / len(x)
        assert correlation.abs().max() < 4 * drawn.square().mean() / math.sqrt(DRAWS) * math.sqrt(2)


@pytest.mark.parametrize("kind", ["mc", "curvature_prop"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_generator_reproduces_the_draws_and_leaves_the_global_one_alone(loss, kind):
    f, state = outputs((6, 5)), torch.get_rng_state()

    def draw(seed):
        return torch.stack(list(fisher_vectors(f, loss, kind, 3, generator=torch.Generator().manual_seed(seed))))

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_number_of_vectors_is_that_of_the_outputs_or_of_the_samples():
    f = outputs((2, 5))
    count = {kind: len(list(fisher_vectors(f, "mse", kind, samples=3))) for kind in KINDS}
    assert count == {"type-2": 5, "mc": 3, "curvature_prop": 3}


# the product with the Hessian


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_hessian_product_is_that_of_torchs_loss(loss, reduction, shape, masked):
    f, v = outputs(shape), outputs(shape, seed=5)
    mask = random_mask(shape) if masked else None
    expected = hvp(torch_loss(loss, shape, reduction, mask), f, v)[1]
    close(hessian_product(f, loss, v, reduction, mask), expected)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_shape_and_mask_has_the_hessian_of_torchs_loss(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    loss, reduction = data.draw(st.sampled_from(LOSSES)), data.draw(st.sampled_from(REDUCTIONS))
    f, v = outputs(shape, data.draw(st.integers(0, 99))), outputs(shape, 1)
    mask = random_mask(shape, data.draw(st.integers(0, 99)))
    expected = hessian(torch_loss(loss, shape, reduction, mask), f).reshape(f.numel(), -1)
    close(curvature(f, loss, reduction=reduction, mask=mask), expected)
    close(hessian_product(f, loss, v, reduction, mask), (expected @ v.flatten()).reshape(shape))


# what masked terms hold, dtypes, extremes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_masked_term_holds_does_not_matter(loss, kind):
    f, mask = outputs((4, 3)), torch.tensor([True, False, True, False])
    padded = f.masked_fill(~mask[:, None], torch.nan)

    def draw(f):
        return torch.stack(list(fisher_vectors(f, loss, kind, mask=mask, generator=torch.Generator().manual_seed(0))))

    assert torch.equal(draw(padded), draw(f))
    assert (draw(padded)[:, ~mask] == 0).all()
    assert torch.equal(hessian_product(padded, loss, padded, mask=mask), hessian_product(f, loss, f, mask=mask))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_mask_leaves_the_vectors_of_the_other_terms_as_they_are(loss, kind):
    f, mask = outputs((4, 3)), torch.tensor([True, False, True, True])

    def draw(mask):
        return torch.stack(list(fisher_vectors(f, loss, kind, 3, "mean", mask, torch.Generator().manual_seed(0))))

    assert torch.equal(draw(mask)[:, mask], draw(None)[:, mask])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_without_any_term_all_is_zero(loss, reduction):
    f, mask = outputs((2, 3)), torch.zeros(2, dtype=torch.bool)
    assert terms(f, mask) == 0
    assert all((v == 0).all() for v in fisher_vectors(f, loss, "type-2", reduction=reduction, mask=mask))
    assert (hessian_product(f, loss, f, reduction, mask) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_vectors_have_the_dtype_of_the_outputs_but_at_least_float32_and_no_graph(dtype, loss, kind):
    f, mask = outputs((4, 3)).to(dtype).requires_grad_(), torch.tensor([True, True, False, True])
    wide = torch.promote_types(dtype, torch.float32)

    def draw(f):
        return list(fisher_vectors(f, loss, kind, 2, mask=mask, generator=torch.Generator().manual_seed(0)))

    for v, expected in zip(draw(f), draw(f.detach().to(wide)), strict=True):
        assert v.dtype == wide and not v.requires_grad
        assert torch.equal(v, expected)
    product = hessian_product(f, loss, f, mask=mask)
    assert product.dtype == wide and not product.requires_grad
    assert terms(f).dtype == terms(f, mask).dtype == wide and terms(f).ndim == 0


def test_autograd_takes_the_vectors_of_half_precision_outputs():
    f = outputs((4, 3)).bfloat16().requires_grad_()
    (v,) = fisher_vectors(f, "cross_entropy", "mc")
    (gradient,) = torch.autograd.grad(2 * f, f, v)
    assert torch.equal(gradient, 2 * v.bfloat16())


def test_saturated_outputs_have_the_curvature_that_float64_gives_them():
    f = torch.tensor([[30.0], [-30.0]])
    (v,) = fisher_vectors(f, "bce", "type-2")
    torch.testing.assert_close(v, torch.full((2, 1), math.exp(-15)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_is_excluded_has_no_curvature_and_is_never_drawn(kind):
    f = torch.tensor([0.0, -torch.inf, 1.0, -torch.inf]).expand(1000, -1)
    for v in fisher_vectors(f, "cross_entropy", kind):
        assert v.isfinite().all()
        assert (v[:, [1, 3]] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_value_is_read_from_the_device(loss, kind):
    f, mask = torch.empty(4, 3, device="meta"), torch.empty(4, dtype=torch.bool, device="meta")
    assert all(v.shape == f.shape for v in fisher_vectors(f, loss, kind, 2, mask=mask))
    assert hessian_product(f, loss, f, mask=mask).shape == f.shape
    assert terms(f, mask).shape == terms(f).shape == ()


# bad input

BAD = {
    "loss": ({"loss": "hinge"}, r"loss must be 'cross_entropy' or 'mse' or 'bce', got 'hinge'"),
    "kind": ({"kind": "exact"}, r"kind must be 'type-2' or 'mc' or 'curvature_prop', got 'exact'"),
    "reduction": ({"reduction": "none"}, r"reduction must be 'mean' or 'sum', got 'none'"),
    "no reduction": ({"reduction": None}, r"reduction must be 'mean' or 'sum', got None"),
    "no samples": ({"samples": 0}, r"samples must be a positive int, got 0"),
    "samples that are no int": ({"samples": 1.5}, r"samples must be a positive int, got 1.5"),
    "a flag for samples": ({"samples": True}, r"samples must be a positive int, got True"),
    "mask per output": ({"mask": torch.ones(4, 3, dtype=torch.bool)}, r"of shape \(4,\).*torch.bool of shape \(4, 3\)"),
    "mask of integers": ({"mask": torch.ones(4, dtype=torch.int64)}, r"mask must be a bool tensor.*got torch.int64"),
    "scalar outputs": ({"f": torch.tensor(1.0)}, r"f must have shape \(\.\.\., C\).*got \(\)"),
    "no outputs": ({"f": torch.ones(4, 0)}, r"f must have shape \(\.\.\., C\).*got \(4, 0\)"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_refused_before_the_first_vector(change, message):
    arguments = {"f": torch.ones(4, 3), "loss": "mse", "kind": "mc", **change}
    with pytest.raises(ValueError, match=message):
        fisher_vectors(**arguments)


def test_hessian_product_and_terms_check_their_arguments_too():
    f = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"v must have the shape of f, \(4, 3\), got \(3, 4\)"):
        hessian_product(f, "mse", f.T)
    with pytest.raises(ValueError, match="loss must be"):
        hessian_product(f, "hinge", f)
    with pytest.raises(ValueError, match="reduction must be"):
        hessian_product(f, "mse", f, reduction="none")
    with pytest.raises(ValueError, match="mask must be"):
        terms(f, torch.ones(3, dtype=torch.bool))
