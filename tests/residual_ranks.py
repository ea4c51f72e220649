"""What every rank does in `test_residual_distributed.py`: residuals of its own samples, linearized or stepped by.

One process that has all samples, rank by rank, is the oracle: with `world` 1 there is no group.
"""

from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from residual_cases import flat, grad, mlp
from secondorder.engdw import ENGDW
from secondorder.residuals.terms import term
from secondorder.sharding import jacobian
from secondorder.sharding.samples import Learned, linearized
from secondorder.spring import SPRING

EQUAL, UNEVEN, EMPTY = "equal", "uneven", "empty"
# Of ranks: each has four times as many points in the domain, half as many on the boundary.
SHARES = {EQUAL: [2, 2, 2, 2], UNEVEN: [3, 1, 2, 5], EMPTY: [2, 0, 3, 1]}


def samples(share, step, dtype=torch.float64):
    """Points of a rank in the domain and on the boundary."""
    count, rank = share
    draw = torch.Generator().manual_seed(100 * step + rank)
    return [torch.rand(k, 2, generator=draw, dtype=torch.float64).to(dtype) for k in (4 * count, count // 2)]


def points(rank, world, ranks, shares=UNEVEN, step=0, dtype=torch.float64):
    """Those of this rank of so many; where it is the only one, those of all."""
    mine = range(ranks) if world == 1 else [rank]
    parts = [samples((SHARES[shares][r], r), step, dtype) for r in mine]
    return [torch.cat(of) for of in zip(*parts, strict=True)]


def terms_of(net, x_in, x_out, coupled=False):
    """A scalar mean, a vector-valued mean, and a sum of some weight; coupled: samples of a rank see each other."""
    x = x_in.clone().requires_grad_(True)
    u = net(x)
    first = grad(u, x)
    second = torch.stack([grad(first[:, i], x)[:, i] for i in range(2)], 1)
    if coupled:
        u = u - 0.1 * torch.tanh(u).sum()
    boundary = net(x_out)[:, 0] - x_out.sum(1)
    pde = second.sum(1) + u[:, 0] ** 2 + 1
    return {"pde": term(pde), "flux": term(first - x_in, 0.3), "boundary": term(boundary, 2.0, "sum")}


def coupled(rank, operator):
    return operator == "coupled" or (operator == "coupled on one" and rank == 1)


def linear(rank, world, shares, operator, dtype=torch.float64):
    """Everything of a linearization by name, with what the first one learned under names that begin with "again"."""
    net = mlp(2, 6, 4, 1, dtype=dtype)
    params = list(net.parameters())
    params[1].requires_grad_(False)
    x = points(rank, world, world, shares, dtype=dtype)
    memory, found = Learned(), {}

    def closure():
        return terms_of(net, *x, coupled(rank, operator))

    for again in ("", "again "):
        terms, J, _ = linearized(closure, params, memory, dist.group.WORLD)
        u, v, X = probes(J.residual, params)
        some = J.restricted([4, 1, 2])
        found |= {
            again + "backend": J.backend,
            again + "loss": terms.loss(),
            again + "loss by term": torch.stack(list(terms.by_term().values())),
            again + "vector": terms.vector(),
            again + "residual": J.residual,
            again + "half squares": J.loss,
            again + "gradient": flat(J.gradient),
            again + "jvp": J.jvp(v),
            again + "vjp": flat(J.vjp(u)),
            again + "kernel": J.kernel(),
            again + "normal": J.normal(),
            again + "rows": J.rows(),
            again + "trace": J.trace() if J.backend == "expand" else J.kernel().trace(),
            again + "kernel product": J.apply_kernel(X),
            again + "some rows": some.rows(),
            again + "some kernel": some.kernel(),
            again + "some vjp": flat(some.vjp(u)),
            again + "some kernel product": some.apply_kernel(X),
            again + "layers": J.groups,
        }
    return found


def probes(residual, params):
    """Vectors in the space of residuals and of parameters, and more columns than "matvec" has in a chunk."""
    draw, N = torch.Generator().manual_seed(0), len(residual)
    u, X = torch.randn(N, 71, generator=draw, dtype=torch.float64).to(residual.dtype).split([1, 70], 1)
    return u[:, 0], [torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype) for p in params], X


def by_algebra(world, shares, operator, dtype=torch.float64):
    """The same from dense rows of autograd, in float64."""
    net = mlp(2, 6, 4, 1, dtype=dtype).double()
    params = list(net.parameters())
    parts = []
    for rank in range(world):
        x = [of.double() for of in points(rank, 2, world, shares, dtype=dtype)]
        parts.append(terms_of(net, *x, coupled(rank, operator)))
    N = {name: sum(len(part[name].residual) for part in parts) for name in parts[0]}
    scales = {name: (parts[0][name].weight / (N[name] if name != "boundary" else 1)) ** 0.5 for name in N}
    r = torch.cat([part[name].residual.flatten() * scales[name] for part in parts for name in N])
    found = [torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True) for entry in r]
    r, J = r.detach(), torch.stack([flat(row) for row in found])
    frozen = params[0].numel()
    J[:, frozen : frozen + params[1].numel()] = 0
    squares = [sum(part[name].residual.detach().square().sum() for part in parts) for name in N]
    by_term = torch.stack([s * scales[name] ** 2 / 2 for s, name in zip(squares, N, strict=True)])
    u, v, X = probes(r.to(dtype), [p.to(dtype) for p in params])
    u, X = u.double(), X.double()
    columns = torch.arange(len(J.T)).split([p.numel() for p in params])
    some = J[:, torch.cat([columns[i] for i in (4, 1, 2)])]
    loss = r @ r / 2
    found = {"loss": loss, "loss by term": by_term, "vector": r, "residual": r, "half squares": loss}
    found |= {"gradient": J.T @ r, "jvp": J @ flat(v).double(), "vjp": J.T @ u}
    found |= {"trace": J.square().sum(), "kernel product": J @ (J.T @ X), "some rows": some, "some vjp": some.T @ u}
    found |= {"some kernel": some @ some.T, "some kernel product": some @ (some.T @ X)}
    return {**found, "kernel": J @ J.T, "normal": J.T @ J, "rows": J}


