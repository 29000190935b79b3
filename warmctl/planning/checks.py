"""Arguments of `plan` and `rate_range`: each error names the argument, what was given and what to do."""

from __future__ import annotations

from typing import Any

from torch.optim import LBFGS, Optimizer

from warmctl import arguments
from warmctl.numeric import is_count, is_number
from warmctl.proxy import OptimizerProxy
from warmctl.vectors import local


def optimizer(given: Any, model: Any) -> Optimizer:
    """The plain optimizer, which holds trainable parameters of `model`; raises if it is none."""
    base = given.base if isinstance(given, OptimizerProxy) else given
    if not isinstance(base, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(given).__name__}")
    if isinstance(base, LBFGS):
        raise TypeError("optimizer is LBFGS, which chooses its own step length: there is no learning rate to plan")
    arguments.wrapped(base, model)
    held = [p for group in base.param_groups for p in group["params"]]
    if any(local(p) is not p for p in held):
        raise ValueError("model is sharded: plan on one process, before fully_shard")
    return base


def loss_function(call: str, given: Any) -> None:
    """Raise unless `loss_fn` can be called."""
    if not callable(given):
        raise TypeError(f"loss_fn must be callable as loss_fn(model, batch), got {type(given).__name__}; {call}")


def count(name: str, given: Any, least: int = 1) -> None:
    """Raise unless None or an integer of at least `least`."""
    if given is not None and not is_count(given, least):
        raise ValueError(f"{name} must be a whole number of at least {least}, got {given!r}")


def rate(name: str, given: Any) -> None:
    """Raise unless a number above 0."""
    if not is_number(given) or not 0 < float(given) < float("inf"):
        raise ValueError(f"{name} must be a learning rate above 0, got {given!r}")
