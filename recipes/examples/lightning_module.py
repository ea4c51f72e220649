"""A LightningModule with KFAC: it is its own `module`."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secondorder import KFAC


class Regression(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.losses = []

    def training_step(self, batch, index):
        loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return KFAC(self.parameters(), lr=1e-2, module=self)


inputs = torch.randn(512, 8)
data = DataLoader(TensorDataset(inputs, inputs.prod(1, keepdim=True).sign()), batch_size=64, shuffle=True)
model = Regression()
lightning.Trainer(max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False).fit(model, data)
print(f"loss {model.losses[0]:.3f} -> {model.losses[-1]:.3f}")
