"""What every rank does in `test_centred.py`: centred terms of its own samples, linearized and stepped by.

One process that has all samples, rank by rank, is the oracle: with `world` 1 there is no group.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from cases import normal
from residual_cases import flat, mlp
from secondorder.engdw import ENGDW
from secondorder.residuals.generalized import convex_loss, vmc_energy
from secondorder.residuals.terms import term
from secondorder.sharding.samples import Learned, linearized
from secondorder.spring import SPRING

UNEVEN, EMPTY = "uneven", "empty"
SHARES = {UNEVEN: [5, 2], EMPTY: [6, 0]}


def closure_of(net, rank, world, shares, coupled):
    """A centred scalar mean, a mean as it is, and a centred sum of two equations; or with `coupled` no rows."""
    ranks = range(2) if world == 1 else [rank]
    parts = [normal(SHARES[shares][r], 2, seed=r) for r in ranks]

    def closure():
        f, first = [], []
        for x in parts:
            y = net(x)
            f.append(y - 0.1 * y.sum().tanh() if coupled else y)
            first.append(x[:, 0])
        f, x0 = torch.cat(f), torch.cat(first)
        terms = {"scalar": term(f[:, 0] ** 2, center=True), "plain": term(f[:, 1], 0.3)}
        return {**terms, "pair": term(f[:, 1:].sin() - x0[:, None], 2.0, "sum", center=True)}

    return closure


def linear(rank, world, shares, coupled=False):
    """A linearization by name: of all, with another call, which knows how many samples there are."""
    net = mlp(2, 5, 3)
    params, memory, found = list(net.parameters()), Learned(), {}
    closure = closure_of(net, rank, world, shares, coupled)
    for _ in range(2):
        terms, J, _ = linearized(closure, params, memory, None if world == 1 else dist.group.WORLD)
        r = J.residual
        u, v = normal(len(r), seed=2), [normal(*p.shape, seed=1) for p in params]
        found = {"loss": terms.loss().detach(), "by term": torch.stack(list(terms.by_term().values()))}
        found |= {"gradient": flat(J.gradient), "normal": J.normal(), "vjp of r": flat(J.vjp(r)), "half": J.loss}
        if world == 1:  # in the order of ranks: what is symmetric in samples stays, the rest is put in order
            order = by_ranks(SHARES[shares])
            u = torch.empty_like(u).index_copy_(0, order, u)
        else:
            order = torch.arange(len(r))
        K = J.kernel()
        found |= {"vector": terms.vector().detach()[order], "residual": r[order], "jvp": J.jvp(v)[order]}
        found |= {"vjp": flat(J.vjp(u)), "rows": J.rows()[order], "kernel": K[order][:, order]}
        found |= {"trace": K.trace() if coupled else J.trace(), "product": J.apply_kernel(u[:, None])[order]}
        found |= {"some": J.restricted([3, 0]).normal()}
    return {**found, "backend": J.backend}


def by_ranks(counts):
    """Where, in r of one process with all samples, the entries of r are as several processes have them."""
    total, starts = sum(counts), [0, 0, 0]
    order = []
    for n in counts:
        for k, width in enumerate((1, 1, 2)):
            first = (0, total, 2 * total)[k] + starts[k]
            order += range(first, first + n * width)
            starts[k] += n * width
    return torch.tensor(order)


def trained(rank, world, method):
    """Parameters after steps by centred terms, of an energy, or by a convex loss."""
    net = mlp(2, 5, 3)
    n = [7] if world == 1 else SHARES[UNEVEN]
    begin = sum(n[:rank])
    x, y = normal(7, 2, seed=4)[begin:][: n[rank]], (torch.arange(7) % 3)[begin:][: n[rank]]
    cls = SPRING if method == "energy" else ENGDW
    options = {} if world == 1 else {"process_group": dist.group.WORLD}
    opt = cls(net.parameters(), lr=0.3, line_search=None, damping=1e-3, **options)

    def closure():
        f = net(x)
        if method == "energy":
            return {"energy": vmc_energy(f[:, 0], f[:, 1].exp()), "more": term(f[:, 2], 0.1)}
        return {"nll": convex_loss(f, F.cross_entropy, y)}

    losses = [opt.step(closure).detach() for _ in range(4)]
    return {"params": flat(net.parameters()), "losses": torch.stack(losses)}
