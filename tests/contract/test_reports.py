"""What an optimizer tells about itself is what it does and holds."""

import math

import pytest
import torch
from torch import nn

import cases
import secondorder
from cases import gradient, parameters

BLOCKS = cases.variants(whole={}, split={"max_block_size": 3})


def tensors(entry):
    for value in entry.values():
        if isinstance(value, dict):
            yield from tensors(value)
        else:
            yield value


class TestMemory:
    @BLOCKS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_state_is_predicted_to_the_byte(self, case, options, dtype):
        params = parameters(dtype=dtype)
        optimizer = case.make(params, **options)
        report = optimizer.memory_report()
        assert not optimizer.state, "a report makes no state"
        saved = optimizer.state_dict()["state"]
        sizes = [sum(t.numel() * t.element_size() for t in tensors(entry)) for entry in saved.values()]
        assert [row.bytes for row in report.rows] == sizes
        assert report.state == sum(sizes) and report.total == report.state + report.workspaces

    def test_every_parameter_has_a_row_by_name(self, case):
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        optimizer = case.make(model.named_parameters())
        names = [name for name, _ in model.named_parameters()]
        assert [row.name for row in optimizer.memory_report().rows] == names
        text = str(optimizer.memory_report())
        assert all(name in text for name in names) and f"{optimizer.memory_report().state:,}" in text

    def test_reports_do_not_change_with_training(self, case):
        params = parameters()
        optimizer = case.make(params)
        before = str(optimizer.memory_report()), str(optimizer.coverage())
        cases.train(optimizer, params, range(5))
        assert before == (str(optimizer.memory_report()), str(optimizer.coverage()))


class TestCoverage:
    def test_every_parameter_has_a_row_with_a_reason(self, case):
        params = parameters()
        params[2].requires_grad_(False)
        rows = list(case.make(params).coverage())
        assert [row.shape for row in rows] == [tuple(p.shape) for p in params]
        assert all(row.reason and row.treatment in (case.cls.__name__, "AdamW", "frozen") for row in rows)
        assert rows[2].treatment == "frozen"

    def test_table_tells_blocks_and_reasons(self):
        params = parameters([(10, 15), (3, 14), (7,), (20, 2)])
        optimizer = secondorder.SOAP(params, max_block_size=5, max_precond_dim=16)
        rows = list(optimizer.coverage())
        assert [row.blocks for row in rows] == [6, 1, 1, 1]
        assert [row.treatment for row in rows] == ["SOAP", "SOAP", "AdamW", "AdamW"]
        assert "one-sided" in rows[1].reason and "max_precond_dim=16" in rows[3].reason
        assert all(row.reason in str(optimizer.coverage()) for row in rows)


class TestDiagnostics:
    @pytest.mark.parametrize("full", [False, True])
    def test_scalars_by_name(self, case, full):
        params = parameters()
        optimizer = case.make(params)
        optimizer.track()
        for _ in range(2):
            found = optimizer.diagnostics(full)
            assert all(type(key) is str and type(value) is float for key, value in found.items())
            assert not any(math.isnan(value) for value in found.values())
            assert found["refused_steps"] == 0 and found["refresh_failures"] == 0
            cases.train(optimizer, params, range(5))

    @pytest.mark.parametrize("full", [False, True])
    def test_nothing_is_read_of_meta_parameters(self, case, full):
        """What the host knows is told; the rest is nan, in the steps that are measured too."""
        params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in cases.SHAPES]
        optimizer = case.make(params)
        optimizer.track()
        assert optimizer.diagnostics(full)["parameters"] == len(params)
        for _ in range(3):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
        found = optimizer.diagnostics(full)
        assert found["state_bytes"] == optimizer.memory_report().state
        assert all(math.isnan(found[key]) for key in ("gradient_norm", "update_ratio", "skipped_updates_max"))

    def test_gradient_norm_is_that_of_all_gradients(self, case):
        params = parameters()
        optimizer = case.make(params)
        cases.train(optimizer, params, [0])
        whole = torch.cat([p.grad.flatten() for p in params]).norm()
        assert optimizer.diagnostics()["gradient_norm"] == pytest.approx(float(whole), rel=1e-6)

    def test_condition_is_that_of_the_covariances(self):
        (p,) = parameters([(5, 5)], dtype=torch.float64)
        optimizer = secondorder.SOAP([p], refresh_by="eigh", refresh_every=4, refresh="together")
        cases.train(optimizer, [p], range(8))
        wanted = [torch.linalg.cond(optimizer.state[p][f"covariance_{i}"]).item() for i in (0, 1)]
        assert optimizer.diagnostics(full=True)["condition_max"] == pytest.approx(max(wanted), rel=1e-6)


