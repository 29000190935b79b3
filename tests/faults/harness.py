"""Any fault at any probe of any model under any optimizer, beside a twin whose probes do not exist.

The wrapper monitors, so that its weights are the twin's bit for bit if a fault leaves no trace.
"""

from __future__ import annotations

import gc
import random
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tests.faults.faults import INTERRUPTS, AtOperation, InForward
from tests.faults.models import MODELS, OPTIMIZERS
from tests.helpers import Batch, assert_same, batch_of, everything, loss_fn
from warmctl import AdaptiveWarmup
from warmctl.loss import backward, no_trace, switches

Fault = InForward | AtOperation
SOURCES = ("closure", "observed", "captured", "backward", "backward in a closure", "scaled", "accumulated")
IGNORED = "torch|.*([Dd]eprecat|[Ss]parse|autograd|lr_scheduler|use_reentrant|[Cc]omplex).*"
"""Warnings of torch's own, which stop the twin as well where they are errors."""


@dataclass(frozen=True)
class Case:
    """A training, and what goes wrong in the probes of which of its steps."""

    model: str
    optimizer: str
    source: str
    faults: Mapping[int, Fault]
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 7
    seed: int = 0
    own_loss: bool = True
    clip: bool = False
    autocast: bool = False
    set_to_none: bool = True
    warnings_are_errors: bool = False


class Event(NamedTuple):
    """What came of a step: whether it came to a backward pass and to the update, the interrupt that left it, and the
    operation that went wrong."""

    passed: bool
    made: bool
    interrupt: str
    fault: str


class Modelled(nn.Module):
    """Returns its own loss, or outputs."""

    def __init__(self, net: nn.Module, own_loss: bool) -> None:
        super().__init__()
        self.net, self.own_loss = net, own_loss

    def forward(self, batch: Batch) -> Any:
        return {"loss": loss_fn(self.net, batch)} if self.own_loss else self.net(batch[0])


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    output = model(batch)
    loss: Tensor = output["loss"] if isinstance(output, dict) else nn.functional.mse_loss(output, batch[1])
    return loss


class Training:
    """One of the two trainings of a case. Without the wrapper it makes the steps that the events say."""

    def __init__(self, case: Case, wrapped: bool) -> None:
        torch.manual_seed(case.seed), np.random.seed(case.seed), random.seed(case.seed)
        self.case, self.model = case, Modelled(MODELS[case.model](), case.own_loss)
        self.bases = OPTIMIZERS[case.optimizer]([p for p in self.model.parameters() if p.requires_grad])
        self.passes = self.made = 0
        self.bases[-1].register_step_post_hook(self._count)
        self.opt: Any = None
        if wrapped:
            options = {"every": 1, "control": False, **case.options}
            if case.source == "observed":
                options["loss_fn"] = loss_of
            bases = self.bases if len(self.bases) > 1 else self.bases[0]
            self.opt = AdaptiveWarmup(bases, self.model, **options)
        self.stepping = [self.opt] if wrapped else self.bases
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13, enabled=case.source == "scaled")

    def _count(self, *_: Any) -> None:
        self.made += 1

    def step(self, step: int, passes: bool = True, made: bool = True) -> None:
        """Evaluate the loss, and make a backward pass and the update if they are to be made."""
        self.passing = passes
        batch = batch_of(100 * self.case.seed + step)
        if "closure" in self.case.source:
            if self.opt:
                self.opt.step(lambda: self._closure(batch))
                return
            self._closure(batch)
        else:
            self._without_closure(batch)
            if self.opt and self.case.source == "observed":
                self.opt.observe(batch)
        if self.scaler.is_enabled():
            self._scaled_step(made)
        elif made:
            for optimizer in self.stepping:
                optimizer.step()

    def _zero_grad(self) -> None:
        for optimizer in self.stepping:
            optimizer.zero_grad(set_to_none=self.case.set_to_none)

    def _clip(self) -> None:
        if self.case.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)

    def _closure(self, batch: Batch) -> Tensor:
        self._zero_grad()
        loss = self._evaluate(batch)
        self._clip()
        return loss

    def _without_closure(self, batch: Batch) -> None:
        self._zero_grad()
        x, y = batch
        halves = 2 if self.case.source == "accumulated" else 1
        for part in zip(x.chunk(halves), y.chunk(halves), strict=True):
            self._evaluate(part, 1 / halves)
        if not self.scaler.is_enabled():
            self._clip()

    def _evaluate(self, batch: Batch, weight: float = 1.0) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.case.autocast else nullcontext():
            loss = loss_of(self.model, batch)
            loss = loss * weight if weight != 1.0 else loss
        if not self.passing:
            return loss
        scaled = self.scaler.scale(loss)
        if self.opt and "backward" in self.case.source:
            self.opt.backward(scaled)
        else:
            scaled.backward()
        self.passes += 1
        return loss

    def _scaled_step(self, made: bool) -> None:
        if self.case.clip or not made:
            for optimizer in self.stepping:
                self.scaler.unscale_(optimizer)
            self._clip()
        try:
            if made:
                for optimizer in self.stepping:
                    self.scaler.step(optimizer)
        finally:
            self.scaler.update()

    def trace(self) -> Any:
        return [everything(self.model, base) for base in self.bases]


