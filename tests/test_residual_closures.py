"""Residual closures: every optimizer takes them, and what they may return."""

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap

import adapting
import secondorder
from cases import OPTIMIZERS, assert_same_bits, assert_same_state, flat_state, normal, values
from secondorder.residuals.terms import least_squares, residual_terms, term

PI = math.pi
# Those that step by the gradient alone.
BY_GRADIENT = pytest.mark.parametrize(
    "case", [case for case in OPTIMIZERS if not case.residuals], ids=lambda case: case.cls.__name__
)


class Poisson:
    """Δu + f = 0 on the unit square, u = 0 at its boundary, for a small tanh network; all in float64."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.x = torch.rand(7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.boundary = torch.cat([torch.tensor([[0.0, 0.3], [0.6, 1.0]]), torch.tensor([[1.0, 0.2]])]).double()

    def force(self, x):
        return 2 * PI**2 * torch.sin(PI * x[..., 0]) * torch.sin(PI * x[..., 1])

    def residuals(self):
        """Nested autograd, as in textbooks."""
        x = self.x.clone().requires_grad_()
        (du,) = torch.autograd.grad(self.model(x).sum(), x, create_graph=True)
        seconds = [torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return {"pde": seconds[0] + seconds[1] + self.force(x), "boundary": self.model(self.boundary)}

    def parameters(self):
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def oracle(self, parameters):
        """The same residuals without autograd's graph: the trace of a Hessian, one sample at a time."""

        def u(x):
            return functional_call(self.model, parameters, x).squeeze(-1)

        laplacian = vmap(lambda x: hessian(u)(x).trace())(self.x)
        return laplacian + self.force(self.x), u(self.boundary)

    def gradient(self, weights=(1.0, 1.0)):
        """Jᵀ r by parameter, J by `jacrev`; r is scaled."""
        scales = [math.sqrt(w / n) for w, n in zip(weights, (len(self.x), len(self.boundary)), strict=True)]

        def vector(parameters):
            return torch.cat([s * r for s, r in zip(scales, self.oracle(parameters), strict=True)])

        r = vector(self.parameters())
        jacobian = jacrev(vector)(self.parameters())
        return [(r @ part.flatten(1)).view(part.shape[1:]) for part in jacobian.values()]


def optimizer_of(case, problem, **options):
    return case.make(problem.model.parameters(), module=problem.model, **options)


def by_hand(optimizer, problem, weights=(1.0, 1.0)):
    """The closure that users would write without residuals."""

    def closure():
        optimizer.zero_grad()
        parts = zip(weights, problem.residuals().values(), strict=True)
        loss = sum(0.5 * w / len(r) * r.square().sum() for w, r in parts)
        loss.backward()
        return loss

    return closure


def weighted(problem, weights):
    return lambda: {name: term(r, weight=w) for w, (name, r) in zip(weights, problem.residuals().items(), strict=True)}


def grads(problem):
    return [p.grad for p in problem.model.parameters()]


