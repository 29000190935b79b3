"""A compiled model: either module may be given, before or after it is compiled, and errors name the compiler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import OwnLoss, batch_of, loss_fn, mlp, sgd
from tests.integrations.helpers import failures
from warmctl import AdaptiveWarmup

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance", "ignore:.*Dynamo")


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="aot_eager")


def steps(opt: AdaptiveWarmup, model: Any, count: int = 4) -> None:
    for step in range(count):
        opt.zero_grad()
        model(batch_of(step))["loss"].backward()
        opt.step()


@pytest.mark.parametrize("given", ["plain", "compiled", "plain, then compiled"])
def test_either_module_may_be_given(given: str) -> None:
    """A compiled one that was not given itself is heard from the second step on."""
    torch._dynamo.reset()
    model = OwnLoss()
    outer = None if "then" in given else compiled(model)
    opt = AdaptiveWarmup(sgd(model), outer if given == "compiled" else model, every=1)
    steps(opt, compiled(model) if outer is None else outer)
    rows = list(opt.history)
    reference = OwnLoss()
    plain = AdaptiveWarmup(sgd(reference), reference, every=1)
    steps(plain, reference)
    known = given == "compiled"
    assert [row["probed"] for row in rows] == [known, True, True, True] and not failures(rows)
    if known:
        assert [row["sharpness"] for row in rows] == pytest.approx([r["sharpness"] for r in plain.history], rel=1e-3)


@pytest.mark.parametrize(("given", "unseen"), [("plain", 1), ("compiled", 0)])
def test_outputs_are_looked_at_where_the_backward_pass_is_measured(given: str, unseen: int) -> None:
    torch._dynamo.reset()
    model = mlp()
    outer = torch.compile(model, backend="eager")
    opt = AdaptiveWarmup(sgd(model), outer if given == "compiled" else model)
    for step in range(3):
        opt.zero_grad()
        opt.backward(loss_fn(outer, batch_of(step)))
        opt.step()
    changes = opt.history["representation_change"]
    assert [math.isnan(change) for change in changes] == [step < unseen for step in range(3)]


def test_the_plain_module_is_called_and_the_compiled_one_was_given() -> None:
    torch._dynamo.reset()
    model = OwnLoss()
    opt = AdaptiveWarmup(sgd(model), compiled(model), every=1)
    steps(opt, model)
    assert opt.metrics["probes"] == 4 and not failures(list(opt.history))


def test_compiled_in_place_is_said() -> None:
    torch._dynamo.reset()
    model = OwnLoss()
    opt = AdaptiveWarmup(sgd(model), model)
    model.compile(backend="aot_eager")  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"compiled in place.*Use torch\.compile\(model\)"):
        steps(opt, model)


def test_no_second_derivative_through_a_compiled_model_is_said_to_be_that() -> None:
    torch._dynamo.reset()
    model = mlp()
    opt, outer = AdaptiveWarmup(sgd(model), model), compiled(model)
    with pytest.warns(RuntimeWarning, match=r"torch\.compile .* double backward.*opt\.step\(closure\)"):
        for step in range(3):
            opt.zero_grad()
            loss: Tensor = loss_fn(outer, batch_of(step))
            opt.backward(loss)
            opt.step()
