"""Exported factors and curvature operators: what tools for posteriors and influence compute with them, in float64."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secondorder

SETTINGS = dict(
    lr=0.02,
    betas=(0.9, 0.9),
    damping=1e-2,
    weight_decay=0.0,
    kl_clip=None,
    norm_clip=None,
    momentum="update",
)


class Net(nn.Module):
    """One layer of every kind: blocks that are joint, batched, folded, cut, tied, diagonal, and a bias apart."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, 4, 2, groups=2), nn.ConvTranspose2d(4, 2, 2)
        self.emb, self.tied, self.norm = nn.Embedding(5, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.wide, self.apart = nn.Linear(24, 6, bias=False), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, images, ids):
        h = self.wide(self.up(self.conv(images).tanh()).tanh().flatten(1)[:, :24])
        h = h + self.tied(self.tied(self.emb(ids)).tanh()).mean(1)
        return self.apart(self.norm(h)) * self.scale


BATCH = 16


def batch(seed):
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(BATCH, 2, 4, 4, generator=g, dtype=torch.float64)
    return (images, torch.randint(5, (BATCH, 3), generator=g)), torch.randint(3, (BATCH,), generator=g)


def make(cls, seed=0, **options):
    torch.manual_seed(seed)
    net = Net()
    apart = [net.apart.bias]
    rest = [p for p in net.parameters() if p is not apart[0]]
    groups = [{"params": rest}, {"params": apart}]
    return net, cls(groups, module=net, max_block_size=14, **{**SETTINGS, "refresh_every": 2, **options})


def train(net, optimizer, steps):
    for t in range(steps):
        optimizer.zero_grad()
        x, y = batch(t)
        F.cross_entropy(net(*x), y).backward()
        optimizer.step()


@pytest.fixture(scope="module", params=[secondorder.KFAC, secondorder.EKFAC])
def trained(request):
    net, optimizer = make(request.param)
    train(net, optimizer, 5)
    return net, optimizer


# ---------------------------------------------------------------------- a tool that knows the format alone


def kron(matrices):
    out = torch.ones(1, 1, dtype=torch.float64)
    for matrix in matrices:
        out = torch.kron(out, matrix)
    return out


def of_axes(found, sizes, group):
    """Matrices, one for every axis."""
    out = []
    for matrix, size in zip(found, sizes, strict=True):
        matrix = torch.eye(size, dtype=torch.float64) if matrix is None else matrix if group is None else matrix[group]
        out.append(matrix.diag() if matrix.ndim == 1 else matrix)
    return out


def matrices(block, sizes, group):
    return of_axes(block["factors"], sizes, group)


def bases(block, sizes, group):
    return of_axes(block["eigenvectors"], sizes, group)


def dense_blocks(entry):
    """`(where the block's entries are in the flattened view, matrix)` of every independent block."""
    at = torch.arange(torch.Size(entry["view"]).numel()).view(entry["view"])
    for block in entry["blocks"]:
        inside = at[tuple(slice(*cut) for cut in block["region"])]
        if entry["kind"] == "diagonal":
            yield inside.reshape(-1), block["moment"].reshape(-1).diag()
            continue
        for group in range(len(inside)) if entry["batched"] else [None]:
            places = inside if group is None else inside[group]
            if block["moment"] is None:
                yield places.reshape(-1), kron(matrices(block, places.shape, group))
                continue
            moment = block["moment"] if group is None else block["moment"][group]
            Q = kron(bases(block, places.shape, group))
            yield places.reshape(-1), Q @ moment.reshape(-1).diag() @ Q.T


def dense(entry):
    size = torch.Size(entry["view"]).numel()
    out = torch.zeros(size, size, dtype=torch.float64)
    for places, matrix in dense_blocks(entry):
        out[places[:, None], places] = matrix
    return out


