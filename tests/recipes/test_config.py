"""From the command line and YAML files to a typed config."""

from typing import Literal, Optional

import pytest
import torch
import yaml

import command
import optimizer
from convert import convert
from errors import RecipeError


def resolve(*argv):
    return command.resolve(command.parse(argv))


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("3e-3", float, 0.003),  # what PyYAML reads as text
        (1, float, 1.0),
        ("1e3", int, 1000),
        ("none", int | None, None),
        (None, Optional[float], None),  # noqa: UP045 -- the older spelling is found in signatures too
        ("512", int | None, 512),
        ("0.9,0.95", tuple[float, float], (0.9, 0.95)),
        ([0.9, "95e-2"], tuple[float | torch.Tensor, float | torch.Tensor], (0.9, 0.95)),
        ("[0.9, 0.95]", tuple[float, ...] | None, (0.9, 0.95)),
        ("True", bool, True),
        ("qr", Literal["qr", "eigh"], "qr"),
        (123, str, "123"),
    ],
)
def test_values_take_the_annotated_type(value, hint, expected):
    converted = convert(value, hint, "key")
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("abc", float),
        (True, float),
        (True, int),
        (1.5, int),
        ("1.5", int),
        (1, bool),
        ("yes", bool),
        (False, str),  # YAML's reading of an unquoted `no`
        ("svd", Literal["qr", "eigh"]),
        ("0.9", tuple[float, float]),
        (None, int),
        ("x", int | None),
        ({}, float),
    ],
)
def test_values_of_another_type_are_refused(value, hint):
    with pytest.raises(RecipeError, match=r"key: expected .*, got "):
        convert(value, hint, "key")


def test_both_forms_of_an_override_are_the_same():
    assert resolve("--train.steps=7", "--optimizer.lr=3e-3") == resolve("--train.steps", "7", "--optimizer.lr", "3e-3")


def test_later_config_files_and_then_the_command_line_win(tmp_path):
    (tmp_path / "first.yaml").write_text("seed: 3\ntrain: {steps: 5, batch_size: 2}\noptimizer: {lr: 3e-3}\n")
    (tmp_path / "second.yaml").write_text("train: {steps: 6}\n")
    files = [f"--config={tmp_path / name}.yaml" for name in ("first", "second")]
    config = resolve(*files, "--seed=4")
    assert (config.train.steps, config.train.batch_size, config.seed) == (6, 2, 4)
    assert config.optimizer.arguments["lr"] == 0.003
    assert config.name == "first"


def test_the_lr_comes_from_the_most_specific_place(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "CONFIGS", tmp_path)

    def lr(*argv):
        return resolve("--optimizer", "torch.sgd", *argv).optimizer.arguments.get("lr")

    assert lr() is None
    (tmp_path / "optim_torch.sgd.yaml").write_text("optimizer: {name: torch.sgd, lr: 0.1, momentum: 0.9}\n")
    assert lr() == 0.1
    (tmp_path / "task.yaml").write_text("tuned_lr: {torch.sgd: 2e-1}\n")
    task = f"--config={tmp_path / 'task.yaml'}"
    assert lr(task) == 0.2
    assert lr(task, "--optimizer.lr=0.3") == 0.3
    assert resolve(task, "--compare=torch.SGD").compare[0].arguments == {"lr": 0.2, "momentum": 0.9}


def test_compare_takes_commas_repeats_and_none():
    names = [spec.name for spec in resolve("--compare", "torch.sgd,torch.adam", "--compare=torch.muon").compare]
    assert names == ["torch.sgd", "torch.adam", "torch.muon"]
    assert resolve("--compare=none").compare == ()


def test_the_main_optimizer_is_not_compared_with_itself():
    assert resolve("--optimizer.name=torch.sgd", "--compare=torch.sgd").compare == ()


def test_a_variant_is_its_class_with_the_arguments_of_its_own_file(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "CONFIGS", tmp_path)
    (tmp_path / "optim_heavy.yaml").write_text("optimizer: {name: heavy, class: torch.SGD, momentum: 0.9}\n")
    (tmp_path / "optim_torch.sgd.yaml").write_text("optimizer: {name: torch.sgd, weight_decay: 0.5}\n")
    (tmp_path / "task.yaml").write_text("tuned_lr: {heavy: 0.2, torch.sgd: 0.1}\n")
    config = resolve(f"--config={tmp_path / 'task.yaml'}", "--optimizer=heavy", "--compare=torch.sgd")
    assert [spec.name for spec in config.optimizers] == ["heavy", "torch.sgd"]
    assert [spec.arguments for spec in config.optimizers] == [
        {"momentum": 0.9, "lr": 0.2},
        {"weight_decay": 0.5, "lr": 0.1},
    ]
    built = optimizer.build(config.optimizer, torch.nn.Linear(2, 2))
    assert type(built) is torch.optim.SGD
    assert built.defaults["momentum"] == 0.9