class TestEveryOptimizer:
    @BY_GRADIENT
    @pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 10.0)])
    def test_step_is_that_of_the_loss(self, case, weights):
        """Parameters, state and losses, over refreshes, with weight decay and a scheduler."""
        ours, theirs = Poisson(), Poisson()
        mine, other = (optimizer_of(case, problem, weight_decay=0.1) for problem in (ours, theirs))
        schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in (mine, other)]
        closures = weighted(ours, weights), by_hand(other, theirs, weights)
        start = values(ours.model.parameters())
        for _ in range(5):
            losses = [optimizer.step(closure) for optimizer, closure in zip((mine, other), closures, strict=True)]
            torch.testing.assert_close(losses[0], losses[1].detach(), rtol=1e-14, atol=0)
            assert_same_bits(grads(ours), grads(theirs))
            assert not losses[0].requires_grad and losses[0].shape == ()
            for schedule in schedules:
                schedule.step()
        assert_same_bits(ours.model.parameters(), theirs.model.parameters())
        assert_same_state(flat_state(mine), flat_state(other))
        assert all(not torch.equal(a, b) for a, b in zip(start, ours.model.parameters(), strict=True))

    def test_gradient_is_the_jacobian_times_the_residual(self, case):
        problem = Poisson()
        optimizer = optimizer_of(case, problem)
        for p in problem.model.parameters():
            p.grad = torch.full_like(p, math.nan)  # of somebody else: cleared before
        kept = [p.grad for p in problem.model.parameters()]
        wanted = problem.gradient(weights=(2.0, 0.5))
        optimizer.step(weighted(problem, (2.0, 0.5)))
        for found, g, before in zip(grads(problem), wanted, kept, strict=True):
            torch.testing.assert_close(found, g, rtol=1e-12, atol=1e-12 * float(g.abs().max()))
            assert before.isnan().all()  # set to None, not to zero

    def test_closure_of_a_loss_keeps_its_gradients(self, case):
        """Only residuals have the gradients cleared: others accumulate as they like."""
        problem = Poisson()
        optimizer = optimizer_of(case, problem)

        def closure():
            loss = least_squares(**problem.residuals())
            loss.backward()
            return loss

        optimizer.zero_grad()
        wanted = [2 * g for g in problem.gradient()]
        closure()
        loss = optimizer.step(closure)
        assert loss.requires_grad
        for found, g in zip(grads(problem), wanted, strict=True):
            torch.testing.assert_close(found, g, rtol=1e-12, atol=1e-12 * float(g.abs().max()))

    @BY_GRADIENT
    def test_loop_with_least_squares_is_the_same_training(self, case):
        ours, theirs = Poisson(), Poisson()
        mine, other = optimizer_of(case, ours), optimizer_of(case, theirs)
        for _ in range(4):
            mine.step(ours.residuals)
            other.zero_grad()
            least_squares(**theirs.residuals()).backward()
            other.step()
        assert_same_bits(ours.model.parameters(), theirs.model.parameters())

    @pytest.mark.filterwarnings("ignore:.*a step was refused")
    def test_residuals_that_are_not_finite_are_refused(self, case):
        problem = Poisson()
        optimizer = optimizer_of(case, problem)
        optimizer.step(problem.residuals)
        before = values(problem.model.parameters())
        loss = optimizer.step(lambda: {name: r * math.nan for name, r in problem.residuals().items()})
        assert loss.isnan()
        assert_same_bits(before, problem.model.parameters())

    def test_unusable_closures_change_nothing(self, case):
        problem = Poisson()
        optimizer = optimizer_of(case, problem)
        before = values(problem.model.parameters())
        kind, message = (RuntimeError, "'pde', 'boundary' have no graph")
        if case.residuals:
            kind, message = (ValueError, r"depend on a parameter, got \('pde', 'boundary'\) without graph")
        with pytest.raises(kind, match=message):
            optimizer.step(lambda: {name: r.detach() for name, r in problem.residuals().items()})
        with pytest.raises(ValueError, match="at least one term"):
            optimizer.step(dict)
        assert_same_bits(before, problem.model.parameters())

    def test_copies_take_residuals(self, case):
        problem = Poisson()
        optimizer = optimizer_of(case, problem)
        optimizer.step(problem.residuals)
        twin, other = copy.deepcopy((problem, optimizer))
        if hasattr(other, "attach"):
            other.attach(twin.model)
        optimizer.step(problem.residuals)
        other.step(twin.residuals)
        assert_same_bits(problem.model.parameters(), twin.model.parameters())


class TestLayerMethods:
    def test_a_given_scaler_has_no_part(self):
        """Captured gradients of a residual closure were never scaled, whatever the scaler's scale is."""
        ours, theirs = Poisson(), Poisson()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        mine = adapting.optimize(ours.model, grad_scaler=scaler)
        other = adapting.optimize(theirs.model)
        for _ in range(3):
            mine.step(ours.residuals)
            other.step(theirs.residuals)
        assert_same_bits(ours.model.parameters(), theirs.model.parameters())

    @pytest.mark.parametrize("cls", adapting.CLASSES)
    def test_adapted_damping_sees_both_losses(self, cls):
        problem = Poisson()
        optimizer = adapting.optimize(problem.model, cls, lr=0.01, adapt_damping=True, adapt_every=1)
        before = residual_terms(problem.residuals()).loss()
        assert torch.equal(optimizer.step(problem.residuals), before.detach())
        after, found = residual_terms(problem.residuals()).loss(), optimizer.diagnostics()
        change = float(after.detach() - before.detach())
        assert found["rho"] == pytest.approx(change / found["predicted_change"], rel=1e-9)
        gradient = problem.gradient()
        optimizer.step(problem.residuals)  # its second evaluation leaves the gradients of the first
        for g, wanted in zip(grads(problem), gradient, strict=True):
            torch.testing.assert_close(g, wanted, rtol=1e-12, atol=1e-12 * float(wanted.abs().max()))

    def test_quadratic_model_says_what_it_needs(self):
        problem = Poisson()
        optimizer = adapting.optimize(problem.model, loss="mse", quadratic_model="lr")
        with pytest.raises(TypeError, match=r"must return \(loss, outputs\).*got dict"):
            optimizer.step(problem.residuals)


