"""Layer methods and what changes: groups, late and frozen parameters, values that are read at every step, reports."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

import secondorder
from cases import assert_same_bits, flat_state, values
from layer_cases import OPTIONS, ROWS, batch, each_row, every_row, factors, make, train, zoo

# nothing that couples one parameter to another
FREE = dict(kl_clip=None, norm_clip=None, momentum="update", weight_decay=0.0)


def split_groups(model, **other):
    """Weights that are matrices, and all else in a group with other values."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": weights}, {"params": rest, "weight_decay": 0.0, **other}]


def rows(optimizer):
    return {row.name: row for row in optimizer.coverage()}


class TestGroups:
    @each_row
    def test_biases_in_a_group_without_decay_have_blocks_of_their_own(self, row):
        model = zoo()
        optimizer = make(row, model, split_groups(model, lr=0.5), **{**FREE, "weight_decay": 0.1})
        found = rows(optimizer)
        biases = [n for n in found if n.endswith("bias") and "norm" not in n]
        assert len(biases) == 5 and all("apart: in another group" in found[name].reason for name in biases)
        assert {row.treatment for row in found.values()} == {type(optimizer).__name__, "AdamW"}
        train(model, optimizer, range(7))
        other = zoo()
        twin = make(row, other, split_groups(other, lr=0.5), **{**FREE, "weight_decay": 0.1})
        train(other, twin, range(4))
        resumed = make(row, other, split_groups(other, lr=0.5))
        resumed.load_state_dict(twin.state_dict())
        train(other, resumed, range(4, 7))
        assert_same_bits(other.parameters(), model.parameters())

    def test_bias_apart_is_preconditioned_by_its_weights_output_factor(self):
        """u = G⁻¹ g with relative damping λ tr(G)/d, by dense algebra."""
        model = zoo(torch.float64)
        still = dict(betas=(0.0, 0.9), nesterov=False, refresh_every=1)
        optimizer = make("KFAC", model, split_groups(model), **{**OPTIONS, **FREE, **still})
        train(model, optimizer, range(3))
        before = model.hidden.bias.detach().clone()
        train(model, optimizer, [3])
        G = optimizer.state[model.hidden.bias]["covariance_0"]
        torch.testing.assert_close(G, optimizer.state[model.hidden.weight]["covariance_0"])
        ridge = OPTIONS["damping"] * G.diagonal().mean() * torch.eye(7, dtype=torch.float64)
        wanted = OPTIONS["lr"] * torch.linalg.solve(G + ridge, model.hidden.bias.grad)
        torch.testing.assert_close(before - model.hidden.bias.detach(), wanted)

    @each_row
    def test_rates_of_groups_act_on_their_own(self, row):
        model = zoo()
        optimizer = make(row, model, split_groups(model, lr=0.0), **FREE)
        before = dict(zip(dict(model.named_parameters()), values(model.parameters()), strict=True))
        train(model, optimizer, range(3))
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (p.ndim <= 1), name

    @each_row
    def test_group_with_sharing_none_is_trained_by_adamw(self, row):
        model = zoo()
        left, chosen = list(model.attention.parameters()), list(model.hidden.parameters())
        theirs = [nn.Parameter(p.detach().clone()) for p in left]
        options = {**OPTIONS, **FREE, "betas": (0.9, 0.99), "fallback_lr_scale": 1.0}
        optimizer = make(row, model, [{"params": left, "sharing": "none"}, {"params": chosen}], **options)
        reference = torch.optim.AdamW(theirs, lr=options["lr"], betas=(0.9, 0.99), weight_decay=0.0)

        def copy_gradients(step):
            for p, q in zip(left, theirs, strict=True):
                q.grad = p.grad.clone()

        for step in range(6):
            train(model, optimizer, [step], copy_gradients)
            reference.step()
        torch.testing.assert_close([p.detach() for p in left], [q.detach() for q in theirs])
        assert all("sharing='none'" in row.reason for row in rows(optimizer).values() if "attention" in row.name)

    @each_row
    @pytest.mark.parametrize("every", [1, 3])
    def test_statistics_come_in_every_nth_call(self, row, every):
        model = zoo()
        optimizer = make(row, model, statistics_every=every)
        for step in range(7):
            before = factors(flat_state(optimizer))
            train(model, optimizer, [step])
            after = factors(flat_state(optimizer))
            moved = {key for key in after if not torch.equal(after[key], before[key])}
            assert moved == (set(after) if step % every == 0 else set())
        seen = {int(v.max()) for key, v in flat_state(optimizer).items() if key.endswith("seen")}
        assert seen == {len(range(0, 7, every))}

    @each_row
    def test_keys_of_torch_and_its_schedulers_are_no_surprise(self, row):
        model = zoo()
        foreign = dict(foreach=True, fused=None, capturable=False, differentiable=False, initial_lr=1.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = make(row, model, [{"params": model.parameters(), **foreign}])
            train(model, optimizer, range(2))


class TestLate:
    @each_row
    def test_late_layers_start_with_the_next_step_and_do_not_disturb(self, row):
        options = {**FREE, "lr": 1e-3, "refresh": "together", "statistics_every": 3}
        model, alone = zoo(), zoo()
        head, body = list(model.head.parameters()), [p for n, p in model.named_parameters() if "head" not in n]
        optimizer = make(row, model, head, **options)
        straight = make(row, alone, list(alone.head.parameters()), **options)
        train(model, optimizer, range(4))
        train(alone, straight, range(5))
        optimizer.add_param_group({"params": body, "lr": 2e-3})
        before = values(body)
        train(model, optimizer, [4])
        for p, q in zip(model.head.parameters(), alone.head.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # attention is computed in pieces where it is tapped
        assert all(not torch.equal(p, q) for p, q in zip(body, before, strict=True))
        train(model, optimizer, range(5, 8))
        state = optimizer.state[model.hidden.weight]
        seen = next((v for v in state.values() if isinstance(v, dict)), state)["seen"]
        assert state["step"] == 4 and seen == 2  # calls 1 and 4 of its own

    @each_row
    def test_late_layer_is_saved_and_goes_on(self, row):
        model = zoo()
        optimizer = make(row, model, list(model.head.parameters()))
        train(model, optimizer, range(2))
        optimizer.add_param_group({"params": list(model.hidden.parameters())})
        train(model, optimizer, range(2, 5))
        new = copy.deepcopy(model)
        other = make(row, new, [{"params": new.head.parameters()}, {"params": new.hidden.parameters()}])
        other.load_state_dict(optimizer.state_dict())
        train(model, optimizer, range(5, 8))
        train(new, other, range(5, 8))
        assert_same_bits(model.parameters(), new.parameters())

    @each_row
    def test_lazy_layers_are_met_when_they_exist(self, row):
        torch.manual_seed(0)
        lazy = [nn.LazyConv2d(4, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(6)]
        model = nn.Sequential(*lazy, nn.Tanh(), nn.Linear(6, 3))
        optimizer = make(row, model)
        assert [row.treatment for row in optimizer.coverage()][:4] == ["undecided"] * 4
        optimizer.state_dict()
        for step in range(5):
            images, _, labels = batch(step)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            before = values(model.parameters())
            optimizer.step()
            # the first forward pass made the layers: none of their statistics could be taken in it
            still = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
            assert still == [step == 0] * 4 + [False] * 2
        assert {row.treatment for row in optimizer.coverage()} == {type(optimizer).__name__}
        assert [int(optimizer.state[p]["step"]) for p in model.parameters()] == [4] * 4 + [5] * 2


FREEZABLE = ["conv.bias", "hidden.bias", "hidden.weight", "norm.weight", "norm.bias", "attention.in_proj_bias"]


class TestFreezing:
    @every_row
    @pytest.mark.parametrize("name", FREEZABLE)
    def test_parameter_that_is_frozen_and_thawed_rests_between(self, row, name):
        model = zoo()
        optimizer = make(row, model, statistics_every=2)
        p = dict(model.named_parameters())[name]
        train(model, optimizer, range(4))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            p.requires_grad_(False)
            before, others = p.detach().clone(), values(model.parameters())
            train(model, optimizer, range(4, 7))
            assert torch.equal(p, before)
            p.requires_grad_(True)
            train(model, optimizer, range(7, 11))
            assert not torch.equal(p, before)
        afresh = [str(w.message) for w in caught if "start afresh" in str(w.message)]
        assert len(afresh) == 1 and len(caught) == 1
        for q, old in zip(model.parameters(), others, strict=True):
            assert torch.isfinite(q).all() and not torch.equal(q, old)
        assert all(torch.isfinite(value).all() for value in flat_state(optimizer).values())

    @each_row
    @pytest.mark.parametrize("name", ["hidden.bias", "hidden.weight"])
    def test_checkpoint_of_a_partly_frozen_layer_goes_on(self, row, name):
        def partly(model):
            dict(model.named_parameters())[name].requires_grad_(False)
            return model

        model = partly(zoo())
        optimizer = make(row, model)
        train(model, optimizer, range(4))
        new = copy.deepcopy(model)
        other = make(row, new)
        other.load_state_dict(optimizer.state_dict())
        train(model, optimizer, range(4, 8))
        train(new, other, range(4, 8))
        assert_same_bits(model.parameters(), new.parameters())
        thawed = zoo()
        other = make(row, thawed)
        if name == "hidden.bias":  # [W | b] is another block than W
            with pytest.raises(ValueError, match="does not fit"):
                other.load_state_dict(optimizer.state_dict())
        else:  # a parameter that had no state when the dict was saved starts fresh
            other.load_state_dict(optimizer.state_dict())
        train(thawed, other, range(4, 6))

    @each_row
    def test_sharing_may_change_during_training(self, row):
        model = zoo()
        optimizer = make(row, model)
        train(model, optimizer, range(3))
        optimizer.param_groups[0]["sharing"] = "none"
        with pytest.warns(UserWarning, match="start afresh"):
            train(model, optimizer, range(3, 5))
        assert {row.treatment for row in optimizer.coverage()} == {"AdamW"}
        optimizer.param_groups[0]["sharing"] = "reduce"
        train(model, optimizer, range(5, 8))
        assert rows(optimizer)["conv.weight"].treatment == type(optimizer).__name__
        assert all(torch.isfinite(p).all() for p in model.parameters())


class TestValues:
    @each_row
    def test_every_value_of_a_group_is_read_at_every_step(self, row):
        """Values that are changed during training act from then on, as in an optimizer that was loaded with them."""
        model = zoo()
        optimizer = make(row, model)
        train(model, optimizer, range(4))
        new = copy.deepcopy(model)
        changed = dict(lr=0.03, betas=(0.5, 0.8), damping=1.0, kl_clip=1e-2, weight_decay=0.2, eps=1e-3)
        changed.update(factor_rate=0.3)
        changed = {key: value for key, value in changed.items() if key in optimizer.param_groups[0]}
        saved = optimizer.state_dict()
        saved["param_groups"] = [{**group, **changed} for group in saved["param_groups"]]
        other = make(row, new)
        other.load_state_dict(saved)
        for key, value in changed.items():
            optimizer.param_groups[0][key] = value
        train(model, optimizer, range(4, 8))
        train(new, other, range(4, 8))
        assert_same_bits(model.parameters(), new.parameters())

    @each_row
    def test_schedules_of_rate_and_damping_act(self, row):
        """A rate that falls to zero stops everything; damping without end stops what is preconditioned."""
        model = zoo()
        optimizer = make(row, model, **{**FREE, "betas": (0.0, 0.9)})
        schedule = lr_scheduler.LambdaLR(optimizer, lambda step: float(step < 2))
        for step in range(2):
            train(model, optimizer, [step])
            schedule.step()
        before = values(model.parameters())
        train(model, optimizer, range(2, 4))
        assert_same_bits(model.parameters(), before)
        optimizer.param_groups[0].update(lr=0.02, damping=1e9)
        train(model, optimizer, [4])
        for (name, p), q in zip(model.named_parameters(), before, strict=True):
            assert ((p.detach() - q).abs().max() < 1e-6) == (name != "scale"), name

    @each_row
    def test_tensor_rate_is_read_at_every_step(self, row):
        model, twin = zoo(), zoo()
        lr = torch.tensor(0.02)
        ours, theirs = make(row, model, lr=lr), make(row, twin)
        schedules = [lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
        for step in range(4):
            train(model, ours, [step])
            train(twin, theirs, [step])
            for schedule in schedules:
                schedule.step()
        assert ours.param_groups[0]["lr"] is lr and lr < 0.02
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


COVERAGE = """\
parameter                  shape    treatment  blocks  reason
scale                      6        AdamW      1       no layer statistics are known for Zoo
conv.weight                6x2x3x3  KFAC       1       [W | b] of Conv2d conv: 6 x 19
conv.bias                  6        KFAC       1       a column of conv.weight
grouped.weight             6x3x2x2  KFAC       1       Conv2d grouped: 2 groups of 3 x 12
embed.weight               5x6      KFAC       1       Embedding embed: diagonal over 5 tokens
norm.weight                6        KFAC       1       LayerNorm: 6 features, a 2x2 factor each
norm.bias                  6        KFAC       1       a column of norm.weight
attention.in_proj_weight   18x6     KFAC       1       [W | b] of MultiheadAttention attention: 3 groups of 6 x 7
attention.in_proj_bias     18       KFAC       1       a column of attention.in_proj_weight
attention.out_proj.weight  6x6      KFAC       1       [W | b] of Linear attention.out_proj: 6 x 7
attention.out_proj.bias    6        KFAC       1       a column of attention.out_proj.weight
hidden.weight              7x6      KFAC       1       [W | b] of Linear hidden: 7 x 7
hidden.bias                7        KFAC       1       a column of hidden.weight
head.weight                3x7      KFAC       1       [W | b] of Linear head: 3 x 8
head.bias                  3        KFAC       1       a column of head.weight"""


class TestReports:
    def test_coverage_tells_treatment_and_reason_of_every_parameter(self):
        model = zoo()
        optimizer = make("KFAC", model)
        assert str(optimizer.coverage()) == COVERAGE
        train(model, optimizer, range(3))
        assert str(optimizer.coverage()) == COVERAGE

    @every_row
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_memory_report_is_what_is_allocated(self, row, dtype):
        model = zoo(dtype)
        optimizer = make(row, model)
        report = optimizer.memory_report()
        assert not optimizer.state, "a report makes no state"
        train(model, optimizer, range(2))
        held = flat_state(optimizer).values()
        assert report.state == sum(t.numel() * t.element_size() for t in held)
        works = optimizer._layout._workspaces.values()
        assert report.workspaces == sum(t.numel() * t.element_size() for t in works)
        assert str(optimizer.memory_report()) == str(report)

    @every_row
    def test_diagnostics_are_floats_by_name(self, row):
        model = zoo()
        optimizer = make(row, model)
        for _ in range(2):
            found = optimizer.diagnostics()
            assert all(type(key) is str and type(value) is float for key, value in found.items())
            assert found["refused_steps"] == 0 and found["refresh_failures"] == 0
            train(model, optimizer, range(2))
        assert found["parameters"] == 15 and found["fallback_parameters"] == 1

    @each_row
    def test_steps_read_nothing_from_the_device(self, row):
        """On the meta device any host read of a value raises."""
        model = zoo().to("meta")
        optimizer = make(row, model, lr=torch.tensor(0.1, device="meta"), statistics_every=2, refresh_every=2)
        for step in range(4):
            images, tokens, labels = (t.to("meta") for t in batch(step))
            optimizer.zero_grad()
            F.cross_entropy(model(images, tokens), labels).backward()
            optimizer.step()
        assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {4}

    def test_without_a_module_everything_is_the_fallbacks_until_one_is_attached(self):
        model, cls = zoo(), ROWS["KFAC"][0]
        with pytest.warns(UserWarning, match="no module= was given"):
            optimizer = cls(model.parameters(), **OPTIONS)
        train(model, optimizer, range(2))
        with pytest.warns(UserWarning, match="start afresh"):
            optimizer.attach(model)
        train(model, optimizer, range(2, 5))
        assert str(optimizer.coverage()) == COVERAGE

    def test_a_copy_asks_for_its_module(self):
        model = zoo()
        optimizer = secondorder.KFAC(model.parameters(), module=model, **OPTIONS)
        train(model, optimizer, range(2))
        with pytest.raises(RuntimeError, match=r"attach\(module\)"):
            copy.deepcopy(optimizer).step()
        with pytest.raises(ValueError, match="none of the optimizer's parameters"):
            optimizer.attach(nn.Linear(2, 2))
        with pytest.raises(TypeError, match="must be a torch.nn.Module"):
            optimizer.attach([model])
