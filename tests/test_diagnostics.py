"""`diagnostics()` and `track()` against dense algebra: what a step did, and what the state holds."""

import math

import pytest
import torch
from torch import nn

import cases
import secondorder
from cases import parameters
from dense_kfac import SETTINGS, backward, batch, joint, mlp

BLOCKS = cases.variants(whole={}, split={"max_block_size": 3})


def flat(tensors):
    return torch.cat([t.detach().reshape(-1).double() for t in tensors])


def moved(optimizer, params, step):
    """`(parameters before, what the step added, gradients)`, flat."""
    before = cases.values(params)
    cases.train(optimizer, params, [step])
    return flat(before), flat(params) - flat(before), flat([p.grad for p in params])


def close(value, wanted, rel=1e-5):
    assert value == pytest.approx(float(wanted), rel=rel), (value, float(wanted))


class TestMovement:
    @BLOCKS
    def test_is_that_of_all_parameters(self, case, options):
        params = parameters(dtype=torch.float64)
        optimizer = case.make(params, weight_decay=0.1, **options)
        optimizer.track()
        for step in range(5):
            p, d, g = moved(optimizer, params, step)
        told = optimizer.diagnostics()
        close(told["parameter_norm"], p.norm())
        close(told["update_norm"], d.norm())
        close(told["update_ratio"], d.norm() / p.norm())
        close(told["cosine"], -d.dot(g) / (d.norm() * g.norm()))
        for key in ("parameter_norm", "update_norm", "gradient_norm"):  # buckets part the parameters among them
            parts = [v for name, v in told.items() if name.startswith("bucket/") and name.endswith(key)]
            close(math.hypot(*parts), told[key])

    def test_is_told_by_bucket(self):
        params = parameters([(6, 5), (6, 5), (4, 4), (7,)], dtype=torch.float64)
        optimizer = secondorder.SOAP([{"params": params[:2]}, {"params": params[2:], "maximize": True}])
        optimizer.track()
        for step in range(3):
            before = cases.values(params)
            cases.train(optimizer, params, [step])
        told = optimizer.diagnostics()
        places = {"group0.6x5": [0, 1], "group1.4x4": [2], "group1.AdamW": [3]}
        assert {key.split("/")[1] for key in told if key.startswith("bucket/")} == set(places)
        for name, chosen in places.items():
            p, d, g = (flat([t[i] for i in chosen]) for t in (before, params, [q.grad for q in params]))
            d, sign = d - p, 1 if name.startswith("group1") else -1
            close(told[f"bucket/{name}/update_ratio"], d.norm() / p.norm())
            close(told[f"bucket/{name}/cosine"], sign * d.dot(g) / (d.norm() * g.norm()))

    def test_of_gradient_descent_is_straight_down(self):
        (p,) = parameters([(5,)])
        optimizer = secondorder.AdamW([p], betas=(0.0, 0.0), eps=1e6, weight_decay=0.0, lr=1e4)
        optimizer.track()
        cases.train(optimizer, [p], [0])
        close(optimizer.diagnostics()["cosine"], 1.0)

    @pytest.mark.parametrize("options", [{}, {"max_update_rms": 0.5}, {"weight_decay": 0.1}], ids=str)
    def test_watching_changes_no_bit(self, case, options):
        found = []
        for every in (0, 1, 2):
            params = parameters()
            optimizer = case.make(params, **options)
            optimizer.track(every)
            for step in range(6):
                cases.train(optimizer, params, [step])
                optimizer.diagnostics(full=step == 3)
            found.append((cases.values(params), cases.flat_state(optimizer)))
        for values, state in found[1:]:
            cases.assert_same_bits(found[0][0], values)
            cases.assert_same_state(found[0][1], state)

    def test_is_measured_every_so_many_steps(self):
        params = parameters()
        optimizer = secondorder.SOAP(params)
        optimizer.track(3)
        found = []
        for step in range(7):
            cases.train(optimizer, params, [step])
            found.append(optimizer.diagnostics().get("update_norm"))
        assert found[0] is found[1] is None
        assert found[2] == found[3] == found[4] != found[5] == found[6]

    def test_of_a_refused_step_is_none(self):
        params = parameters()
        optimizer = secondorder.SOAP(params)
        optimizer.track()
        cases.train(optimizer, params, [0], before=lambda _: params[0].grad.fill_(math.nan))
        assert optimizer.diagnostics()["update_norm"] == 0

    def test_parameters_without_gradient_are_left_out(self):
        params = parameters([(5, 4), (5, 4)])
        optimizer = secondorder.SOAP(params)
        optimizer.track()
        cases.train(optimizer, params, [0], before=lambda _: setattr(params[1], "grad", None))
        close(optimizer.diagnostics()["gradient_norm"], params[0].grad.norm())
        close(optimizer.diagnostics()["bucket/group0.5x4/gradient_norm"], params[0].grad.norm())

    @pytest.mark.parametrize("every", [-1, 1.5, None])
    def test_what_is_no_count_is_refused(self, every):
        with pytest.raises(ValueError, match="every"):
            secondorder.SOAP(parameters()).track(every)