class TestTerms:
    def test_vector_is_scaled_and_in_order(self):
        a, b, c = normal(4, seed=1), normal(3, 2, seed=2), normal(2, 2, 2, seed=3)
        terms = residual_terms({"z": a, "a": term(b, weight=6.0), "m": term(c, weight=9.0, reduction="sum")})
        assert terms.names == ("z", "a", "m") and terms.weights == (1.0, 6.0, 9.0)
        assert all(ours is theirs for ours, theirs in zip(terms.residuals, (a, b, c), strict=True))
        wanted = torch.cat([a / 2, (b * math.sqrt(2)).flatten(), 3 * c.flatten()])
        torch.testing.assert_close(terms.vector(), wanted, rtol=1e-15, atol=0)
        assert terms.scales == pytest.approx((0.5, math.sqrt(2), 3.0))

    @settings(deadline=None, max_examples=40)
    @given(
        st.lists(
            st.tuples(
                st.integers(0, 5),
                st.lists(st.integers(0, 3), max_size=2),
                st.floats(0, 1e3),
                st.sampled_from(["mean", "sum"]),
            ),
            min_size=1,
            max_size=4,
        ),
        st.booleans(),
    )
    def test_loss_is_half_the_square_of_the_vector(self, shapes, named):
        """The loss, its parts and its gradient, whatever the terms; ones without samples count zero."""
        leaves = [normal(n, *more, seed=i).requires_grad_() for i, (n, more, _, _) in enumerate(shapes)]
        entries = [term(r, w, reduction) for r, (_, _, w, reduction) in zip(leaves, shapes, strict=True)]
        terms = residual_terms({f"t{i}": t for i, t in enumerate(entries)} if named else entries)
        vector = terms.vector()
        assert vector.shape == (sum(r.numel() for r in leaves),)
        torch.testing.assert_close(terms.loss(), vector.square().sum() / 2)
        torch.testing.assert_close(sum(terms.by_term().values()), terms.loss().detach())
        assert tuple(terms.by_term()) == terms.names == tuple(f"t{i}" if named else str(i) for i in range(len(leaves)))
        wanted = torch.autograd.grad(vector.square().sum() / 2, leaves)
        loss = terms.backward()
        assert not loss.requires_grad and math.isfinite(loss)
        for r, g in zip(leaves, wanted, strict=True):
            torch.testing.assert_close(r.grad, g)

    def test_bits_are_those_of_a_mean_of_squares(self):
        r = normal(7, seed=1)
        assert torch.equal(residual_terms([term(r, weight=0.3)]).loss(), 0.5 * 0.3 * r.square().mean())

    def test_by_term_has_no_graph(self):
        r = normal(3).requires_grad_()
        assert not any(part.requires_grad for part in residual_terms([r, r]).by_term().values())
        assert residual_terms([r, r]).loss().requires_grad

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_squares_of_half_precision_do_not_overflow(self, dtype):
        r = torch.full((4,), 3e4, dtype=dtype, requires_grad=True)
        terms = residual_terms([r])
        assert terms.vector().dtype == terms.loss().dtype == torch.float32
        torch.testing.assert_close(terms.loss(), r.detach().float().square().sum() / 8)
        terms.backward()
        assert r.grad.dtype == dtype and r.grad.isfinite().all()

    def test_terms_of_two_precisions(self):
        r = normal(3)
        terms = residual_terms([r.float(), r])
        assert terms.vector().dtype == terms.loss().dtype == torch.float64

    @pytest.mark.parametrize("container", [list, tuple])
    def test_sequences_have_numbers_for_names(self, container):
        terms = residual_terms(container(normal(2, seed=i) for i in range(3)))
        assert terms.names == ("0", "1", "2")


class TestWhatIsALoss:
    @pytest.mark.parametrize(
        "returned",
        [
            None,
            0.5,
            torch.tensor(0.5),
            torch.tensor([0.5]),
            torch.tensor([[0.5]]),
            (torch.tensor(0.5), torch.ones(3, 2)),
            (0.5, {"accuracy": 1.0}),
            "loss",
        ],
        ids=repr,
    )
    def test_it_has_no_terms(self, returned):
        assert residual_terms(returned) is None

    def test_step_returns_it_as_it_is(self, case):
        model = nn.Linear(2, 1)
        returned = (torch.tensor(0.5), torch.ones(3))
        assert case.make(model.parameters()).step(lambda: returned) is returned