def of_process() -> dict[str, Any]:
    """What is set for the whole process or thread."""
    return {
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "measured": dict(no_trace._measured),
        "switches": [switch.inside for switch in (switches.EAGER, switches.MATH, switches.NO_MKLDNN)],
        "backward": getattr(backward._handlers, "current", None),
        "kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cudnn.enabled,
            torch.backends.mkldnn.enabled,
        ),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly": torch.is_anomaly_enabled(),
        "dtype": torch.get_default_dtype(),
        "warnings": len(warnings.filters),
        "interpreter": (sys.getswitchinterval(), sys.getrecursionlimit(), gc.isenabled()),
    }


def hooks(model: nn.Module) -> int:
    kinds = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def run(case: Case) -> tuple[list[Any], list[Event], AdaptiveWarmup]:
    """The wrapped training: its traces after each step, and what came of them."""
    training = Training(case, wrapped=True)
    before, most, traces, events = of_process(), hooks(training.model), [], []
    for step in range(case.steps):
        where = f"seed {case.seed}, step {step}"
        fault, interrupt, passes, made = case.faults.get(step), "", training.passes, training.made
        with fault.armed(training.model, training.opt) if fault else nullcontext() as armed:
            try:
                training.step(step)
            except tuple(INTERRUPTS.values()) as error:
                if not (armed and armed.fired):
                    raise
                interrupt = type(error).__name__
        fired = (armed and armed.fired) or ""
        assert interrupt == (fault.what if fault and fired and fault.what in INTERRUPTS else ""), (where, interrupt)
        assert_same(of_process(), before, where)
        assert hooks(training.model) <= most, f"{where}: hooks are left"
        traces.append(training.trace())
        events.append(Event(training.passes > passes, training.made > made, interrupt, fired))
    return traces, events, training.opt


def check(case: Case) -> tuple[list[Event], AdaptiveWarmup]:
    """After each step all is as in the twin's, whatever went wrong in a probe."""
    with warnings.catch_warnings():
        warnings.simplefilter("error" if case.warnings_are_errors else "ignore")
        if case.warnings_are_errors:
            warnings.filterwarnings("ignore", IGNORED)
        traces, events, opt = run(case)
        twin = Training(case, wrapped=False)
        for step, (trace, event) in enumerate(zip(traces, events, strict=True)):
            twin.step(step, event.passed, event.made)
            assert_same(trace, twin.trace(), f"seed {case.seed}, step {step}")
    assert all(event.made or event.interrupt for event in events), "a step was not made"
    return events, opt
