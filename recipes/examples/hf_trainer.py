"""Hugging Face Trainer with KFAC on a small GPT-2; methods without layer statistics need no factory: (SOAP, {...})."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from secondorder import KFAC
from secondorder.trainers import for_trainer

rows = (torch.arange(24) * 3 + torch.arange(32)[:, None]) % 32
data = [{"input_ids": row, "labels": row} for row in rows]
size = dict(vocab_size=32, n_positions=24, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
settings = dict(max_steps=40, per_device_train_batch_size=8, logging_steps=10, save_strategy="no", report_to="none")
arguments = TrainingArguments(tempfile.mkdtemp(), **settings)
optimizer = (for_trainer(KFAC), {"lr": 3e-2})
model = GPT2LMHeadModel(GPT2Config(**size))
trainer = Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=optimizer)
trainer.train()
