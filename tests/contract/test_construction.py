"""The constructor: what it accepts, what it refuses and in which words, and what it says about itself."""

import inspect
import math
import pydoc

import numpy as np
import pytest
import torch
from torch import nn

import cases
import secondorder
from cases import parameters
from secondorder.sharding.choice import Sharing

# torch's own tests construct with `params=None` and expect the complaint about the hyper-parameter.
BAD_VALUES = [
    (dict(lr=-1.0), "Invalid learning rate: -1.0"),
    (dict(lr=math.nan), "Invalid learning rate: nan"),
    (dict(lr=math.inf), "Invalid learning rate: inf"),
    (dict(lr=torch.tensor([0.1, 0.2])), "Tensor lr must be 1-element"),
    (dict(lr=torch.tensor(-0.5)), "Invalid learning rate: -0.5"),
    (dict(lr=torch.tensor(math.nan)), "Invalid learning rate: nan"),
    (dict(betas=(1.0, 0.9)), "Invalid beta parameter at index 0: 1.0"),
    (dict(betas=(-0.1, 0.9)), "Invalid beta parameter at index 0: -0.1"),
    (dict(betas=(0.9, math.nan)), "Invalid beta parameter at index 1: nan"),
    (dict(betas=(0.9,)), "Invalid betas"),
    (dict(betas=0.9), "Invalid betas: 0.9"),
    (dict(eps=-1e-8), "Invalid epsilon value: -1e-08"),
    (dict(eps=math.nan), "Invalid epsilon value: nan"),
    (dict(weight_decay=-0.1), "Invalid weight_decay value: -0.1"),
    (dict(weight_decay=math.nan), "Invalid weight_decay value: nan"),
]

OBJECTS = ("module", "grad_scaler", *Sharing._fields)  # arguments that are no value of a group


def options(cls):
    return {**cls.shared_options, **cls.own_options}


def public_optimizers():
    public = (getattr(secondorder, name) for name in secondorder.__all__)
    return {item for item in public if inspect.isclass(item) and issubclass(item, torch.optim.Optimizer)}


def test_every_public_optimizer_is_under_contract():
    assert {case.cls for case in cases.OPTIMIZERS} == public_optimizers()


