"""LoRA adapters by PEFT, the network itself frozen."""

import inspect

import pytest
import torch
from torch import nn

import cases
import secondorder
from secondorder.trainers import for_trainer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

slow = pytest.mark.integrations
OPTIONS = dict(lr=3e-2, refresh_every=3, statistics_every=1)
CLASSES = [secondorder.SOAP, secondorder.KFAC, secondorder.SINGD]


def options(cls):
    """Those that the class has."""
    known = inspect.signature(cls).parameters
    return {name: value for name, value in OPTIONS.items() if name in known}


@pytest.fixture
def adapted(gpt2):
    """Makes a network with adapters, always with the same parameters."""

    def make():
        config = peft.LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True,
            lora_dropout=0.1,
            task_type="CAUSAL_LM",
        )
        return peft.get_peft_model(gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0), config)

    return make


def frozen(model):
    return [p for p in model.parameters() if not p.requires_grad]


def train(model, opt, rows, steps):
    """Returns the losses; dropout depends on the step alone."""
    found = []
    model.train()
    for step in steps:
        torch.manual_seed(step)
        ids = torch.stack([row["input_ids"] for row in rows[step % 4 :: 4]])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("cls", CLASSES)
def test_adapters_are_preconditioned_and_the_network_is_left_alone(adapted, rows, cls):
    model = adapted()
    before = cases.values(frozen(model))
    opt = cls(model.parameters(), module=model, **options(cls))
    for row in opt.coverage():
        assert row.treatment == (cls.__name__ if "lora_" in row.name else "frozen"), row
    losses = train(model, opt, rows, range(40))
    assert losses[-1] < 0.65 * losses[0]
    cases.assert_same_bits(frozen(model), before)
    assert all(p.requires_grad for p in opt.state)
    assert {row.treatment for row in opt.coverage()} == {cls.__name__, "frozen"}


@slow
def test_statistics_of_an_adapter_are_those_of_its_layer(adapted, rows):
    """A and G from the layer's own inputs and output gradients: means over tokens of the mean loss."""
    model = adapted().double()
    opt = secondorder.KFAC(model.parameters(), module=model, lr=1e-3, sharing="expand", refresh_every=1)
    train(model, opt, rows, range(2))  # the second matrix is zero at first
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" in name}
    seen = {}

    def keep(module, args, out):
        out.retain_grad()
        seen[module] = args[0].detach().flatten(0, 1), out

    for layer in layers.values():
        layer.register_forward_hook(keep)
    opt = secondorder.KFAC(model.parameters(), module=model, lr=0.0, sharing="expand", refresh_every=1)
    ids = torch.stack([row["input_ids"] for row in rows[:8]])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    opt.step()
    terms, factors = ids[:, 1:].numel(), opt.factors()
    for name, layer in layers.items():
        a, g = seen[layer][0], seen[layer][1].grad.flatten(0, 1)
        a = a[(g != 0).any(1)]
        output, inputs = factors[f"{name}.weight"]["blocks"][0]["factors"]
        torch.testing.assert_close(inputs, a.T @ a / len(a))
        torch.testing.assert_close(output, terms * g.T @ g)


@slow
@pytest.mark.parametrize("cls", CLASSES)
def test_adapter_saved_and_resumed_goes_on_with_the_same_bits(adapted, gpt2, rows, tmp_path, cls):
    model = adapted()
    opt = cls(model.parameters(), module=model, **options(cls))
    train(model, opt, rows, range(5))
    model.save_pretrained(tmp_path)
    torch.save(opt.state_dict(), tmp_path / "optimizer.pt")
    train(model, opt, rows, range(5, 9))

    base = gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    resumed = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    other = cls(resumed.parameters(), module=resumed, **options(cls))
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    train(resumed, other, rows, range(5, 9))
    cases.assert_same_bits(model.parameters(), resumed.parameters())
    cases.assert_same_state(cases.flat_state(opt), cases.flat_state(other))


@slow
def test_trainer_resumes_an_adapter_with_the_same_bits(adapted, rows, tmp_path):
    def trainer(folder):
        settings = transformers.TrainingArguments(
            str(tmp_path / folder),
            max_steps=8,
            save_steps=4,
            per_device_train_batch_size=8,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        given = (for_trainer(secondorder.KFAC), options(secondorder.KFAC))
        return transformers.Trainer(adapted(), settings, train_dataset=rows, optimizer_cls_and_kwargs=given)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    cases.assert_same_bits(whole.model.parameters(), resumed.model.parameters())
    states = [cases.flat_state(t.optimizer.optimizer) for t in (whole, resumed)]
    cases.assert_same_state(*states)
