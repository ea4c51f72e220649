"""`batch_size="count"` against the same run in which every step is told its batch."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import batch_ranks
import cases
import secondorder
from batch_ranks import METHODS, batch, network
from cases import assert_same_bits
from secondorder._batch import BatchCounting

ALL = pytest.mark.parametrize("name", METHODS)
F32, F64 = torch.float32, torch.float64


def make(name, model, **options):
    options = {"module": model, "batch_size": "count", **METHODS[name], **options}
    return getattr(secondorder, name)(model.parameters(), **options)


def backward(model, step=0, size=8, dtype=F64):
    x, y = batch(step, size, dtype)
    F.cross_entropy(model(x), y).backward()


def told(name, passes, dtype=F64, **options):
    """The reference: `passes` are the sizes of the micro-batches of every step, whose gradients are added."""
    model = network(dtype)
    optimizer = make(name, model, module=None, batch_size=None, **options)
    for step, sizes in enumerate(passes):
        optimizer.zero_grad()
        for size in sizes:
            backward(model, step, size, dtype)
        optimizer.param_groups[0]["batch_size"] = sum(sizes)
        optimizer.step()
    return cases.values(model.parameters())


class Net(nn.Module):
    """A class of its own: a compiler skips torch's own containers as the outermost frame."""

    def __init__(self, dtype):
        super().__init__()
        self.layers = network(dtype)

    def forward(self, x):
        return self.layers(x)


@pytest.fixture
def model():
    return network()


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*no forward pass of the module was counted")
        yield


def test_every_class_with_the_option_can_count():
    public = [getattr(secondorder, key) for key in secondorder.__all__]
    having = {cls for cls in public if "batch_size" in getattr(cls, "own_options", {})}
    assert having == {cls for cls in public if isinstance(cls, type) and issubclass(cls, BatchCounting)}
    assert having == {getattr(secondorder, name) for name in METHODS}