def seen_as_view(entry, tensors):
    """A parameter's tensor (and its bias's) as the entry says that its blocks see it."""
    lead = tensors[entry["parameters"][0]]
    if entry["fold"] is not None:
        split, order = entry["fold"]
        lead = lead.reshape(split).permute(order)
    view = entry["view"]
    if not entry["bias_column"]:
        return lead.reshape(view)
    bias = tensors[entry["parameters"][1]].reshape(*view[:-1], 1)
    return torch.cat([lead.reshape(*view[:-1], view[-1] - 1), bias], -1)


# ---------------------------------------------------------------------- the format


def test_every_trained_parameter_is_in_one_entry(trained):
    net, optimizer = trained
    entries = optimizer.factors()
    named = [name for entry in entries.values() for name in entry["parameters"]]
    assert sorted(named) == sorted(name for name, _ in net.named_parameters())
    assert list(entries) == [entry["parameters"][0] for entry in entries.values()]
    assert {name for name, entry in entries.items() if entry["kind"] == "diagonal"} == {"scale"}
    assert entries["apart.bias"]["sides"] == ("output",) and not entries["apart.weight"]["bias_column"]
    assert entries["emb.weight"]["sides"] == ("input", "output")
    assert entries["conv.weight"]["batched"] and entries["conv.weight"]["view"] == (2, 2, 5)
    assert entries["up.weight"]["fold"] is not None and len(entries["wide.weight"]["blocks"]) == 2
    assert all((block["observations"] == 5).all() for entry in entries.values() for block in entry["blocks"])


def test_kronecker_product_of_factors_is_the_curvature(trained):
    net, optimizer = trained
    params = dict(net.named_parameters())
    for name, entry in optimizer.factors().items():
        torch.testing.assert_close(optimizer.curvature(params[name]).to_dense(), dense(entry), rtol=1e-10, atol=1e-14)


def test_views_tell_where_every_gradient_entry_is(trained):
    net, optimizer = trained
    params = dict(net.named_parameters())
    grads = {name: p.grad for name, p in params.items()}
    for name, entry in optimizer.factors().items():
        v = seen_as_view(entry, grads)
        assert v.shape == entry["view"]
        operator = optimizer.curvature(params[name])
        wanted = (dense(entry) @ v.reshape(-1)).view(v.shape)
        seen = v if entry["bias_column"] or entry["fold"] is not None else grads[name]
        torch.testing.assert_close((operator @ seen).reshape(v.shape), wanted, rtol=1e-10, atol=1e-14)


def test_factors_are_debiased_averages_of_batch_statistics():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    optimizer = secondorder.KFAC(layer.parameters(), module=layer, **SETTINGS)
    weights = torch.tensor([0.1 * 0.9**2, 0.1 * 0.9, 0.1], dtype=torch.float64) / (1 - 0.9**3)
    A, G = 0, 0
    for t in range(3):
        x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(2, (7,))
        a = torch.cat([x, torch.ones(7, 1, dtype=torch.float64)], 1)
        out = layer(x)
        g = out.detach().softmax(-1) - F.one_hot(y, 2)
        A, G = A + weights[t] * a.T @ a / 7, G + weights[t] * g.T @ g / 7
        optimizer.zero_grad()
        F.cross_entropy(out, y).backward()
        optimizer.step()
    (block,) = optimizer.factors()["weight"]["blocks"]
    torch.testing.assert_close(block["factors"], [G, A], rtol=1e-12, atol=1e-14)


def test_fallback_exports_its_corrected_second_moment():
    net, optimizer = make(secondorder.KFAC, fallback_betas=(0.9, 0.99))
    train(net, optimizer, 1)
    (block,) = optimizer.factors()["scale"]["blocks"]
    torch.testing.assert_close(block["moment"], net.scale.grad.square(), rtol=1e-10, atol=0)


def test_export_is_a_copy(trained):
    _, optimizer = trained
    before = optimizer.factors()
    for entry in optimizer.factors().values():
        for block in entry["blocks"]:
            for t in (*block.get("factors", ()), block["moment"]):
                if t is not None:
                    t.zero_()
    assert_same(before, optimizer.factors())


