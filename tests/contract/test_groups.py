"""Parameter groups: late ones, unknown keys, names, frozen and lazy parameters, schedulers, tensor learning rates."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as sched

import cases
from cases import assert_same_bits, assert_same_state, feed, flat_state, gradient, parameters, values


class TestGroups:
    def test_unknown_key_is_warned_about_by_name(self, case):
        with pytest.warns(UserWarning, match="typo_lr"):
            case.make([{"params": parameters(), "typo_lr": 1.0}])

    def test_keys_of_schedulers_and_torch_are_no_surprise(self, case):
        foreign = dict(initial_lr=1.0, max_lr=1.0, min_lr=0.0, max_momentum=0.9, base_momentum=0.8, swa_lr=0.1)
        foreign.update(foreach=True, fused=None, capturable=False, differentiable=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = case.make([{"params": parameters(), **foreign}])
        cases.train(optimizer, optimizer.param_groups[0]["params"], range(3))

    def test_refused_group_leaves_no_trace(self, case):
        params = parameters()
        optimizer = case.make(params[:2])
        bad = [
            dict(params=params[2:], lr=-1.0),
            dict(params=[nn.Parameter(torch.zeros(2, dtype=torch.complex64))]),
            dict(params=params[:1]),
        ]
        for group in bad:
            with pytest.raises((ValueError, TypeError)):
                optimizer.add_param_group(group)
            assert len(optimizer.param_groups) == 1
        optimizer.add_param_group({"params": params[2:]})
        cases.train(optimizer, params, range(4))
        assert len(optimizer.coverage()) == len(params)

    def test_late_group_starts_its_own_clock(self, case):
        """The late group does what a new optimizer would do; the early one does not notice."""
        early, late = parameters([(6, 5), (6,)]), parameters([(5, 4), (3,)], seed=1)
        optimizer = case.make(early)
        cases.train(optimizer, early, range(4))
        optimizer.add_param_group({"params": late, "lr": 0.05})
        for step in range(4, 12):
            feed(early, step)
            feed(late, step)
            optimizer.step()
        alone_early, alone_late = parameters([(6, 5), (6,)]), parameters([(5, 4), (3,)], seed=1)
        cases.train(case.make(alone_early), alone_early, range(12))
        cases.train(case.make(alone_late, lr=0.05), alone_late, range(4, 12))
        if not case.takes("refresh"):  # phases of a staggered schedule depend on all units
            assert_same_bits(early + late, alone_early + alone_late)
        assert [int(optimizer.state[p]["step"]) for p in early + late] == [12, 12, 8, 8]

    @cases.classes_with("refresh")
    def test_late_group_does_not_disturb_when_refreshes_are_together(self, case):
        early, late = parameters([(6, 5), (6,)]), parameters([(6, 5), (3,)], seed=1)
        optimizer = case.make(early, refresh="together")
        cases.train(optimizer, early, range(4))
        optimizer.add_param_group({"params": late})
        for step in range(4, 12):
            feed(early, step)
            feed(late, step)
            optimizer.step()
        alone_early, alone_late = parameters([(6, 5), (6,)]), parameters([(6, 5), (3,)], seed=1)
        cases.train(case.make(alone_early, refresh="together"), alone_early, range(12))
        cases.train(case.make(alone_late, refresh="together"), alone_late, range(4, 12))
        assert_same_bits(early + late, alone_early + alone_late)

    def test_names_are_kept(self, case):
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = case.make(model.named_parameters())
        names = [name for name, _ in model.named_parameters()]
        assert optimizer.param_groups[0]["param_names"] == names
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
        assert [row.name for row in optimizer.coverage()] == names
        with pytest.raises(ValueError, match="with/without names"):
            optimizer.add_param_group({"params": parameters()})

    def test_frozen_parameters_are_left_alone_until_they_are_not(self, case):
        params = parameters()
        params[0].requires_grad_(False)
        optimizer = case.make(params)
        before = params[0].detach().clone()
        for step in range(3):
            feed(params[1:], step)
            optimizer.step()
        assert torch.equal(params[0], before)
        params[0].requires_grad_(True)
        cases.train(optimizer, params, range(3, 6))
        assert not torch.equal(params[0], before)
        assert optimizer.state[params[0]]["step"] == 3

    def test_integer_parameters_that_are_frozen_are_tolerated(self, case):
        params = [*parameters(), nn.Parameter(torch.arange(4), requires_grad=False)]
        optimizer = case.make(params)
        cases.train(optimizer, params[:-1], range(3))
        optimizer.load_state_dict(optimizer.state_dict())

    def test_lazy_parameters_are_met_when_they_exist(self, case):
        model = nn.Sequential(nn.LazyLinear(6), nn.Tanh(), nn.Linear(6, 2))
        optimizer = case.make(model.parameters())
        optimizer.state_dict()
        x = torch.randn(5, 4)
        for step in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            before = values(model.parameters())
            optimizer.step()
            for p, q in zip(model.parameters(), before, strict=True):
                assert torch.equal(p, q) == (case.measures and step == 0 and p.ndim == 2)
        assert all(optimizer.state[p]["step"] == 5 for p in model.parameters())

    def test_lazy_parameters_are_reported_as_such(self, case):
        optimizer = case.make([*nn.LazyLinear(4).parameters(), *parameters([(6, 5)])])
        rows = list(optimizer.coverage())
        assert len(rows) == 3 and rows[2].shape == (6, 5)
        assert str(optimizer.coverage()) and str(optimizer.memory_report())
        assert optimizer.diagnostics()["parameters"] == 1

    def test_parameter_put_into_the_list_of_a_group_is_trained(self, case):
        """Not by `add_param_group`: torch's optimizers take what the list holds at the step."""
        params = parameters([(6, 5), (4, 6)])
        optimizer = case.make(params)
        cases.train(optimizer, params, range(3))
        params += parameters([(5, 4)], seed=1)
        optimizer.param_groups[0]["params"].append(params[2])
        before = values(params)
        cases.train(optimizer, params, range(3, 6))
        assert all(not torch.equal(p, q) for p, q in zip(params, before, strict=True))
        assert [int(optimizer.state[p]["step"]) for p in params] == [6, 6, 3]
        assert len(optimizer.coverage()) == 3

    def test_parameter_replaced_by_another_shape_starts_fresh(self, case):
        """A new head in an old optimizer."""
        params = parameters([(6, 5), (4, 6)])
        optimizer = case.make(params)
        cases.train(optimizer, params, range(3))
        body, head = params[0], parameters([(9, 6)], seed=1)[0]
        optimizer.param_groups[0]["params"][1] = head
        cases.train(optimizer, [body, head], range(3, 6))
        assert optimizer.state[body]["step"] == 6 and optimizer.state[head]["step"] == 3

    @cases.classes_with("one_sided_aspect")
    def test_role_in_a_group_chooses_the_treatment(self, case):
        roles = ("hidden", "embedding", "head")
        optimizer = case.make([{"params": parameters([(8, 6)]), "role": r, "max_precond_dim": 7} for r in roles])
        kinds = [row.treatment for row in optimizer.coverage()]
        assert kinds == [case.cls.__name__, "AdamW", "AdamW"]
        with pytest.raises(ValueError, match="role"):
            case.make([{"params": parameters(), "role": "tail"}])

    @cases.classes_with("one_sided_aspect")
    def test_module_tells_embeddings_and_heads(self, case):
        model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30))
        groups = [{"params": model.parameters(), "max_precond_dim": 7}]
        rows = {row.name: row for row in case.make(groups, module=model).coverage()}
        assert {name for name, row in rows.items() if row.treatment == case.cls.__name__} == {"1.weight"}
        assert "'embedding'" in rows["0.weight"].reason and "'head'" in rows["2.weight"].reason

    @cases.classes_with("max_block_size")
    def test_small_vocabularies_are_preconditioned(self, case):
        model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30))
        rows = {row.name: row for row in case.make(model.parameters(), module=model).coverage()}
        matrices = {name for name, row in rows.items() if row.treatment == case.cls.__name__}
        assert matrices == {"0.weight", "1.weight", "2.weight"}