class TestCounters:
    def test_memory_is_that_of_the_report(self, case):
        params = parameters()
        optimizer = case.make(params)
        for step in range(2):
            told, report = optimizer.diagnostics(), optimizer.memory_report()
            assert told["state_bytes"] == report.state and told["workspace_bytes"] == report.workspaces
            parts = sum(v for k, v in told.items() if k.startswith("bucket/") and k.endswith("state_bytes"))
            assert parts + 4 * len(params) == report.state
            cases.train(optimizer, params, [step])

    def test_refused_steps_are_updates_that_blocks_skipped(self, case):
        params = parameters()
        optimizer = case.make(params)
        cases.train(optimizer, params, range(5))
        assert optimizer.diagnostics()["skipped_updates_max"] == 0
        for _ in range(2):
            cases.train(optimizer, params, [5], before=lambda _: params[0].grad.fill_(math.inf))
        told = optimizer.diagnostics()
        assert told["refused_steps"] == told["skipped_updates_max"] == 2

    def test_average_weight_is_that_of_the_terms(self):
        params = parameters([(5, 4), (3,)])
        optimizer = secondorder.SOAP(params, betas=(0.9, 0.99), factor_beta=0.8)
        cases.train(optimizer, params, range(4))
        told = optimizer.diagnostics()
        close(told["bucket/group0.5x4/average_weight_min"], 1 - 0.8**4)
        close(told["bucket/group0.AdamW/average_weight_min"], 1 - 0.99**4)
        close(told["average_weight_min"], 1 - 0.99**4)

    def test_staleness_is_the_age_of_the_oldest_basis(self):
        params = parameters([(5, 4)])
        optimizer = secondorder.SOAP(params, refresh_every=4, refresh="together")
        ages = []
        for step in range(12):
            cases.train(optimizer, params, [step])
            ages.append(optimizer.diagnostics()["bucket/group0.5x4/steps_since_refresh_max"])
        assert ages[7:12] == [0, 1, 2, 3, 0]

    def test_clipped_share_counts_blocks(self):
        params = parameters([(6, 6), (5, 5), (5, 5)])
        optimizer = secondorder.SOAP(params, max_update_rms=1e-3)
        cases.train(optimizer, params, range(3))
        assert optimizer.diagnostics()["clipped_share"] == 1
        optimizer.param_groups[0]["max_update_rms"] = 1e3
        cases.train(optimizer, params, [3])
        assert optimizer.diagnostics()["clipped_share"] == 0

    @pytest.mark.parametrize("clip", ["norm_clip", "kl_clip"])
    def test_clip_factor_is_that_of_the_update(self, clip):
        updates, told = [], []
        for limit in (1e-3, None):
            torch.manual_seed(0)
            model = mlp(5, 7, 3)
            optimizer = secondorder.KFAC(model.parameters(), module=model, **{**SETTINGS, "lr": 0.1, clip: limit})
            backward(model, *batch(model))
            before = joint(model[0])
            optimizer.step()
            updates.append(before - joint(model[0]))
            told.append(optimizer.diagnostics().get(f"{clip}_factor"))
        assert told[1] is None and 0 < told[0] < 1
        torch.testing.assert_close(updates[0], told[0] * updates[1])

    def test_keys_are_stable(self, case):
        params = parameters()
        optimizer = case.make(params)
        optimizer.track()
        cases.train(optimizer, params, range(4))
        before = optimizer.diagnostics(full=True)
        cases.train(optimizer, params, range(4, 9))
        after = optimizer.diagnostics(full=True)
        assert list(before) == list(after) and all(type(v) is float for v in after.values())
        assert optimizer.diagnostics().keys() < after.keys()

    def test_names_of_buckets_of_one_shape_differ(self):
        params = [*parameters([(5, 4)]), *parameters([(5, 4)], dtype=torch.float64)]
        told = secondorder.SOAP(params).diagnostics()
        assert told["bucket/group0.5x4/blocks"] == told["bucket/group0.5x4#2/blocks"] == 1