def test_looking_inside_between_steps_changes_nothing():
    (net, plain), (other_net, looked_at) = make(secondorder.KFAC), make(secondorder.KFAC)
    train(net, plain, 3)
    for t in range(3):
        looked_at.zero_grad()
        x, y = batch(t)
        F.cross_entropy(other_net(*x), y).backward()
        looked_at.step()
        looked_at.factors(), looked_at.diagnostics(), looked_at.curvature(other_net.conv.weight)
    assert_same(looked_at.factors(), plain.factors())


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.EKFAC])
def test_factors_survive_a_checkpoint_and_a_file(cls):
    net, optimizer = make(cls)
    train(net, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "factors": optimizer.factors()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    other_net, other = make(cls, seed=1)
    other_net.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["optimizer"])
    assert_same(other.factors(), optimizer.factors())
    assert_same(loaded["factors"], optimizer.factors())


# ---------------------------------------------------------------------- posteriors and influence


def test_posterior_of_a_saved_run_is_that_of_the_running_optimizer(trained):
    """Precision N (curvature + δ I): covariance, a root of it to sample with, and log-determinant."""
    net, optimizer = trained
    params, prior = dict(net.named_parameters()), 1e-2
    file = io.BytesIO()
    torch.save(optimizer.factors(), file)
    file.seek(0)
    for name, entry in torch.load(file, weights_only=True).items():
        size = torch.Size(entry["view"]).numel()
        covariance, root = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
        logdet = 0
        for places, matrix in dense_blocks(entry):
            values, vectors = torch.linalg.eigh(matrix)
            values = values.clamp_min(0) + prior
            covariance[places[:, None], places] = vectors @ values.reciprocal().diag() @ vectors.T
            root[places[:, None], places] = vectors @ values.rsqrt().diag() @ vectors.T
            logdet = logdet + values.log().sum()
        posterior = optimizer.curvature(params[name]).inv(damping=prior)
        torch.testing.assert_close(posterior.to_dense(), covariance, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(posterior.power(0.5).to_dense(), root, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(-posterior.logdet(), logdet, rtol=1e-10, atol=1e-10)


def test_influence_is_solved_factor_by_factor(trained):
    """gᵀ (curvature + λ I)⁻¹ g from eigenvectors of the exported factors, without one large matrix."""
    net, optimizer = trained
    grads = {name: p.grad for name, p in net.named_parameters()}
    for entry in optimizer.factors().values():
        if entry["kind"] == "diagonal":
            continue
        v, total = seen_as_view(entry, grads), 0
        for block in entry["blocks"]:
            inside = v[tuple(slice(*cut) for cut in block["region"])]
            for group in range(len(inside)) if entry["batched"] else [None]:
                Y = inside if group is None else inside[group]
                if block["moment"] is None:
                    values, vectors = zip(*map(torch.linalg.eigh, matrices(block, Y.shape, group)), strict=True)
                    spectrum = kron(row[None] for row in values).clamp_min(0).view(Y.shape)
                else:
                    vectors = bases(block, Y.shape, group)
                    spectrum = block["moment"] if group is None else block["moment"][group]
                for axis, Q in enumerate(vectors):
                    Y = torch.tensordot(Q.T, Y, ([1], [axis])).movedim(0, axis)
                total = total + (Y.square() / (spectrum + 1e-2)).sum()
        solved = torch.linalg.solve(dense(entry) + 1e-2 * torch.eye(v.numel(), dtype=torch.float64), v.reshape(-1))
        torch.testing.assert_close(total, v.reshape(-1) @ solved, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------- operators against autograd


class Twice(nn.Module):
    """A layer that is used twice, on data of its own each time."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return torch.cat([self.layer(x), self.layer(x.flip(-1).sin())], 1)


def floats(*shape):
    return lambda: torch.randn(shape, dtype=torch.float64)


SINGLE = {
    "joint": (lambda: nn.Linear(3, 2), floats(4, 2, 3)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2, stride=2, padding=1), floats(3, 2, 3, 4)),
    "batched": (lambda: nn.Conv1d(4, 6, 2, groups=2), floats(3, 4, 5)),
    "folded": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2), floats(3, 2, 4)),
    "folded_and_batched": (lambda: nn.ConvTranspose1d(4, 6, 2, groups=2), floats(3, 4, 4)),
    "diagonal": (lambda: nn.Embedding(5, 3), lambda: torch.randint(5, (4, 3))),
    "features": (lambda: nn.LayerNorm(4), floats(5, 4)),
    "tied": (Twice, floats(4, 2, 3)),
}


@pytest.mark.parametrize("case", SINGLE)
def test_curvature_is_the_gauss_newton_matrix_of_a_single_layer(case):
    """Under the squared error of every output at every position all Kronecker approximations are exact."""
    make_layer, inputs = SINGLE[case]
    layer, x = make_layer().double(), inputs()
    optimizer = secondorder.KFAC(layer.parameters(), module=layer, sharing="expand", **SETTINGS)
    out = layer(x)
    class_dim = 1 if case in ("convolution", "batched", "folded", "folded_and_batched") else -1
    optimizer.fisher_backward(out, "mse", "type-2", class_dim=class_dim)
    F.mse_loss(out, torch.zeros_like(out)).backward()
    params = dict(layer.named_parameters())
    values = tuple(params.values())

    def output(*given):
        return torch.func.functional_call(layer, dict(zip(params, given, strict=True)), (x,)).reshape(-1)

    jacobian = dict(zip(params, torch.autograd.functional.jacobian(output, values), strict=True))
    optimizer.step()
    (entry,) = optimizer.factors().values()
    J = torch.stack([
        seen_as_view(entry, {n: j[i] for n, j in jacobian.items()}).reshape(-1) for i in range(out.numel())
    ])  # fmt: skip
    operator = optimizer.curvature(params[entry["parameters"][0]])
    torch.testing.assert_close(operator.to_dense(), 2 / out.numel() * J.T @ J, rtol=1e-10, atol=1e-14)
    for name in entry["parameters"]:
        torch.testing.assert_close(optimizer.curvature(params[name]).trace(), operator.trace())


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["type-2", "empirical"])
@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_operators_are_those_of_curvlinops_on_one_batch(net, kind, sharing):
    curvlinops = pytest.importorskip("curvlinops")
    if net == "mlp":
        model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5)
    else:
        first = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        model, x = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)), torch.randn(4, 2, 6, 5)
    model, x, y = model.double(), x.double(), torch.randint(3, (len(x),))
    params, loss = list(model.parameters()), nn.CrossEntropyLoss()
    theirs = curvlinops.KFACLinearOperator(
        model, loss, params, [(x, y)], fisher_type=kind, kfac_approx=sharing, separate_weight_and_bias=False
    )
    inverse = curvlinops.KFACInverseLinearOperator(theirs, damping=1e-2, use_exact_damping=True)

    optimizer = secondorder.KFAC(params, module=model, sharing=sharing, **SETTINGS)
    out = model(x)
    if kind == "type-2":
        optimizer.fisher_backward(out, "cross_entropy", "type-2")
    loss(out, y).backward()
    optimizer.step()
    vectors = [torch.randn_like(p) for p in params]
    by_name = dict(zip((name for name, _ in model.named_parameters()), vectors, strict=True))
    for operator, power in ((theirs, 1), (inverse, -1)):
        wanted = dict(zip(by_name, operator @ vectors, strict=True))
        for name, entry in optimizer.factors().items():
            ours = optimizer.curvature(model.get_parameter(name))
            ours = ours if power == 1 else ours.inv(damping=1e-2)
            found = ours @ seen_as_view(entry, by_name)
            torch.testing.assert_close(found, seen_as_view(entry, wanted), rtol=1e-8, atol=1e-12)