def on_lambda(optimizer):
    return sched.LambdaLR(optimizer, lambda epoch: 0.9**epoch)


SCHEDULERS = {
    "StepLR": lambda o: sched.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: sched.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: sched.ConstantLR(o, 0.3, 3),
    "LinearLR": lambda o: sched.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: sched.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: sched.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: sched.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: sched.CosineAnnealingWarmRestarts(o, 3),
    "LambdaLR": on_lambda,
    "MultiplicativeLR": lambda o: sched.MultiplicativeLR(o, lambda epoch: 0.8),
    "CyclicLR": lambda o: sched.CyclicLR(o, 0.001, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: sched.OneCycleLR(o, 0.1, total_steps=10),
    "ReduceLROnPlateau": lambda o: sched.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: sched.SequentialLR(o, [sched.ConstantLR(o, 0.1), sched.ExponentialLR(o, 0.9)], [2]),
    "ChainedScheduler": lambda o: sched.ChainedScheduler([sched.ConstantLR(o, 0.1), sched.ExponentialLR(o, 0.9)]),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


class TestLearningRate:
    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_scheduler_drives_us_as_it_drives_torch(self, case, name):
        """Group values follow torch's own AdamW under the same scheduler, and what they say is what acts."""
        params, others = parameters(), parameters()
        ours = case.make(params, lr=0.01, betas=(0.9, 0.999))
        theirs = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.999))
        a, b = SCHEDULERS[name](ours), SCHEDULERS[name](theirs)
        again, twins = None, parameters()
        again = case.make(twins, lr=0.01, betas=(0.9, 0.999))
        for step in range(8):
            for key in ("lr", "betas"):
                assert ours.param_groups[0][key] == theirs.param_groups[0][key]
            again.param_groups[0].update(lr=ours.param_groups[0]["lr"], betas=ours.param_groups[0]["betas"])
            cases.train(ours, params, [step])
            cases.train(theirs, others, [step])
            cases.train(again, twins, [step])
            for s in (a, b):
                s.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert_same_bits(params, twins)

    def test_schedulers_cover_all_that_torch_has(self):
        known = {
            name
            for name, item in vars(sched).items()
            if isinstance(item, type) and issubclass(item, sched.LRScheduler) and item.__module__ == sched.__name__
        }
        assert known - {"LRScheduler", "_LRScheduler"} <= set(SCHEDULERS)

    def test_nothing_moves_at_learning_rate_zero(self, case):
        params = parameters()
        optimizer = case.make(params, weight_decay=0.1)
        cases.train(optimizer, params, range(3))
        optimizer.param_groups[0]["lr"] = 0.0
        before = values(params)
        cases.train(optimizer, params, range(3, 9))
        assert_same_bits(params, before)
        assert all(optimizer.state[p]["step"] == 9 for p in params)

    def test_tensor_lr_is_shared_and_read_at_every_step(self, case):
        lr = torch.tensor(0.02)
        params, twins = parameters(), parameters()
        tensor = case.make([{"params": params[:3]}, {"params": params[3:]}], lr=lr)
        plain = case.make([{"params": twins[:3]}, {"params": twins[3:]}], lr=0.02)
        assert all(group["lr"] is lr for group in tensor.param_groups)
        schedules = [on_lambda(tensor), on_lambda(plain)]
        for step in range(6):
            cases.train(tensor, params, [step])
            cases.train(plain, twins, [step])
            for schedule in schedules:
                schedule.step()
        assert tensor.param_groups[0]["lr"] is lr and lr < 0.02
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    def test_tensor_lr_may_have_one_element_and_another_dtype(self, case):
        params, twins = (parameters(dtype=torch.bfloat16) for _ in range(2))
        cases.train(case.make(params, lr=torch.tensor([0.0625], dtype=torch.float64)), params, range(4))
        cases.train(case.make(twins, lr=0.0625), twins, range(4))
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-2)

    def test_tensor_lr_of_two_groups_is_still_one_after_a_load(self, case):
        params = parameters()
        optimizer = case.make([{"params": params[:3]}, {"params": params[3:]}], lr=torch.tensor(0.02))
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups[0]["lr"] is optimizer.param_groups[1]["lr"]

    def test_every_value_of_a_group_is_read_at_every_step(self, case):
        """Values that are changed during training act from then on, as in an optimizer that was loaded with them."""
        params = parameters()
        optimizer = case.make(params)
        cases.train(optimizer, params, range(4))
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        changed = dict(lr=0.03, betas=(0.5, 0.8), eps=1e-3, weight_decay=0.2)
        saved = optimizer.state_dict()
        saved["param_groups"] = [{**group, **changed} for group in saved["param_groups"]]
        other = case.make(twins)
        other.load_state_dict(saved)
        optimizer.param_groups[0].update(changed)
        cases.train(optimizer, params, range(4, 9))
        cases.train(other, twins, range(4, 9))
        assert_same_bits(params, twins)

    @cases.classes_with("refresh_every")
    def test_refresh_period_may_change(self, case):
        if case.moves:
            pytest.skip("its factors move in every step: tests/test_spectral_factorized.py tells what a refresh does")
        params = parameters()
        optimizer = case.make(params, refresh_every=4)
        cases.train(optimizer, params, range(6))
        optimizer.param_groups[0]["refresh_every"] = 1
        state = optimizer.state[params[0]]
        key = "basis_0" if "basis_0" in state else "root_0"
        for step in range(6, 10):
            before = state[key].clone()
            cases.train(optimizer, params, [step])
            assert not torch.equal(before, state[key])
        optimizer.param_groups[0]["refresh_every"] = 50
        before = state[key].clone()
        cases.train(optimizer, params, range(10, 14))
        assert torch.equal(before, state[key])

    def test_gradient_of_another_parameter_is_not_needed(self, case):
        """Two optimizers on parts of one model do not see each other."""
        params = parameters()
        ours = case.make(params[:3])
        before = values(params[3:])
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = gradient(tuple(p.shape), step, i)
            ours.step()
        assert_same_bits(params[3:], before)


def test_groups_that_are_listed_twice_count_once(case):
    """As in torch's own test of repeated parameters."""
    params = parameters()
    optimizer = case.make(params)
    cases.train(optimizer, params, range(2))
    before = flat_state(optimizer)
    optimizer.param_groups.extend(optimizer.param_groups)
    assert len(optimizer.state_dict()["param_groups"]) == 2
    assert_same_state(flat_state(optimizer), before)
