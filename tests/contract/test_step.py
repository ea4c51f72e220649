"""`step`: closures, hooks, scalers, signs, absent and odd gradients, memory layouts, autocast."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cases
from cases import SHAPES, assert_same_bits, assert_same_state, feed, flat_state, gradient, parameters, values


class TestClosure:
    @pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad])
    def test_closure_runs_with_gradients_and_its_loss_is_returned(self, case, outside):
        model = nn.Linear(4, 2)
        x = torch.randn(8, 4)
        optimizer = case.make(model.parameters())
        seen = []

        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            seen.append(loss)
            return loss

        with outside():
            assert optimizer.step(closure) is seen[0]
            assert optimizer.step(closure=closure) is seen[1]
        assert seen[0].requires_grad and seen[1] < seen[0]

    def test_step_returns_nothing_without_a_closure(self, case):
        params = parameters()
        feed(params, 0)
        assert case.make(params).step() is None

    def test_closure_makes_the_same_step(self, case):
        params, twins = parameters(), parameters()
        ours, theirs = case.make(params), case.make(twins)
        for step in range(5):
            ours.step(lambda step=step: feed(params, step) or 1.0)
            cases.train(theirs, twins, [step])
        assert_same_bits(params, twins)


class TestHooks:
    def test_step_hooks_fire_once(self, case):
        params = parameters()
        optimizer = case.make(params)
        order = []
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: order.append("before") and None)
        optimizer.register_step_post_hook(lambda opt, args, kwargs: order.append("after") and None)
        cases.train(optimizer, params, range(3))
        assert order == ["before", "after"] * 3

    def test_state_dict_hooks_fire_once(self, case):
        params = parameters()
        optimizer = case.make(params)
        order = []
        optimizer.register_state_dict_pre_hook(lambda opt: order.append("save"))
        optimizer.register_state_dict_post_hook(lambda opt, saved: order.append("saved") and None)
        optimizer.register_load_state_dict_pre_hook(lambda opt, saved: order.append("load") and None)
        optimizer.register_load_state_dict_post_hook(lambda opt: order.append("loaded"))
        optimizer.load_state_dict(optimizer.state_dict())
        assert order == ["save", "saved", "load", "loaded"]

    def test_load_hook_may_replace_the_dict(self, case):
        params = parameters()
        optimizer = case.make(params)

        def halve(opt, saved):
            groups = [{**group, "lr": group["lr"] / 2} for group in saved["param_groups"]]
            return {**saved, "param_groups": groups}

        optimizer.register_load_state_dict_pre_hook(halve)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups[0]["lr"] == case.kwargs["lr"] / 2

    def test_optimizer_in_backward(self, case):
        """One optimizer per parameter, stepped by the gradient's own hook, equals one optimizer for all."""
        models = []
        for in_backward in (True, False):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
            kwargs = {"refresh": "together"} if case.takes("refresh") else {}
            each = {p: case.make([p], **kwargs) for p in model.parameters()}
            whole = case.make(model.parameters(), **kwargs)
            if in_backward:

                def hook(p, each=each):
                    each[p].step()
                    each[p].zero_grad()

                for p in model.parameters():
                    p.register_post_accumulate_grad_hook(hook)
            for step in range(6):
                x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
                model(x).square().mean().backward()
                if not in_backward:
                    whole.step()
                    whole.zero_grad()
            models.append(model)
        assert_same_bits(models[0].parameters(), models[1].parameters())