class TestWhatCounts:
    @ALL
    @pytest.mark.parametrize("dtype", [F32, F64], ids=str)
    def test_counting_is_telling_each_step_its_batch(self, name, dtype):
        passes = [[12], [12], [5], [4, 4, 2], [12], [1]]
        model = network(dtype)
        optimizer = make(name, model)
        for step, sizes in enumerate(passes):
            optimizer.zero_grad()
            for size in sizes:
                backward(model, step, size, dtype)
            optimizer.step()
        assert_same_bits(model.parameters(), told(name, passes, dtype))
        assert not torch.equal(next(model.parameters()), told(name, [[1]] * 6, dtype)[0])

    @ALL
    def test_evaluation_and_passes_without_gradients_do_not_count(self, name, model):
        optimizer = make(name, model)
        for step in range(3):
            optimizer.zero_grad()
            model.eval()
            backward(model, 50, 30)
            optimizer.zero_grad()
            model.train()
            with torch.no_grad():
                model(batch(60, 40)[0])
            with torch.inference_mode():
                model(batch(60, 40)[0])
            backward(model, step, 9)
            with torch.no_grad():
                model(batch(60, 40)[0])
            optimizer.step()
        assert_same_bits(model.parameters(), told(name, [[9]] * 3))

    def test_passes_that_one_loss_joins_count_together(self, model):
        """Gradients are not there yet when the second pass begins; derivatives by the input come in between."""
        optimizer = make("RFAdamW", model)
        for _ in range(3):
            optimizer.zero_grad()
            x = batch(0, 6)[0].requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            (slope.square().mean() + model(batch(1, 5)[0]).mean()).backward()
            optimizer.step()
            assert optimizer._batch == 11

    def test_gradients_may_be_cleared_between_forward_and_backward(self, model):
        optimizer = make("RFAdamW", model)
        for step, size in enumerate([8, 8, 3, 8]):
            x, y = batch(step, size)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert_same_bits(model.parameters(), told("RFAdamW", [[8], [8], [3], [8]]))

    @pytest.mark.parametrize("to_none", [True, False])
    def test_a_closure_counts_what_follows_its_zero_grad(self, model, to_none):
        optimizer = make("RFAdamW", model)

        def closure(step, size):
            optimizer.zero_grad(set_to_none=to_none)
            x, y = batch(step, size)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for step, size in enumerate([8, 5, 8]):
            closure(70, 20)  # a line search of somebody else
            optimizer.step(lambda: closure(step, size))  # noqa: B023
        assert_same_bits(model.parameters(), told("RFAdamW", [[8], [5], [8]]))

    @pytest.mark.parametrize("clear", ["optimizer", "optimizer, to zero", "model"])
    def test_passes_of_a_step_that_a_scaler_skips_do_not_count(self, model, clear):
        optimizer, scaler = make("RFAdamW", model), torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
        for step, size in enumerate([8, 20, 21, 5, 8]):
            if clear == "model":
                model.zero_grad()
            else:
                optimizer.zero_grad(set_to_none=clear == "optimizer")
            x, y = batch(step, size)
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss * float("inf") if size >= 20 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if size < 20:
                assert optimizer._batch == size

    @ALL
    def test_a_refused_step_uses_up_its_passes(self, name, model):
        optimizer = make(name, model)
        before = cases.values(model.parameters())
        backward(model, 0, 20)
        next(model.parameters()).grad[0] = float("nan")
        optimizer.step()
        assert_same_bits(model.parameters(), before)
        optimizer.zero_grad()
        backward(model, 1, 5)
        optimizer.step()
        assert optimizer._batch == 5

    def test_a_step_without_a_pass_takes_the_last_batch(self, model):
        optimizer = make("RFAdamW", model)
        backward(model, 0, 7)
        optimizer.step()
        optimizer.step()
        assert optimizer._batch == 7

    def test_a_first_step_without_a_pass_takes_one_and_says_so_once(self, model):
        other = network()
        for net in (model, other):
            backward(net)
        optimizer, plain = make("RFAdamW", model), make("RFAdamW", other, batch_size=1)
        with pytest.warns(UserWarning, match=r"no forward pass .* was counted.*attach\(module\)") as found:
            optimizer.step()
        assert Path(found[0].filename).name == Path(__file__).name
        optimizer.step()
        plain.step()
        plain.step()
        assert_same_bits(model.parameters(), other.parameters())

    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [
            ((torch.ones(3, 6), torch.ones(9)), {}),
            ((), {"x": torch.ones(3, 6)}),
            ((None, 2.0, torch.tensor(7)), {"flag": True, "x": torch.ones(3, 6)}),
            (([torch.ones(3, 6), torch.ones(9)],), {}),
            (({"ids": torch.ones(3, 6, dtype=torch.long)},), {}),
            ((), {"batch": (None, torch.ones(3, 6))}),
            (((torch.ones(9),),), {"x": torch.ones(3, 6)}),
        ],
        ids=["positional", "keyword", "not a number", "list", "dict", "in a keyword", "keyword before list"],
    )
    def test_samples_are_the_first_axis_of_the_first_tensor(self, args, kwargs):
        class Takes(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(2))

            def forward(self, *args, **kwargs):
                return self.w.sum()

        model = Takes()
        optimizer = make("RFAdamW", model)
        model(*args, **kwargs).backward()
        optimizer.step()
        assert optimizer._batch == 3

    def test_groups_may_differ(self):
        models = [network(), network()]
        for model, third in zip(models, (None, 4.0), strict=True):
            first, *others = model.parameters()
            groups = [{"params": [first], "batch_size": 9}, {"params": others, "batch_size": third or "count"}]
            optimizer = secondorder.RFAdamW(groups, module=model)
            for step in range(3):
                optimizer.zero_grad()
                backward(model, step, 4)
                optimizer.step()
        assert_same_bits(models[0].parameters(), models[1].parameters())

    def test_reports_use_the_last_batch(self):
        found = []
        for size in ("count", 8):
            model = network()
            optimizer = make("SIRFShampoo", model, normalize=True, batch_size=size)
            optimizer.preconditioner(next(model.parameters()))
            backward(model, 0, 8)
            optimizer.step()
            p = next(model.parameters())
            found.append(optimizer.preconditioner(p).to_dense())
            optimizer.curvature(p).to_dense()
            optimizer.diagnostics()
            optimizer.coverage()
        torch.testing.assert_close(*found, rtol=0, atol=0)


