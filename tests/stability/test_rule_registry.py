"""Which optimizer has which update rule: by its step, by inheritance, by registration."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import (
    LBFGS,
    Adafactor,
    Adam,
    AdamW,
    Optimizer,
    Rprop,
    SparseAdam,
)

from tests.stability.quadratic import Make, all_parameters, at_ratio, fate, parameters
from warmctl.stability import update_rules
from warmctl.stability.update_rules import UpdateRule, register_update_rule, stability_threshold, update_rule


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_rules, "_RULES", dict(update_rules._RULES))


class Quiet(AdamW):
    """Inherits its step."""


class Logged(AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class HeavyBall(Optimizer):
    def __init__(self, params: list[Tensor], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                p.add_(buffer, alpha=-group["lr"])


UNKNOWN: list[Make] = [
    Rprop,
    Adafactor,
    LBFGS,
    SparseAdam,
    Logged,
    partial(HeavyBall, lr=0.1, momentum=0.5),
    lambda params: torch.optim.Muon([p for p in params if p.ndim == 2]),
]


@pytest.mark.parametrize("make", UNKNOWN)
def test_unknown_update_has_no_rule(make: Make) -> None:
    optimizer = make(parameters())
    assert update_rule(optimizer) is None
    with pytest.raises(ValueError, match=rf"{type(optimizer).__name__}.*register_update_rule"):
        stability_threshold(optimizer)


def test_subclass_inherits_the_rule_with_the_step() -> None:
    assert update_rule(Quiet) is update_rule(Quiet(parameters())) is update_rule(AdamW)
    assert update_rule(AdamW) is not update_rule(Adam)


@pytest.mark.parametrize("first", [0, 1])
def test_order_of_the_first_instances_does_not_matter(first: int) -> None:
    """torch wraps the step of a class, inherited or not, when it makes the first instance."""

    class Base(HeavyBall):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()

    class Child(Base):
        pass

    register_update_rule(Base, UpdateRule(edge=lambda group: 2.0))
    for cls in (Base, Child)[first:] + (Base, Child)[:first]:
        assert update_rule(cls(parameters(), lr=0.1, momentum=0.5)) is not None
    assert update_rule(Child) is update_rule(Base) is not None


def test_scheduler_does_not_hide_the_rule() -> None:
    optimizer = Adam(parameters(), lr=0.1)
    torch.optim.lr_scheduler.LinearLR(optimizer)  # replaces optimizer.step
    assert update_rule(optimizer) is update_rule(Adam)


def test_registered_rule() -> None:
    make = partial(HeavyBall, lr=0.1, momentum=0.5)
    register_update_rule(HeavyBall, UpdateRule(edge=lambda group: 2 * (1 + group["momentum"])))
    assert stability_threshold(make(parameters())) == [3.0]
    assert fate(at_ratio(make, 1, 0.98)) == "trains"
    assert fate(at_ratio(make, 1, 1.02)) == "diverges"
    register_update_rule(HeavyBall, UpdateRule(edge=lambda group: 1.0))
    assert stability_threshold(make(parameters())) == [1.0]


def test_rule_of_another_class_may_be_registered() -> None:
    rule = update_rule(AdamW)
    assert rule is not None
    register_update_rule(Logged, rule)
    assert update_rule(Logged(parameters(), lr=0.1)) is rule


def test_schedule_free_example() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    cls = schedulefree.SGDScheduleFree
    register_update_rule(
        cls, UpdateRule(edge=lambda g: 2 / (1 - g["momentum"]), coupled_decay=lambda g: g["weight_decay"])
    )

    def make(params: list[Tensor]) -> Optimizer:
        optimizer: Any = cls(params, lr=1.0, weight_decay=0.1)
        optimizer.train()
        optimizer.param_groups[0]["weight_sum"] = 1e12  # long after the start: the average stands still
        return optimizer  # type: ignore[no-any-return]

    assert stability_threshold(make(parameters())) == [pytest.approx(20)]
    for target, expected in ((0.98, "trains"), (1.02, "diverges")):
        optimizer = at_ratio(make, 1, target)
        for p in all_parameters(optimizer):
            optimizer.state[p]["z"] = p.detach() / (1 - 0.9)  # the average at the minimum
        assert fate(optimizer, momentum=("z",)) == expected


def test_registration_is_checked() -> None:
    with pytest.raises(TypeError, match="expected an optimizer class"):
        register_update_rule(Adam(parameters()), UpdateRule(edge=lambda group: 2.0))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected an UpdateRule for HeavyBall"):
        register_update_rule(HeavyBall, lambda group: 2.0)  # type: ignore[arg-type]