def trained(cls=secondorder.KFAC, steps=4, **options):
    model = mlp(5, 7, 3)
    every = {"refresh_every": 1, **SETTINGS, "lr": 0.05, **options}
    optimizer = cls(model.parameters(), module=model, **every)
    for seed in range(steps):
        backward(model, *batch(model, seed=seed))
        optimizer.step()
    return model, optimizer


def entropy_rank(values):
    p = values.clamp_min(0) / values.sum()
    return math.exp(-float((p[p > 0] * p[p > 0].log()).sum()))


class TestSpectra:
    def test_condition_and_rank_are_those_of_the_factors(self):
        model, optimizer = trained()
        told = optimizer.diagnostics(full=True)
        conditions, ranks = [], []
        for layer in (model[0], model[2]):
            name = "x".join(map(str, joint(layer).shape))
            for i in (0, 1):
                C = optimizer.state[layer.weight][f"covariance_{i}"]
                values = torch.linalg.eigvalsh(C)
                close(told[f"bucket/group0.{name}/effective_rank_{i}"], entropy_rank(values), rel=1e-6)
                ranks.append(entropy_rank(values))
                if values[0] > 1e-10 * values[-1]:
                    close(told[f"bucket/group0.{name}/condition_{i}"], values[-1] / values[0], rel=1e-6)
                conditions.append(told[f"bucket/group0.{name}/condition_{i}"])
        close(told["effective_rank_min"], min(ranks), rel=1e-6)
        assert told["condition_max"] == max(conditions)

    @pytest.mark.parametrize("kind", ["absolute", "relative"])
    @pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.EKFAC])
    def test_damping_share_is_the_trace_of_its_part(self, cls, kind):
        """mean of λ / (c + λ), that is tr(λ P) / N for P = (C + λ)⁻¹."""
        model, optimizer = trained(cls, damping=0.2, damping_kind=kind)
        told, parts = optimizer.diagnostics(full=True), []
        for layer in (model[0], model[2]):
            P = optimizer.preconditioner(layer.weight).to_dense()
            C = optimizer.curvature(layer.weight).to_dense()
            ridge = torch.linalg.inv(P) - C
            share = torch.trace(ridge @ P) / len(P)
            name = "x".join(map(str, joint(layer).shape))
            close(told[f"bucket/group0.{name}/damping_share"], share, rel=1e-6)
            parts.append((share, len(P)))
        close(told["damping_share"], sum(a * n for a, n in parts) / sum(n for _, n in parts), rel=1e-6)

    def test_damping_share_of_adam_is_that_of_eps(self):
        (p,) = parameters([(9,)], dtype=torch.float64)
        optimizer = secondorder.AdamW([p], eps=0.3, betas=(0.9, 0.5))
        cases.train(optimizer, [p], range(3))
        root = optimizer.curvature(p).diag().sqrt()
        told = optimizer.diagnostics(full=True)["bucket/group0.elementwise/damping_share"]
        close(told, (0.3 / (root + 0.3)).mean(), rel=1e-9)

    @pytest.mark.parametrize("cls", [secondorder.KFAC, secondorder.EKFAC, secondorder.SINGD])
    def test_largest_eigenvalues_are_those_of_all_blocks(self, cls):
        options = {} if cls is not secondorder.SINGD else dict(structures=("dense", "dense"))
        if options:
            model = mlp(5, 7, 3)
            optimizer = cls(model.parameters(), module=model, **options)
            backward(model, *batch(model))
            optimizer.step()
        else:
            model, optimizer = trained(cls)
        dense = [torch.linalg.eigvalsh(optimizer.curvature(layer.weight).to_dense()) for layer in (model[0], model[2])]
        wanted = torch.cat(dense).sort(descending=True).values[:5].tolist()
        told = optimizer.diagnostics(full=True)
        assert [told[f"curvature_top_{i}"] for i in range(1, 6)] == pytest.approx(wanted, rel=1e-6)

    def test_values_along_directions_never_exceed_the_largest_eigenvalue(self):
        """EKFAC's moments of one batch are `qᵀ F q` for orthonormal q, F the empirical Fisher matrix of that batch."""
        model = mlp(5, 7, 3)
        optimizer = secondorder.EKFAC(model.parameters(), module=model, **{**SETTINGS, "lr": 0.0, "betas": (0.0, 0.0)})
        x, y = batch(model)
        for _ in range(2):
            backward(model, x, y)
            optimizer.step()
        rows = []
        for i in range(len(x)):
            model.zero_grad()
            nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
            rows.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        E = torch.stack(rows)
        assert optimizer.diagnostics(full=True)["curvature_top_1"] <= torch.linalg.eigvalsh(E @ E.T / len(E))[-1]
