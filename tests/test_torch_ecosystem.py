"""What people put around `torch.optim`: clipping under a scaler, averages of weights, range tests, hooks, ZeRO.

Schedulers are in `contract/test_groups.py`, closures and optimizers in the backward pass in `contract/test_step.py`,
checkpoints by DCP in `contract/test_state_matrix.py`, averages beside layer methods in `test_capture_lifetime.py`.
"""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import cases
import secondorder
import zero_ranks
from cases import assert_same_bits, assert_same_state, flat_state, parameters, values


def network(seed=2):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def data(step, size=8):
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps, after=lambda step: None):
    for step in steps:
        optimizer.zero_grad()
        model(data(step)).square().mean().backward()
        optimizer.step()
        after(step)


CLIPS = {
    "by norm": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05),
    "by value": lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.01),
}


class TestScalerAndClip:
    @pytest.mark.parametrize("clip", CLIPS)
    def test_gradients_are_clipped_as_without_a_scaler(self, case, clip):
        """`scale`, `unscale_`, clip, `step`: scales are powers of two and leave no trace; they shrink and grow."""
        results = []
        for enabled in (True, False):
            model = network()
            optimizer = case.make(model.parameters())
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=enabled)
            for step in range(7):
                optimizer.zero_grad()
                scaler.scale(model(data(step)).square().mean()).backward()
                if step == 3 and not enabled:
                    continue  # the scaler leaves it out
                if step == 3:
                    next(model.parameters()).grad.view(-1)[0] = torch.nan
                scaler.unscale_(optimizer)
                CLIPS[clip](model)
                scaler.step(optimizer)
                scaler.update()
            results.append(values(model.parameters()))
        assert_same_bits(*results)


class TestAverages:
    def test_swa_is_the_mean_of_the_iterates_and_disturbs_nothing(self, case):
        """AveragedModel, SWALR and update_bn beside our class: what is averaged is a plain run."""
        runs = []
        for averaged in (True, False):
            model = network()
            optimizer = case.make(model.parameters())
            schedule = SWALR(optimizer, swa_lr=0.02, anneal_epochs=3)
            mean, seen = AveragedModel(model) if averaged else None, []

            def after(step, model=model, mean=mean, seen=seen, schedule=schedule):
                schedule.step()
                if step >= 3:
                    seen.append(values(model.parameters()))
                    if mean is not None:
                        mean.update_parameters(model)

            train(model, optimizer, range(9), after)
            runs.append(values(model.parameters()))
            if mean is not None:
                for i, p in enumerate(mean.module.parameters()):
                    torch.testing.assert_close(p, torch.stack([iterate[i] for iterate in seen]).mean(0))
                update_bn([data(step) for step in range(3)], mean)
                assert mean(data(0)).isfinite().all()
        assert_same_bits(*runs)

    def test_ema_of_the_optimizers_own_parameters(self, case):
        params = parameters()
        model = nn.ParameterList(params)
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        optimizer, expected = case.make(params), None
        for step in range(4):
            cases.train(optimizer, params, [step])
            ema.update_parameters(model)
            now = values(params)
            expected = now if expected is None else [0.5 * e + 0.5 * p for e, p in zip(expected, now, strict=True)]
        for p, e in zip(ema.module.parameters(), expected, strict=True):
            torch.testing.assert_close(p, e)


class TestRangeTest:
    @pytest.mark.parametrize("tensor", [False, True])
    def test_learning_rate_finder_leaves_no_trace(self, case, tensor):
        """It saves, raises lr step by step until training explodes, and puts everything back."""
        models = [network(), network()]
        made = [case.make(m.parameters(), lr=torch.tensor(0.01) if tensor else 0.01) for m in models]
        for model, optimizer in zip(models, made, strict=True):
            train(model, optimizer, range(3))
        model, optimizer = models[0], made[0]
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

        def raise_lr(step):
            for group in optimizer.param_groups:
                if tensor:
                    group["lr"].mul_(10.0)
                else:
                    group["lr"] *= 10.0

        train(model, optimizer, range(20, 30), raise_lr)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        for model, optimizer in zip(models, made, strict=True):
            train(model, optimizer, range(3, 7))
        assert_same_bits(*(m.state_dict().values() for m in models))
        assert_same_state(flat_state(made[0]), flat_state(made[1]))


class TestHooksAndKeys:
    def test_hooks_for_all_optimizers_fire_once(self, case):
        params, order = parameters(), []
        optimizer = case.make(params)
        handles = [
            register_optimizer_step_pre_hook(lambda opt, args, kwargs: order.append(("before", opt is optimizer))),
            register_optimizer_step_post_hook(lambda opt, args, kwargs: order.append(("after", opt is optimizer))),
        ]
        try:
            cases.train(optimizer, params, range(2))
        finally:
            for handle in handles:
                handle.remove()
        assert order == [("before", True), ("after", True)] * 2

    def test_a_hook_may_change_gradients_and_rates(self, case):
        """What a hook before the step does acts in this step."""
        params, twins = parameters(), parameters()
        hooked, plain = case.make(params), case.make(twins, lr=0.02)

        def halve(opt, args, kwargs):
            opt.param_groups[0]["lr"] = 0.02
            for p in params:
                p.grad.mul_(0.5)

        hooked.register_step_pre_hook(halve)
        cases.train(hooked, params, range(4))
        cases.train(plain, twins, range(4), before=lambda step: [p.grad.mul_(0.5) for p in twins])
        assert_same_bits(params, twins)

    def test_torchs_implementation_switches_change_nothing(self, case):
        """Trainers set them in every group, whatever the class."""
        results = []
        for switches in (dict(foreach=True, fused=True, capturable=True, differentiable=True), {}):
            params = parameters()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer = case.make([{"params": params, **switches}])
            cases.train(optimizer, params, range(4))
            assert all(optimizer.param_groups[0].get(key) is value for key, value in switches.items())
            results.append(values(params))
        assert_same_bits(*results)

    def test_profiler_shows_the_step_by_the_name_of_the_class(self):
        params = parameters()
        optimizer = secondorder.SOAP(params)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            cases.train(optimizer, params, [0])
        assert "Optimizer.step#SOAP.step" in {event.key for event in profile.key_averages()}


class TestZeroRedundancyOptimizer:
    def test_around_a_single_process(self, case, tmp_path):
        zero_ranks.start(tmp_path, 0, 1)
        try:
            found, held = zero_ranks.trained(case)
        finally:
            dist.destroy_process_group()
        assert_same_bits(found, zero_ranks.straight(case))
        assert held == len(zero_ranks.SHAPES)

    @pytest.mark.slow
    @pytest.mark.dist
    def test_around_two_processes_that_have_a_part_of_the_state_each(self, tmp_path):
        here = Path(__file__).parent
        commands = [[sys.executable, str(here / "zero_ranks.py"), str(tmp_path), str(rank), "2"] for rank in range(2)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path]), "OMP_NUM_THREADS": "1"}
        running = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
        for process in running:
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 0, errors[-3000:]
        for case in cases.OPTIMIZERS:
            parts = [torch.load(tmp_path / f"{rank}.pt")[case.cls.__name__] for rank in range(2)]
            for found, held in parts:
                assert_same_bits(found, zero_ranks.straight(case))
                assert 0 < held < len(zero_ranks.SHAPES)
