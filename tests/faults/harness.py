"""Any fault at any probe of any model under any optimizer, beside a twin whose probes do not exist.

The wrapper monitors, so that its weights are the twin's bit for bit if a fault leaves no trace.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.helpers import assert_same, batch_of, closure_for, loss_fn, mlp, noisy_net, weights
from warmctl import AdaptiveWarmup

STEPS, FROM = 4, 1
"""Steps of a run, and the first whose probes go wrong."""


class Unspeakable(RuntimeError):
    def __str__(self) -> str:
        raise ValueError("no words")


def raises(error: Callable[[], BaseException]) -> Callable[[nn.Module, Tensor], Tensor]:
    def fault(model: nn.Module, out: Tensor) -> Tensor:
        raise error()

    return fault


def times(factor: float) -> Callable[[nn.Module, Tensor], Tensor]:
    return lambda model, out: out * factor


def adds_a_buffer(model: nn.Module, out: Tensor) -> Tensor:
    model.register_buffer("added", torch.ones(3))
    return out


def changes_the_mode(model: nn.Module, out: Tensor) -> Tensor:
    model.eval()
    return out


def draws(model: nn.Module, out: Tensor) -> Tensor:
    torch.rand(3), np.random.rand(), random.random()
    return out


def warns(model: nn.Module, out: Tensor) -> Tensor:
    warnings.warn("in a probe", UserWarning, stacklevel=1)
    return out


FAULTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "RuntimeError": raises(lambda: RuntimeError("shape mismatch")),
    "KeyError": raises(lambda: KeyError("mask")),
    "AssertionError": raises(lambda: AssertionError("bad")),
    "OutOfMemoryError": raises(lambda: torch.OutOfMemoryError("out of memory")),
    "MemoryError": raises(MemoryError),
    "StopIteration": raises(StopIteration),
    "no words": raises(Unspeakable),
    "nan": times(math.nan),
    "inf": times(math.inf),
    "zero": times(0.0),
    "a buffer added": adds_a_buffer,
    "mode changed": changes_the_mode,
    "random numbers drawn": draws,
    "warning as error": warns,
}
WORTHLESS = [name for name in FAULTS if name not in ("a buffer added", "mode changed", "random numbers drawn")]
"""Those after which a probe says nothing, and has failed."""
MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "noisy": noisy_net}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, 0.01),
    "rprop": lambda params: torch.optim.Rprop(params, 0.01),  # no registered rule: measured along its updates
}
SOURCES = ("closure", "observed", "captured")


@dataclass(frozen=True)
class Case:
    fault: str
    model: str
    optimizer: str
    source: str
    evaluation: int  # of a step at which it goes wrong; 0 is the step's own

    def __str__(self) -> str:
        return " ".join(map(str, vars(self).values()))


class Faulty(nn.Module):
    """Returns its own loss, which goes wrong from the given evaluation of a step on."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.net, self.case = MODELS[case.model](), case
        self.seen, self.armed = 0, False

    def forward(self, batch: Any) -> dict[str, Tensor]:
        at, self.seen = self.seen, self.seen + 1
        loss = loss_fn(self.net, batch)
        if self.armed and at >= self.case.evaluation:
            loss = FAULTS[self.case.fault](self, loss)
        return {"loss": loss}


def run(case: Case, wrapped: bool) -> tuple[Any, Any, dict[str, Any]]:
    """Model, optimizer and random streams after a training in which the probes of the later steps go wrong."""
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    model = Faulty(case)
    opt: Any = OPTIMIZERS[case.optimizer](model.parameters())
    if wrapped:
        observed = {"loss_fn": lambda m, b: m(b)["loss"]} if case.source == "observed" else {}
        opt = AdaptiveWarmup(opt, model, every=1, control=False, hvp="finite_difference", **observed)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if case.fault == "warning as error" else "ignore")
        for step in range(STEPS):
            model.seen, model.armed = 0, wrapped and step >= FROM
            closure = closure_for(opt, model, batch_of(step), lambda m, b: m(b)["loss"])
            if case.source == "closure":
                opt.step(closure)
                continue
            closure()
            if wrapped and case.source == "observed":
                opt.observe(batch_of(step))
            opt.step()
    streams = {
        "torch": torch.get_rng_state(),
        "numpy": torch.as_tensor(np.random.get_state()[1].astype(np.int64)),  # type: ignore[index, union-attr]
        "python": random.getstate(),
    }
    return model, opt, streams


def check(case: Case) -> None:
    """Nothing of the fault is in what trains; what makes a probe worthless is a failed probe, at every step."""
    model, opt, streams = run(case, wrapped=True)
    twin, _, expected = run(case, wrapped=False)
    assert_same(weights(model), weights(twin))
    assert_same(dict(model.state_dict()), dict(twin.state_dict()))
    assert_same(streams, expected)
    assert all(module.training for module in model.modules())
    rows = list(opt.history)
    assert len(rows) == STEPS
    if case.fault in WORTHLESS and case.optimizer != "rprop":  # which knows of a probe one step later
        assert any("failed" in row["reason"] for row in rows[FROM:])
        assert not any("failed" in row["reason"] for row in rows[:FROM])
