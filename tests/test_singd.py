"""SINGD and IKFAC on layers: structures, scaling, launches, and what was found to fail elsewhere.

Factors alone are in test_inverse_free, the contract and ranks in test_layer_*.
"""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secondorder
from cases import Launches, assert_same_bits, assert_same_state, flat_state, values
from layer_cases import batch, train, zoo
from secondorder.preconditioner.inverse_free import InverseFree
from secondorder.preconditioner.structures import structure

BOTH = pytest.mark.parametrize("cls", [secondorder.SINGD, secondorder.IKFAC], ids=["SINGD", "IKFAC"])


def layers(*sizes, bias=True):
    torch.manual_seed(0)
    parts = [nn.Linear(a, b, bias=bias) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*[m for part in parts for m in (part, nn.Tanh())][:-1]).double()


def learn(model, optimizer, steps, x=None):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        features = next(m for m in model.modules() if isinstance(m, nn.Linear)).in_features
        a = torch.randn(8, features, generator=generator, dtype=torch.float64) if x is None else x
        optimizer.zero_grad()
        out = model(a.to(next(model.parameters()).dtype))
        F.cross_entropy(out, torch.arange(len(out)) % out.shape[1]).backward()
        optimizer.step()


class TestStructures:
    def test_diagonal_sides_store_and_gather_vectors_alone(self):
        model = layers(40, 30, 20)
        opt = secondorder.SINGD(model.parameters(), module=model, structures=("diagonal", "diagonal"))
        learn(model, opt, 1)
        state = opt.state[model[0].weight]
        assert state["root_0"].shape == (30,) and state["root_1"].shape == (41,)
        leaves = [t for site in opt._capture.sites for t in site.flat]
        assert max(t.numel() for t in leaves) <= 41
        works = [b.work[name] for b in opt._layout.buckets for name in b.work if "gram" in name]
        assert max(w[0].numel() for w in works) <= 41
        assert "diagonal on both sides" in str(opt.coverage())

    def test_first_structure_is_of_inputs_and_second_of_outputs(self):
        """Of embeddings too, whose weight is (tokens, outputs): tokens have a diagonal factor."""
        model = nn.Sequential(nn.Embedding(11, 9), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4)).double()
        opt = secondorder.SINGD(model.parameters(), module=model, structures=("block(2)", "block(3)"))
        F.cross_entropy(model(torch.arange(6)), torch.arange(6) % 4).backward()
        opt.step()
        linear, embedding = opt.state[model[1].weight], opt.state[model[0].weight]
        assert linear["root_0"].shape == (8, 3) and linear["root_1"].shape == (10, 2)
        assert embedding["root_0"].shape == (11,) and embedding["root_1"].shape == (9, 3)

    @pytest.mark.parametrize("names", [("diagonal", "dense"), ("dense", "diagonal")])
    @pytest.mark.parametrize("bias", ["joined", "frozen weight", "apart"])
    def test_bias_follows_the_structure_of_its_side(self, names, bias):
        model = layers(6, 5, 4)
        model[0].weight.requires_grad_(bias != "frozen weight")
        params = [p for name, p in model.named_parameters() if name != "0.bias"]
        groups = [{"params": params}, {"params": [model[0].bias]}] if bias == "apart" else model.parameters()
        opt = secondorder.SINGD(groups, module=model, structures=names, statistics_every=1)
        learn(model, opt, 3)
        state = opt.state[model[0].bias]
        if bias == "joined":
            assert set(state) == {"step"}
        else:
            assert state["root_0"].shape == ((5,) if names[1] == "diagonal" else (5, 5))

    @pytest.mark.parametrize("name", ["block", "hierarchical", "tril_toeplitz", "triu_top_left_diag", "diagonal"])
    def test_every_structure_trains_every_kind_of_layer(self, name):
        model = zoo()
        opt = secondorder.SINGD(
            model.parameters(), module=model, structures=(name, name), lr=0.03, factor_rate=0.05, statistics_every=2
        )
        losses = []
        for _ in range(30):
            opt.zero_grad()
            images, tokens, labels = batch(0)
            loss = F.cross_entropy(model(images, tokens), labels)
            loss.backward()
            losses.append(loss.item())
            opt.step()
        assert losses[-1] < 0.7 * losses[0], losses
        assert {row.treatment for row in opt.coverage() if row.name != "scale"} == {"SINGD"}

    def test_wide_sides_are_cut_but_diagonal_ones_are_not(self):
        model = layers(12, 10)
        opt = secondorder.SINGD(model.parameters(), module=model, structures=("diagonal", "dense"), max_block_size=5)
        learn(model, opt, 1)
        tiles = {k: v for k, v in opt.state[model[0].weight].items() if k.startswith("tile")}
        assert [tiles[k]["root_1"].shape for k in sorted(tiles)] == [(13,), (13,)]
        assert [tiles[k]["root_0"].shape for k in sorted(tiles)] == [(5, 5), (5, 5)]


