"""Every reading of a run: made on a loss that is evaluated again, on a live graph, or along the update just made.

Which of the four depends on the optimizer and on the loop; the meter keeps count of what all of them cost.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from warmctl import distributed
from warmctl.curvature.operators import METHODS
from warmctl.loss.source import NEVER, TRIES
from warmctl.loss.sources import Sources
from warmctl.stability.estimator import SharpnessEstimator
from warmctl.stability.measurement import Measurement, failed
from warmctl.stability.probe import Prober, RealisedUpdate, UpdateMade
from warmctl.stability.update_rules import UpdateRule, update_rule
from warmctl.state import Allowed, Counts, check
from warmctl.vectors import Vector, locals_of
from warmctl.warning import warn

NO_RULE = (
    "backward(loss) cannot measure {name}: it has no registered update rule, so it is measured along the update that "
    "it makes, and that needs the loss again afterwards. Use opt.step(closure), or opt.observe(batch) with a loss_fn, "
    "or warmctl.register_update_rule"
)

JUMP = 3.0
"""Factor between the sharpness of two readings from which on the loss is compared with the step's once more."""
SILENT_STEPS, SILENT_SCALE = 50, 0.1
"""Steps in a row at which a probe was due and could not be made, after which that is said below this scale."""
SILENT = (
    "warmctl: no probe could be made in the last {steps} steps, and the learning rate stays at {scale:.2g} of the "
    "schedule: {cause}"
)
NO_BACKWARD_IN_CLOSURE = (
    "opt.step() gets a closure that calls no backward, as from Lightning's manual optimization. There use "
    "self.manual_backward(loss) and Trainer(callbacks=[WarmupLogger()]); or call opt.step(closure) with one that "
    "computes the loss, calls backward and returns it, or give AdaptiveWarmup a loss_fn and call opt.observe(batch) on "
    "the wrapper before opt.step()"
)
NOT_AGAIN = (
    "the loss of an earlier step was given to opt.backward(loss) or opt.step(closure), that of these steps was not. "
    "Do so at every step"
)


