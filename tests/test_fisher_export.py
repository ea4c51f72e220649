"""`fisher()` against autograd and dense algebra, in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cases
import secondorder
from cases import parameters
from dense_kfac import SETTINGS, backward, batch, mlp, pairs

LOOSE = [case for case in cases.OPTIMIZERS if not case.layers]
ELEMENTWISE = ("AdamW", "RFAdamW", "RFRMSProp")
FACTORED = [case for case in LOOSE if not case.residuals and case.cls.__name__ not in ELEMENTWISE]
BY_NAME = pytest.mark.parametrize("case", LOOSE, ids=lambda case: case.cls.__name__)
BY_FACTORS = pytest.mark.parametrize("case", FACTORED, ids=lambda case: case.cls.__name__)


def near(a, b, rtol=1e-9, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def named(params):
    return [(f"p{i}", p) for i, p in enumerate(params)]


def dense(entry):
    """The matrix of a "kronecker" entry on the flattened view, for blocks that are not batched."""
    at = torch.arange(torch.Size(entry["view"]).numel()).view(entry["view"])
    out = torch.zeros(at.numel(), at.numel(), dtype=torch.float64)
    for block in entry["blocks"]:
        inside = at[tuple(slice(*cut) for cut in block["region"])]
        M = torch.ones(1, 1, dtype=torch.float64)
        for size, factor in zip(inside.shape, block["factors"], strict=True):
            factor = torch.eye(size, dtype=torch.float64) if factor is None else factor
            M = torch.kron(M, factor.diag() if factor.ndim == 1 else factor)
        places = inside.reshape(-1)
        out[places[:, None], places] = M
    return out


class Net(nn.Module):
    """Blocks that are joint, batched, folded, tied, diagonal, and a bias apart."""

    def __init__(self):
        super().__init__()
        self.conv, self.up = nn.Conv2d(2, 4, 2, groups=2), nn.ConvTranspose2d(4, 2, 2)
        self.emb, self.norm = nn.Embedding(5, 6), nn.LayerNorm(6)
        self.wide, self.apart = nn.Linear(24, 6, bias=False), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(3))
        self.double()

    def forward(self, images, ids):
        h = self.wide(self.up(self.conv(images).tanh()).tanh().flatten(1)[:, :24])
        return self.apart(self.norm(h + self.emb(ids).mean(1))) * self.scale


def train_net(cls, steps=3, **options):
    torch.manual_seed(0)
    net = Net()
    groups = [
        {"params": [(name, p) for name, p in net.named_parameters() if name != "apart.bias"]},
        {"params": [("apart.bias", net.apart.bias)]},
    ]
    optimizer = cls(groups, module=net, max_block_size=14, lr=0.01, **options)
    for seed in range(steps):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 2, 4, 4, generator=g, dtype=torch.float64), torch.randint(5, (8, 3), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(net(*x), torch.randint(3, (8,), generator=g)).backward()
        optimizer.step()
    return net, optimizer


class TestDiagonal:
    def test_of_kfac_is_that_of_the_products_of_factors(self):
        model = mlp(5, 7, 3)
        x, y = batch(model)
        found = pairs(model, x, y)
        optimizer = secondorder.KFAC(model.named_parameters(), module=model, **{**SETTINGS, "lr": 0.0})
        backward(model, x, y)
        optimizer.step()
        told = optimizer.fisher()
        for layer, (A, G) in zip(("0", "2"), found, strict=True):
            joint = torch.outer(G.diag(), A.diag())
            near(told[f"{layer}.weight"], joint[:, :-1])
            near(told[f"{layer}.bias"], joint[:, -1])

    @pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.EKFAC])
    def test_of_one_example_is_its_squared_gradient(self, cls):
        model = mlp(5, 7, 3)
        options = {**SETTINGS, "lr": 0.0, "betas": (0.0, 0.0)}
        optimizer = cls(model.named_parameters(), module=model, **options)
        for _ in range(2):
            backward(model, *batch(model, n=1))
            optimizer.step()
        for name, p in model.named_parameters():
            near(optimizer.fisher()[name], p.grad.square())

    def test_of_ekfac_has_the_trace_of_the_empirical_fisher_matrix(self):
        model = mlp(5, 7, 3)
        x, y = batch(model)
        optimizer = secondorder.EKFAC(model.named_parameters(), module=model, **{**SETTINGS, "lr": 0.0})
        for _ in range(2):
            backward(model, x, y)
            optimizer.step()
        told, squares = optimizer.fisher(), 0
        for i in range(len(x)):
            backward(model, x[i : i + 1], y[i : i + 1])
            squares += sum(p.grad.square().sum() for p in model.parameters()) / len(x)
        near(sum(value.sum() for value in told.values()), squares)

    @pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.EKFAC, secondorder.SINGD])
    def test_of_every_layer_is_that_of_its_curvature(self, cls):
        net, optimizer = train_net(cls)
        told = optimizer.fisher()
        assert list(told) == [name for name, _ in net.named_parameters() if name != "apart.bias"] + ["apart.bias"]
        for name, p in net.named_parameters():
            assert told[name].shape == p.shape
        for name in ("wide.weight", "emb.weight", "apart.weight", "apart.bias", "scale"):
            p = net.get_parameter(name)
            near(told[name], optimizer.curvature(p).to_dense().diag().view(p.shape))
        for layer in (net.conv, net.norm):  # the bias is the last column
            view = optimizer.curvature(layer.weight).to_dense().diag().view(len(layer.bias), -1)
            where = "conv" if layer is net.conv else "norm"
            near(told[f"{where}.weight"].flatten(1) if where == "conv" else told["norm.weight"][:, None], view[:, :-1])
            near(told[f"{where}.bias"], view[:, -1])
        up = optimizer.curvature(net.up.weight)  # its view is the weight with outputs first
        folded = net.up.weight.new_tensor(range(net.up.weight.numel())).view(net.up.weight.shape)
        split, order = optimizer.factors()["up.weight"]["fold"] if cls is not secondorder.SINGD else ((), ())
        if split:
            at = folded.reshape(split).permute(order).reshape(-1).long()
            view = up.to_dense().diag().view(optimizer.factors()["up.weight"]["view"])
            near(told["up.weight"].reshape(-1)[at], view[..., :-1].reshape(-1))

    @BY_NAME
    @pytest.mark.parametrize("block", [None, 3])
    def test_of_gradient_methods_is_that_of_the_dense_curvature(self, case, block):
        options = {"max_block_size": block} if case.takes("max_block_size") else {}
        params = parameters(dtype=torch.float64)
        optimizer = case.make(named(params), **options)
        cases.train(optimizer, params, range(7))
        told = optimizer.fisher()
        for name, p in named(params):
            near(told[name], optimizer.curvature(p).to_dense().diag().view(p.shape))

    def test_of_soap_is_the_second_moment_rotated_back(self):
        (p,) = parameters([(6, 5)], dtype=torch.float64)
        optimizer = secondorder.SOAP([("p", p)], refresh_every=2)
        cases.train(optimizer, [p], range(5))
        s = optimizer.state[p]
        Q = torch.kron(s["basis_0"], s["basis_1"])
        near(optimizer.fisher()["p"], (Q @ s["exp_avg_sq"].flatten().diag() @ Q.T).diag().view(6, 5))

    def test_of_adamw_is_its_second_moment_without_bias(self):
        params = parameters(dtype=torch.float64)
        optimizer = secondorder.AdamW(named(params))
        cases.train(optimizer, params, range(6))
        for name, p in named(params):
            near(optimizer.fisher()[name], optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**6))


class TestKronecker:
    @BY_FACTORS
    @pytest.mark.parametrize("block", [None, 3])
    def test_has_the_trace_of_the_curvature(self, case, block):
        params = parameters(dtype=torch.float64)
        optimizer = case.make(named(params), max_block_size=block)
        cases.train(optimizer, params, range(7))
        told = optimizer.fisher("kronecker")
        assert {"p0", "p2", "p3", "p6"} <= told.keys()
        for name, entry in told.items():
            p = params[int(name[1:])]
            C = optimizer.curvature(p).to_dense()
            near(torch.trace(dense(entry)), torch.trace(C))
            assert entry["parameters"] == [name] and entry["shape"] == p.shape
            if case.cls.__name__ not in ("SOAP", "EigenvalueCorrectedShampoo", "KLSOAP", "Shampoo", "KLShampoo"):
                near(dense(entry), C, rtol=1e-7, atol=1e-9 * float(C.abs().max()))

    def test_of_shampoo_is_the_product_of_covariances_over_their_trace(self):
        params = parameters([(6, 5), (3, 14)], dtype=torch.float64)
        optimizer = secondorder.Shampoo(named(params))
        cases.train(optimizer, params, range(5))
        told = optimizer.fisher("kronecker")
        C = [optimizer.state[params[0]][f"covariance_{i}"] for i in (0, 1)]
        near(dense(told["p0"]), torch.kron(*C) / C[0].trace())
        one_sided = torch.kron(optimizer.state[params[1]]["covariance_0"], torch.eye(14).double() / 14)
        near(dense(told["p1"]), one_sided)

    def test_of_kl_shampoo_is_the_product_of_its_factors(self):
        (p,) = parameters([(6, 5)], dtype=torch.float64)
        optimizer = secondorder.KLShampoo([("p", p)])
        cases.train(optimizer, [p], range(5))
        near(dense(optimizer.fisher("kronecker")["p"]), optimizer.curvature(p).to_dense())

    def test_of_soap_has_the_shape_of_its_covariances(self):
        (p,) = parameters([(6, 5)], dtype=torch.float64)
        optimizer = secondorder.SOAP([("p", p)])
        cases.train(optimizer, [p], range(5))
        s = optimizer.state[p]
        wanted = torch.kron(s["covariance_0"], s["covariance_1"])
        near(dense(optimizer.fisher("kronecker")["p"]), wanted * (s["exp_avg_sq"].sum() / wanted.trace()))

    @pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.SINGD])
    def test_of_layers_is_what_factors_exports(self, cls):
        _, optimizer = train_net(cls)
        told, exported = optimizer.fisher("kronecker"), optimizer.factors()
        assert told.keys() == {name for name, entry in exported.items() if entry["kind"] == "kronecker"}
        for name, entry in told.items():
            same = ("parameters", "shape", "view", "fold", "batched", "bias_column")
            assert {key: entry[key] for key in same} == {key: exported[name][key] for key in same}
            for ours, theirs in zip(entry["blocks"], exported[name]["blocks"], strict=True):
                assert ours["region"] == theirs["region"]
                for a, b in zip(ours["factors"], theirs["factors"], strict=True):
                    assert (a is None) == (b is None)
                    if a is not None:
                        near(a, b)

    def test_is_a_copy_that_is_safe_to_load(self, tmp_path):
        _, optimizer = train_net(secondorder.KFAC)
        told = optimizer.fisher("kronecker")
        torch.save(told, tmp_path / "fisher.pt")
        back = torch.load(tmp_path / "fisher.pt", weights_only=True)
        ours, theirs = (found["wide.weight"]["blocks"][0]["factors"][0] for found in (told, back))
        assert torch.equal(ours, theirs)
        for entry in told.values():
            for block in entry["blocks"]:
                for factor in block["factors"]:
                    if factor is not None:
                        factor.fill_(torch.nan)
        assert all(value.isfinite().all() for value in optimizer.fisher().values())


class TestScale:
    def test_of_steps_gradients_is_that_of_single_terms_times_their_number(self):
        """With a mean gradient of zero, E[g²] of a mean over B terms is F / B: all 4 draws of 2 terms u = ±h."""
        h = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
        p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = secondorder.AdamW([("p", p)], lr=1e-12, betas=(0.0, 0.999999), weight_decay=0.0)
        for first in (1, -1):
            for second in (1, -1):
                p.grad = (first * h + second * h) / 2
                optimizer.step()
        near(optimizer.fisher(batch_size=2)["p"], h.square(), rtol=1e-5)
        near(optimizer.fisher()["p"], h.square() / 2, rtol=1e-5)

    def test_of_loss_terms_is_that_already(self):
        _, optimizer = train_net(secondorder.KFAC)
        plain, scaled = optimizer.fisher(), optimizer.fisher(batch_size=8)
        near(scaled["wide.weight"], plain["wide.weight"])
        near(scaled["scale"], 8 * plain["scale"])  # the fallback's
        whole = [optimizer.fisher("kronecker", size)["wide.weight"]["blocks"][0]["factors"][0] for size in (None, 8)]
        near(*whole)

    @pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.EKFAC])
    def test_does_not_hang_on_the_reduction_of_the_loss(self, cls):
        told = []
        for reduction in ("mean", "sum"):
            model = mlp(5, 7, 3)
            torch.manual_seed(0)
            for p in model.parameters():
                nn.init.normal_(p)
            options = {**SETTINGS, "lr": 0.0, "loss_reduction": reduction}
            optimizer = cls(model.named_parameters(), module=model, **options)
            for _ in range(2):
                x, y = batch(model)
                model.zero_grad()
                F.cross_entropy(model(x), y, reduction=reduction).backward()
                optimizer.step()
            told.append(optimizer.fisher(batch_size=len(x)))
        for name, value in told[0].items():
            near(told[1][name], value)

    @pytest.mark.parametrize("cls", [secondorder.RFAdamW, secondorder.SIRFShampoo])
    def test_of_methods_that_know_the_batch_includes_it(self, cls):
        params = parameters([(6, 5)], dtype=torch.float64)
        optimizer = cls(named(params), batch_size=16)
        cases.train(optimizer, params, range(3))
        near(optimizer.fisher(batch_size=16)["p0"], optimizer.fisher()["p0"])
        params = parameters([(6, 5)], dtype=torch.float64)
        optimizer = cls(named(params))
        cases.train(optimizer, params, range(3))
        near(optimizer.fisher(batch_size=16)["p0"], 16 * optimizer.fisher()["p0"])


class TestContract:
    def test_nothing_is_known_before_training(self, case):
        params = parameters()
        optimizer = case.make(named(params))
        for name, p in named(params):
            value = optimizer.fisher()[name]
            assert value.shape == p.shape and not value.any()

    @pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.SINGD])
    def test_nothing_is_known_of_layers_before_training(self, cls):
        _, optimizer = train_net(cls, steps=0)
        assert not any(value.any() for value in optimizer.fisher().values())
        for entry in optimizer.fisher("kronecker").values():
            assert not any(f.any() for block in entry["blocks"] for f in block["factors"] if f is not None)

    def test_copies_change_nothing(self, case):
        params = parameters()
        optimizer = case.make(named(params))
        cases.train(optimizer, params, range(3))
        before = cases.flat_state(optimizer)
        for value in optimizer.fisher().values():
            value.fill_(7)
        cases.assert_same_state(before, cases.flat_state(optimizer))

    def test_methods_without_factors_say_so(self, case):
        params = parameters()
        optimizer = case.make(named(params))
        cases.train(optimizer, params, range(3))
        if case in FACTORED:
            assert optimizer.fisher("kronecker")
        else:
            with pytest.raises(ValueError, match=f"{case.cls.__name__} holds no Kronecker factors"):
                optimizer.fisher("kronecker")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [(("full",), "'full'"), (("diag", 0), "batch_size"), (("diag", -2.0), "batch_size")],
        ids=str,
    )
    def test_what_is_not_allowed_is_named(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            secondorder.SOAP(parameters()).fisher(*arguments)
