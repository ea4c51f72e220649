"""The base class of all optimizers of the suite, for those who add a method."""

from secondorder._optimizer import PreconditionedOptimizer as PreconditionedOptimizer

__all__ = ["PreconditionedOptimizer"]