# Steps ----------------------------------------------------------------------------------------------------------------

METHODS = {  # of dampings that do not amplify rounding beyond what tests compare
    "ENGDW": (ENGDW, {"damping": 1e-4, "damping_kind": "relative"}),
    "primal": (ENGDW, {"damping": 1e-4, "damping_kind": "relative", "form": "primal"}),
    "bracket": (ENGDW, {"damping": 1e-2, "line_search": "bracket"}),
    "SPRING": (SPRING, {"damping": 1e-4, "lr": 0.3, "norm_constraint": 0.1}),
    "fixed momentum": (SPRING, {"damping": 1e-4, "momentum": 0.9, "lr": 0.3}),
    "layerwise": (ENGDW, {"damping": 1e-4, "damping_kind": "relative", "form": "layerwise"}),
    "cg": (ENGDW, {"damping": 1e-2, "solver": "cg"}),
    "nystrom": (ENGDW, {"damping": 1e-4, "solver": "nystrom", "rank": 3}),  # its sketch depends on the samples' order
}
GIVEN, MODULE, CALLED, UNUSED = "given", "module", "called", "find_unused_parameters"


def make(method, net, world, how=GIVEN, **more):
    """An optimizer, and the network as the closure calls it."""
    cls, options = METHODS[method]
    options = {**options, **more}
    if world == 1:
        return cls(net.parameters(), **options), net
    if how == GIVEN:
        return cls(net.parameters(), process_group=dist.group.WORLD, **options), net
    wrapper = DistributedDataParallel(net, find_unused_parameters=how == UNUSED)
    return cls(net.parameters(), **options, **({"module": wrapper} if how == MODULE else {})), wrapper


def told(opt, net, losses):
    state = [value for p in net.parameters() for value in opt.state[p].values()]
    grads = [p.grad for p in net.parameters()]
    numbers = [v for g in opt.param_groups for v in (g["step_size"], g["residual_steps"], g["damping"] or 0.0)]
    found = {"losses": torch.stack(losses), "grad": flat(grads), "parameters": flat(net.parameters())}
    return {**found, "state": flat(state), "numbers": torch.tensor(numbers, dtype=torch.float64)}


def trained(rank, world, ranks, method, shares, how, steps=5):
    """Losses, gradients, parameters and state after some steps; SPRING's with fresh points."""
    net = mlp(2, 6, 4, 1)
    opt, called = make(method, net, world, how)
    losses = []
    for step in range(steps):
        x = points(rank, world, ranks, shares, step if METHODS[method][0] is SPRING else 0)
        losses.append(opt.step(lambda: terms_of(called, *x)))  # noqa: B023
    return told(opt, net, losses)


def around_a_wrapper(rank, world, ranks, how):
    """Steps by residuals and by losses in turn, and passes of the wrapper that no backward pass follows."""
    net = mlp(2, 6, 4, 1)
    net.register_buffer("calls", torch.zeros(()))  # which DDP sends before every pass
    net.register_forward_pre_hook(lambda module, args: module.calls.add_(1) and None)
    opt, called = make("ENGDW", net, world, how)
    x = points(rank, world, ranks, EQUAL)
    losses, sent = [], []

    def residuals():
        terms = terms_of(called, *x)
        if rank == 1:  # this use is found out by calling the closure once more than on the other rank
            terms["pde"] = term(terms["pde"].residual + 0.0 * torch.stack([net[0].weight]).sum())
        return terms

    def by_loss():
        opt.zero_grad()
        loss = called(x[0]).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        losses.append(opt.step(residuals))
        called(x[0])
        with torch.no_grad():
            called(x[0])
        losses.append(opt.step(residuals))
        by_loss()
        sent.append(flat(p.grad for p in net.parameters()))
        opt.step()
        opt.step(by_loss)
        sent.append(flat(p.grad for p in net.parameters()))
    return {**told(opt, net, losses), "sent": torch.stack(sent)}


