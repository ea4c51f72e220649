"""SOAP on one matrix in plain dense algebra: the oracle of the tests."""

import torch


class DenseSOAP:
    """One block `W (d_0, d_1)`, refreshes together, no bucket: the doc-string of SOAP read aloud.

    Args:
        W: The block, changed in place.
        modes: Sides with a factor.
        hp: SOAP's arguments.
        lagged: Apply before the factors see the gradient, as SOAP does; else after.
    """

    def __init__(self, W, modes, hp, lagged=True):
        self.W, self.modes, self.hp, self.lagged, self.t, self.updates = W, modes, hp, lagged, 0, 0
        self.Q = [torch.eye(d, dtype=W.dtype) for d in W.shape]
        self.C = [torch.zeros(d, d, dtype=W.dtype) for d in W.shape]
        self.m, self.v = torch.zeros_like(W), torch.zeros_like(W)

    def step(self, G):
        self.t += 1
        skip = self.hp["first"] == "skip" and self.t == 1
        if self.lagged and not skip:
            self.apply(G)
        beta = self.hp["factor_beta"]
        for i, gram in enumerate((G @ G.T, G.T @ G)):
            self.C[i] += (1 - beta) / (1 - beta**self.t) * (gram - self.C[i])
        period = self.hp["refresh_every"]
        if self.hp["first"] == "skip":  # the skipped call chooses the first basis and is not counted
            due, initial = (self.t - 1) % period == 0, self.t == 1
        else:
            due, initial = self.t % period == 0, self.t <= 2 * period
        for i in self.modes if due else ():
            self.refresh(i, initial)
        if not self.lagged:
            self.apply(G)

    def apply(self, G):
        (b1, b2), lr, decay = self.hp["betas"], self.hp["lr"], self.hp["weight_decay"]
        self.updates += 1
        X = self.Q[0].T @ G @ self.Q[1]
        self.m += (1 - b1) / (1 - b1**self.updates) * (X - self.m)
        self.v += (1 - b2) / (1 - b2**self.updates) * (X**2 - self.v)
        m = b1 * self.m + (1 - b1) * X if self.hp["nesterov"] else self.m
        U = self.Q[0] @ (m / (self.v.sqrt() + self.hp["eps"])) @ self.Q[1].T
        self.W -= lr * decay * self.W
        self.W -= lr * U

    def refresh(self, i, initial):
        old, d = self.Q[i], len(self.Q[i])
        C = self.C[i] + 1e-6 * self.C[i].trace() / d * torch.diag(torch.arange(d, 0, -1) / d)
        if initial or self.hp["refresh_by"] == "eigh":
            new = torch.linalg.eigh(C).eigenvectors.flip(1)
        else:
            order = torch.diag(old.T @ C @ old).argsort(descending=True)
            new = torch.linalg.qr(C @ old[:, order]).Q
        R = new.T @ old
        self.m = R @ self.m if i == 0 else self.m @ R.T
        self.v = R**2 @ self.v if i == 0 else self.v @ (R**2).T
        self.Q[i] = new
