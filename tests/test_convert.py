"""Checkpoints of other optimizers: the step after a load is the other's next step, from recorded states of theirs."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secondorder
from cases import assert_same_state, flat_state, gradient
from golden_singd import network
from secondorder.convert import load_singd, load_soap
from secondorder.preconditioner.structures import structure

GOLDEN = Path(__file__).parent / "golden"
WHOLE = dict(nesterov=False, max_block_size=None, one_sided_aspect=None)
NAMES = ("w8x5", "w16x16", "conv", "b7", "s", "w40x24")


def recorded(names=NAMES, file="soap_pf10_default_f64"):
    """Parameters and the state dict of the reference SOAP after 30 calls."""
    z = np.load(GOLDEN / f"{file}.npz")
    params, state = [], {}
    for i, name in enumerate(names):
        params.append(nn.Parameter(torch.tensor(z[f"traj/{name}"][-1])))
        entry = {key: torch.tensor(z[f"final/{name}/{key}"]) for key in ("exp_avg", "exp_avg_sq")}
        for key in ("GG", "Q"):
            found = [f"final/{name}/{key}/{axis}" for axis in range(params[-1].ndim)]
            entry[key] = [torch.tensor(z[f]) if f in z.files else [] for f in found]
        entry |= {key: z[f"final/{name}/{key}"].item() for key in ("step", "precondition_frequency", "shampoo_beta")}
        state[i] = entry
    group = dict(lr=3e-3, betas=(0.95, 0.95), eps=1e-8, weight_decay=0.01, params=list(range(len(names))))
    return params, {"state": state, "param_groups": [group]}


def through(tensor, matrices, side):
    """Each axis contracted with the rows (side 0) or the columns (1) of its matrix."""
    for axis, matrix in enumerate(matrices):
        if len(matrix):
            tensor = torch.tensordot(matrix, tensor, ([side], [axis])).movedim(0, axis)
    return tensor


def reference_step(p, g, entry, lr, beta1=0.95, beta2=0.95):
    """The published update, without decay and eps; also the statistics that follow it."""
    steps = entry["step"] + 1
    projected = through(g, entry["Q"], 0)
    m = beta1 * entry["exp_avg"] + (1 - beta1) * projected
    v = beta2 * entry["exp_avg_sq"] + (1 - beta2) * projected.square()
    u = through(m / v.sqrt(), entry["Q"], 1)
    grams = []
    for axis, gram in enumerate(entry["GG"]):
        flat = g.movedim(axis, 0).reshape(len(gram), -1) if len(gram) else gram
        grams.append(beta2 * gram + (1 - beta2) * flat @ flat.T if len(gram) else gram)
    return p - lr * (1 - beta2**steps) ** 0.5 / (1 - beta1**steps) * u, grams


def one_step(optimizer, params):
    """`(what the reference's step is given, parameters before)`."""
    before = [p.detach().clone() for p in params]
    for i, p in enumerate(params):
        p.grad = gradient(tuple(p.shape), 77, i, p.dtype)
    optimizer.step()
    return before


def ours(params, betas=(0.95, 0.95), **options):
    return secondorder.SOAP(params, lr=1e-2, betas=betas, weight_decay=0.0, eps=0.0, **{**WHOLE, **options})


class TestSOAP:
    @pytest.mark.parametrize("rotated", [True, False])
    def test_next_step_is_theirs(self, rotated):
        """Matrices, a convolution with four factors, and what has none; their statistics go on as well."""
        params, saved = recorded()
        optimizer = ours(params)
        given = {**saved, "state": {i: dict(entry) for i, entry in saved["state"].items()}}
        if not rotated:
            for entry in given["state"].values():
                entry["exp_avg"] = through(entry["exp_avg"], entry["Q"], 1)
        load_soap(optimizer, given, rotated_momentum=rotated)
        before = one_step(optimizer, params)
        for i, (p, start, name) in enumerate(zip(params, before, NAMES, strict=True)):
            expected, grams = reference_step(start, p.grad, saved["state"][i], 1e-2)
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12, msg=name)
            assert optimizer.state[p]["step"] == 31
            if p.ndim == 2:
                weight = 1 - 0.95**31  # of theirs, which began at zero
                for axis, gram in enumerate(grams):
                    held = optimizer.state[p][f"covariance_{axis}"]
                    torch.testing.assert_close(held, gram / weight, rtol=1e-12, atol=1e-14)

    def test_deviations_are_the_documented_ones(self):
        """Decay before the step instead of after it, of second order in lr; eps on the corrected moment, tiny."""
        params, saved = recorded(("w16x16",))
        optimizer = secondorder.SOAP(params, lr=1e-2, betas=(0.95, 0.95), weight_decay=0.1, **WHOLE)
        load_soap(optimizer, saved)
        (start,) = one_step(optimizer, params)
        expected, _ = reference_step(start, params[0].grad, saved["state"][0], 1e-2)
        expected = expected - 1e-2 * 0.1 * expected
        off = (params[0] - expected).abs().max()
        assert 0 < off < 1.1 * 1e-2 * 0.1 * (expected - start).abs().max() / (1 - 1e-3)

    def test_covariance_of_merged_axes_is_a_product_with_their_trace(self):
        params, saved = recorded(("conv",))
        optimizer = ours(params)
        load_soap(optimizer, saved)
        grams = saved["state"][0]["GG"]
        held = optimizer.state[params[0]]["covariance_1"]
        product = torch.kron(torch.kron(grams[1], grams[2]), grams[3])
        weight = 1 - 0.95**30
        torch.testing.assert_close(held / held.trace(), product / product.trace())
        torch.testing.assert_close(held.trace(), grams[0].trace() / weight)
        torch.testing.assert_close(optimizer.state[params[0]]["covariance_0"], grams[0] / weight)

    def test_merged_dimensions_that_are_ours_are_taken(self):
        """`merge_dims` made a matrix of a convolution: the state is that of the matrix."""
        (matrix,), saved = recorded(("w40x24",))
        conv = nn.Parameter(matrix.detach().clone().view(40, 6, 2, 2))
        entry = dict(saved["state"][0])
        entry |= {key: entry[key].view(40, 6, 2, 2) for key in ("exp_avg", "exp_avg_sq")}
        a, b = ours([matrix]), ours([conv])
        load_soap(a, saved)
        load_soap(b, {"state": {0: entry}, "param_groups": saved["param_groups"]})
        conv.grad = gradient((40, 24), 77).double().view(40, 6, 2, 2)
        matrix.grad = gradient((40, 24), 77).double()
        a.step(), b.step()
        torch.testing.assert_close(conv.view(40, 24), matrix)

    def test_sides_that_were_too_long_have_no_factor(self):
        """Theirs by `max_precond_dim`, ours by their aspect: (200, 4)."""
        params, saved = recorded(("t200x4",), "soap_onesided_mpd20_f64")
        optimizer = ours(params, one_sided_aspect=4.0)
        load_soap(optimizer, saved)
        (start,) = one_step(optimizer, params)
        expected, _ = reference_step(start, params[0].grad, saved["state"][0], 1e-2)
        torch.testing.assert_close(params[0].detach(), expected, rtol=0, atol=1e-12)

    def test_other_betas_of_ours_start_from_the_same_averages(self):
        """What is stored is an estimate; bias is that of the betas with which it was averaged."""
        params, saved = recorded(("w16x16", "b7"))
        for entry in saved["state"].values():
            entry["step"] = 3  # so that bias is large
        optimizer = ours(params, betas=(0.5, 0.6))
        load_soap(optimizer, saved)
        for i, p in enumerate(params):
            state, theirs = optimizer.state[p], saved["state"][i]
            debiased = (1.0, 1.0) if p.ndim == 2 else (1 - 0.5**3, 1 - 0.6**3)
            for key, weight in zip(("exp_avg", "exp_avg_sq"), debiased, strict=True):
                torch.testing.assert_close(state[key] / weight, theirs[key] / (1 - 0.95**3))

    def test_their_first_gradient_alone_is_a_basis(self):
        """After one call theirs has a basis, no moments, and has made no step."""
        params, saved = recorded(("w16x16",))
        entry = saved["state"][0]
        entry |= {key: torch.zeros_like(entry[key]) for key in ("exp_avg", "exp_avg_sq")} | {"step": 0}
        optimizer = ours(params)
        load_soap(optimizer, saved)
        (start,) = one_step(optimizer, params)
        expected, _ = reference_step(start, params[0].grad, entry, 1e-2)
        torch.testing.assert_close(params[0].detach(), expected, rtol=0, atol=1e-12)

    def test_parameters_that_had_no_gradient_start_fresh(self):
        params, saved = recorded(("w16x16", "w8x5"))
        del saved["state"][1]
        optimizer = ours(params)
        load_soap(optimizer, saved)
        assert [int(optimizer.state[p]["step"]) for p in params] == [30, 0]

    def test_half_precision_state_is_taken_in_float32(self):
        params, saved = recorded(("w16x16",))
        half = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in saved["state"][0].items()}
        p = nn.Parameter(params[0].detach().bfloat16())
        optimizer = ours([p])
        load_soap(optimizer, {"state": {0: half}, "param_groups": saved["param_groups"]})
        assert {t.dtype for t in optimizer.state[p].values()} == {torch.float32}


def without(key):
    def fault(entry):
        del entry[key]

    return fault


def changed(**more):
    return lambda entry: entry.update(more)


FAULTS = {
    "no Q": (without("Q"), {}, "no 'Q'"),
    "no exp_avg": (without("exp_avg"), {}, "no tensor 'exp_avg'"),
    "shape": (changed(exp_avg=torch.zeros(8, 6)), {}, r"'exp_avg' .* shape \(8, 6\), expected .*\(8, 5\)"),
    "integers": (changed(exp_avg_sq=torch.zeros(8, 5, dtype=torch.int64)), {}, "'exp_avg_sq' is of dtype torch.int64"),
    "factor": (changed(Q=[torch.eye(7), torch.eye(5)]), {}, r"factors of shapes \[\(7, 7\), \(5, 5\)\]"),
    "one side": (changed(Q=[[], torch.eye(5)]), {}, r"\[1\] in their 'Q', \[0, 1\] here; .*one_sided_aspect=None"),
    "merged": (changed(Q=[torch.eye(40)], GG=[torch.eye(40)]), {}, r"axes \(40,\) there, \(8, 5\) here"),
    "blocks": (lambda entry: None, {"max_block_size": 4}, "cut into blocks here.*max_block_size=None"),
    "fallback": (lambda entry: None, {"max_precond_dim": 1}, "left to AdamW here"),
}


class TestSOAPThatDoesNotFit:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_it_is_refused_in_words_and_nothing_changes(self, fault):
        spoil, options, message = FAULTS[fault]
        params, saved = recorded(("w16x16", "w8x5"))
        spoil(saved["state"][1])
        optimizer = ours([("a", params[0]), ("b", params[1])], **options)
        before = flat_state(optimizer)
        with pytest.raises(ValueError, match=rf"b of shape \(8, 5\).*: .*{message}"):
            load_soap(optimizer, saved)
        assert_same_state(flat_state(optimizer), before)

    def test_the_rest_can_be_taken_nevertheless(self):
        params, saved = recorded(("w16x16", "w8x5"))
        del saved["state"][1]["Q"]
        optimizer = ours(params)
        with pytest.warns(UserWarning, match=r"\(8, 5\): no 'Q'.*keep the state they have"):
            load_soap(optimizer, saved, strict=False)
        assert [int(optimizer.state[p]["step"]) for p in params] == [30, 0]

    def test_a_preconditioned_vector_does_not_fit(self):
        params, saved = recorded(("b7",))
        saved["state"][0] |= {"Q": [torch.eye(7)], "GG": [torch.eye(7)]}
        with pytest.raises(ValueError, match="left to AdamW here"):
            load_soap(ours(params), saved)

    def test_groups_optimizer_and_dict_must_be_what_they_should(self):
        params, saved = recorded(("w16x16", "w8x5"))
        with pytest.raises(ValueError, match=r"\[2\] parameters, ours have \[1, 1\]"):
            load_soap(ours([{"params": [p]} for p in params]), saved)
        with pytest.raises(TypeError, match="must be a SOAP, got KLSOAP"):
            load_soap(secondorder.KLSOAP(params), saved)
        with pytest.raises(ValueError, match="no checkpoint of the reference SOAP: it has no 'param_groups'"):
            load_soap(ours(params), {"state": {}})
        with pytest.raises(TypeError, match="must be a mapping, got list"):
            load_soap(ours(params), [])


@dataclass
class Stored:
    """What a structured matrix of singd is to us."""

    matrix: torch.Tensor

    def to_dense(self):
        return self.matrix


PARITY = dict(momentum="update", nesterov=False, weight_decay_kind="coupled", norm_clip=None, max_update_rms=None)
FILES = {
    "singd_seq_f64_dense_expand_batchseq_ingd": secondorder.SINGD,
    "singd_seqpool_f64_dense_expand_batch_ikfac": secondorder.IKFAC,
}


def recorded_singd(file, at):
    """Model before the recorded step `at`, their state with the factors that this step applies, and the record."""
    z = np.load(GOLDEN / f"{file}.npz")
    meta = json.loads(str(z["meta"]))
    hyper = meta["hyper"]
    model = network(meta["model_kind"]).double()
    state = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        path = torch.tensor(z[f"param/{name}"])
        with torch.no_grad():
            p.copy_(path[at - 2])
        state[i] = {"momentum_buffer": (path[at - 3] - path[at - 2]) / hyper["lr"]}
    snap = list(z["snap_steps"]).index(at)
    factors = {}
    for what in ("K", "C"):
        keys = sorted(key for key in z.files if key.startswith(f"{what}/"))
        factors[f"{what}s"] = {key[2:]: Stored(torch.tensor(z[key][snap])) for key in keys}
    group = {**hyper, "T": 7, "params": list(range(len(state)))}
    saved = {"state": state, "param_groups": [group], "steps": at, **factors, "m_Ks": {}, "m_Cs": {}}
    return model, saved, z, meta


def fit(cls, model, hyper, **options):
    betas = (hyper["momentum"], 0.999)
    return cls(
        model.parameters(),
        lr=hyper["lr"],
        betas=betas,
        weight_decay=hyper["weight_decay"],
        module=model,
        **{**PARITY, "statistics_every": 7, **options},
    )


class TestSINGD:
    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("at", [5, 10])
    def test_next_step_is_theirs(self, file, at):
        model, saved, z, meta = recorded_singd(file, at)
        optimizer = fit(FILES[file], model, meta["hyper"])
        load_singd(optimizer, saved)
        out, y = model(torch.tensor(z["x"][at - 1])), torch.tensor(z["y"][at - 1])
        F.cross_entropy(out.flatten(0, -2), y.flatten(), reduction=meta["reduction"]).backward()
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), torch.tensor(z[f"param/{name}"][at - 1]), rtol=0, atol=1e-12)
            assert optimizer.state[p]["step"] == at + 1

    def test_momentum_of_gradients_starts_afresh(self):
        model, saved, z, meta = recorded_singd("singd_seq_f64_dense_expand_batchseq_ingd", 5)
        optimizer = fit(secondorder.SINGD, model, meta["hyper"], momentum="gradient", weight_decay_kind="decoupled")
        load_singd(optimizer, saved)
        start = model[0].weight.detach().clone()
        model(torch.tensor(z["x"][4])).square().mean().backward()
        optimizer.step()
        joined = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
        K, C = (saved[what]["0"].to_dense() for what in ("Ks", "Cs"))
        expected = start * (1 - 0.02 * 0.01) - 0.02 * (C @ C.T @ joined @ K @ K.T)[:, :-1]
        torch.testing.assert_close(model[0].weight.detach(), expected)

    def test_nothing_is_left_of_what_an_optimizer_had(self):
        model, saved, z, meta = recorded_singd("singd_seq_f64_dense_expand_batchseq_ingd", 5)
        used = fit(secondorder.SINGD, model, meta["hyper"], factor_momentum=0.5, statistics_every=1)
        fresh = fit(secondorder.SINGD, model, meta["hyper"], factor_momentum=0.5, statistics_every=1)
        for _ in range(2):
            model(torch.tensor(z["x"][4])).square().mean().backward()
            used.step()
        load_singd(used, saved)
        load_singd(fresh, saved)
        assert_same_state(flat_state(used), flat_state(fresh))

    def test_order_of_their_parameters_may_be_that_of_their_layers(self):
        """Without `params`, theirs counts only what its layers have."""
        model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 2, bias=False))
        eye = {"1": Stored(torch.eye(5)), "2": Stored(torch.eye(3))}
        buffers = {i: {"momentum_buffer": torch.full(s, i + 1.0)} for i, s in enumerate([(3, 4), (3,), (2, 3)])}
        saved = {"state": buffers, "param_groups": [{"T": 2, "params": [0, 1, 2]}], "steps": 3, "Ks": eye}
        saved["Cs"] = {"1": Stored(torch.eye(3)), "2": Stored(torch.eye(2))}
        optimizer = secondorder.SINGD(model.parameters(), module=model, **PARITY)
        load_singd(optimizer, saved)
        momentum = optimizer.state[model[1].weight]["momentum"]
        assert torch.equal(momentum, torch.tensor([1.0, 1, 1, 1, 2]).expand(3, 5))
        assert torch.equal(optimizer.state[model[2].weight]["momentum"], torch.full((2, 3), 3.0))
        assert optimizer.state[model[0].weight]["step"] == 0
        saved["param_groups"][0]["params"] = [0, 1, 2, 3]
        with pytest.raises(ValueError, match="4 parameters, their layers 3, ours 5"):
            load_singd(optimizer, saved)

    @pytest.mark.parametrize("name", ["diagonal", "block(3)", "tril_toeplitz", "triu_toeplitz", "hierarchical(2,1)"])
    def test_structured_factors_are_stored_as_ours(self, name):
        model = nn.Linear(6, 7, bias=False)
        kind = structure(name)
        element = {d: kind.project(torch.randn(1, d, d)) for d in (6, 7)}
        element = {d: kind.product(kind.project((m := torch.randn(1, d, d)) + m.mT), e) for d, e in element.items()}
        saved = {"state": {}, "param_groups": [{"T": 1, "params": [0]}], "steps": 1}
        saved |= {"Ks": {"": Stored(kind.to_dense(element[6])[0])}, "Cs": {"": Stored(kind.to_dense(element[7])[0])}}
        optimizer = secondorder.SINGD(model.parameters(), module=model, structures=(name, name))
        load_singd(optimizer, saved)
        for mode, d in ((1, 6), (0, 7)):
            assert torch.equal(optimizer.state[model.weight][f"root_{mode}"], element[d][0])

    def test_what_does_not_fit_is_refused_in_words(self):
        model = nn.Sequential(nn.Linear(6, 7), nn.Conv1d(4, 4, 1, groups=2, bias=False))
        dense = {"0": Stored(torch.randn(7, 7)), "1": Stored(torch.randn(2, 2))}
        saved = {"state": {}, "param_groups": [{"T": 1, "params": [0, 1, 2]}], "steps": 1, "Ks": dense}
        saved["Cs"] = {"0": Stored(torch.randn(7, 7)), "1": Stored(torch.randn(4, 4))}

        def refused(message, saved=saved, **options):
            optimizer = secondorder.SINGD(model.parameters(), module=model, **options)
            with pytest.raises(ValueError, match=message):
                load_singd(optimizer, saved)

        refused(r"1.weight of shape \(4, 2, 1\): groups of a convolution")
        refused(r"0.weight .*: C is no matrix of the structure 'diagonal'", structures=("dense", "diagonal"))
        refused(r"0.weight .* cut into blocks here: construct ours with max_block_size=None", max_block_size=4)
        refused(r"0.weight .* left to AdamW here", sharing="none")
        swapped = {**saved, "Ks": {**dense, "0": dense["1"]}}
        refused(r"0.weight .*: K is of shape \(2, 2\), and ours of \(7, 7\)", swapped)
        refused(r"layers \['net'\] here.*module=", {**saved, "Ks": {"net": dense["0"]}})
        refused("it has no 'Cs'", {key: value for key, value in saved.items() if key != "Cs"})
        with pytest.raises(TypeError, match="must be a SINGD, got KFAC"):
            load_singd(secondorder.KFAC(model.parameters(), module=model), saved)
        optimizer = secondorder.SINGD(model.parameters(), module=model)
        with pytest.warns(UserWarning, match="groups of a convolution"):
            load_singd(optimizer, saved, strict=False)
        assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [1, 1, 0]

    def test_loading_is_silent(self):
        model, saved, _, meta = recorded_singd("singd_seq_f64_dense_expand_batchseq_ingd", 5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_singd(fit(secondorder.SINGD, model, meta["hyper"]), saved)