def small_steps(cls, reduction="mean", micro=1, steps=4, **options):
    """Parameters and output factors after steps of which each has so many backward passes over parts of a batch."""
    model = layers(6, 5, 3)
    how = dict(lr=0.05, factor_rate=0.2, statistics_every=1, norm_clip=None, weight_decay=0.0)
    opt = cls(model.parameters(), module=model, loss_reduction=reduction, **{**how, **options})
    for step in range(steps):
        opt.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(12, 6, generator=generator).double(), torch.randint(0, 3, (12,), generator=generator)
        for k in range(micro):
            loss = F.cross_entropy(model(x[k::micro]), y[k::micro], reduction=reduction)
            (loss / micro if reduction == "mean" else loss).backward()
        opt.step()
    return [*values(model.parameters()), *(s["root_0"].clone() for s in opt.state.values() if "root_0" in s)]


class TestScaling:
    """How a batch is split over backward passes, and whether its loss is a mean or a sum."""

    @BOTH
    @pytest.mark.parametrize("kind", ["relative", "absolute"])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_micro_batches_are_the_batch(self, cls, reduction, kind):
        once = small_steps(cls, reduction, damping_kind=kind)
        for micro in (2, 4):
            parts = small_steps(cls, reduction, micro, damping_kind=kind)
            torch.testing.assert_close(parts, once, rtol=1e-10, atol=1e-12)

    @BOTH
    def test_sum_is_the_mean_of_as_many_times_the_curvature(self, cls):
        """S of a sum is B times that of the mean, and so is the gradient: the first step is the same."""
        weights = [small_steps(cls, reduction, steps=1)[:4] for reduction in ("mean", "sum")]
        torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-12)


class TestLaunches:
    """Of the step that observes, counted for layers of one shape."""

    def launches(self, count, monkeypatch, **options):
        """Those of a whole step, and those from statistics to factors."""
        model = layers(*[6] * (count + 1)).float()
        opt = secondorder.SINGD(model.parameters(), module=model, statistics_every=1, **options)
        learn(model, opt, 3)
        opt.zero_grad()
        F.cross_entropy(model(torch.randn(8, 6)), torch.arange(8) % 6).backward()
        moving, observe = Launches(), InverseFree.observe

        def counted(*args):
            with moving:
                observe(*args)

        with monkeypatch.context() as patch, Launches() as step:
            patch.setattr(InverseFree, "observe", counted)
            opt.step()
        return step.found, moving.found

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"structures": ("diagonal", "diagonal")},
            {"structures": ("block(2)", "hierarchical(2,1)"), "factor_momentum": 0.5},
            {"factor_dtype": "bfloat16"},
        ],
        ids=str,
    )
    def test_a_layer_more_costs_no_launch(self, options, monkeypatch):
        """Raw sums are normalised for all layers at once; factors and updates are launched by bucket."""
        (few, few_moving), (many, many_moving) = (self.launches(n, monkeypatch, **options) for n in (4, 12))
        assert few_moving == many_moving and few_moving.total() > 50
        assert not many - few, many - few


