"""A closure is watched at the few steps that are measured; at the others it is still held to its contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from warmctl import AdaptiveWarmup


def guarding(
    returned: Callable[[Tensor], Any] = lambda loss: loss, phase: str = "guard", **options: Any
) -> tuple[AdaptiveWarmup, Any]:
    """A wrapper whose next step is not measured, and what makes its closure from a factor on the loss."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(16, 4)
    opt = AdaptiveWarmup(Adam(model.parameters(), 1e-2), model, max_warmup=10 if phase == "guard" else None, **options)

    def closure(factor: float = 1.0, backward: bool = True) -> Callable[[], Any]:
        def evaluate() -> Any:
            loss = model(x).square().mean()
            if backward:
                opt.zero_grad()
                loss.backward()
            return returned(loss.detach() * factor if backward else loss)

        return evaluate

    def measured_next() -> bool:
        return opt._due() != "" or opt.cadence.looks_next(warming=phase == "warmup")

    while opt.phase != phase or measured_next():
        opt.step(closure())
    return opt, closure


@pytest.mark.parametrize("returned", [lambda loss: loss, lambda loss: float(loss)], ids=["tensor", "float"])
def test_its_loss_is_kept_and_one_that_is_not_finite_is_left_out(returned: Callable[[Tensor], Any]) -> None:
    opt, closure = guarding(returned, skip_nonfinite=True)
    opt.step(closure())
    assert opt.history["loss"][-1] > 0.0 and not opt.history["probed"][-1]
    before = [p.clone() for p in opt.param_groups[0]["params"]]
    with pytest.warns(RuntimeWarning, match="left out"):
        opt.step(closure(float("inf")))
    assert all(map(torch.equal, before, opt.param_groups[0]["params"]))


@pytest.mark.parametrize(
    ("returned", "backward", "error", "says"),
    [
        (lambda loss: loss, False, RuntimeError, "did not call"),
        (lambda loss: None, True, TypeError, "returned None"),
        (lambda loss: loss.expand(3), True, ValueError, "scalar"),
        (lambda loss: (loss, 1), True, TypeError, "tuple"),
    ],
)
def test_a_closure_that_breaks_its_contract_is_told(
    returned: Callable[[Tensor], Any], backward: bool, error: type[Exception], says: str
) -> None:
    broken = False
    opt, closure = guarding(lambda loss: returned(loss) if broken else loss)
    broken = True
    before = [p.clone() for p in opt.param_groups[0]["params"]]
    with pytest.raises(error, match=says):
        opt.step(closure(backward=backward))
    assert all(map(torch.equal, before, opt.param_groups[0]["params"]))


@pytest.mark.parametrize("phase", ["warmup", "guard"])
def test_neither_the_random_streams_nor_the_gradients_are_read(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, closure = guarding(phase=phase)
    monkeypatch.setattr("warmctl.loss.closure.ClosureRun", None)
    opt.step(closure())
    assert opt.sources.watch.marks is None and opt.sources.watch.marking