def test_the_reference_variant_has_the_arguments_of_the_soap_authors_code():
    spec = resolve("--optimizer=soap_reference").optimizer
    assert spec.class_name == "soap"
    built = optimizer.build(spec, torch.nn.Linear(3, 2)).defaults
    expected = {"lr": 3e-3, "betas": (0.95, 0.95), "eps": 1e-8, "weight_decay": 0.01, "refresh_every": 10}
    assert {key: built[key] for key in expected} == expected
    assert built["max_block_size"] is built["one_sided_aspect"] is None


@pytest.mark.parametrize("name", ["torch.adamw", "soap_reference"])
def test_a_resolved_config_resolves_to_itself(tmp_path, name):
    config = resolve(f"--optimizer.name={name}", "--optimizer.betas=0.8,0.9", "--compare=torch.muon")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(command.as_dict(config)))
    assert resolve(f"--config={path}") == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim.lr=1"], "unknown key 'optim.lr', did you mean 'optimizer.lr'?"),
        (["--train.stpes=1"], "unknown key 'train.stpes', did you mean 'train.steps'?"),
        (["--optimizer.name=torch.adamw", "--optimizer.wight_decay=0"], "did you mean 'weight_decay'?"),
        (["--optimizer.name=sopa"], "did you mean 'soap'?"),
        (["--optimizer.name=mine", "--optimizer.class=sopa"], "optimizer.class: expected one of"),
        (["--optimizer.name=adamw", "--optimizer.class=soap"], "a variant of soap needs a name of its own"),
        (["--optimizer.name=../x", "--optimizer.class=soap"], "a variant of soap needs a name of its own"),
        (["--task=llm"], "task: expected one of autoencoder, lm, pinn, vision, got 'llm', did you mean 'lm'?"),
        (["--schedule.kind=cosin"], "got 'cosin', did you mean 'cosine'?"),
        (["--train.steps=many"], "train.steps: expected int, got 'many'"),
        (["--train.steps=0"], "train.steps must be >= 1, got 0"),
        (["--optimizer.name=torch.adamw", "--optimizer.lr=-1"], "optimizer torch.adamw: Invalid learning rate: -1.0"),
        (["--optimizer.name=torch.adamw", "--optimizer.betas=0.9"], "optimizer.betas: expected tuple"),
        (["--model.heads=3"], "model.width=64 is not a multiple of model.heads=3"),
        (["--config=absent.yaml"], "cannot read 'absent.yaml': No such file or directory"),
        (["--train.steps"], "--train.steps needs a value"),
        (["steps=3"], "expected an option, got 'steps=3'"),
        (["--train=3"], "train: expected a section with keys, got '3'"),
    ],
)
def test_a_mistake_is_named_with_the_nearest_right_word(argv, message):
    with pytest.raises(RecipeError) as error:
        resolve(*argv)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_yaml_file_is_one_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("train: {steps: 5\nseed: [")
    with pytest.raises(RecipeError, match=r"bad.yaml' is no valid YAML: .* line 2") as error:
        resolve(f"--config={tmp_path / 'bad.yaml'}")
    assert "\n" not in str(error.value)


def test_help_lists_every_key_and_every_argument_of_the_optimizer():
    text = command.help_text(command.parse(["--optimizer.name=torch.adamw", "--help"]))
    for key in command.flat(command.as_dict(resolve())):
        if not key.startswith(("optimizer", "compare")):
            assert f"--{key} " in text, key
    for key in optimizer.arguments("torch.adamw"):
        assert f"--optimizer.{key} " in text, key


def test_the_loop_gives_params_and_module_itself():
    for name in optimizer.classes():
        assert not {"params", "module", "self", "args", "kwargs"} & set(optimizer.arguments(name)), name


@pytest.mark.parametrize("path", sorted(command.CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_resolves_and_says_what_it_is_for(path):
    if path.name != "wandb_sweep.yaml":  # that one is for wandb: test_wandb.py
        resolve(f"--config={path}")
    purpose, launch, expected = path.read_text().splitlines()[:3]
    assert purpose.startswith("# ")
    assert "recipes/train.py" in launch
    assert f"configs/{path.name}" in launch
    assert expected.startswith("# Expected: ")