class TestValues:
    @pytest.mark.parametrize(("bad", "message"), BAD_VALUES, ids=str)
    def test_bad_value_is_refused_before_anything_else(self, case, bad, message):
        with pytest.raises(ValueError) as error:
            case.make(None, **bad)
        assert message in str(error.value)

    @pytest.mark.parametrize("lr", ["0.1", None, True])
    def test_lr_must_be_a_number(self, case, lr):
        with pytest.raises(TypeError, match="lr must be a number"):
            case.make(None, lr=lr)

    def test_bad_option_is_refused_by_name_value_and_what_is_allowed(self, case):
        for name, option in options(case.cls).items():
            for bad in (math.nan, -1, "nonsense", object()):
                with pytest.raises(ValueError) as error:
                    case.make(None, **{name: bad})
                for part in (name, repr(bad), option.allowed):
                    assert part in str(error.value)

    def test_same_checks_hold_in_a_group(self, case):
        for bad, message in BAD_VALUES:
            with pytest.raises(ValueError) as error:
                case.make([{"params": parameters(), **bad}])
            assert message in str(error.value)
        for name in options(case.cls):
            if name != "module":
                with pytest.raises(ValueError, match=name):
                    case.make([{"params": parameters(), name: "nonsense"}])

    def test_boundaries_are_allowed(self, case):
        optimizer = case.make(parameters(), lr=0.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
        assert optimizer.param_groups[0]["lr"] == 0.0
        case.make(parameters(), lr=1, betas=[0.9, 0.99])

    def test_numbers_of_numpy_are_numbers(self, case):
        """Sweeps make them."""
        given = dict(lr=np.float32(0.5), weight_decay=np.float64(0.25), eps=np.float32(1e-6))
        given["betas"] = tuple(np.array([0.5, 0.75]))
        if case.takes("refresh_every"):
            given.update(refresh_every=np.int64(5), max_block_size=np.int32(4))
        params = parameters()
        optimizer = case.make(params, **given)
        cases.train(optimizer, params, range(3))
        for name in ("lr", "weight_decay"):
            assert optimizer.param_groups[0][name] == given[name]

    def test_unknown_keyword_is_a_type_error_with_a_hint(self, case):
        with pytest.raises(TypeError, match="'maximise'.*did you mean 'maximize'"):
            case.make(parameters(), maximise=True)
        for name in ("fused", "foreach", "capturable", "differentiable", "learning_rate"):
            with pytest.raises(TypeError, match=name):
                case.make(parameters(), **{name: True})

    def test_only_lr_and_betas_are_positional(self, case):
        case.build(parameters(), 0.1, (0.9, 0.99))
        with pytest.raises(TypeError):
            case.build(parameters(), 0.1, (0.9, 0.99), 1e-8)


class TestParams:
    def test_no_parameters(self, case):
        with pytest.raises(ValueError, match="empty parameter list"):
            case.make([])

    def test_a_tensor_a_module_a_dict_are_no_parameters(self, case):
        with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
            case.make(torch.zeros(3, requires_grad=True))
        with pytest.raises(TypeError, match=r"\.parameters\(\)"):
            case.make(nn.Linear(2, 2))
        with pytest.raises(TypeError, match="list of dicts"):
            case.make({"params": parameters()})

    def test_non_leaf(self, case):
        with pytest.raises(ValueError, match="non-leaf"):
            case.make([parameters()[0] * 2])

    def test_one_parameter_in_two_groups(self, case):
        params = parameters()
        with pytest.raises(ValueError, match="more than one parameter group"):
            case.make([{"params": params}, {"params": params[:1]}])

    def test_complex_parameters_are_refused_in_words(self, case):
        with pytest.raises(TypeError, match=f"{case.cls.__name__}.*complex"):
            case.make([nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))])

    def test_generators_and_single_tensors_are_accepted(self, case):
        case.make(p for p in parameters())
        assert len(case.make([{"params": parameters()[0]}]).param_groups[0]["params"]) == 1
        case.make([{"params": []}, {"params": parameters()}])

    def test_parameter_given_twice_in_a_group_moves_once(self, case):
        once, twice = parameters(), parameters()
        a = case.make(once)
        with pytest.warns(UserWarning, match="duplicate"):
            b = case.make([*twice, twice[0]])
        cases.train(a, once, range(5))
        cases.train(b, twice, range(5))
        cases.assert_same_bits(once, twice)


class TestDescription:
    def test_signature_lists_every_option_with_its_default(self, case):
        optimizer = case.build(parameters())
        for signature in (inspect.signature(case.cls), inspect.signature(case.cls.__init__)):
            assert all(p.kind is not p.VAR_KEYWORD for p in signature.parameters.values())
            for name, option in case.cls.shared_options.items():
                parameter = signature.parameters[name]
                assert parameter.kind is parameter.KEYWORD_ONLY
                assert parameter.default == option.default
            for name, parameter in signature.parameters.items():
                if name not in ("self", "params", *OBJECTS):
                    assert optimizer.defaults[name] == parameter.default, name

    def test_help_documents_every_argument(self, case):
        text = pydoc.render_doc(case.cls, renderer=pydoc.plaintext)
        assert "See below" not in text
        for name in inspect.signature(case.cls).parameters:
            assert f"{name}: " in text, name

    def test_defaults_train(self, case):
        """Every class has a default learning rate that is a sensible start."""
        model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))
        x = torch.randn(64, 6)
        y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], 1)
        optimizer = case.build(model.parameters())
        losses = []
        for _ in range(150):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    def test_repr_is_short(self, case):
        text = repr(case.make(parameters()))
        assert text.startswith(case.cls.__name__)
        assert len(text) < 1000

    def test_betas_are_in_defaults(self, case):
        """OneCycleLR and CyclicLR look for them there."""
        assert "betas" in case.make(parameters()).defaults