class TestFailuresOfOthers:
    @BOTH
    @pytest.mark.parametrize("momentum", [0.0, 0.5])
    @pytest.mark.parametrize("factor_dtype", ["float32", "bfloat16"])
    def test_training_goes_on_from_a_file_with_the_same_bits(self, cls, momentum, factor_dtype):
        options = dict(statistics_every=2, factor_momentum=momentum, structures=("block(3)", "hierarchical(2,1)"))
        options["factor_dtype"] = factor_dtype
        model, twin = layers(7, 6, 4), layers(7, 6, 4)
        straight = cls(twin.parameters(), module=twin, **options)
        learn(twin, straight, 5)
        opt = cls(model.parameters(), module=model, **options)
        learn(model, opt, 3)
        file = io.BytesIO()
        torch.save([model.state_dict(), opt.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        kept = copy.deepcopy(state)
        fresh = layers(7, 6, 4)
        fresh.load_state_dict(weights)
        resumed = cls(fresh.parameters(), module=fresh, **options)
        resumed.load_state_dict(state)
        assert state.keys() == kept.keys() and state["param_groups"] == kept["param_groups"]
        for step in (3, 4):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 7, generator=generator, dtype=torch.float64)
            learn(fresh, resumed, 1, x)
        assert_same_bits(fresh.parameters(), twin.parameters())
        assert_same_state(flat_state(resumed), flat_state(straight))
        for index, entry in kept["state"].items():  # what was loaded is not aliased
            for key, value in entry.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(state["state"][index][key])), key

    def test_layer_that_rests_in_a_call_that_observes_goes_on(self):
        first, rest = layers(6, 5), layers(5, 4)
        model = nn.ModuleList([first, rest, layers(6, 5)])
        opt = secondorder.SINGD(model.parameters(), module=model, statistics_every=3)
        for step in range(7):
            opt.zero_grad()
            x = torch.randn(8, 6, dtype=torch.float64)
            hidden = model[0](x) if step == 3 else model[0](x) + model[2](x)
            F.cross_entropy(model[1](torch.tanh(hidden)), torch.arange(8) % 4).backward()
            before = model[2][0].weight.detach().clone()
            opt.step()
            assert torch.equal(before, model[2][0].weight) == (step == 3)
        assert {row.treatment for row in opt.coverage()} == {"SINGD"}

    @pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
    def test_frozen_parameter_of_a_layer(self, frozen):
        model = layers(6, 5, 4)
        model.get_parameter(frozen).requires_grad_(False)
        opt = secondorder.SINGD(model.parameters(), module=model, statistics_every=1)
        before = values(model.parameters())
        learn(model, opt, 4)
        moved = {n for (n, p), b in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, b)}
        assert moved == {n for n, _ in model.named_parameters()} - {frozen}

    def test_network_may_move_to_another_dtype_after_construction(self):
        model = layers(6, 5, 4).float()
        opt = secondorder.SINGD(model.parameters(), module=model, statistics_every=1)
        model.double()
        learn(model, opt, 3)
        assert opt.state[model[0].weight]["root_0"].dtype == torch.float64

    def test_tied_weight_steps_once(self):
        torch.manual_seed(0)
        a, b = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
        b.weight = a.weight
        model = nn.Sequential(a, nn.Tanh(), b).double()
        options = dict(lr=0.1, norm_clip=None, weight_decay=0.0, betas=(0.0, 0.9), nesterov=False)
        opt = secondorder.SINGD(model.parameters(), module=model, **options)
        x = torch.randn(8, 5, dtype=torch.float64)
        F.cross_entropy(model(x), torch.arange(8) % 5).backward()
        before, g = a.weight.detach().clone(), a.weight.grad.clone()
        opt.step()
        C, K = opt.state[a.weight]["root_0"], opt.state[a.weight]["root_1"]
        torch.testing.assert_close(before - a.weight, 0.1 * C @ C.T @ g @ K @ K.T)

    def test_group_that_comes_late_is_trained(self):
        model = layers(6, 5, 4)
        opt = secondorder.SINGD(model[0].parameters(), module=model, statistics_every=1)
        learn(model, opt, 2)
        opt.add_param_group({"params": model[2].parameters(), "lr": 0.2})
        before = model[2].weight.detach().clone()
        learn(model, opt, 2)
        assert not torch.equal(before, model[2].weight) and "root_0" in opt.state[model[2].weight]

    @pytest.mark.parametrize(
        "layer",
        [
            nn.Conv1d(2, 3, 3, padding=1),
            nn.Conv2d(2, 3, 2, padding="same"),
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
            nn.Conv2d(2, 4, 3, groups=2),
            nn.Conv3d(2, 3, 2),
            nn.ConvTranspose2d(2, 3, 2, stride=2),
            nn.BatchNorm2d(2),
            nn.GroupNorm(1, 2),
        ],
        ids=lambda layer: f"{type(layer).__name__}",
    )
    @BOTH
    def test_layers_that_others_leave_untrained(self, layer, cls):
        layer = copy.deepcopy(layer).double()
        rank = len(getattr(layer, "kernel_size", (1, 1)))
        opt = cls(layer.parameters(), module=layer, statistics_every=1)
        before = values(layer.parameters())
        for _ in range(3):
            opt.zero_grad()
            layer(torch.randn(4, 2, *[5] * rank, dtype=torch.float64)).sin().square().sum((1, 2)).mean().backward()
            opt.step()
        assert {row.treatment for row in opt.coverage()} == {cls.__name__}
        for p, b in zip(layer.parameters(), before, strict=True):
            assert p.isfinite().all() and not torch.equal(p, b)

    def test_construction_prints_nothing(self, capsys):
        model = layers(6, 5)
        secondorder.SINGD(model.parameters(), module=model)
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize("names", [("dense", "dense"), ("block(3)", "hierarchical(2,1)"), ("diagonal",) * 2])
    def test_steps_wait_for_no_device(self, names):
        """On the meta device any look at a value raises."""
        model = layers(6, 5, 4).to("meta")
        opt = secondorder.SINGD(
            model.parameters(), module=model, structures=names, statistics_every=2, factor_momentum=0.5
        )
        for _ in range(5):
            opt.zero_grad()
            model(torch.empty(8, 6, device="meta", dtype=torch.float64)).square().mean().backward()
            opt.step()

    @pytest.mark.parametrize("names", [("dense", "dense"), ("block(4)", "hierarchical(3,2)"), ("diagonal",) * 2])
    def test_factors_in_bfloat16_take_half_the_bytes_and_nothing_else_changes(self, names):
        model = layers(16, 12).float()
        how = dict(module=model, structures=names, factor_momentum=0.5)
        wide, narrow = (secondorder.SINGD(model.parameters(), factor_dtype=t, **how) for t in ("float32", "bfloat16"))
        numbers = sum(torch.Size(structure(name).shape(d)).numel() for name, d in zip(names, (17, 12), strict=True))
        assert wide.memory_report().state - narrow.memory_report().state == 2 * 2 * numbers  # and their momenta
        for opt in (wide, narrow):
            learn(model, opt, 1)
        state = [{key: value.dtype for key, value in o.state[model[0].weight].items()} for o in (wide, narrow)]
        changed = {key for key in state[0] if state[0][key] != state[1][key]}
        assert changed == {"root_0", "root_1", "velocity_0", "velocity_1"}
        assert {state[1][key] for key in changed} == {torch.bfloat16}

    def test_reports_know_factors_in_bfloat16(self):
        model = layers(6, 5)
        opt = secondorder.SINGD(model.parameters(), module=model, factor_dtype="bfloat16")
        learn(model, opt, 3)
        P, C = opt.preconditioner(model[0].weight), opt.curvature(model[0].weight)
        K = [opt.state[model[0].weight][f"root_{i}"].double() for i in range(2)]
        torch.testing.assert_close(P.to_dense(), torch.kron(*(A @ A.T for A in K)))
        torch.testing.assert_close(C.to_dense() @ P.to_dense(), torch.eye(35).double())
        assert opt.diagnostics(full=True)["condition_max"] >= 1

    def test_half_precision_parameters_have_factors_that_learn(self):
        """In bfloat16, increments below half an ulp leave every entry of K where it began."""
        model = layers(6, 5, 4).bfloat16()
        opt = secondorder.SINGD(model.parameters(), module=model, factor_rate=1e-3, statistics_every=1)
        learn(model, opt, 10)
        before = opt.state[model[0].weight]["root_1"].clone()
        learn(model, opt, 1)
        after = opt.state[model[0].weight]["root_1"]
        assert after.dtype == torch.float32 and ((after - before).abs() > 0).double().mean() > 0.9


