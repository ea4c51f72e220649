"""Hugging Face's Trainer trains as a plain loop does, by each of its ways to take an optimizer."""

import inspect

import pytest
import torch

import cases
import secondorder
from secondorder.trainers import for_trainer

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

slow = pytest.mark.integrations
BATCH = 8
OPTIONS = dict(lr=1e-2, weight_decay=0.1, refresh_every=3, statistics_every=1)
NO_DROPOUT = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
GRADIENT = [secondorder.SOAP, secondorder.SIRFShampoo]
LAYER = [secondorder.KFAC, secondorder.SINGD]


def options(cls, **more):
    """Those that the class has."""
    known = inspect.signature(cls).parameters
    return {name: value for name, value in {**OPTIONS, **more}.items() if name in known}


def arguments(folder, **more):
    usual = dict(
        max_steps=8,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        use_cpu=True,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return transformers.TrainingArguments(str(folder), **{**usual, **more})


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def loop(model, opt, rows, steps=8, accumulation=1):
    """What `Trainer` does, written out."""
    model.train()
    for step in range(steps):
        start = step * BATCH * accumulation
        chosen = [rows[(start + i) % len(rows)]["input_ids"] for i in range(BATCH * accumulation)]
        count = sum(row.numel() for row in chosen)
        for i in range(accumulation):
            ids = torch.stack(chosen[i * BATCH : (i + 1) * BATCH])
            model(input_ids=ids, labels=ids, num_items_in_batch=count).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()


def groups(model, weight_decay):
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("cls", [*GRADIENT, *LAYER])
def test_all_of_gpt2_is_preconditioned_but_vectors_without_layer_statistics(gpt2, cls):
    model = gpt2()
    rows = cls(model.parameters(), module=model).coverage()
    left = [row for row in rows if row.treatment != cls.__name__]
    assert not left or (cls in GRADIENT and all(len(row.shape) == 1 for row in left))


def test_factory_splits_groups_as_trainer_does(gpt2):
    model = gpt2()
    opt = for_trainer(secondorder.KFAC)()(model, lr=0.5, weight_decay=0.25)
    for ours, theirs in zip(opt.param_groups, groups(model, 0.25), strict=True):
        assert {id(p) for p in ours["params"]} == {id(p) for p in theirs["params"]}
        assert (ours["lr"], ours["weight_decay"]) == (0.5, theirs["weight_decay"])


def test_factory_leaves_out_frozen_parameters_and_empty_groups():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    for p in (model[0].bias, model[1].bias):
        p.requires_grad_(False)
    opt = for_trainer(secondorder.SOAP)()(model)
    assert [group["params"] for group in opt.param_groups] == [[model[1].weight]]


@slow
@pytest.mark.parametrize("cls", [secondorder.SOAP, secondorder.KFAC, secondorder.SIRFShampoo])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_trains_as_a_loop_given_as_optimizers(gpt2, rows, tmp_path, cls, accumulation):
    ours, theirs = gpt2(**NO_DROPOUT), gpt2(**NO_DROPOUT)
    opt = cls(ours.named_parameters(), module=ours, **options(cls))
    settings = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    transformers.Trainer(ours, settings, train_dataset=rows, optimizers=(opt, None)).train()
    assert opt.param_groups[0]["param_names"]
    loop(theirs, cls(theirs.parameters(), module=theirs, **options(cls)), rows, accumulation=accumulation)
    cases.assert_same_bits(ours.parameters(), theirs.parameters())


@slow
@pytest.mark.parametrize("cls", GRADIENT)
def test_trains_as_a_loop_given_as_class_and_arguments(gpt2, rows, tmp_path, cls):
    """Weight decay is then that of `TrainingArguments`."""
    ours, theirs = gpt2(**NO_DROPOUT), gpt2(**NO_DROPOUT)
    given = (cls, options(cls))
    settings = arguments(tmp_path, weight_decay=0.2)
    transformers.Trainer(ours, settings, train_dataset=rows, optimizer_cls_and_kwargs=given).train()
    loop(theirs, cls(groups(theirs, 0.2), **options(cls)), rows)
    cases.assert_same_bits(ours.parameters(), theirs.parameters())


@pytest.mark.parametrize("cls", [secondorder.KFAC, pytest.param(secondorder.SINGD, marks=slow)])
def test_trains_as_a_loop_given_as_factory(gpt2, rows, tmp_path, cls):
    ours, theirs = gpt2(**NO_DROPOUT), gpt2(**NO_DROPOUT)
    given = (for_trainer(cls), options(cls))
    transformers.Trainer(ours, arguments(tmp_path), train_dataset=rows, optimizer_cls_and_kwargs=given).train()
    loop(theirs, cls(groups(theirs, OPTIONS["weight_decay"]), module=theirs, **options(cls)), rows)
    cases.assert_same_bits(ours.parameters(), theirs.parameters())


@slow
@pytest.mark.parametrize("cls", [*GRADIENT, *LAYER])
@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_trains_in_bfloat16_with_state_in_float32(gpt2, rows, tmp_path, cls, precision):
    model = gpt2()
    if precision == "weights":
        model.bfloat16()
    settings = arguments(tmp_path, bf16=precision == "autocast", max_steps=30, logging_steps=5)
    given = (for_trainer(cls), options(cls, lr=3e-2))
    trainer = transformers.Trainer(model, settings, train_dataset=rows, optimizer_cls_and_kwargs=given)
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    state = cases.flat_state(trainer.optimizer.optimizer)
    assert state and {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}


@slow
@pytest.mark.parametrize("cls", [*GRADIENT, *LAYER])
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(gpt2, rows, tmp_path, cls):
    """With dropout: the random state is Trainer's to restore."""

    def trainer(folder, **more):
        settings = arguments(tmp_path / folder, save_strategy="steps", save_steps=5, max_steps=9, **more)
        given = (for_trainer(cls), options(cls))
        return transformers.Trainer(gpt2(), settings, train_dataset=rows, optimizer_cls_and_kwargs=given)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert resumed.state.global_step == 9
    cases.assert_same_bits(whole.model.parameters(), resumed.model.parameters())
    states = [cases.flat_state(t.optimizer.optimizer) for t in (whole, resumed)]
    cases.assert_same_state(*states)


@slow
@pytest.mark.parametrize("cls", LAYER)
def test_activation_checkpointing_changes_no_bit(gpt2, rows, tmp_path, cls):
    """Layers run forward twice then, and are counted once."""
    found = []
    for checkpointing in (False, True):
        model = gpt2()
        settings = arguments(tmp_path, gradient_checkpointing=checkpointing)
        given = (for_trainer(cls), options(cls))
        transformers.Trainer(model, settings, train_dataset=rows, optimizer_cls_and_kwargs=given).train()
        assert model.is_gradient_checkpointing == checkpointing
        found.append(list(model.parameters()))
    cases.assert_same_bits(*found)


@slow
@pytest.mark.parametrize(("cls", "backend"), [(secondorder.SOAP, "eager"), (secondorder.KFAC, "aot_eager")])
def test_compiled_model_trains_as_an_eager_one(gpt2, rows, tmp_path, cls, backend):
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = gpt2(**NO_DROPOUT)
        settings = arguments(tmp_path, torch_compile=compiled, torch_compile_backend=backend if compiled else None)
        given = (for_trainer(cls), options(cls))
        trainer = transformers.Trainer(model, settings, train_dataset=rows, optimizer_cls_and_kwargs=given)
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule) == compiled
        treated = {row.treatment for row in trainer.optimizer.optimizer.coverage()}
        assert cls is not secondorder.KFAC or treated == {"KFAC"}
        found.append(list(model.parameters()))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@slow
def test_example_learns(example):
    trainer = example("hf_trainer.py")["trainer"]
    assert losses(trainer)[-1] < 0.5 * losses(trainer)[0]
