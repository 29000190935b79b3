"""Bad arguments get an error that names them and says what to do."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import assert_same, everything, mlp, sgd
from warmctl import AdaptiveWarmup


@pytest.mark.parametrize("optimizer", [None, "adam", 1e-3, torch.optim.SGD])
def test_not_an_optimizer(optimizer: Any) -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got \w+"):
        AdaptiveWarmup(optimizer, mlp())


@pytest.mark.parametrize("model", [None, 3, lambda x: x])
def test_not_a_model(model: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got"):
        AdaptiveWarmup(sgd(mlp()), model)


def test_arguments_in_the_wrong_order() -> None:
    model = mlp()
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got Sequential"):
        AdaptiveWarmup(model, sgd(model))  # type: ignore[arg-type]


def test_wrapped_twice() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="AdaptiveWarmup already"):
        AdaptiveWarmup(AdaptiveWarmup(sgd(model), model), model)


def test_parameters_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"4 of the optimizer's 4 parameters are not .* of model \(Sequential\)"):
        AdaptiveWarmup(sgd(mlp(1)), mlp(2))


def test_an_optimizer_without_a_rate() -> None:
    class Rateless(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

    model = mlp()
    with pytest.raises(ValueError, match="every parameter group of Rateless must have an 'lr'"):
        AdaptiveWarmup(Rateless(model.parameters()), model)


OPTIONS: list[tuple[str, Any, type[Exception]]] = [
    ("target", 0, ValueError),
    ("target", -0.5, ValueError),
    ("target", 1.6, ValueError),
    ("target", math.nan, ValueError),
    ("target", "0.5", ValueError),
    ("target", True, ValueError),
    ("loss_fn", 3, TypeError),
    ("every", 0, ValueError),
    ("every", -1, ValueError),
    ("every", 1.5, ValueError),
    ("every", "often", ValueError),
    ("budget", 0, ValueError),
    ("budget", 2, ValueError),
    ("budget", math.nan, ValueError),
    ("budget", None, ValueError),
    ("hvp", "exact", ValueError),
    ("hvp", None, ValueError),
    ("estimator", "qr", ValueError),
    ("probe_steps", 0, ValueError),
    ("probe_steps", 2.0, ValueError),
    ("after", "stop", ValueError),
    ("after", [], ValueError),
    ("max_warmup", 0, ValueError),
    ("max_warmup", 10.0, ValueError),
    ("control", "no", TypeError),
    ("seed", "a", TypeError),
]


@pytest.mark.parametrize("name, value, error", OPTIONS)
def test_options(name: str, value: Any, error: type[Exception]) -> None:
    """The message names the argument and what was given; the optimizer and the model are left alone."""
    model = mlp()
    base = sgd(model)
    before = everything(model, base), dict(base.param_groups[0])
    with pytest.raises(error) as caught:
        AdaptiveWarmup(base, model, **{name: value})
    said = str(caught.value)
    assert name in said and (repr(value) in said or type(value).__name__ in said)
    assert_same((everything(model, base), dict(base.param_groups[0])), before)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_numbers_of_numpy_are_numbers() -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model, every=np.int64(5), target=np.float32(0.5))
    assert type(opt.metrics["target"]) is float


def test_all_parameters_frozen() -> None:
    model = mlp().requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen.*nothing to train"):
        AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model)


def test_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="meta device: materialise it"):
        AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model)


def test_complex_parameters() -> None:
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"complex.*view_as_real"):
        AdaptiveWarmup(torch.optim.SGD(model.parameters(), 0.1), model)


class Lookahead(torch.optim.SGD):
    """Saves as others than torch do."""

    def state_dict(self) -> dict[str, Any]:
        return {"lookahead_state": {}, "base_optimizer": super().state_dict()}


class Unsaved(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("call consolidate_state_dict() first")


@pytest.mark.parametrize(
    ("base", "found"),
    [
        (Lookahead, r"Lookahead has no 'param_groups' and no 'state'.*the one inside Lookahead"),
        (Unsaved, r"Unsaved raises RuntimeError: call consolidate_state_dict\(\) first"),
    ],
)
def test_a_base_that_could_not_be_saved(base: Any, found: str) -> None:
    model = mlp()
    with pytest.raises(TypeError, match=found):
        AdaptiveWarmup(base(model.parameters(), 0.1), model)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_parameter_that_is_listed_twice() -> None:
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        twice = torch.optim.SGD([*model.parameters(), model[0].weight], 0.1)
    with pytest.raises(ValueError, match=r"holds a parameter twice.*give it once"):
        AdaptiveWarmup(twice, model)
