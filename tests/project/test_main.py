"""`python -m secondorder`: a complete report, and a verdict that can be negative."""

import inspect

import torch

import secondorder
import secondorder_kernels
from secondorder import __main__ as report


class Still(torch.optim.SGD):
    """Does not move."""

    def step(self, closure=None):
        return None


class Diverging(torch.optim.SGD):
    """Goes uphill."""

    def __init__(self, params, lr):
        super().__init__(params, lr=1e3, maximize=True)


class Raising(torch.optim.SGD):
    """Cannot be constructed."""

    def __init__(self, params, lr):
        raise RuntimeError("no such instruction")


def test_report_names_every_method_and_kernel_and_passes(capsys) -> None:
    assert report.main() == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    for name in secondorder.__all__:
        cls = getattr(secondorder, name)
        if inspect.isclass(cls):
            assert f"{name:<28} {inspect.getdoc(cls).splitlines()[0].removeprefix(name + ': ')}" in printed
            assert f"{name:<28} ok" in printed
    for operation, path, reason in secondorder_kernels.explain_all():
        assert operation in printed and path in printed and reason in printed


def test_problem_is_solved_to_a_quarter_by_a_working_method() -> None:
    before, after, steps = report.train(secondorder.SOAP, seconds=60.0)
    assert steps == report.STEPS
    assert after < 0.25 * before


def test_exit_code_is_1_when_a_method_does_not_learn(monkeypatch, capsys) -> None:
    for cls in (Still, Diverging, Raising):
        monkeypatch.setattr(report, "methods", lambda cls=cls: [secondorder.AdamW, cls])
        assert report.main() == 1
        printed = capsys.readouterr().out
        assert f"{'AdamW':<28} ok" in printed
        assert f"{cls.__name__:<28} FAILED" in printed