class TestOperators:
    @BLOCKS
    def test_preconditioner_is_what_a_step_applies(self, case, options):
        """Without momentum, decay and a refresh in the step: update = lr · P g, with the second moment of that step."""
        if case.measures:
            pytest.skip("its factors move in every step: tests/test_flagship.py compares with those before")
        more = dict(betas=(0.0, 0.9), weight_decay=0.0, lr=0.1)
        if case.takes("nesterov"):
            more.update(nesterov=False)
        if case.takes("refresh_every"):
            more.update(refresh_every=4, refresh="together")
        if case.takes("clip"):  # what is clipped is no longer linear in the gradient
            more.update(clip=None)
        if case.takes("max_update_rms"):
            more.update(max_update_rms=None)
        params = parameters(dtype=torch.float64)
        optimizer = case.make(params, **more, **options)
        for step in range(11):
            before = cases.values(params)
            cases.train(optimizer, params, [step])
            if step in (1, 2, 5, 9):  # calls 2, 3, 6 and 10: calls 4 and 8 refresh
                for p, q in zip(params, before, strict=True):
                    P = optimizer.preconditioner(p)
                    torch.testing.assert_close(0.1 * (P @ p.grad), q - p.detach(), rtol=1e-9, atol=1e-12)

    def test_operator_is_a_copy(self, case):
        params = parameters()
        optimizer = case.make(params)
        cases.train(optimizer, params, range(5))
        P, g = optimizer.preconditioner(params[0]), gradient((6, 5), 0)
        before = P @ g
        cases.train(optimizer, params, range(5, 9))
        assert torch.equal(P @ g, before)

    def test_curvature_of_adamw_is_its_second_moment(self):
        params = parameters(dtype=torch.float64)
        optimizer, twin = secondorder.AdamW(params), parameters(dtype=torch.float64)
        reference = torch.optim.AdamW(twin)
        cases.train(optimizer, params, range(6))
        cases.train(reference, twin, range(6))
        for p, q in zip(params, twin, strict=True):
            wanted = reference.state[q]["exp_avg_sq"] / (1 - 0.999**6)
            torch.testing.assert_close(optimizer.curvature(p).diag(), wanted)

    @pytest.mark.parametrize("block", [None, 3])
    def test_curvature_of_soap_is_the_second_moment_in_its_basis(self, block):
        (p,) = parameters([(6, 5)], dtype=torch.float64)
        optimizer = secondorder.SOAP([p], refresh_every=2, max_block_size=block)
        cases.train(optimizer, [p], range(7))
        state = optimizer.state[p]
        dense = torch.zeros(6, 5, 6, 5, dtype=torch.float64)
        cuts = {"": (slice(0, 6), slice(0, 5))}
        if block:
            rows, columns = (slice(0, 3), slice(3, 6)), (slice(0, 3), slice(3, 5))
            cuts = {f"tile_r{i}_c{j}": (rows[i], columns[j]) for i in (0, 1) for j in (0, 1)}
        for key, (r, c) in cuts.items():
            s = state[key] if key else state
            V = torch.kron(s["basis_0"], s["basis_1"])
            sides = s["exp_avg_sq"].shape
            dense[r, c, r, c] = (V @ torch.diag(s["exp_avg_sq"].flatten()) @ V.T).reshape(*sides, *sides)
        torch.testing.assert_close(optimizer.curvature(p).to_dense(), dense.reshape(30, 30))

    def test_operator_of_a_stranger_is_refused(self, case):
        optimizer = case.make(parameters())
        with pytest.raises(ValueError, match=r"\(2, 2\)"):
            optimizer.curvature(nn.Parameter(torch.zeros(2, 2)))

    def test_operators_exist_before_training(self, case):
        params = parameters()
        optimizer = case.make(params)
        for p in params:
            assert optimizer.curvature(p).trace() in (0, torch.inf)  # nothing is known yet: of inverses, everything
            assert torch.isfinite(optimizer.preconditioner(p) @ gradient(tuple(p.shape), 0)).all()
