"""AdaptiveWarmup: the wiring between a user's optimizer, the probe and the controller, and nothing else."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import SGD, Optimizer

from warmctl import arguments as checks, checkpoint
from warmctl.control.cadence import Cadence
from warmctl.control.controller import Controller, Reading
from warmctl.curvature.operators import METHODS
from warmctl.loss.captured import ModelCapture, loss_scale
from warmctl.loss.live_graph import GraphProbe
from warmctl.loss.replay import Closure, RandomState
from warmctl.loss.scaler import lend_scaler, take_back_scaler
from warmctl.loss.watch import ClosureRun, GradientWatch
from warmctl.rates import ScaledRates, learning_rate
from warmctl.record.history import COLUMNS, History
from warmctl.stability.estimator import SharpnessEstimator
from warmctl.stability.measurement import Measurement, failed
from warmctl.stability.probe import NO_SOURCE, Evaluation, Prober, RealisedUpdate
from warmctl.stability.signals import StepSignals
from warmctl.stability.update_rules import update_rule
from warmctl.state import FloatState
from warmctl.vectors import locals_of
from warmctl.warning import warn

log = logging.getLogger("warmctl")

UNKNOWN = (math.nan, math.nan, math.nan)
PATIENCE = 10
"""Steps at the scale of before the first probe after which a loop that has a loss_fn but observes nothing is warned."""
NOT_OBSERVED = (
    f"warmctl: loss_fn was given, but observe(batch) was not called in {PATIENCE} steps: call opt.observe(batch) "
    "before opt.step(). Until then the learning rate stays at 1 % of the schedule"
)
NO_RULE = (
    "backward(loss) cannot measure {name}: it has no registered update rule, so it is measured along the update that "
    "it makes, and that needs the loss again afterwards. Use opt.step(closure), or opt.observe(batch) with a loss_fn, "
    "or warmctl.register_update_rule"
)


class AdaptiveWarmup(Optimizer):
    """Learning-rate warmup without `warmup_steps`, around any PyTorch optimizer.

    Every few steps a probe measures the stability ratio of the coming update (edge of stability at 1); a controller
    scales the scheduled rates inside `step` so that the ratio stays below `target` (SGD: is cut back to it above the
    edge), raises the scale with the age of the run and ends warmup by itself. Outside `step` the rates are the
    schedule's alone.

    Args:
        optimizer: any `torch.optim.Optimizer` but LBFGS. One without a registered update rule is measured along the
            update that it really makes.
        model: the module whose parameters the optimizer holds; its buffers and modes are put back after probes.
        target: the stability ratio to stay below, in (0, 1.5].
        loss_fn: loss_fn(model, batch) -> scalar loss, for `observe`.
        every: steps between probes, or "auto": events and a budget decide.
        budget: gradient evaluations for probes per gradient evaluation of training when `every="auto"`.
        hvp: "finite_difference", "double_backward" or "forward_over_reverse", see `HessianOperator`; "auto" is the
            first, unless the model computes in less than float32 and an exact product says otherwise;
            `backward(loss)` is always by double backward.
        estimator: "lanczos" (from cold; then, with two products, Rayleigh–Ritz on the tracked eigenvector and the
            coming step) or "power".
        probe_steps: Hessian-vector products per probe; twice as many at the first.
        after: when warmup has ended, "guard" goes on with sparse probes, which can cut the scale and let it come back
            to what it was then; "hold" keeps it, "release" returns to the schedule.
        control: False only monitors: the trajectory is bitwise that of the bare optimizer. Phases and cadence are those
            of a controlled run; `every=10` with `after="guard"` measures evenly.
        max_warmup: steps after which warmup ends in any case.
        seed: of the random component of a warm start, where the solver takes one.

    Cost: `budget` on average after an opening burst; a probe is `probe_steps` gradient evaluations by finite
    differences. Memory: one parameter-sized vector between probes, `probe_steps` + 3 during one, 2 `probe_steps` + 3
    during the first.

    Raises: TypeError or ValueError for arguments that cannot work, naming the argument.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        target: float = 0.5,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        every: int | str = "auto",
        budget: float = 0.034,
        hvp: str = "auto",
        estimator: str = "lanczos",
        probe_steps: int = 2,
        after: str = "guard",
        control: bool = True,
        max_warmup: int | None = None,
        seed: int = 0,
    ) -> None:
        checks.wrapped(optimizer, model)
        checks.options(target, loss_fn, every, budget, hvp, estimator, probe_steps, after, max_warmup, control, seed)
        self.base = optimizer
        self.model = model
        self.control, self.probe_steps, self.seed = control, probe_steps, seed
        self.rule = update_rule(optimizer)
        self.estimator = SharpnessEstimator(optimizer, self.rule, hvp, estimator, probe_steps)
        self.prober = Prober(model, self.estimator, loss_fn)
        self.watch = GradientWatch(self._params())
        self.controller = Controller(target=float(target), after=after, max_warmup=max_warmup)
        self.cadence = Cadence(every=every, budget=budget)
        self.counts = checkpoint.Counts(method=METHODS.index(hvp))
        self.history = History()
        self.last: Measurement | None = None
        self._row: tuple[Any, ...] = ()
        self._graph_probe = GraphProbe()
        self._update: RealisedUpdate | Measurement | None = None
        self._reading: Measurement | None = None
        self._in_closure = self._stepped = self._announced = False
        self._rates = ScaledRates()
        self._signals = StepSignals()
        self._said: set[str] = set()
        self._publish("")
        checkpoint.announce(optimizer, self._numbers())

    # The wrapped optimizer's own state, shared and never copied

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    @property
    def phase(self) -> str:
        """One of "warmup", "guard", "done"."""
        return self.controller.phase

    @property
    def metrics(self) -> dict[str, Any]:
        """The values of the latest step, plain Python scalars, as the history has them.

        `scale`, `lr`: the factor and the first group's rate as applied; `stability_ratio`: of this step, measured at
        probes and carried on between them; `sharpness`, `threshold`, `residual`: of the last probe, r₁·τ/η in the
        optimizer's own coordinates (for SGD with one rate and no weight decay an estimate of λ_max(H)), τ, and
        the residual relative to it; `hvps`, `probes`, `overhead`: so far, the last in gradient evaluations per one of
        training; `reason`: words, mostly "".
        """
        beside = ("scheduled_lr", "loss", "probed")
        return {name: value for name, value in zip(COLUMNS, self._row, strict=True) if name not in beside}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch. Warmup starts again, as it does when parameters are thawed: they have never been measured."""
        self.base.add_param_group(param_group)
        self.restart()

    def train(self) -> None:
        """Forwarded for schedule-free optimizers; nothing for others."""
        getattr(self.base, "train", lambda: None)()

    def eval(self) -> None:
        """Forwarded for schedule-free optimizers; nothing for others."""
        getattr(self.base, "eval", lambda: None)()

    def __repr__(self) -> str:
        name = type(self.base).__name__
        return f"AdaptiveWarmup({name}, phase={self.phase!r}, scale={self.controller.state.scale:.4g})"

    # What the user calls

    @_disable_dynamo  # decides on numbers in Python; compile the wrapped optimizer's own step instead
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step of the wrapped optimizer, at its scheduled rates times the scale.

        Args:
            closure: clears gradients, computes the loss, calls backward, returns the loss. A probe evaluates it again.

        Returns: what the wrapped optimizer returns.
        Raises: RuntimeError if there is no source of a loss; TypeError or ValueError for a closure that breaks its
            contract. The parameters are as before then.
        """
        checks.closure(closure)
        self._follow_freezing()
        steps = self.counts.steps
        if self._announced:
            checkpoint.withdraw_vector(self.base, self._all_params())
            self._announced = False
        skipped = "found_inf" in self.__dict__ and lend_scaler(
            self, self.base, [] if self.phase == "done" else self._all_params()
        )
        result: Any
        try:
            if closure is not None:
                result = self.base.step(self._deciding(closure))
                self._measure_update()
                return result
            if not skipped:
                self._decide(self.prober.capture.loss if self._graph_probe.loss is None else self._graph_probe.loss)
            result = self.base.step()
            self._measure_update()
            return result
        finally:
            self._finish()
            if self.counts.steps == steps and not any(learning_rate(group) for group in self.param_groups):
                self._row = tuple(
                    0.0 if name == "lr" else value for name, value in zip(COLUMNS, self._row, strict=True)
                )

    step.hooked = True  # type: ignore[attr-defined]  # step hooks fire in the base, once

    def backward(self, loss: Tensor) -> None:
        """In place of `loss.backward()`. A probe that is due is made here, on the live graph, by double backward."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"backward(loss) takes a scalar tensor, got {getattr(loss, 'shape', type(loss).__name__)}")
        if self._in_closure:  # `step` sees to it
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._backward_on_graph(loss, lambda: loss.backward())  # type: ignore[no-untyped-call]

    def observe(self, batch: Any) -> None:
        """Give the mini-batch that a probe at the next `step` is measured on, through `loss_fn(model, batch)`."""
        if self.prober.loss_fn is None:
            raise ValueError("observe(batch) needs AdaptiveWarmup(..., loss_fn=lambda model, batch: loss)")
        self.prober.observed = batch, RandomState({p.device for p in self._params()})

    def restart(self) -> None:
        """Begin warmup again from here."""
        self.controller.restart()
        self.cadence.restart()
        self.estimator.vector = self.last = self._reading = None
        self.prober.capture.enabled = self.watch.marking = True

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict and, inside it, the wrapper's: tensors and primitives only.

        It is larger than the former by one parameter-sized vector, the eigenvector.
        """
        params = self._params()
        vector, shapes = self.estimator.vector, locals_of(params)
        if vector is None or [v.shape for v in vector] != [t.shape for t in shapes]:  # frozen or thawed since
            vector = [torch.zeros_like(t) for t in shapes]
        by_param = dict(zip(params, vector, strict=True))
        stateless = isinstance(self.base, SGD) or self.estimator.vector is not None
        packed = checkpoint.pack(self.base.state_dict(), self._numbers(), self._all_params(), by_param, stateless)
        if self._stepped:
            checkpoint.announce_vector(self.base, by_param)
            self._announced = True
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume bit for bit. A bare optimizer's state dict loads too; warmup starts from the beginning then.

        Raises: ValueError if the parameter groups have another layout than those that were saved.
        """
        bare, numbers, vector = checkpoint.unpack(state_dict)
        trainable = [v for v, p in zip(vector, self._all_params(), strict=False) if p.requires_grad]
        checks.resumed(numbers, len(self._numbers()), trainable, self._params())
        self.base.load_state_dict(bare)
        if numbers is None:
            self.restart()
            checkpoint.announce(self.base, self._numbers())
            return
        for part in self._parts():
            size = len(part.state_values())
            part.load_state_values(numbers[:size])
            numbers = numbers[size:]
        size = len(numbers) // 2
        self.last, self._reading = Measurement.from_values(numbers[:size]), Measurement.from_values(numbers[size:])
        self._signals = StepSignals(self.counts.loss, self.counts.norm)
        self.estimator.method, self.prober.closure_replays = METHODS[int(self.counts.method)], self.counts.replays
        self.watch.marking = True
        self.estimator.load_vector(trainable, self._params())
        self._publish("resumed", recorded=False)
        checkpoint.announce(self.base, self._numbers())

    # One step

    def _backward_on_graph(self, loss: Tensor, backward: Callable[[], None]) -> None:
        """Run `backward`; before it, a probe on the graph if one is wanted and nothing can be evaluated again."""
        probe = self._graph_probe
        if probe.passes and not self._has_gradient():
            probe.passes = 0  # the step of those passes was skipped
        probe.passes, probe.loss = probe.passes + 1, loss.detach() / loss_scale(loss)
        measure = probe.wanted and probe.passes == probe.passes_before and self._largest_rate() > 0.0
        measure = measure and self.phase != "done" and self.rule is not None and not self.prober.expects_source()
        if measure:
            probe.found = self.prober.on_graph(loss, self._params(), self._probe_seed())
        backward()

    def _deciding(self, closure: Closure) -> Closure:
        """The closure for the wrapped optimizer: its first evaluation decides the step, before the rates are read."""
        called = False

        def evaluate() -> Any:
            nonlocal called
            if called or self.phase == "done":
                with torch.enable_grad():
                    loss = closure()
                if not called:
                    self._decide(loss.detach() if isinstance(loss, Tensor) else None)
                called = True
                return loss
            called = True
            self.prober.capture.remove()  # the closure is the better source
            on_graph = self._backward_on_graph if self.prober.closure_replays == 0.0 else None
            run = ClosureRun(closure, self._params(), self.watch, on_graph)
            self._in_closure = True
            try:
                loss = run.evaluate()
                self._decide(run.loss, run)
            finally:
                self._in_closure = False
            return loss

        return evaluate

    def _decide(self, loss: Tensor | None, run: ClosureRun | None = None) -> None:
        """Probe if due, ask the controller, scale the rates. Does nothing for a step that moves nothing.

        Args:
            loss: the step's, detached; None if unknown.
            run: the evaluation of the closure that led to it, if that was watched.
        """
        rate = self._largest_rate()
        if rate <= 0.0 or not self._has_gradient():
            return
        self.counts.steps += 1
        gradients = 1 if run is not None else max(self.watch.passes, self._graph_probe.passes, 1)
        self.counts.gradients += gradients
        if self.phase == "done":
            self.prober.capture.remove()  # nothing will be measured
            self.watch.marking = False
            self._scale_rates(self.controller.update(rate).scale)
            known = loss is not None and loss.device.type == "cpu"  # never wait for a device here
            self._publish("", loss=float(loss) if known and loss is not None else None)
            return
        params = self._params() if run is None else run.params
        value, norm = self._signals.read(loss, params)
        guarding = self.phase != "warmup" and not self.controller.rising(rate)
        due = self.cadence.due(value, norm, self._probe_cost(), guarding, gradients)
        broken = self._broken(loss is not None, value, norm, params[0].device)
        found = None if broken else self._measure(due, loss, run, params)
        if found is not None and self.rule is not None:
            found = self._account(found)
        reading = None
        if found is not None:
            tolerant = self.rule is not None and self.rule.tolerates_overshoot
            reading = Reading(
                found.ratio, found.share, found.relative_update, tolerant, bool(found.noisy), found.reason
            )
        if broken:
            reading = Reading(math.nan, reason="the loss or its gradient is not finite")
        was = self.phase
        decision = self.controller.update(rate, reading, self.cadence.losing, self.cadence.surprise)
        if found is not None:
            self.cadence.probed(found.cost, decision.closeness)
        if self.phase != was:
            log.info("step %d: %s", int(self.counts.steps), decision.reason)
        self._scale_rates(decision.scale)
        ratio = decision.ratio if self.control or not decision.scale else decision.ratio / decision.scale
        self._publish(decision.reason, None if loss is None else value, found is not None, ratio)

    def _account(self, found: Measurement) -> Measurement:
        """Book a probe."""
        found = found.agreed(self._params()[0].device)
        self.last = found
        self.counts.probes += 1
        self.counts.hvps += found.hvps
        self.counts.cost += found.cost
        self.counts.method = METHODS.index(self.estimator.method)
        self.counts.replays = self.prober.closure_replays
        if found.reason:
            self._warn(found.reason)
        return found

    def _broken(self, known: bool, loss: float, norm: float, device: torch.device) -> bool:
        """Whether the loss or the gradient is not finite; in an accelerator's first step nan is not known yet."""
        unknown = math.isnan(norm) and self.counts.steps == 1 and device.type != "cpu"
        return not unknown and not (math.isfinite(norm) and (not known or math.isfinite(loss)))

    def _measure(
        self, due: str, loss: Tensor | None, run: ClosureRun | None, params: list[Tensor]
    ) -> Measurement | None:
        """The reading for this step, if there is one: made now, on the live graph before, or on the last update."""
        graph = self._graph_probe
        if self.rule is not None and graph.found is not None:
            return graph.found.times(graph.passes)
        if run is not None and run.skipped:
            due = ""
        if self.rule is None:
            found = self._last_update()
            if due and (found is None or self.cadence.every == 1):  # else `due` has not heard of this probe yet
                self._begin_update(self._evaluation(loss, run), params)
            return found
        if not due:
            return None
        evaluation = self._evaluation(loss, run)
        if self.prober.has_source(evaluation):
            return self.prober.probe(evaluation, params, self._probe_seed())
        if graph.passes == 0 and self.prober.closure_replays == 0.0:
            return failed(self.prober.why_no_source)
        if graph.passes == 0:
            self._no_source()
        graph.wanted = graph.wanted or graph.passes > 0
        return None

    def _evaluation(self, loss: Tensor | None, run: ClosureRun | None) -> Evaluation:
        return Evaluation(loss=loss, untouched=self.watch.untouched) if run is None else run.evaluation()

    def _last_update(self) -> Measurement | None:
        """The reading along the last update, where the rule is not known, at the rate of that."""
        found, self._reading = self._reading, None
        if found is None:
            return None
        return replace(found, ratio=found.ratio * self._largest_rate() / self.counts.rate)

    def _begin_update(self, evaluation: Evaluation, params: list[Tensor]) -> None:
        if self.prober.closure_replays != 0.0 and not self.prober.has_source(evaluation):
            if self._graph_probe.passes:
                raise RuntimeError(NO_RULE.format(name=type(self.base).__name__))
            return self._no_source()
        self._update = self.prober.before_update(evaluation, params)
        self.counts.rate = self._largest_rate()

    def _no_source(self) -> None:
        """Raise at the first probe. One that has been made, or a batch that may be observed later, is worth waiting."""
        if self.counts.probes == 0 and self.prober.loss_fn is None:
            raise RuntimeError(NO_SOURCE)
        if self.counts.probes == 0 and self.counts.steps == PATIENCE:
            warn(NOT_OBSERVED)

    def _measure_update(self) -> None:
        """The reading for the next step, where the rule is not known: along the update just made."""
        if self._update is not None:
            scale = self.controller.applied if self.control else 1.0
            update = self._update
            found = update if isinstance(update, Measurement) else self.prober.after_update(update, max(scale, 1e-12))
            self._reading = self._account(found)

    def _finish(self) -> None:
        """After the update: the schedule's own rates again, the batch forgotten."""
        self._stepped = True
        self._rates.restore(self.param_groups)
        self._update = None
        self._graph_probe.next_step()
        self.prober.forget()
        self.watch.clear()
        take_back_scaler(self.base)

    def _scale_rates(self, scale: float) -> None:
        if self.control and scale != 1.0:
            self._rates.scale(self.param_groups, scale)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(getattr(self.base, "_step_supports_amp_scaling", False))

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _params(self) -> list[Tensor]:
        """The trainable parameters, group by group."""
        return [p for p in self._all_params() if p.requires_grad]

    def _follow_freezing(self) -> None:
        """Begin again where parameters have been thawed or added: they have never been measured."""
        params = self._params()
        if len(params) == len(self.watch.params):
            return
        if len(params) > len(self.watch.params):
            self.restart()
        self.watch.remove()
        self.watch = GradientWatch(params)

    def _has_gradient(self) -> bool:
        return any(p.grad is not None for group in self.param_groups for p in group["params"] if p.requires_grad)

    def _largest_rate(self) -> float:
        return max((learning_rate(group) for group in self.param_groups), default=0.0)

    def _probe_cost(self) -> float:
        return float(self.probe_steps) if self.last is None else max(self.last.cost, 1.0)

    def _probe_seed(self) -> int:
        return self.seed + int(self.counts.probes)

    def _warn(self, reason: str) -> None:
        """Say once for each kind of failure what went wrong; the numbers are in the history."""
        kind = reason.split(":")[0]
        if kind not in self._said:
            self._said.add(kind)
            warn(f"warmctl: a probe failed, the learning rate is held: {reason}")

    def _publish(
        self,
        reason: str,
        loss: float | None = None,
        probed: bool = False,
        ratio: float = math.nan,
        recorded: bool = True,
    ) -> None:
        """Keep the row of this step, in the order of `COLUMNS`."""
        counts, last = self.counts, self.last
        scale = self.controller.applied if self.control else 1.0
        scheduled = self._rates.scheduled(self.param_groups)
        steps, overhead = int(counts.steps), counts.cost / max(counts.gradients, 1.0)
        sharpness, threshold, residual = (last.sharpness, last.threshold, last.residual) if last else UNKNOWN
        self._row = (
            *(steps, self.phase, scale, scale * scheduled, scheduled, loss, sharpness, threshold, ratio),
            *(self.controller.target, residual, int(counts.hvps), int(counts.probes), overhead, probed, reason),
        )
        if steps and recorded:
            self.history.record(self._row)

    # State

    def _parts(self) -> tuple[FloatState, FloatState, FloatState, GraphProbe, ModelCapture]:
        return self.controller.state, self.cadence.state, self.counts, self._graph_probe, self.prober.capture

    def _numbers(self) -> list[float]:
        self.counts.loss, self.counts.norm = self._signals.delayed
        values = [value for part in self._parts() for value in part.state_values()]
        return [*values, *Measurement.values(self.last), *Measurement.values(self._reading)]

    def __getstate__(self) -> dict[str, Any]:
        # "step": a scheduler's patch on the instance, bound to the original.
        transient = {"watch", "_update", "_rates", "grad_scale", "found_inf", "step"}
        return {name: value for name, value in self.__dict__.items() if name not in transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.estimator.optimizer = self.base
        self.watch = GradientWatch(self._params())
        self._update, self._rates = None, ScaledRates()


# The hooks of the wrapper are those of the base, so that they are registered once and fire once.
for _name in (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
):
    setattr(AdaptiveWarmup, _name, property(lambda self, name=_name: getattr(self.base, name)))  # type: ignore[misc]