class TestGradients:
    def test_maximize_is_the_negated_gradient(self, case):
        params, twins = parameters(), parameters()
        ours, theirs = case.make(params, maximize=True), case.make(twins)
        cases.train(ours, params, range(8))
        cases.train(theirs, twins, range(8), before=lambda step: [p.grad.neg_() for p in twins])
        assert_same_bits(params, twins)

    def test_gradients_stay_as_they_are(self, case):
        params = parameters()
        for kind in ("decoupled", "l2", "coupled"):
            optimizer = case.make(params, maximize=True, weight_decay=0.1, weight_decay_kind=kind, max_update_rms=0.1)
            for step in range(5):
                feed(params, step)
                tensors, before = [p.grad for p in params], [p.grad.clone() for p in params]
                optimizer.step()
                assert all(p.grad is g for p, g in zip(params, tensors, strict=True))
                assert_same_bits(tensors, before)

    def test_parameter_without_gradient_is_skipped_wholly(self, case):
        """No decay, no momentum, no statistics, no count; it goes on as if the steps had not been."""
        kwargs = dict(weight_decay=0.1, **({"refresh": "together"} if case.takes("refresh") else {}))
        params, twins = parameters(), parameters()
        optimizer, other = case.make(params, **kwargs), case.make(twins, **kwargs)
        absent = [0, 1, 3]

        def drop(step):
            if 3 <= step < 7:
                for i in absent:
                    params[i].grad = None

        cases.train(optimizer, params, range(3))
        before, state = values(params), flat_state(optimizer)
        cases.train(optimizer, params, range(3, 7), drop)
        after = flat_state(optimizer)
        for i, p in enumerate(params):
            assert torch.equal(p, before[i]) == (i in absent)
            own = {key for key in state if key.split("/")[0] == str(i)}
            assert all(torch.equal(state[key], after[key]) for key in own) == (i in absent)
        cases.train(optimizer, params, range(7, 12))
        cases.train(other, twins, [*range(3), *range(7, 12)])
        assert_same_bits([params[i] for i in absent], [twins[i] for i in absent])

    def test_a_step_without_any_gradient_changes_nothing(self, case):
        params = parameters()
        optimizer = case.make(params, weight_decay=0.1)
        optimizer.step()
        cases.train(optimizer, params, range(3))
        optimizer.zero_grad()
        before, state = values(params), flat_state(optimizer)
        optimizer.step()
        assert_same_bits(params, before)
        assert_same_state(flat_state(optimizer), state)

    def test_zero_gradients_leave_fresh_parameters_where_they_are(self, case):
        params = parameters()
        optimizer = case.make(params, weight_decay=0.0)
        before = values(params)
        for _ in range(8):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert_same_bits(params, before)
        assert all(torch.isfinite(value).all() for value in flat_state(optimizer).values())
        cases.train(optimizer, params, range(8))
        assert all(torch.isfinite(p).all() and not torch.equal(p, q) for p, q in zip(params, before, strict=True))

    def test_sparse_gradients_are_refused_in_words(self, case):
        model = nn.Embedding(10, 4, sparse=True)
        optimizer = case.make(model.parameters())
        model(torch.tensor([1, 2])).sum().backward()
        before = values(model.parameters())
        with pytest.raises(RuntimeError, match=f"{case.cls.__name__} does not support sparse gradients"):
            optimizer.step()
        assert_same_bits(model.parameters(), before)

    def test_scale_of_a_loss_is_undone_by_the_scaler(self, case):
        """A power of two is exact: the run with a scaler equals the one without, and its skipped step never was."""
        results = []
        for scaled in (True, False):
            torch.manual_seed(2)
            model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
            optimizer = case.make(model.parameters())
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=10**6, enabled=scaled)
            for step in range(8):
                loss = model(torch.randn(8, 4, generator=torch.Generator().manual_seed(step))).square().mean()
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                if step == 4:
                    if not scaled:
                        continue
                    next(model.parameters()).grad.fill_(torch.inf)
                if step % 2 == 0:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            results.append(values(model.parameters()))
        assert_same_bits(*results)


ODD_SHAPES = [(), (1,), (7,), (1, 1), (1, 7), (7, 1), (2, 1, 3), (0,), (0, 3), (3, 0), (2, 3, 4, 5)]


