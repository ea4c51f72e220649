"""The contract of torch.optim, kept by layer methods on layers: steps, failures, groups, checkpoints."""

import copy
import functools
import io
import math
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from cases import assert_same_bits, assert_same_state, flat_state, values
from layer_cases import batch, each_row, every_row, factors, make, train, zoo

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:.*TypedStorage")

PERIODS = dict(statistics_every=3, refresh_every=5)


def on_disk(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def treatments(optimizer):
    return {row.name: row.treatment for row in optimizer.coverage()}


def poison(model, name, value):
    dict(model.named_parameters())[name].grad.view(-1)[-1] = value


# ---------------------------------------------------------------------- detours: what may happen between two steps


def nothing(row, model, optimizer, options, folder):
    return model, optimizer


def read(row, model, optimizer, options, folder):
    """With gradients that are zero or of the last step, as they are where a checkpoint is written."""
    optimizer.state_dict(), optimizer.diagnostics(), optimizer.memory_report(), str(optimizer.coverage())
    optimizer.zero_grad(set_to_none=False)
    optimizer.state_dict()
    return model, optimizer


def save_and_load(row, model, optimizer, options, folder):
    new = copy.deepcopy(model)
    other = make(row, new, **options)
    other.load_state_dict(on_disk(optimizer.state_dict()))
    return new, other


def load_late(row, model, optimizer, options, folder):
    """Into an optimizer whose state was made by an early `state_dict()`."""
    new = copy.deepcopy(model)
    other = make(row, new, **options)
    other.state_dict()
    other.load_state_dict(on_disk(optimizer.state_dict()))
    return new, other


def load_over_later_state(row, model, optimizer, options, folder):
    saved, bits = copy.deepcopy(optimizer.state_dict()), values(model.parameters())
    train(model, optimizer, range(50, 53))
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(model.parameters(), bits, strict=True):
            p.copy_(q)
    return model, optimizer


def deepcopy(row, model, optimizer, options, folder):
    model, optimizer = copy.deepcopy((model, optimizer))
    optimizer.attach(model)
    return model, optimizer


def pickled(row, model, optimizer, options, folder):
    model, optimizer = pickle.loads(pickle.dumps((model, optimizer)))
    optimizer.attach(model)
    return model, optimizer


def checkpoint(flat):
    def through_dcp(row, model, optimizer, options, folder):
        how = StateDictOptions(flatten_optimizer_state_dict=flat)
        saved = get_optimizer_state_dict(model, optimizer, options=how)
        dcp.save(saved, checkpoint_id=folder, no_dist=True)
        new = copy.deepcopy(model)
        other = make(row, new, **options)
        target = get_optimizer_state_dict(new, other, options=how)
        dcp.load(target, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(new, other, target, options=how)
        return new, other

    return through_dcp


DETOURS = {
    "read": read,
    "save and load": save_and_load,
    "load late": load_late,
    "load over later state": load_over_later_state,
    "deepcopy": deepcopy,
    "pickle": pickled,
    "dcp nested": checkpoint(False),
    "dcp flat": checkpoint(True),
}

# Statistics come in calls 1, 4 and 7. Before the first call only what makes state is of interest.
EACH = ("KFAC", "split", "SINGD")
WAYS = [(row, detour, *when) for row in EACH for detour in DETOURS for when in ((1, 6), (5, 8))]
WAYS += [(row, detour, 0, 2) for row in EACH for detour in ("read", "dcp nested", "dcp flat")]
WAYS += [(row, detour, 5, 8) for row in ("gradient", "structured") for detour in ("read", "save and load", "pickle")]


@functools.cache
def straight(row, steps):
    """Parameters and state of a run without a detour."""
    model = zoo()
    optimizer = make(row, model, **PERIODS)
    train(model, optimizer, range(steps))
    return values(model.parameters()), flat_state(optimizer)


class HalfSeen(nn.Module):
    """The parameters of `unseen` are used, but it is never called."""

    def __init__(self):
        super().__init__()
        self.seen, self.unseen = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, images, tokens):
        return F.linear(torch.tanh(self.seen(images.flatten(1)[:, :6])), self.unseen.weight, self.unseen.bias)


def half_seen():
    torch.manual_seed(0)
    return HalfSeen()


@pytest.mark.filterwarnings("ignore:.*without their forward pass")
class TestCheckpoints:
    @pytest.mark.parametrize(("row", "detour", "at", "end"), WAYS)
    def test_training_continues_with_the_same_bits(self, row, detour, at, end, tmp_path):
        model = zoo()
        optimizer = make(row, model, **PERIODS)
        train(model, optimizer, range(at))
        model, optimizer = DETOURS[detour](row, model, optimizer, PERIODS, tmp_path / "checkpoint")
        train(model, optimizer, range(at, end))
        bits, state = straight(row, end)
        assert_same_bits(model.parameters(), bits)
        assert_same_state(flat_state(optimizer), state)

    @each_row
    def test_state_is_complete_before_training(self, row):
        fresh, trained = zoo(), zoo()
        optimizer = make(row, trained)
        train(trained, optimizer, range(3))
        shapes = [{k: (v.shape, v.dtype) for k, v in flat_state(o).items()} for o in (make(row, fresh), optimizer)]
        assert shapes[0] == shapes[1]

    @each_row
    def test_dict_that_does_not_fit_changes_nothing(self, row):
        model, twin = zoo(), zoo()
        optimizer, straight = make(row, model), make(row, twin)
        train(model, optimizer, range(3))
        groups = optimizer.state_dict()["param_groups"]
        sgd = torch.optim.SGD(twin.parameters(), momentum=0.9, lr=0.0)
        train(twin, sgd, [0])
        adamw = make(row, twin, sharing="none", lr=0.0)
        train(twin, adamw, [0])
        bad = [copy.deepcopy(optimizer.state_dict()) for _ in range(4)]
        weight = [d["state"][7] for d in bad]  # attention.in_proj_weight
        weight = [next((v for v in entry.values() if isinstance(v, dict)), entry) for entry in weight]
        first, *_, last = (name for name in weight[0] if name[-2:] in ("_0", "_1"))
        del weight[0][last]
        weight[1]["momentum"] = weight[1]["momentum"][:1]
        weight[2][first] = "text"
        bad[3]["param_groups"][0]["damping"] = -1.0
        bits, state = values(model.parameters()), flat_state(optimizer)
        for saved in (*bad, sgd.state_dict(), {**adamw.state_dict(), "param_groups": groups}):
            with pytest.raises(ValueError):
                optimizer.load_state_dict(saved)
            assert_same_bits(model.parameters(), bits)
            assert_same_state(flat_state(optimizer), state)
        train(twin, straight, range(6))
        train(model, optimizer, range(3, 6))
        assert_same_bits(model.parameters(), twin.parameters())

    @each_row
    @pytest.mark.parametrize("detour", ["read", "save and load", "load late", "load over later state", "pickle"])
    def test_a_layer_whose_forward_pass_never_came_by_goes_on_in_the_fallback(self, row, detour, tmp_path):
        model, twin = half_seen(), half_seen()
        other, optimizer = make(row, model), make(row, twin)
        with pytest.warns(UserWarning, match="without their forward pass; AdamW trains unseen"):
            train(twin, optimizer, range(9))
        train(model, other, range(6))
        model, other = DETOURS[detour](row, model, other, {}, tmp_path)
        train(model, other, range(6, 9))
        assert treatments(other) == treatments(optimizer)
        assert set(treatments(other).values()) == {type(other).__name__, "AdamW"}
        assert_same_bits(model.parameters(), twin.parameters())
        assert_same_state(flat_state(other), flat_state(optimizer))


class TestSteps:
    @each_row
    def test_closure_makes_the_same_step(self, row):
        model, twin = zoo(), zoo()
        ours, theirs = make(row, model), make(row, twin)
        for step in range(4):
            images, tokens, labels = batch(step)

            def closure(images=images, tokens=tokens, labels=labels):
                ours.zero_grad()
                loss = F.cross_entropy(model(images, tokens), labels)
                loss.backward()
                return loss

            assert ours.step(closure).requires_grad
        train(twin, theirs, range(4))
        assert_same_bits(model.parameters(), twin.parameters())

    @each_row
    def test_maximize_is_the_negated_loss(self, row):
        model, twin = zoo(), zoo()
        ours, theirs = make(row, model, maximize=True), make(row, twin)
        for step in range(6):
            images, tokens, labels = batch(step)
            for m, o, sign in ((model, ours, -1), (twin, theirs, 1)):
                o.zero_grad()
                (sign * F.cross_entropy(m(images, tokens), labels)).backward()
                o.step()
        assert_same_bits(model.parameters(), twin.parameters())

    @each_row
    def test_gradients_stay_as_they_are(self, row):
        model = zoo()
        optimizer = make(row, model, maximize=True, weight_decay_kind="l2", max_update_rms=0.1)
        before = []
        for step in range(3):
            train(model, optimizer, [step], lambda _: before.append([p.grad.clone() for p in model.parameters()]))
            assert_same_bits([p.grad for p in model.parameters()], before[-1])

    @every_row
    def test_scale_of_the_loss_is_undone_by_the_scaler(self, row):
        """A power of two is exact: the run with a scaler equals the one without, and its skipped step never was."""
        results = []
        for scaled in (True, False):
            model = zoo()
            optimizer = make(row, model)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=10**6, enabled=scaled)
            for step in range(8):
                if step == 4 and not scaled:
                    continue
                optimizer.zero_grad()
                images, tokens, labels = batch(step)
                scaler.scale(F.cross_entropy(model(images, tokens), labels)).backward()
                if step == 4:
                    poison(model, "conv.weight", math.inf)
                if step % 2 == 0:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                assert scaler.get_scale() in (1.0, 2.0**12, 2.0**11)
            results.append(values(model.parameters()))
        assert_same_bits(*results)

    @each_row
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_state_of_any_precision(self, row, dtype):
        model = zoo(dtype)
        optimizer = make(row, model)
        train(model, optimizer, range(6))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for key, value in flat_state(optimizer).items():
            counter = key.rpartition("/")[2] in ("step", "count", "seen", "failures")
            assert value.dtype == (torch.float32 if counter else wide), key
        assert all(p.dtype == dtype and torch.isfinite(p).all() for p in model.parameters())

    @each_row
    def test_autocast_around_forward_pass_and_step(self, row):
        """Statistics are those of the bfloat16 pass, in float32; the step itself is not touched."""
        model, exact = zoo(), zoo()
        mixed, plain = make(row, model), make(row, exact)
        with torch.autocast("cpu", torch.bfloat16):
            train(model, mixed, [0])
        train(exact, plain, [0])
        found, wanted = factors(flat_state(mixed)), factors(flat_state(plain))
        assert len(wanted) >= 15
        for key, value in wanted.items():
            assert found[key].dtype == torch.float32 and (found[key] - value).norm() < 0.2 * value.norm(), key

    @each_row
    def test_memory_layout_does_not_matter(self, row):
        """Sums in another order, in float64, and a null space in every factor of a convolution."""
        results = []
        for layout in (torch.contiguous_format, torch.channels_last):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)).double().to(memory_format=layout)
            x = torch.randn(2, 4, 7, 7, dtype=torch.float64).to(memory_format=layout)
            optimizer = make(row, model)
            for _ in range(12):
                optimizer.zero_grad()
                model(x).sin().square().mean().backward()
                optimizer.step()
            results.append(values(model.parameters()))
        torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


