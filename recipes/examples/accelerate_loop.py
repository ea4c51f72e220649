"""A loop on Accelerate with KFAC: the optimizer is made for the network itself, then both are prepared."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secondorder import KFAC

inputs = torch.randn(512, 8)
data = DataLoader(TensorDataset(inputs, inputs.prod(1, keepdim=True).sign()), batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
optimizer = KFAC(model.parameters(), lr=1e-2, module=model)

accelerator = Accelerator(gradient_accumulation_steps=2)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
losses = []
for x, y in (batch for _ in range(20) for batch in data):
    with accelerator.accumulate(model):
        loss = nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
