"""What `state_dict` holds, and what `load_state_dict` takes, refuses and leaves alone."""

import copy
import io
from collections.abc import Mapping

import pytest
import torch
from torch import nn

import cases
import secondorder
from cases import assert_same_bits, assert_same_state, flat_state, parameters, values

SPLIT = {"max_block_size": 3}
ALL_OPTIONS = cases.variants(whole={}, split=SPLIT)


def trained(case, steps=5, **more):
    params = parameters(**{k: more.pop(k) for k in ("dtype", "shapes") if k in more})
    optimizer = case.make(params, **more)
    cases.train(optimizer, params, range(steps))
    return params, optimizer


def through_disk(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def edited(saved, change):
    """A copy of a state dict after `change(dict)`."""
    saved = copy.deepcopy(saved)
    change(saved)
    return saved


class TestSaved:
    @ALL_OPTIONS
    def test_values_are_tensors_or_dicts_of_them_with_plain_keys(self, case, options):
        _, optimizer = trained(case, **options)

        def check(entry):
            assert type(entry) is dict
            for key, value in entry.items():
                assert isinstance(key, str) and "." not in key and "/" not in key
                if not isinstance(value, torch.Tensor):
                    check(value)

        for entry in optimizer.state_dict()["state"].values():
            check(entry)

    @ALL_OPTIONS
    def test_weights_only_is_enough(self, case, options):
        _, optimizer = trained(case, **options)
        saved = optimizer.state_dict()
        loaded = through_disk(saved)
        assert loaded["param_groups"] == saved["param_groups"]
        assert_same_state(*(flatten(d["state"]) for d in (loaded, saved)))

    def test_named_tensor_lr_survives_weights_only(self, case):
        params = parameters()
        optimizer = case.make(zip("abcdefg", params, strict=True), lr=torch.tensor(0.25))
        saved = through_disk(optimizer.state_dict())
        assert saved["param_groups"][0]["lr"] == 0.25
        assert saved["param_groups"][0]["param_names"] == list("abcdefg")

    @ALL_OPTIONS
    def test_state_is_complete_before_training(self, case, options):
        fresh = case.make(parameters(), **options)
        _, old = trained(case, **options)
        before, after = flat_state(fresh), flat_state(old)
        assert {k: (v.shape, v.dtype) for k, v in before.items()} == {k: (v.shape, v.dtype) for k, v in after.items()}

    def test_keys_of_state_are_the_parameters(self, case):
        params, optimizer = trained(case)
        assert list(optimizer.state) == params

    def test_reading_the_state_does_not_touch_training(self, case):
        params, twins = parameters(), parameters()
        read, unread = case.make(params), case.make(twins)
        for step in range(8):
            read.state_dict()
            cases.train(read, params, [step])
            read.diagnostics(), read.coverage(), read.memory_report(), read.preconditioner(params[0])
            cases.train(unread, twins, [step])
        assert_same_bits(params, twins)
        assert_same_state(flat_state(read), flat_state(unread))

    def test_counters_of_bfloat16_parameters_do_not_stop_at_256(self, case):
        params = parameters([(3, 2)], dtype=torch.bfloat16)
        optimizer = case.make(params)
        cases.train(optimizer, params, range(258))
        optimizer.load_state_dict(through_disk(optimizer.state_dict()))
        assert optimizer.state[params[0]]["step"] == 258 and optimizer.state[params[0]]["count"] == 258


class TestLoaded:
    @ALL_OPTIONS
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
    def test_state_keeps_its_bits_whatever_the_parameters_precision(self, case, dtype, options):
        params, optimizer = trained(case, dtype=dtype, **options)
        other = case.make([nn.Parameter(p.detach().clone()) for p in params], **options)
        other.load_state_dict(through_disk(optimizer.state_dict()))
        assert_same_state(flat_state(other), flat_state(optimizer))

    def test_nothing_aliases_the_given_dict(self, case):
        params, optimizer = trained(case, lr=torch.tensor(0.01))
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        other = case.make(twins)
        saved = optimizer.state_dict()
        kept = copy.deepcopy(saved)
        other.load_state_dict(saved)
        cases.train(other, twins, range(5, 9))
        other.param_groups[0]["lr"].fill_(0.5)
        assert_same_state(*(flatten(d["state"]) for d in (saved, kept)))
        assert saved["param_groups"][0]["lr"] == 0.01
        cases.train(optimizer, params, range(5, 9))
        assert_same_bits(params, twins)

    def test_group_values_come_from_the_dict(self, case):
        _, optimizer = trained(case, lr=0.125, weight_decay=0.5)
        other = case.make(parameters(), lr=0.001, weight_decay=0.0)
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0]["lr"] == 0.125 and other.param_groups[0]["weight_decay"] == 0.5

    def test_group_values_that_an_older_dict_lacks_stay_ours(self, case):
        params, optimizer = trained(case)
        saved = edited(optimizer.state_dict(), lambda d: d["param_groups"][0].pop("max_update_rms"))
        other = case.make(parameters(), max_update_rms=0.75)
        other.load_state_dict(saved)
        assert other.param_groups[0]["max_update_rms"] == 0.75

    @cases.variants(blocks={"max_block_size": 3}, one_sided={"one_sided_aspect": 1.0}, limit={"max_precond_dim": 4})
    def test_how_parameters_are_cut_comes_from_the_dict_too(self, case, options):
        """A dict fits if it fits the group values that it brings."""
        params, optimizer = trained(case, **options)
        twins = [nn.Parameter(p.detach().clone()) for p in params]
        other = case.make(twins)
        other.load_state_dict(through_disk(optimizer.state_dict()))
        cases.train(optimizer, params, range(5, 12))
        cases.train(other, twins, range(5, 12))
        assert_same_bits(params, twins)
        assert_same_state(flat_state(other), flat_state(optimizer))

    @cases.classes_with("max_block_size")
    def test_state_that_does_not_fit_its_own_group_values_is_refused(self, case):
        """Never is a state dropped in silence for fresh tiles."""
        _, optimizer = trained(case)
        bad = edited(optimizer.state_dict(), lambda d: d["param_groups"][0].update(max_block_size=3))
        other = case.make(parameters())
        state = flat_state(other)
        with pytest.raises(ValueError, match="does not fit"):
            other.load_state_dict(bad)
        assert_same_state(flat_state(other), state)

    def test_users_own_entries_travel_along(self, case):
        params, optimizer = trained(case)
        optimizer.state[params[1]]["mine"] = torch.arange(3)
        other = case.make(parameters())
        other.load_state_dict(through_disk(optimizer.state_dict()))
        mine = other.state[other.param_groups[0]["params"][1]]["mine"]
        assert torch.equal(mine, torch.arange(3)) and mine.dtype == torch.int64

    def test_parameter_without_state_starts_fresh(self, case):
        params, optimizer = trained(case)
        saved = edited(optimizer.state_dict(), lambda d: d["state"].pop(0))
        other = case.make([nn.Parameter(p.detach().clone()) for p in params])
        other.load_state_dict(saved)
        mine = other.param_groups[0]["params"]
        assert other.state[mine[0]]["step"] == 0 and other.state[mine[1]]["step"] == 5
        cases.train(other, mine, range(5, 9))
        assert other.state[mine[0]]["step"] == 4

    def test_state_follows_the_parameters_device(self, case):
        """Stands for a GPU: a dict on one device, parameters on another."""
        _, optimizer = trained(case)
        model = [nn.Parameter(torch.empty(p.shape, device="meta")) for p in parameters()]
        other = case.make(model)
        other.load_state_dict(optimizer.state_dict())
        devices = {k.rpartition("/")[2]: v.device.type for k, v in flat_state(other).items()}
        assert devices.pop("step") == "cpu"
        assert set(devices.values()) == {"meta"}