class TestShapesAndMemory:
    @pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
    def test_any_shape_trains(self, case, shape):
        params = parameters([shape, (4, 3)])
        optimizer = case.make(params, weight_decay=0.1)
        before = values(params)
        cases.train(optimizer, params, range(7))
        assert all(torch.isfinite(p).all() for p in params)
        assert shape.count(0) or not torch.equal(params[0], before[0])
        optimizer.load_state_dict(optimizer.state_dict())
        cases.train(optimizer, params, range(7, 9))
        assert len(optimizer.coverage()) == 2 and optimizer.memory_report().total > 0

    def test_empty_parameters_alone(self, case):
        params = parameters([(0,), (0, 3)])
        cases.train(case.make(params, weight_decay=0.1, max_update_rms=1.0), params, range(4))

    @cases.variants(whole={}, split={"max_block_size": 3}, clipped={"max_update_rms": 0.5})
    def test_memory_layout_of_parameters_does_not_matter(self, case, options):
        plain = parameters([(6, 5), (4, 3, 2, 2), (6, 5), (7,)])
        odd = [
            nn.Parameter(plain[0].detach().clone().t().contiguous().t()),
            nn.Parameter(
                plain[1].detach().clone(memory_format=torch.preserve_format).to(memory_format=torch.channels_last)
            ),
            nn.Parameter(torch.stack([plain[2].detach(), plain[2].detach()], -1)[..., 0]),
            nn.Parameter(plain[3].detach().repeat_interleave(2)[::2]),
        ]
        assert not any(p.is_contiguous() for p in odd)
        strides = [p.stride() for p in odd]
        a, b = (case.make(ps, weight_decay=0.1, **options) for ps in (plain, odd))
        cases.train(a, plain, range(8))
        cases.train(b, odd, range(8))
        for p, q in zip(plain, odd, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert strides == [p.stride() for p in odd]

    @cases.variants(whole={}, split={"max_block_size": 3})
    def test_memory_layout_may_change_during_training(self, case, options):
        """`model.to(memory_format=...)` keeps the parameters and moves their memory."""
        plain, odd = parameters([(6, 5), (4, 3, 2, 2), (7,)]), parameters([(6, 5), (4, 3, 2, 2), (7,)])
        a, b = (case.make(ps, **options) for ps in (plain, odd))
        cases.train(a, plain, range(9))
        cases.train(b, odd, range(3))
        odd[0].data = odd[0].data.t().contiguous().t()
        odd[1].data = odd[1].data.to(memory_format=torch.channels_last)
        cases.train(b, odd, range(3, 6))
        odd[1].data = odd[1].data.contiguous()
        cases.train(b, odd, range(6, 9))
        for p, q in zip(plain, odd, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)

    def test_memory_layout_of_gradients_does_not_matter(self, case):
        plain, odd = (parameters([(6, 5), (6, 5), (5, 5), (4, 3, 2, 2)]) for _ in range(2))
        a, b = case.make(plain), case.make(odd)
        for step in range(8):
            feed(plain, step)
            plain[2].grad = gradient((5, 1), step).expand(5, 5).clone()
            odd[0].grad = plain[0].grad.t().contiguous().t()
            odd[1].grad = torch.stack([plain[1].grad, plain[1].grad + 1], -1).flatten(1)[:, ::2]
            odd[2].grad = gradient((5, 1), step).expand(5, 5)
            odd[3].grad = plain[3].grad.to(memory_format=torch.channels_last)
            a.step()
            b.step()
        assert_same_bits(plain, odd)

    def test_autocast_around_the_step_does_not_matter(self, case):
        params, twins = parameters(), parameters()
        inside, outside = case.make(params), case.make(twins)
        for step in range(8):
            feed(params, step)
            feed(twins, step)
            with torch.autocast("cpu", torch.bfloat16):
                inside.step()
            outside.step()
        assert_same_bits(params, twins)
        assert_same_state(flat_state(inside), flat_state(outside))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_parameters_of_any_precision(self, case, dtype):
        """State is float32, or float64 for float64; the result is the float64 one up to the parameter's rounding."""
        params, exact = parameters(dtype=dtype), [nn.Parameter(p.detach().double()) for p in parameters(dtype=dtype)]
        kwargs = dict(lr=0.01, weight_decay=0.0)
        if case.takes("refresh"):  # when all factors have full rank: the null space of others is rounding's choice
            kwargs.update(refresh="together", refresh_every=4)
        a, b = case.make(params, **kwargs), case.make(exact, **kwargs)
        for step in range(6):
            feed(params, step)
            for p, q in zip(params, exact, strict=True):
                q.grad = p.grad.double()
            a.step()
            b.step()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for key, value in flat_state(a).items():
            counter = key.rpartition("/")[2] in ("step", "count", "seen", "failures")
            assert value.dtype == (torch.float32 if counter else wide), key
        tolerance = 0.0 if dtype == torch.float64 else 2e-2 if dtype == torch.bfloat16 else 3e-3
        for p, q in zip(params, exact, strict=True):
            torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=tolerance)

    def test_precisions_may_be_mixed(self, case):
        params = [*parameters([(6, 5), (4,)], dtype=torch.bfloat16), *parameters(), *parameters(dtype=torch.float64)]
        optimizer = case.make(params)
        cases.train(optimizer, params, range(6))
        optimizer.load_state_dict(optimizer.state_dict())
        cases.train(optimizer, params, range(6, 8))
        assert all(torch.isfinite(p).all() for p in params)

    @pytest.mark.parametrize("pair", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
    def test_gradients_may_have_another_precision(self, case, pair):
        """As torch allows where a parameter's `grad_dtype` is None."""
        if not hasattr(torch.Tensor, "grad_dtype"):
            pytest.skip("this torch ties the gradient's dtype to the parameter's")
        params, twins = parameters(dtype=pair[0]), parameters(dtype=pair[0])
        for p in params:
            p.grad_dtype = None
        a, b = case.make(params), case.make(twins)
        for step in range(5):
            feed(twins, step)
            for p, q in zip(params, twins, strict=True):
                q.grad = q.grad.bfloat16().to(pair[0])
                p.grad = q.grad.to(pair[1])
            a.step()
            b.step()
        assert_same_bits(params, twins)

    def test_no_workspace_is_as_large_as_all_gradients(self, case):
        """Many equal layers in groups of their own share one workspace."""
        params = parameters([(32, 32)] * 16)
        report = case.make([{"params": [p]} for p in params]).memory_report()
        assert report.workspaces <= 3 * 4 * 32 * 32

    def test_step_counts_calls(self, case):
        params = parameters()
        optimizer = case.make(params)
        for n in range(1, 5):
            cases.train(optimizer, params, [n])
            assert all(optimizer.state[p]["step"] == n for p in params)
        assert len(SHAPES) == len(optimizer.state)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 7), min_size=2, max_size=5))
def test_accumulated_gradients_equal_the_whole_batch(case, sizes):
    """Micro-batches of any sizes, each weighted by its share."""
    results = []
    for split in (sizes, [sum(sizes)]):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        optimizer = case.make(model.parameters())
        for step in range(8):
            x = torch.randn(sum(sizes), 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            for micro in x.split(split):
                (model(micro).square().mean() * len(micro) / len(x)).backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=0, atol=1e-8)