class TestClass:
    def test_step_is_both_sides_of_the_gradient(self):
        model = layers(6, 5)
        options = dict(norm_clip=None, weight_decay=0.1, betas=(0.0, 0.9), nesterov=False, lr=0.3)
        opt = secondorder.SINGD(model.parameters(), module=model, **options)
        before = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach().clone()
        learn(model, opt, 1)
        state = opt.state[model[0].weight]
        C, K = state["root_0"], state["root_1"]
        g = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
        after = torch.cat([model[0].weight, model[0].bias[:, None]], 1).detach()
        torch.testing.assert_close(after, 0.97 * before - 0.3 * C @ C.T @ g @ K @ K.T)
        P = opt.preconditioner(model[0].weight)
        torch.testing.assert_close((P @ g.flatten()).view(5, 7), C @ C.T @ g @ K @ K.T)
        torch.testing.assert_close(opt.curvature(model[0].weight).solve(g.flatten()), P @ g.flatten())

    def test_statistics_are_taken_every_t_calls(self):
        model = layers(6, 5)
        opt = secondorder.SINGD(model.parameters(), module=model, statistics_every=3)
        roots = []
        for _ in range(7):
            learn(model, opt, 1)
            roots.append(opt.state[model[0].weight]["root_0"].clone())
        changed = [not torch.equal(a, b) for a, b in zip(roots, roots[1:], strict=False)]
        assert changed == [False, False, True, False, False, True]

    def test_exported_factors_of_a_network_at_rest_are_kfacs_damped(self):
        """On every kind of layer, cut ones too: F + λ I, reached by products alone."""
        still, exported = dict(lr=0.0, max_block_size=6), []
        how = dict(damping_kind="absolute", damping=0.1, factor_rate=0.5, statistics_every=1)
        for cls, options, steps in ((secondorder.KFAC, {}, 1), (secondorder.IKFAC, how, 60)):
            model = zoo(torch.float64)
            opt = cls(model.parameters(), module=model, **still, **options)
            train(model, opt, [0] * steps)
            exported.append(opt.factors())
        wanted, found = exported
        assert found.keys() == wanted.keys()
        for name, entry in wanted.items():
            assert {**found[name], "blocks": None} == {**entry, "blocks": None}
            for ours, theirs in zip(found[name]["blocks"], entry["blocks"], strict=True):
                assert ours.keys() == theirs.keys() and ours["region"] == theirs["region"]
                for mine, bare in zip(ours.get("factors", ()), theirs.get("factors", ()), strict=True):
                    dense = bare.ndim > 1 and bare.shape[-1] == bare.shape[-2]
                    ridge = 0.1 * torch.eye(bare.shape[-1]) if dense else 0.1
                    torch.testing.assert_close(mine, bare + ridge, rtol=1e-6, atol=1e-8)

    @BOTH
    @pytest.mark.parametrize("names", [("block(3)", "hierarchical(2,1)"), ("tril_toeplitz", "diagonal")])
    def test_exported_factors_invert_what_is_applied(self, cls, names):
        model = layers(6, 5)
        opt = cls(model.parameters(), module=model, structures=names)
        learn(model, opt, 3)
        file = io.BytesIO()
        torch.save(opt.factors(), file)
        file.seek(0)
        ((_, entry),) = torch.load(file, weights_only=True).items()
        whole = [f if f.ndim == 2 else f.diag() for f in entry["blocks"][0]["factors"]]
        for i, name in enumerate(reversed(names)):
            K = structure(name).to_dense(opt.state[model[0].weight][f"root_{i}"][None])[0]
            torch.testing.assert_close(whole[i] @ K @ K.T, torch.eye(len(K)).double(), rtol=0, atol=1e-9)
        torch.testing.assert_close(torch.kron(*whole), opt.curvature(model[0].weight).to_dense())

    @pytest.mark.parametrize("bad", [("dense",), ("dense", "banded"), "dense", ("block(0)", "dense"), (1, 2)])
    def test_structures_are_two_names(self, bad):
        with pytest.raises(ValueError, match="Invalid structures: .*two names of structures"):
            secondorder.SINGD([nn.Parameter(torch.zeros(2, 2))], structures=bad)

    @BOTH
    def test_with_the_exact_fisher_ill_conditioned_regression_is_newton(self, cls):
        """Condition number 1e4; beside it, gradient descent at about its largest stable rate."""
        losses = {}
        for name in ("ours", "gradient descent"):
            torch.manual_seed(0)
            model = nn.Linear(10, 4).double()
            x = torch.randn(200, 10, dtype=torch.float64) * torch.logspace(0, -2, 10, dtype=torch.float64)
            y = x @ torch.randn(10, 4, dtype=torch.float64) * 10
            options = dict(lr=0.5, betas=(0.0, 0.9), nesterov=False, norm_clip=None, weight_decay=0.0)
            options.update(statistics_every=1, factor_rate=0.3, damping=1e-6)
            ours = name == "ours"
            opt = cls(model.parameters(), module=model, **options) if ours else torch.optim.SGD(model.parameters(), 2.0)
            for _ in range(60):
                opt.zero_grad()
                out = model(x)
                if ours:
                    opt.fisher_backward(out, "mse", "type-2")
                loss = F.mse_loss(out, y)
                loss.backward()
                opt.step()
            losses[name] = loss.item()
        assert losses["ours"] < 1e-6 * losses["gradient descent"], losses
