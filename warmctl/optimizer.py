"""AdaptiveWarmup: one step of training, from its loss to its record. Wiring alone: it neither measures nor decides."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from warmctl import arguments
from warmctl.checkpoint import AVERAGE, VECTOR, SavedState
from warmctl.common_rate import CommonRate
from warmctl.control.cadence import Cadence
from warmctl.control.controller import Controller, Reading
from warmctl.follow.follower import Follower
from warmctl.follow.followers import Followers
from warmctl.loss.nonfinite import SKIPPED, NonfiniteSteps
from warmctl.loss.replay import Closure
from warmctl.loss.sources import Sources
from warmctl.momentum import persistence
from warmctl.proxy import OptimizerProxy
from warmctl.rates import ScaledRates
from warmctl.record.about import configuration
from warmctl.record.history import History, StepRow
from warmctl.record.scalars import scalars
from warmctl.rollback import all_or_nothing
from warmctl.stability.measurement import Measurement
from warmctl.stability.meter import Meter
from warmctl.stability.signals import StepSignals
from warmctl.state import Counts, Saved

log = logging.getLogger("warmctl")
HISTORY_ONLY = "scheduled_lr", "loss", "probed"
NO_PROBE_YET = math.nan, math.nan, math.nan
NOT_FINITE = Reading(math.nan, reason="the loss or its gradient is not finite")


class Made(NamedTuple):
    """What a step adds to its row: why, the loss, whether it was probed, and its stability ratio."""

    reason: str = ""
    loss: float | None = None
    probed: bool = False
    ratio: float = math.nan


class AdaptiveWarmup(OptimizerProxy):
    """Learning-rate warmup without `warmup_steps`, around any PyTorch optimizer.

    Scales the scheduled rates inside `step`, as fast as three gauges allow: the stability ratio of the coming update
    (edge at 1) stays below `target` (SGD is cut back to it above the edge), a step changes the layers' outputs by a
    bounded part, and the next gradients agree (where they surely undo it, it falls). Warmup ends by itself.

    Args:
        optimizer: any but LBFGS, or several in a list. Without an update rule its own updates are measured along.
        model: the module whose parameters the optimizer holds; its buffers and modes are put back after probes.
        target: the stability ratio to stay below, in (0, 1.5].
        loss_fn: loss_fn(model, batch) -> scalar loss, for `observe`.
        every: steps between probes of the ratio, or "auto": the age of the run, shocks and a budget decide.
        budget: gradient evaluations for probes per one of training if `every="auto"`, beside what the age earns.
        hvp, estimator, probe_steps, seed: see `HessianOperator`; the solver, its products, its chance (if not 2).
        after: warmup, "guard" may cut the scale and give it back; "hold" keeps it, "release" returns to the schedule.
        control: False only monitors: the trajectory is bitwise that of the bare optimizer.
        max_warmup: steps after which warmup ends in any case.
        skip_nonfinite: leave out steps whose loss or gradient is not finite, on all ranks, as `GradScaler` does.

    Cost: two probes at the start, two fifths of one an e-fold of age, `budget` besides, a forward pass a look, without
    a closure two. Memory: two parameter-sized vectors in warmup, one after it, `probe_steps` + 3 in a probe.

    Raises: TypeError or ValueError for arguments that cannot work, naming the argument.
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        model: nn.Module,
        *,
        target: float = 0.8,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        every: int | str = "auto",
        budget: float = 0.01,
        hvp: str = "auto",
        estimator: str = "lanczos",
        probe_steps: int = 2,
        after: str = "guard",
        control: bool = True,
        max_warmup: int | None = None,
        seed: int = 0,
        skip_nonfinite: bool = False,
    ) -> None:
        optimizer = arguments.wrapped(optimizer, model)
        arguments.options(target, loss_fn, every, budget, hvp, estimator, probe_steps, after, max_warmup, seed)
        arguments.flags(control=control, skip_nonfinite=skip_nonfinite)
        super().__init__(optimizer)
        self.model, self.control, self.counts = model, control, Counts()
        self.sources = Sources(model, self.trainable, self._due, loss_fn)
        self.meter = Meter(optimizer, model, self.sources, self.counts, hvp, estimator, probe_steps, seed)
        self.controller = Controller(target=float(target), after=after, max_warmup=max_warmup)
        self.cadence, self._signals = Cadence(every=every, budget=budget), StepSignals()
        self._common, self._rates = CommonRate(optimizer), ScaledRates()
        options = {"target": target, "every": every, "budget": budget, "after": after, "control": control}
        self.history = History(about=configuration(optimizer, model, **options))
        self._followers, self._nonfinite = Followers(optimizer, control), NonfiniteSteps(skip_nonfinite)
        self._made: Made | None = None  # nothing, where a step ends in an error
        self._saved = SavedState(optimizer, self._parts, {VECTOR: self.meter.estimator, AVERAGE: self._signals.slope})
        self._row = _row(self, Made())
        self._saved.begin()

    @property
    def phase(self) -> str:
        """One of "warmup", "guard", "done"."""
        return self.controller.phase

    @property
    def _applied_scale(self) -> float:
        """What the rates of the last step were multiplied by."""
        return self._followers.applied(self.controller.applied)

    @property
    def metrics(self) -> dict[str, Any]:
        """The values of the latest step, plain Python scalars, as the history has them.

        `scale`, `lr`: the factor, and the first rate of a group that trains, as applied; `stability_ratio`: of this
        step, carried on between probes; `representation_change`, `end_slope`: as last measured; `sharpness`,
        `threshold`, `residual`: of the last probe, r₁·τ/η in the optimizer's coordinates (SGD with one rate, no weight
        decay: about λ_max(H)), τ, and the residual relative to it; `hvps`, `probes`, `overhead`: so far, the last in
        gradient evaluations per one of training; `reason`: what holds the scale below 1.
        """
        return {k: v for k, v in self._row._asdict().items() if k not in HISTORY_ONLY} | self._followers.latest

    def scalars(self, prefix: str = "warmup/") -> dict[str, float]:
        """The finite numbers among `metrics`, for loggers: "warmup/scale" …, "warmup/phase" as 0, 1 or 2."""
        return scalars(self.metrics, prefix)

    def __repr__(self) -> str:
        return f"AdaptiveWarmup({type(self.base).__name__}, phase={self.phase!r}, scale={self._applied_scale:.4g})"

    @_disable_dynamo  # decides on numbers in Python; compile the wrapped optimizer's own step instead
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step of the wrapped optimizer, at its scheduled rates times the scale.

        Args:
            closure: clears gradients, computes the loss, calls backward, returns the loss. A probe evaluates it again.

        Returns what the wrapped optimizer returns. Raises RuntimeError if there is no source of a loss, TypeError or
        ValueError for a closure that breaks its contract; the parameters are as before then.
        """
        arguments.closure(closure)
        self._made = None
        _follow_parameters(self)
        skipped = self._lend_scaler(unscale=self.phase != "done")
        try:
            if closure is None and not skipped:  # a GradScaler takes no closure
                self._decide(self.sources.loss)
            deciding = None if closure is None else _deciding(self, closure)  # called before the base reads its rates
            result: Any = self._nonfinite.step(self.base.step, deciding)
            self.meter.after_update(self._applied_scale, self.sources.params)  # if `read` has asked for it
            self.controller.changed(*self.meter.changed())
            self._saved.stepped = True
            return result
        finally:
            self._end_step()

    step.hooked = True  # type: ignore[attr-defined]  # step hooks fire in the base, once

    def _decide(self, loss: Tensor | None) -> None:
        """The gradient is there: read signals, probe if due, decide, scale. `loss`: detached, None if unknown."""
        rate, params, before = self._common.value, self.sources.params, self.phase
        if rate <= 0.0 or not self.has_gradient:  # the step moves nothing
            return
        if before != "done" or self._nonfinite.skip:
            self.meter.prober.ranks.check_even()  # the step will have collectives
        self.counts.steps += 1
        self.counts.gradients += (evaluations := self.sources.evaluations)
        if self._nonfinite.to_skip(loss, params):
            self._made = Made(SKIPPED)
            return
        if self.phase == "done":
            return self._coast(rate, loss)
        warming, lasting = self.phase == "warmup", persistence(self.param_groups)
        now = self._signals.read(loss, params, warming and self.cadence.asks_slope(), evaluations)
        due, guarding = self._due(), self._guarding()
        self.cadence.step(now.norm, self.meter.expected_cost, guarding, now.evaluations)
        found = self.meter.read(due, params, rate, self.cadence.every == 1, self._applied_scale) if now.finite else None
        reading = _reading(found, self.meter.tolerant, due) if now.finite else NOT_FINITE
        self._nonfinite.make(now.finite)
        decision = self.controller.update(rate, reading, now.end_slope, self.cadence.surprise, lasting)
        if self.phase != before:
            self._signals.rest()
            log.info("step %d: %s", int(self.counts.steps), decision.reason)
        if found is not None:
            self.cadence.probed(found.cost, decision.closeness)
        if now.finite and self.cadence.look(warming):
            self.meter.look(params, rate * self._applied_scale)
        self._rates.scale(self.param_groups, self._followers.decided(decision.scale, self.phase, found is not None))
        ratio = self._followers.ratio(decision.ratio, decision.scale)
        self._made = Made(decision.reason, None if loss is None else now.loss, found is not None, ratio)

    def _guarding(self) -> bool:
        """Whether probes may be sparse: a rate above any of warmup's is probed as in warmup."""
        return self.phase != "warmup" and not self.controller.rising(self._common.value)

    def _due(self) -> str:
        """Why to probe at the coming step, or ""."""
        return self.cadence.due(self.meter.expected_cost, self._guarding())

    def _coast(self, rate: float, loss: Tensor | None) -> None:
        """Warmup is done: nothing is measured, and no device is waited for."""
        self.sources.rest()
        self.controller.update(rate)
        self._rates.scale(self.param_groups, self._followers.decided(self.controller.applied, self.phase, False))
        self._made = Made("", None if loss is None or loss.device.type != "cpu" else float(loss))

    def backward_on_graph(self, loss: Tensor, backward: Callable[[], None]) -> None:
        """Run `backward`; before it, measure on the graph that it will free, if that was asked for."""
        self.sources.graph.begin_pass(loss, self.sources.watch.cleared)
        if self.phase != "done" and self._common.value > 0.0:
            self.meter.before_backward(self._due(), loss, self.trainable)
        backward()

    def _end_step(self) -> None:
        """After the update: its row, the schedule's own rates again, the batch forgotten, what was thawed seen."""
        if self._made is not None:
            self._row = _row(self, self._made)
            self.history.record(self._row, self._followers.row)
        elif self._common.value <= 0.0:
            self._row = self._row._replace(lr=0.0)
        self._followers.end()
        self._rates.restore(self.param_groups)
        self.sources.next_step(measured_on_graph=self.meter.next_step())
        self._take_back_scaler()
        if self._followers:
            _follow_parameters(self)

    def backward(self, loss: Tensor) -> None:
        """In place of `loss.backward()`. A probe that is due is made here, on the live graph, by double backward."""
        arguments.loss(loss)
        plain: Callable[[], None] = loss.backward
        plain() if self.sources.in_closure else self.backward_on_graph(loss, plain)  # `step` sees to a closure's

    def observe(self, batch: Any) -> None:
        """Give the mini-batch that a probe at the next `step` is measured on, through `loss_fn(model, batch)`."""
        self.sources.observed.observe(batch, self.trainable)

    def follow(self, *followers: Follower) -> AdaptiveWarmup:
        """Have these move with the rate, and return self; a fresh wrapper is given the same before it loads a state.

        With `control=False` nothing is moved. Raises TypeError or ValueError for what cannot."""
        self._followers.add(followers, self.controller.applied)
        self.sources.follow(self.trainable)  # some may have been frozen
        self._saved.announce_numbers()
        return self

    def restart(self) -> None:
        """Begin warmup again from here."""
        for part in (self.controller, self.cadence, self.meter, self._common):
            part.restart()
        self._signals.rest()
        self.sources.wake()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch. Warmup starts again, as it does when parameters are thawed: they have never been measured."""
        super().add_param_group(param_group)
        self.restart()
        self._saved.announce_numbers()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict and, inside it, the wrapper's: primitives and tensors, two vectors."""
        return self._rates.unscaled(self._followers.unlent(self._saved.state_dict(self.trainable)), self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume bit for bit. A bare optimizer's state dict loads too; warmup starts from the beginning then.

        Raises: ValueError, naming the field, if the state does not fit or is not possible. All is as before then."""
        vectors = self._saved.vectors.values()
        owners = self, self.controller, self.cadence, self.meter, self.sources.watch, self._signals, *vectors
        with all_or_nothing(self.base, self._parts(), owners):
            if self._saved.load_state_dict(state_dict):
                if self._followers:
                    self.sources.follow(self.trainable)  # as it was when it was saved
                self.sources.resume()
                self._row = _row(self, Made("resumed"))
            else:
                self.restart()
            self._saved.announce_numbers()

    def _parts(self) -> tuple[Saved, ...]:
        """What is saved beside the two vectors. The order is that of the checkpoint's format."""
        controlling: Sequence[Saved] = (*self.controller.parts, self.cadence.state, self.counts, self._common)
        return *controlling, *self.sources.parts, self.meter, self._signals, self._followers


def _deciding(opt: AdaptiveWarmup, closure: Closure) -> Closure:
    """The closure for the base: its first call decides the step. Watched where it may have to be evaluated again."""
    looks = opt.cadence.looks_next(opt.phase == "warmup")
    watched = opt.phase != "done" and (looks or opt.sources.live or opt._due() != "")
    listening = opt.meter.prober.listening(looks)
    return opt.sources.deciding(closure, opt._decide, opt.backward_on_graph if watched else None, listening)


def _row(opt: AdaptiveWarmup, made: Made) -> StepRow:
    counts, last, scale = opt.counts, opt.meter.last, opt._applied_scale
    scheduled = opt._rates.scheduled(opt.param_groups)
    sharpness, threshold, residual = (last.sharpness, last.threshold, last.residual) if last else NO_PROBE_YET
    return StepRow(
        *(int(counts.steps), opt.phase, scale, scale * scheduled, scheduled, made.loss, sharpness, threshold),
        *(made.ratio, opt.meter.representation_change, opt._signals.end_slope, opt.controller.target, residual),
        *(int(counts.hvps), int(counts.probes), counts.overhead, made.probed, made.reason),
    )


def _follow_parameters(opt: AdaptiveWarmup) -> None:
    """See which train. Those thawed, added or given a rate, since a save too, were never measured: warmup restarts."""
    opt._saved.withdraw()
    thawed = opt.sources.follow(opt.trainable) or 0 < opt.counts.trained < len(opt.sources.params)
    if opt._common.note_first_rates() or thawed:
        opt.restart()
    opt.counts.trained = len(opt.sources.params)


def _reading(found: Measurement | None, tolerant: bool, due: str) -> Reading | None:
    """What the controller takes in of what was measured."""
    if found is None:
        return None
    reason = found.reason and f"the probe failed: {found.reason}"
    return Reading(found.ratio, found.share, found.relative_update, tolerant, found.noisy, due == "distress", reason)