def change_group(**values):
    return lambda d: d["param_groups"][0].update(values)


def first_entry(d):
    """A state dict's first entry of tensors, inside its tile where there is one."""
    entry = d["state"][0]
    return next((value for value in entry.values() if isinstance(value, Mapping)), entry)


def average(d):
    return "exp_avg" if "exp_avg" in first_entry(d) else "momentum"


BAD_DICTS = {
    "more groups": lambda d: d["param_groups"].append(d["param_groups"][0]),
    "no groups": lambda d: d["param_groups"].clear(),
    "fewer parameters": lambda d: d["param_groups"][0]["params"].pop(),
    "bad lr": change_group(lr=-1.0),
    "bad betas": change_group(betas=(0.9, 2.0)),
    "bad option": change_group(on_nonfinite="explode"),
    "missing entry": lambda d: first_entry(d).pop(average(d)),
    "missing count": lambda d: first_entry(d).pop("count"),
    "missing step": lambda d: d["state"][0].pop("step"),
    "wrong shape": lambda d: first_entry(d).update({average(d): torch.zeros(2, 2)}),
    "wrong shape in the last entry": lambda d: d["state"][6].update(step=torch.zeros(3)),
    "no tensor": lambda d: first_entry(d).update({average(d): "text"}),
}


class TestRefused:
    @ALL_OPTIONS
    @pytest.mark.parametrize("fault", BAD_DICTS)
    def test_bad_dict_is_refused_before_anything_changes(self, case, fault, options):
        params, optimizer = trained(case, **options)
        bad = edited(optimizer.state_dict(), BAD_DICTS[fault])
        state, bits = flat_state(optimizer), values(params)
        groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
        views = {id(v) for v in optimizer.state[params[0]].values()}
        with pytest.raises(ValueError):
            optimizer.load_state_dict(bad)
        assert_same_state(flat_state(optimizer), state)
        assert optimizer.state_dict()["param_groups"] == groups
        assert views == {id(v) for v in optimizer.state[params[0]].values()}
        assert_same_bits(params, bits)

    @pytest.mark.parametrize("key", ["state", "param_groups"])
    def test_dict_of_something_else_is_refused(self, case, key):
        params, optimizer = trained(case)
        saved = dict(optimizer.state_dict())
        del saved[key]
        state = flat_state(optimizer)
        with pytest.raises((ValueError, KeyError), match=key):
            optimizer.load_state_dict(saved)
        assert_same_state(flat_state(optimizer), state)

    @cases.classes_with("max_block_size")
    def test_another_split_is_refused_by_name(self, case):
        _, whole = trained(case)
        _, split = trained(case, **SPLIT)
        state = flat_state(split)
        with pytest.raises(ValueError, match="does not fit"):
            split.load_state_dict({**whole.state_dict(), "param_groups": split.state_dict()["param_groups"]})
        assert_same_state(flat_state(split), state)

    def test_state_of_another_method_is_refused(self, case):
        _, ours = trained(case)
        params = parameters()
        theirs = torch.optim.SGD(params, lr=0.1, momentum=0.9)
        cases.train(theirs, params, range(2))
        state = flat_state(ours)
        with pytest.raises(ValueError, match="exp_avg|momentum"):
            ours.load_state_dict(theirs.state_dict())
        assert_same_state(flat_state(ours), state)

    def test_messages_tell_which_parameter_and_what(self):
        params = parameters([(6, 5), (7,)])
        optimizer = secondorder.SOAP(params)
        saved = edited(optimizer.state_dict(), lambda d: d["state"][0].update(basis_0=torch.eye(3)))
        with pytest.raises(ValueError, match=r"\(6, 5\).*'basis_0'.*\(3, 3\).*\(6, 6\)"):
            optimizer.load_state_dict(saved)


def flatten(state):
    out = {}

    def visit(prefix, entry):
        for key, value in entry.items():
            if isinstance(value, Mapping):
                visit(f"{prefix}/{key}", value)
            else:
                out[f"{prefix}/{key}"] = value

    visit("", state)
    return out