class TestFailure:
    @pytest.mark.filterwarnings("ignore:.*a step was refused")
    @each_row
    @pytest.mark.parametrize("at", [0, 4])
    def test_bad_gradient_changes_nothing_but_the_clock(self, row, at):
        model = zoo()
        optimizer = make(row, model)
        train(model, optimizer, range(at))
        for name, bad in (("conv.weight", math.nan), ("attention.in_proj_bias", math.inf), ("scale", 1e30)):
            bits, state = values(model.parameters()), flat_state(optimizer)
            train(model, optimizer, [at], before=lambda step, name=name, bad=bad: poison(model, name, bad))
            assert_same_bits(model.parameters(), bits)
            after = flat_state(optimizer)
            assert_same_state(after, state, but="step")
            assert all(after[key] == value + 1 for key, value in state.items() if key.endswith("step"))
        train(model, optimizer, range(6))
        assert all(torch.isfinite(p).all() for p in model.parameters())

    @each_row
    def test_bad_activations_leave_no_trace(self, row):
        """Statistics are as bad as the gradients: both are dropped, with `model.zero_grad` too."""
        model = zoo()
        optimizer = make(row, model)
        train(model, optimizer, range(4))
        bits, state = values(model.parameters()), flat_state(optimizer)
        images, tokens, labels = batch(4)
        with pytest.warns(UserWarning, match="a step was refused"):
            for value in (math.nan, math.inf):
                model.zero_grad()
                F.cross_entropy(model(images * value, tokens), labels).backward()
                optimizer.step()
        assert_same_bits(model.parameters(), bits)
        assert_same_state(flat_state(optimizer), state, but="step")
        train(model, optimizer, range(4, 8))
        assert all(torch.isfinite(value).all() for value in [*model.parameters(), *flat_state(optimizer).values()])

    @each_row
    def test_raise_names_the_parameter_and_changes_nothing(self, row):
        model = zoo()
        optimizer = make(row, model, on_nonfinite="raise")
        train(model, optimizer, range(3))
        bits, state = values(model.parameters()), flat_state(optimizer)
        with pytest.raises(RuntimeError, match=r"1 parameters.*grouped\.weight"):
            train(model, optimizer, [3], before=lambda step: poison(model, "grouped.weight", math.nan))
        assert_same_bits(model.parameters(), bits)
        assert_same_state(flat_state(optimizer), state)
        train(model, optimizer, range(3, 6))

    @each_row
    @pytest.mark.filterwarnings("ignore:.*a step was refused")
    def test_any_sequence_of_sizes_stays_finite(self, row):
        for scales in [(1e30, 1.0), (0.0, 1e-30, 1.0), (1.0, 0.0, 1e-20), (1e15, 1e-15)]:
            model = zoo()
            optimizer = make(row, model, refresh_every=1)
            for step, scale in enumerate((*scales, 1.0)):
                optimizer.zero_grad()
                images, tokens, labels = batch(step)
                (scale * F.cross_entropy(model(images, tokens), labels)).backward()
                optimizer.step()
            for value in [*model.parameters(), *flat_state(optimizer).values()]:
                assert torch.isfinite(value).all(), scales
