"""Arguments checked where they come in: each error names the argument, what was given and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from warmctl.chained import ChainedOptimizer
from warmctl.checkpoint import LAYOUT
from warmctl.curvature.operators import METHODS
from warmctl.distributed import FLAT, check_layout
from warmctl.numeric import is_count, is_number
from warmctl.proxy import OptimizerProxy
from warmctl.stability.estimator import ESTIMATORS
from warmctl.warning import first_line

AFTER = ("guard", "hold", "release")


def wrapped(optimizer: Any, model: Any) -> Optimizer:
    """The optimizer, of a list a chain. Raises unless it can be wrapped and holds parameters of `model`."""
    several = isinstance(optimizer, (list, tuple))
    for member in optimizer if several else [optimizer]:
        _one(member)
    found: Optimizer = ChainedOptimizer(optimizer) if several else optimizer
    _of_model(found, model)
    _saves_as_torch_does(found)
    return found


def _one(optimizer: Any) -> None:
    """Raise unless this is an optimizer that can be wrapped."""
    if type(optimizer).__module__.startswith("deepspeed"):
        raise TypeError(f"optimizer is DeepSpeed's {type(optimizer).__name__}: {FLAT.format('it holds')}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; "
            "the arguments are AdaptiveWarmup(optimizer, model)"
        )
    if isinstance(optimizer, OptimizerProxy):
        raise TypeError("optimizer is an AdaptiveWarmup already: wrap the plain optimizer once")
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            "LBFGS chooses its own step length and evaluates its closure many times a step: there is no warmup to "
            "adapt. Use it without AdaptiveWarmup"
        )


def _of_model(optimizer: Optimizer, model: Any) -> None:
    """Raise unless it holds parameters of `model`, and they can be measured."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ValueError(f"every parameter group of {type(optimizer).__name__} must have an 'lr' to scale, not None")
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if any(getattr(p, "_fsdp_flattened", False) for p in held):
        check_layout(model, held)
    if len({id(p) for p in held}) < len(held):
        raise ValueError(
            "the optimizer holds a parameter twice, as of tied weights, and torch would step it twice: give it once, "
            "as model.parameters() does"
        )
    owned = {id(p) for p in model.parameters()}
    strangers = sum(id(p) not in owned for p in held)
    if strangers:
        raise ValueError(
            f"{strangers} of the optimizer's {len(held)} parameters are not parameters of model "
            f"({type(model).__name__}): pass the module that was given to the optimizer, after .to(device)"
        )
    if not any(p.requires_grad for p in held):
        raise ValueError("all parameters of the optimizer are frozen (requires_grad=False): there is nothing to train")
    if any(p.device.type == "meta" for p in held):
        raise ValueError("model has parameters on the meta device: materialise it (to_empty and load) before wrapping")
    if any(p.is_complex() for p in held):
        raise ValueError("model has complex parameters: curvature is defined for real ones; use torch.view_as_real")


def _saves_as_torch_does(optimizer: Optimizer) -> None:
    """Raise unless its state dict is one that ours can be put into: better now than at the first checkpoint."""
    name = type(optimizer).__name__
    try:
        saved: Any = optimizer.state_dict()
    except Exception as error:
        found = f"raises {first_line(error)}"
    else:
        missing = [part for part in LAYOUT if not isinstance(saved, Mapping) or part not in saved]
        if not missing:
            return
        found = f"has no {' and no '.join(map(repr, missing))}"
    raise TypeError(
        f"state_dict() of {name} {found}, so this run could not be saved. Wrap an optimizer with torch's state dict: "
        f"the one inside {name}, alone, or {name} with a state_dict() of its own that has 'param_groups' and 'state'"
    )


def options(
    target: Any,
    loss_fn: Any,
    every: Any,
    budget: Any,
    hvp: Any,
    estimator: Any,
    probe_steps: Any,
    after: Any,
    max_warmup: Any,
    seed: Any,
) -> None:
    """Raise unless AdaptiveWarmup's options make sense."""
    if not (is_number(target) and 0 < target <= 1.5):
        raise ValueError(f"target must be in (0, 1.5], a fraction of the edge of stability at 1, got {target!r}")
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable as loss_fn(model, batch), got {type(loss_fn).__name__}")
    if every != "auto" and not is_count(every):
        raise ValueError(f"every must be 'auto' or a number of steps of at least 1, got {every!r}")
    if not (is_number(budget) and 0 < budget <= 1):
        raise ValueError(f"budget must be in (0, 1], a share of the gradient evaluations of training, got {budget!r}")
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    _one_of("hvp", hvp, METHODS)
    _one_of("estimator", estimator, tuple(ESTIMATORS))
    if not is_count(probe_steps):
        raise ValueError(f"probe_steps must be at least 1, got {probe_steps!r}")
    _one_of("after", after, AFTER)
    if max_warmup is not None and not is_count(max_warmup):
        raise ValueError(f"max_warmup must be None or a number of steps of at least 1, got {max_warmup!r}")


def flags(**given: Any) -> None:
    """Raise unless each is a bool."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def closure(closure: Any) -> None:
    """Raise unless `closure` can be called."""
    if closure is not None and not callable(closure):
        raise TypeError(
            f"step(closure) takes a function that computes the loss, calls backward and returns it, "
            f"got {type(closure).__name__}"
        )


def loss(loss: Any) -> None:
    """Raise unless `backward(loss)` can be called on it."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"backward(loss) takes a scalar tensor, got {getattr(loss, 'shape', type(loss).__name__)}")


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
