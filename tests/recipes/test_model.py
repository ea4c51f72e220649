"""The GPT, the schedule and the optimizers' parameter groups."""

import math

import pytest
import torch
from torch import nn

import optimizer
import schedule
from config import Schedule, Spec
from gpt import GPT, Attention


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_the_softmax_of_scaled_products_masked_where_causal(causal):
    torch.manual_seed(0)
    attention = Attention(width=12, heads=3, dropout=0.0, causal=causal).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (3, 4)) for part in attention.qkv(x).split(12, dim=-1))  # (B, T, H, C/H)
    scores = torch.einsum("bthc,bshc->bhts", q, k) / math.sqrt(4)
    if causal:
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf)
    weights = scores.softmax(-1)
    expected = attention.out(torch.einsum("bhts,bshc->bthc", weights, v).flatten(-2))
    torch.testing.assert_close(attention(x), expected, rtol=1e-12, atol=1e-12)


def test_no_logit_depends_on_a_later_token():
    torch.manual_seed(0)
    model = GPT(vocab_size=11, context=6, layers=2, heads=2, width=8)
    tokens = torch.randint(11, (1, 6))
    changed = tokens.clone()
    changed[0, 4] = (tokens[0, 4] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_a_fresh_model_predicts_every_token_alike():
    torch.manual_seed(0)
    logits = GPT(vocab_size=256, context=16, layers=2, heads=2, width=32)(torch.randint(256, (4, 16)))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(256, (64,)))
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


def test_tied_weights_are_one_parameter():
    tied, free = (GPT(vocab_size=50, context=8, layers=1, heads=1, width=8, tied=tied) for tied in (True, False))
    assert tied.head.weight is tied.token_embedding.weight
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tied, free)]
    assert sizes[1] - sizes[0] == 50 * 8


def trajectory(scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


def sgd(lr):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_decay_is_torchs_own(kind):
    ours = torch.optim.lr_scheduler.LambdaLR(sgd(0.4), schedule.factor(Schedule(kind=kind, final=0.25), 21))
    if kind == "cosine":
        torchs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd(0.4), T_max=20, eta_min=0.1)
    else:
        torchs = torch.optim.lr_scheduler.LinearLR(sgd(0.4), start_factor=1.0, end_factor=0.25, total_iters=20)
    assert trajectory(ours, 21) == pytest.approx(trajectory(torchs, 21), rel=1e-9)


def test_the_warm_up_rises_linearly_to_lr_and_constant_stays_there():
    multiple = schedule.factor(Schedule(kind="constant", warmup=4), 10)
    assert [multiple(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["torch.adamw", "torch.muon", "soap", "adamw"])
def test_every_parameter_is_in_one_group_and_vectors_do_not_decay(name):
    model = GPT(vocab_size=20, context=8, layers=1, heads=1, width=8, tied=True)
    built = optimizer.build(Spec(name, {"weight_decay": 0.2}), model)
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in built.param_groups) == len(decay) == len(list(model.parameters()))
    for parameter in model.parameters():
        assert decay[id(parameter)] == (0.2 if parameter.ndim >= 2 else 0.0)


def test_state_bytes_count_the_two_averages_of_adamw():
    model = nn.Linear(7, 5)
    built = optimizer.build(Spec("torch.adamw", {}), model)
    model(torch.ones(1, 7)).sum().backward()
    built.step()
    assert optimizer.state_bytes(built) == 2 * 4 * (35 + 5) + 2 * 4  # two averages, and a step count each


def test_muon_moves_hidden_matrices_and_adamw_the_rest_as_torch_does():
    torch.manual_seed(0)
    start = GPT(vocab_size=20, context=8, layers=1, heads=1, width=8)
    models = [GPT(vocab_size=20, context=8, layers=1, heads=1, width=8) for _ in range(2)]
    for model in models:
        model.load_state_dict(start.state_dict())
    ours = optimizer.build(Spec("torch.muon", {"lr": 0.01}), models[0])
    named = dict(models[1].named_parameters())
    hidden = {n for n, p in named.items() if n.startswith("blocks") and p.ndim == 2}
    rest = [named[n] for n in named if n not in hidden]
    settings = {"lr": 0.01, "weight_decay": 0.01}
    muon = torch.optim.Muon([named[n] for n in hidden], momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings)
    groups = [{"params": [p for p in rest if p.ndim >= 2]}, {"params": [p for p in rest if p.ndim < 2]}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), **settings)
    adamw.param_groups[1]["weight_decay"] = 0.0
    tokens = torch.randint(20, (2, 8))
    for _ in range(3):
        for model in models:
            model.zero_grad()
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        for built in (ours, muon, adamw):
            built.step()
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=0, atol=0, msg=name)