def not_finite(rank, world, policy):
    """One rank's residual is not a number in the third step, and in a search of the fourth."""
    net = mlp(2, 6, 4, 1)
    opt, called = make("bracket", net, world, on_nonfinite=policy)
    x, losses, told_by = points(rank, world, world), [], []
    calls = 0

    def closure(step):
        nonlocal calls
        calls += 1
        terms = terms_of(called, *x)
        if rank == 1 and (step == 2 or (step == 3 and calls == 2)):
            terms["pde"] = term(terms["pde"].residual * float("nan"))
        return terms

    for step in range(5):
        calls, before = 0, flat(net.parameters())
        try:
            losses.append(opt.step(lambda: closure(step)))  # noqa: B023
        except RuntimeError as error:
            losses.append(torch.tensor(torch.nan, dtype=torch.float64))
            told_by.append(str(error))
        moved = not torch.equal(before, flat(net.parameters()))
        told_by.append(moved)
    return {"told": told_by, "refused": opt.diagnostics()["refused_steps"], "parameters": flat(net.parameters())}


def resumed(rank, world, ranks, saved=None):
    """Five steps of SPRING and what is saved after them; with what was saved, five more."""
    net = mlp(2, 6, 4, 1)
    opt, called = make("SPRING", net, world)
    first = 0 if saved is None else 5
    if saved is not None:
        net.load_state_dict(saved["net"])
        opt.load_state_dict(saved["opt"])
    losses = []
    for step in range(first, first + 5):
        x = points(rank, world, ranks, UNEVEN, step)
        losses.append(opt.step(lambda: terms_of(called, *x)))  # noqa: B023
    return {**told(opt, net, losses), "saved": {"net": net.state_dict(), "opt": opt.state_dict()}}


def one_of_two(rank, world, what):
    """What a step raises if rank 1 is unlike rank 0."""
    net = mlp(2, 6, 4, 1)
    opt, called = make("ENGDW", net, world)
    if what == "parameters" and rank == 1:
        with torch.no_grad():
            net[0].bias.mul_(1.0 + 2**-40)
    x, step = points(rank, world, world), 0

    def closure():
        if rank == 1 and what == "fails" and step > 0:
            raise KeyError("points")
        terms = terms_of(called, *x)
        if rank == 1 and what == "loss" and step > 0:
            return terms["pde"].loss()
        if rank == 1 and what == "weights":
            terms["flux"] = term(terms["flux"].residual, 0.4)
        return terms

    before = flat(net.parameters())
    for step in range(2):
        try:
            opt.step(closure)
        except (KeyError, RuntimeError, ValueError) as error:
            same = torch.equal(before, flat(net.parameters()))
            return step, type(error).__name__, str(error), same
        before = flat(net.parameters())
    return None


def only_one_steps(rank, world):
    """Without a group and a wrapper, a process waits for nobody."""
    if rank == 1:
        return None
    net = mlp(2, 6, 4, 1)
    opt = ENGDW(net.parameters(), damping=1e-4, module=net)
    x = points(0, 1, 1)
    return told(opt, net, [opt.step(lambda: terms_of(net, *x)) for _ in range(2)])


def in_a_group_of_one(rank, world):
    """A program for many processes that was started with one."""
    found = []
    for how in (None, GIVEN, CALLED):
        net = mlp(2, 6, 4, 1)
        opt, called = make("SPRING", net, 1 if how is None else 2, how)
        x = points(0, 1, 2)
        found.append(told(opt, net, [opt.step(lambda: terms_of(called, *x)) for _ in range(2)]))  # noqa: B023
    return found


def sharded(rank, world, given):
    """What a step says of parameters that processes have parts of."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = mlp(2, 6, 4, 1)
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    opt = ENGDW(net.parameters(), process_group=dist.group.WORLD if given else None)
    x = points(rank, world, world, EQUAL)
    try:
        opt.step(lambda: {"value": net(x[0])[:, 0]})
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def in_blocks(rank, world):
    """The kernel by blocks of columns that end within parameters."""
    with mock.patch.object(jacobian, "BLOCK", 200):
        return linear(rank, world, UNEVEN, "expand")


def by_uses(rank, world, shares):
    """The kernel by what J is made of, whatever it costs, and in tiles."""
    with mock.patch.multiple(jacobian, ELEMENTWISE=-1000, TILE=7, WIDE=10):
        return linear(rank, world, shares, "expand")


def fails_in_a_search(rank, world):
    """What a step raises if rank 1's closure fails while a step size is searched, and the step after it."""
    net = mlp(2, 6, 4, 1)
    opt, called = make("bracket", net, world)
    x, calls = points(rank, world, world), 0

    def closure():
        nonlocal calls
        calls += 1
        if rank == 1 and calls == -1:
            raise KeyError("points")
        return terms_of(called, *x)

    losses, raised = [opt.step(closure)], ""
    calls, before = -3, flat(net.parameters())  # the first call linearizes, the second is the search's
    try:
        opt.step(closure)
    except (KeyError, RuntimeError) as error:
        raised = f"{type(error).__name__}: {error}"
    same = torch.equal(before, flat(net.parameters()))
    losses += [opt.step(closure) for _ in range(2)]
    return raised, same, told(opt, net, losses)