class Meter:
    """Measures when asked to, and remembers what it found. A reading comes about in one of four ways:

        a loss that can be evaluated again    read: at once
        the live graph of `backward(loss)`    before_backward measures, read returns it
        no update rule                        read begins, after_update measures, the next read returns it
        shards, and `backward(loss)` alone    read begins, the next read measures with its gradient

    Args:
        optimizer, counts: the wrapped one, read only; where probes, products and their cost are booked.
        seed: of the random component of a warm start; a probe adds its number.

    Attributes:
        last, representation_change: of the last probe, and of the last update that was looked at; nan if not seen.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        sources: Sources,
        counts: Counts,
        hvp: str,
        estimator: str,
        probe_steps: int,
        seed: int,
    ) -> None:
        self.sources, self.counts = sources, counts
        self.probe_steps, self.seed = probe_steps, seed
        self.estimator = SharpnessEstimator(optimizer, hvp, estimator, probe_steps)
        self.prober = Prober(model, sources, self.estimator)
        self.last: Measurement | None = None
        self.representation_change = math.nan
        self._look_rate: float | None = None
        self._on_graph: Measurement | None = None
        self._update: RealisedUpdate | Measurement | None = None
        self._along_last_update: Measurement | None = None
        self._before: Vector | None = None
        self._made: UpdateMade | None = None
        self._rate = math.nan  # of the last update measured along
        self._said: set[str] = set()
        self._missed = 0  # steps in a row at which a probe was due, and nothing to measure on

    @property
    def rule(self) -> UpdateRule | None:
        """The optimizer's update rule; None if it has none, and is measured along the updates that it makes."""
        return self.estimator.rule

    @property
    def tolerant(self) -> bool:
        """Whether the rule undoes a small overshoot by itself."""
        return self.rule is not None and self.rule.tolerates_overshoot

    def restart(self) -> None:
        """Forget what was measured."""
        self.estimator.vector = self.last = self._along_last_update = self._made = None
        self.representation_change = math.nan

    @property
    def expected_cost(self) -> float:
        """Of the next probe, in gradient evaluations."""
        if self.last is None:
            return float(self.probe_steps)
        products = self.last.hvps / self.probe_steps or 1.0  # twice as many at the first
        return max(self.last.cost / products, 1.0)

    def read(
        self, due: str, params: list[Tensor], rate: float, each_step: bool, scale: float = 1.0
    ) -> Measurement | None:
        """The reading for the coming step, if there is one.

        Args:
            due: why to probe now, or "".
            params: the trainable parameters, with the gradient of the step.
            rate, scale: the common rate of all groups; and the scale of the last step.
            each_step: a probe is wanted at every step, though the last one is not known yet.

        Raises: RuntimeError at the first probe if there is no loss to measure on.
        """
        if self._on_graph is not None:
            return self._booked(self._on_graph.times(sum(self.sources.graph.weights)), params)
        if self._on_graph_of_shards(params):
            found = self._measured_by_next(rate, params)
            if due and (found is None or each_step):
                self._before, self._rate = [t.clone() for t in locals_of(params)], rate
            return found
        self._missed += bool(due)
        if self._missed >= SILENT_STEPS:
            self._say_silent(scale)
        if due and not distributed.everywhere(not self.sources.skipped, params[0].device):
            due = ""
        if self.rule is None:
            found = self._last_update(rate)
            if due and (found is None or each_step):  # the cadence hears of `found` only after this call
                self._begin_update(params, rate)
            return found
        found = self._probe(params) if due else None
        return None if found is None else self._booked(found, params)

    def before_backward(self, due: str, loss: Tensor, params: list[Tensor]) -> None:
        """Measure on the graph of `loss`, if a probe is due or was asked for, and nothing can be evaluated again."""
        # Of several ranks one may be ready and another not: they agree at the step, and measure at the next.
        graph, sharded = self.sources.graph, distributed.is_sharded(params)
        now = due != "" and distributed.world_size() == 1 and not self.sources.ready
        alone = self.rule is not None and not self.sources.expected and not sharded
        if alone and graph.last_pass and (graph.wanted or now):
            self._on_graph = self.prober.on_graph(loss, params, self._probe_seed()).times(1.0 / graph.weights[-1])

    def after_update(self, scale: float, params: list[Tensor]) -> None:
        """The update was made, at `scale`: for a rule that is not known the next reading is along it."""
        if self._before is not None:
            self._made, self._before = UpdateMade.since(self._before, params, max(scale, 1e-12)), None
        if self._update is not None:
            update = self._update
            found = update if isinstance(update, Measurement) else self.prober.after_update(update, max(scale, 1e-12))
            if found is None:  # nothing moved
                self.counts.cost += update.cost if isinstance(update, RealisedUpdate) else 0.0
            else:
                self._along_last_update = self._booked(found, params)

    def look(self, params: list[Tensor], rate: float) -> None:
        """Look at the representations before an update at this applied rate, if its batch can be evaluated again."""
        self._look_rate = rate
        self.counts.cost += self.prober.look(params)

    def changed(self) -> tuple[float, float]:
        """By how much the update just made has moved the representations, relative to them, and at which rate.

        nan if it was not looked at, or cannot be seen.
        """
        if self._look_rate is None:
            return math.nan, math.nan
        rate, self._look_rate = self._look_rate, None
        self.representation_change, cost = self.prober.changed()
        self.counts.cost += cost
        return self.representation_change, rate

    def next_step(self) -> bool:
        """Whether this step was measured on its graph, which is forgotten."""
        measured = self._on_graph is not None
        self._update = self._on_graph = self._look_rate = self._before = None
        return measured

    def _probe(self, params: list[Tensor]) -> Measurement | None:
        """Now, if a loss can be evaluated again; else a word to measure on the next step's graph."""
        graph, verdict = self.sources.graph, self.sources.verdict
        # A loss that failed more than once when it was evaluated again is left to its graph, where that works.
        given_up = verdict.failures >= TRIES and self.last is not None and not self.last.reason
        ready = distributed.everywhere(self.sources.ready, params[0].device)
        if ready and not (given_up and graph.passes):
            found = self.prober.probe(params, self._probe_seed())
            jumped = not distributed.everywhere(not self._jumped(found), params[0].device)
            if jumped and self.sources.trusting:
                found = self.prober.recheck(found, params, self._probe_seed())
            self.sources.watch.copy = None
            graph.wanted = graph.wanted or verdict.failures > 0
            return found
        if graph.passes == 0 and verdict.repeats == NEVER:
            return failed(verdict.why_not)
        if graph.passes == 0:
            self.sources.missing(self.counts.steps, self.counts.probes)
        graph.wanted = graph.wanted or graph.passes > 0
        return None

    def _last_update(self, rate: float) -> Measurement | None:
        """The reading along the last update, as it would be at this rate."""
        found, self._along_last_update = self._along_last_update, None
        return None if found is None else replace(found, ratio=found.ratio * rate / self._rate)

    def _on_graph_of_shards(self, params: list[Tensor]) -> bool:
        """The loss is known by its graph alone, and double backward does not go through sharded modules."""
        return self.sources.graph.passes > 0 and not self.sources.ready and distributed.is_sharded(params)

    def _measured_by_next(self, rate: float, params: list[Tensor]) -> Measurement | None:
        made, self._made = self._made, None
        if made is None or [u.shape for u in made.update] != [t.shape for t in locals_of(params)]:
            return None
        found = made.measure(params)
        return self._booked(replace(found, ratio=found.ratio * rate / self._rate), params)

    def _begin_update(self, params: list[Tensor], rate: float) -> None:
        ready = distributed.everywhere(self.sources.ready, params[0].device)
        if self.sources.verdict.repeats != NEVER and not ready:
            if self.sources.graph.passes:
                raise RuntimeError(NO_RULE.format(name=_without_rule(self.estimator.optimizer)))
            return self.sources.missing(self.counts.steps, self.counts.probes)
        self._update = self.prober.before_update(params)
        self._rate = rate

    def _booked(self, found: Measurement, params: list[Tensor]) -> Measurement:
        """Agreed on by all ranks, counted, and said once for each kind of failure; the numbers are in the history."""
        found = self.last = found.agreed(params[0].device)
        self._missed = 0
        self.counts.probes += 1
        self.counts.hvps += found.hvps
        self.counts.cost += found.cost
        kind = found.reason.split(":")[0]
        if kind and kind not in self._said:
            self._said.add(kind)
            warn(f"warmctl: a probe failed, and no learning rate is raised at such a step: {found.reason}")
        return found

    def _say_silent(self, scale: float) -> None:
        """Once, and not where `Sources.missing` has said it."""
        cause = _cause_of_silence(self.sources, self.counts.probes)
        if cause and scale < SILENT_SCALE and "silent" not in self._said:
            self._said.add("silent")
            warn(SILENT.format(steps=SILENT_STEPS, scale=scale, cause=cause))

    def _jumped(self, found: Measurement) -> bool:
        """Whether it is so far from the last reading that what was measured on may be another loss."""
        before = math.nan if self.last is None else self.last.sharpness
        known = math.isfinite(before) and math.isfinite(found.sharpness) and before != 0.0
        return known and not 1.0 / JUMP <= found.sharpness / before <= JUMP

    def _probe_seed(self) -> int:
        return self.seed + int(self.counts.probes)

    def state_values(self) -> list[float]:
        method = float(METHODS.index(self.estimator.method))
        readings = Measurement.values(self.last), Measurement.values(self._along_last_update)
        return [method, self._rate, self.representation_change, *readings[0], *readings[1]]

    def check_state_values(self, values: list[float]) -> None:
        method, rate, change, *numbers = values
        methods = Allowed(among=tuple(float(index) for index in range(len(METHODS))))
        half = len(numbers) // 2
        rates = Allowed(sys.float_info.min, unknown=not numbers[half])  # a reading along an update has the rate of it
        changes = Allowed(0.0, math.inf, unknown=True)
        check([method, rate, change], {"method": methods, "rate": rates, "representation_change": changes})
        Measurement.check_values(numbers[:half], "last_")
        Measurement.check_values(numbers[half:], "along_last_update_")

    def load_state_values(self, values: list[float]) -> None:
        method, self._rate, self.representation_change, *values = values
        self.estimator.method = METHODS[int(method)]
        half = len(values) // 2
        self.last, self._made = Measurement.from_values(values[:half]), None
        self._along_last_update = Measurement.from_values(values[half:])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_update": None, "_before": None}


def _without_rule(optimizer: Optimizer) -> str:
    members: list[Optimizer] = getattr(optimizer, "members", [optimizer])
    return " and ".join(type(member).__name__ for member in members if update_rule(member) is None)


def _cause_of_silence(sources: Sources, probes: float) -> str:
    run = sources.closure.run
    return NO_BACKWARD_IN_CLOSURE if run is not None and run.skipped else NOT_AGAIN if probes else ""