class TestArguments:
    @ALL
    def test_counting_needs_the_module(self, name):
        params = list(network().parameters())
        with pytest.raises(ValueError, match=r"batch_size='count'.*module=model"):
            getattr(secondorder, name)(params, batch_size="count")
        optimizer = getattr(secondorder, name)(params[:1])
        with pytest.raises(ValueError, match=r"batch_size='count'.*module=model"):
            optimizer.add_param_group({"params": params[1:], "batch_size": "count"})
        assert len(optimizer.param_groups) == 1

    @ALL
    def test_other_words_are_refused(self, name, model):
        with pytest.raises(ValueError, match="'count', a number > 0"):
            make(name, model, batch_size="counted")

    def test_nothing_is_hooked_where_nobody_counts(self, model):
        make("RFAdamW", model, batch_size=8)
        assert not model._forward_pre_hooks

    def test_counting_may_begin_later(self, model):
        optimizer = make("RFAdamW", model, batch_size=8)
        optimizer.param_groups[0]["batch_size"] = "count"
        with pytest.warns(UserWarning, match="no forward pass"):
            backward(model, 0, 3)
            optimizer.step()
        backward(model, 1, 3)
        optimizer.step()
        assert optimizer._batch == 3

    def test_hooks_go_with_the_optimizer(self, model):
        optimizer = make("RFAdamW", model)
        backward(model)
        optimizer.step()
        assert len(model._forward_pre_hooks) == 1
        del optimizer
        gc.collect()
        assert not model._forward_pre_hooks
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())

    def test_the_optimizer_does_not_keep_the_network(self, model):
        optimizer = make("RFAdamW", model)
        alive = weakref.ref(twin := network())
        optimizer.attach(twin)
        del twin
        gc.collect()
        assert alive() is None


class TestCopies:
    @ALL
    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
    def test_a_copy_counts_its_network_after_attach(self, name, way, model):
        optimizer = make(name, model)
        for step in range(2):
            optimizer.zero_grad()
            backward(model, step, 8)
            optimizer.step()
        if way == "deepcopy":
            twin, other = copy.deepcopy((model, optimizer))
        elif way == "pickle":
            twin, other = pickle.loads(pickle.dumps((model, optimizer)))
        else:
            buffer = io.BytesIO()
            torch.save((model, optimizer), buffer)
            buffer.seek(0)
            twin, other = torch.load(buffer, weights_only=False)
        backward(twin, 50, 30)
        assert optimizer._counter.samples == 0
        other.attach(twin)
        for net, opt in ((model, optimizer), (twin, other)):
            for step, size in enumerate([8, 3], 2):
                opt.zero_grad()
                backward(net, step, size)
                opt.step()
        reference = told(name, [[8], [8], [8], [3]])
        assert_same_bits(model.parameters(), reference)
        assert_same_bits(twin.parameters(), reference)

    def test_a_copy_that_is_not_attached_says_how(self, model):
        twin, other = copy.deepcopy((model, make("RFAdamW", model)))
        backward(twin)
        with pytest.warns(UserWarning, match=r"copied or unpickled.*call attach\(module\)"):
            other.step()
        other.step()

    def test_attach_moves_the_hook(self, model):
        other = network()
        optimizer = make("RFAdamW", model)
        optimizer.attach(other)
        optimizer.attach(other)
        assert not model._forward_pre_hooks and len(other._forward_pre_hooks) == 1
        with pytest.raises(TypeError, match="Module, got list"):
            optimizer.attach(list(model.parameters()))

    @ALL
    def test_a_checkpoint_keeps_the_word(self, name, model):
        optimizer = make(name, model)
        for step in range(2):
            optimizer.zero_grad()
            backward(model, step, 8)
            optimizer.step()
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        assert saved["param_groups"][0]["batch_size"] == "count"
        twin = copy.deepcopy(model)
        resumed = make(name, twin, batch_size=None)  # the checkpoint's word is what holds
        resumed.load_state_dict(saved)
        for step, size in enumerate([3, 8], 2):
            resumed.zero_grad()
            backward(twin, step, size)
            resumed.step()
        assert_same_bits(twin.parameters(), told(name, [[8], [8], [3], [8]]))