R = torch.ones(3)
WRONG = {
    "empty": ({}, ValueError, "at least one term, got none"),
    "empty list": ([], ValueError, "at least one term, got none"),
    "bare": (R, TypeError, r"in a mapping or list; got a tensor of shape \(3,\)"),
    "bare term": (term(R), TypeError, "in a mapping or list; got a term"),
    "no tensor": ({"pde": [1.0]}, TypeError, r"residual 'pde' must be a tensor of shape \(N, \.\.\.\), got list"),
    "integers": ({"pde": R.long()}, TypeError, r"residual 'pde' must be of a floating-point dtype, got torch\.int64"),
    "complex": ({"pde": R * 1j}, TypeError, r"got torch\.complex64: give torch\.view_as_real"),
    "0-d": ({"pde": R.mean()}, ValueError, "residual 'pde' must have samples as its first axis, got a 0-d tensor"),
    "0-d in a list": ([R.mean()], ValueError, "residual '0' must have samples as its first axis"),
    "name": ({1: R}, TypeError, "names of residuals must be strings, got 1"),
    "devices": ({"a": R, "b": R.to("meta")}, ValueError, "must be on one device, got 'a' on cpu, 'b' on meta"),
}


class TestErrors:
    @pytest.mark.parametrize(("returned", "kind", "message"), WRONG.values(), ids=WRONG)
    def test_of_what_a_closure_returns(self, returned, kind, message):
        with pytest.raises(kind, match=message):
            residual_terms(returned)

    @pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
    def test_weights_that_are_not_allowed(self, weight):
        with pytest.raises(ValueError, match=f"weight of residual 'r' must be finite and >= 0, got {weight}"):
            term(R, weight=weight)
        with pytest.raises(ValueError, match=f"weight of residual 'pde' must be finite and >= 0, got {weight}"):
            least_squares(pde=R, weights={"pde": weight})

    @pytest.mark.parametrize("weight", [True, "1", None, torch.tensor(1.0)], ids=repr)
    def test_weights_that_are_no_numbers(self, weight):
        with pytest.raises(TypeError, match="weight of residual 'r' must be a number, got"):
            term(R, weight=weight)

    def test_reduction(self):
        with pytest.raises(ValueError, match=r"reduction must be one of \('mean', 'sum'\), got 'none'"):
            term(R, reduction="none")

    def test_terms_of_least_squares(self):
        with pytest.raises(ValueError, match=r"names of terms, \['pde'\], got \['bc'\]"):
            least_squares(pde=R, weights={"bc": 1.0})
        with pytest.raises(ValueError, match="at least one term"):
            least_squares()
        with pytest.raises(TypeError, match="residual 'pde' must be a tensor"):
            least_squares(pde=term(R))


@pytest.mark.parametrize(("reduction", "weights"), [*itertools.product(["mean", "sum"], [None, {"b": 3.0}])])
def test_least_squares(reduction, weights):
    a, b = normal(5, seed=1).requires_grad_(), normal(4, 2, seed=2)
    w = 1.0 if weights is None else 3.0
    wanted = {"mean": a.square().mean() / 2 + w * b.square().sum() / 8, "sum": (a @ a + w * b.square().sum()) / 2}
    loss = least_squares(reduction, weights, a=a, b=b)
    torch.testing.assert_close(loss, wanted[reduction], rtol=1e-14, atol=0)
    assert loss.requires_grad


def test_golden_values():
    """Loss, r and Jᵀ r of a Poisson problem as published code for energy natural gradients has them."""
    with np.load(Path(__file__).parent / "golden" / "tiny_problem_engdw.npz") as file:
        z = {name: torch.from_numpy(file[name]) for name in file.files}
    problem = Poisson()
    problem.model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    nn.utils.vector_to_parameters(z["theta0"], problem.model.parameters())
    problem.x, problem.boundary = z["X_int"], z["X_bnd"]
    # The file's right-hand sides were rounded to float32 when it was made, so they are read, not computed anew.
    problem.force = lambda x: z["y_int"][:, 0]

    def closure():
        return {**problem.residuals(), "boundary": problem.model(problem.boundary) - z["y_bnd"]}

    close = dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(residual_terms(closure()).vector(), z["r"], **close)
    loss = secondorder.SOAP(problem.model.parameters()).step(closure)
    torch.testing.assert_close(loss, z["r"].square().sum() / 2, **close)
    assert float(loss) == pytest.approx(float(z["loss"]), rel=1e-6)  # kept in float32
    torch.testing.assert_close(nn.utils.parameters_to_vector(grads(problem)), z["grad"], **close)


def test_an_unknown_coefficient_is_trained_along():
    """An inverse problem: a scalar outside of the network, and measurements as one more term."""
    problem = Poisson()
    k = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    groups = [{"params": list(problem.model.parameters())}, {"params": [k], "lr": 0.1}]
    optimizer = secondorder.SOAP(groups, lr=0.01)
    data = normal(5, seed=4)

    def closure():
        return {**problem.residuals(), "data": k - data}

    optimizer.step(closure)
    torch.testing.assert_close(k.grad, 0.3 - data.mean(), rtol=1e-12, atol=1e-12)
    for _ in range(60):
        optimizer.step(closure)
    assert abs(k.item() - data.mean().item()) < 0.1