class TestCompiled:
    @pytest.mark.parametrize(
        ("build", "backend", "in_place"),
        [(network, "eager", False), (network, "aot_eager", False), (Net, "aot_eager", False), (Net, "eager", True)],
        ids=["one frame-eager", "one frame-aot", "hook apart-aot", "in place"],
    )
    def test_counting_breaks_no_graph_and_makes_no_more_of_them(self, build, backend, in_place):
        passes = [[8], [8], [5], [7, 2], [3], [8, 8]]
        graphs, bits = [], []
        for counting in (False, True):
            torch._dynamo.reset()
            counters.clear()
            compiler, model = CompileCounterWithBackend(backend), build(F32)
            optimizer = make("RFAdamW", model, batch_size="count" if counting else None)
            if in_place:
                model.compile(backend=compiler, fullgraph=True)
            net = model if in_place else torch.compile(model, backend=compiler, fullgraph=True)
            for step, sizes in enumerate(passes):
                optimizer.zero_grad()
                # The first graph is for one size, the second for all.
                with torch._dynamo.config.patch(error_on_recompile=step > 2):
                    for size in sizes:
                        backward(net, step, size, F32)
                if not counting:
                    optimizer.param_groups[0]["batch_size"] = sum(sizes)
                optimizer.step()
            assert not counters["graph_break"]
            graphs.append(len([g for g in compiler.graphs if any("linear" in str(n.target) for n in g.graph.nodes)]))
            assert len(compiler.graphs) <= graphs[-1] + 2
            bits.append(cases.values(model.parameters()))
        assert graphs == [2, 2]
        assert_same_bits(*bits)

    def test_compiled_and_plain_passes_count_together(self, model):
        torch._dynamo.reset()
        optimizer = make("RFAdamW", model)
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            optimizer.zero_grad()
            backward(compiled, 0, 8)
            backward(model, 1, 3)
            optimizer.step()
            assert int(optimizer._batch) == 11
        backward(model, 1, 3)
        optimizer.step()
        assert optimizer._batch == 3.0 and isinstance(optimizer._batch, float)

    def test_zero_grad_drops_compiled_passes_of_a_skipped_step(self, model):
        torch._dynamo.reset()
        optimizer = make("RFAdamW", model)
        compiled = torch.compile(model, backend="eager")
        backward(compiled, 0, 8)
        optimizer.zero_grad()
        backward(compiled, 0, 8)
        optimizer.step()
        assert int(optimizer._batch) == 8

    def test_an_exported_network_counts_nothing(self, model):
        optimizer = make("RFAdamW", model)
        for strict in (False, True):
            graph = torch.export.export(model, (batch(0, 4)[0],), strict=strict).graph
            assert not any("add_" in str(node.target) for node in graph.nodes)
        assert optimizer._counter.samples == 0 and int(optimizer._counter.traced) == 0


@ALL
@pytest.mark.parametrize("compiled", [False, True])
def test_no_step_waits_for_the_device(name, compiled):
    torch._dynamo.reset()
    model = network().to("meta")
    optimizer = make(name, model)
    net = torch.compile(model, backend="eager") if compiled else model
    for size in (8, 8, 3):
        optimizer.zero_grad()
        net(torch.empty(size, 6, device="meta", dtype=F64)).sum().backward()
        optimizer.step()
    assert compiled or optimizer._batch == 3


class TestRanks:
    @ALL
    def test_micro_batches_are_the_batch(self, name):
        torch.testing.assert_close(batch_ranks.trained(name, micro=4), batch_ranks.trained(name), rtol=0, atol=1e-12)

    @pytest.mark.dist
    def test_ranks_are_the_batch(self, tmp_path):
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path]), "OMP_NUM_THREADS": "1"}
        commands = [[sys.executable, str(here / "batch_ranks.py"), str(tmp_path), str(rank)] for rank in range(2)]
        started = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
        for process in started:
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 0, errors[-3000:]
        for rank in range(2):
            for (name, *_), found in torch.load(tmp_path / f"{rank}.pt").items():
                torch.testing.assert_close(found, batch_ranks.trained(name), rtol=0, atol=1e-12)
