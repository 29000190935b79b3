"""One probe: from a loss that can be evaluated again to a Measurement, whatever goes wrong on the way.

A probe that fails is a Measurement with a reason: nothing that goes wrong in here reaches training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from warmctl import distributed
from warmctl.curvature.operators import HessianOperator
from warmctl.loss.no_trace import no_trace
from warmctl.loss.ranks import Ranks
from warmctl.loss.replay import Replay
from warmctl.loss.scaler import loss_scale
from warmctl.loss.source import EXACT, UNTRIED, Replays
from warmctl.loss.sources import Sources
from warmctl.stability.estimator import SharpnessEstimator
from warmctl.stability.measurement import Measurement, failed
from warmctl.stability.representation import RepresentationChange
from warmctl.vectors import Vector, add_, dense_gradient, locals_of
from warmctl.warning import first_line

log = logging.getLogger("warmctl")
BLIND = (
    "representation_change: no layer's output is seen, for the loss goes past the forward of the model's modules (or "
    "they are scripted); the rate grows by the other gauges alone"
)
NOT_TWICE = "use opt.step(closure), or a loss_fn and opt.observe(batch), in place of opt.backward(loss)"
Result = TypeVar("Result")
FORWARD = 1.0 / 3.0
"""Cost of a forward pass, in gradient evaluations."""


@dataclass(frozen=True)
class RealisedUpdate:
    """What is needed to measure along an update once it is made: loss, parameters and gradient before it."""

    replay: Replay
    before: Vector
    gradient: Vector
    cost: float

    def measure(self, scale: float) -> Measurement | None:
        """−½ ΔᵀHΔ / (gᵀΔ) over `scale`, with HΔ from the gradients at both ends.

        On a quadratic that is 1 − ΔL/(gᵀΔ), but a small step is not lost in the rounding of the loss. A constant
        factor on the loss does not matter. Undefined, and said so, where the update was not a descent direction.
        None where nothing moved: the first steps of SOAP, and of RAdam without its schedule, only gather statistics.
        """
        params = self.replay.params
        inner = distributed.inner_product(params)
        update = add_([t.clone() for t in locals_of(params)], self.before, -1.0)
        if inner(update, update) == 0.0:
            return None
        slope = inner(self.gradient, update)
        if not slope < 0:
            return failed("the update does not descend the gradient of its batch")
        after = self.replay.gradient()[1]
        if inner(after, after) == 0.0:
            return failed("the loss has no gradient any more after the update")
        bend = inner(after, update) - slope
        return Measurement(-0.5 * bend / slope / scale, 0.0, bend / inner(update, update), math.nan, 0, 1.0)


@dataclass(frozen=True)
class UpdateMade:
    """An update whose loss cannot be evaluated again; it is measured with the gradient of the next batch.

    On average over batches that is the gradient at the end of the update. The noise of the batch that made the update
    counts as curvature, for half of the edge at most.
    """

    update: Vector
    slope: float
    scale: float

    @staticmethod
    def since(before: Vector, params: list[Tensor], scale: float) -> UpdateMade:
        """From the parameters before it; `.grad` still holds the gradient that made it."""
        update = add_(list(torch._foreach_neg(before)), locals_of(params))
        slope = distributed.inner_product(params)([dense_gradient(p) for p in params], update)
        return UpdateMade(update, slope, scale)

    def measure(self, params: list[Tensor]) -> Measurement:
        """With the next gradient in `.grad`; see `RealisedUpdate.measure`. Cost: none."""
        if not self.slope < 0:
            return failed("the update does not descend the gradient of its batch")
        inner = distributed.inner_product(params)
        bend = inner([dense_gradient(p) for p in params], self.update) - self.slope
        curvature = bend / inner(self.update, self.update)
        return Measurement(-0.5 * bend / self.slope / self.scale, 0.0, curvature, math.nan, 0, 0.0)


class Prober:
    """Measures on the loss that the sources have for the coming step.

    Attributes:
        around: a context for each probe, for frameworks that keep state of their own.
    """

    def __init__(self, model: nn.Module, sources: Sources, estimator: SharpnessEstimator) -> None:
        self.model, self.sources, self.estimator = model, sources, estimator
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._replays = Replays(model)
        self._change = RepresentationChange(model)
        self._looked_at: Replay | None = None
        self._said_blind = False

    @property
    def ranks(self) -> Ranks:
        """Those that measure together."""
        return self._replays.ranks

    def probe(self, params: list[Tensor], seed: int) -> Measurement:
        """Measure the coming step. Cost: the estimator's, and at the first what the source spends on its checks."""

        def measure() -> Measurement:
            loss = self.sources.step_loss(params, self._replays)
            if loss is None:
                return failed(self.sources.verdict.why_not)
            before, replay = self._replays.spent, loss.replay
            replay.compares = True
            if loss.value is not None:
                replay.expected = float(loss.value), loss.gradient
            else:
                replay.moving = any(bool(dense_gradient(p).any()) for p in params if p.grad is not None)
            found = self.estimator.measure(replay, loss.gradient, seed, loss.weight)
            return replace(found, cost=found.cost + before)

        method = self.estimator.method
        found = self._guarded(measure, params)
        if found.reason and distributed.world_size() > 1:  # one rank may have come further than another
            self.estimator.method, self.estimator.vector = method, None
        return found

    def recheck(self, found: Measurement, params: list[Tensor], seed: int) -> Measurement:
        """`found`, if the gradient of the step still is that of the loss that was measured; else what is found now.

        Cost: 1, and another probe where it is not.
        """
        verdict = self.sources.verdict
        verdict.repeats = UNTRIED
        self._guarded(lambda: self.sources.step_loss(params, self._replays), params)
        spent = found.cost + self._replays.spent
        if verdict.repeats == EXACT or verdict.untried:  # then the next probe will tell, as of several micro-batches
            return replace(found, cost=spent)
        again = self.probe(params, seed)
        return replace(again, cost=spent + again.cost, hvps=found.hvps + again.hvps)

    def on_graph(self, loss: Tensor, params: list[Tensor], seed: int) -> Measurement:
        """Measure on the graph of `loss`, before its backward pass frees it, by double backward.

        The loss scale of a `GradScaler` is taken out of products and gradient, as it will be before the step.
        """
        grads = [p.grad for p in params]

        def measure() -> Measurement:
            inner, average = distributed.inner_product(params), distributed.averager(params)
            scale = float(loss_scale(loss))

            def finish(vector: Vector) -> None:
                if average is not None:
                    average(vector)
                if scale != 1.0:
                    torch._foreach_div_(vector, scale)

            with no_trace(params, self.model):  # checkpointed modules run again
                operator = HessianOperator.on_graph(loss, params, finish, self.model, inner=inner)
            with operator:
                for p, gradient in zip(params, operator.graph_gradient(finish), strict=True):
                    if gradient is not None:
                        p.grad = gradient if p.grad is None else gradient + p.grad / scale
                return self.estimator.measure_on(operator, seed)

        try:
            with self._replays.ranks.together(params):
                return measure()
        except distributed.OnAnotherRank as error:
            self.estimator.vector = None
            return failed(str(error))
        except (torch.OutOfMemoryError, MemoryError) as error:
            self.estimator.vector = None
            return failed(first_line(error))
        except Exception as error:
            self.estimator.vector = None
            instead = self.sources.verdict.why_not if self.sources.in_closure else NOT_TWICE
            return failed(f"{first_line(error)}. This model cannot be differentiated twice: {instead}")
        finally:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad

    def before_update(self, params: list[Tensor]) -> RealisedUpdate | Measurement:
        """Begin to measure along the update about to be made, for rules without a threshold; see `RealisedUpdate`.

        Cost: 1 if the gradient is not at hand, and at the first what the source spends on its checks.
        """

        def begin() -> RealisedUpdate | Measurement:
            loss = self.sources.step_loss(params, self._replays)
            if loss is None:
                return failed(self.sources.verdict.why_not)
            # `.grad` is copied: the update may write to it.
            gradient = loss.replay.gradient()[1] if loss.gradient is None else [g.clone() for g in loss.gradient]
            return RealisedUpdate(loss.replay, [t.clone() for t in locals_of(params)], gradient, self._replays.spent)

        return self._guarded(begin, params)

    def after_update(self, update: RealisedUpdate, scale: float) -> Measurement | None:
        """The ratio along the update that was made at `scale`; None if it moved nothing. Cost: 1 more."""
        found = self._guarded(lambda: update.measure(scale), update.replay.params)
        return None if found is None else replace(found, cost=found.cost + update.cost)

    def listening(self, due: bool) -> AbstractContextManager[None]:
        """Around the closure's evaluation for the step: a `look` that is due after it needs none of its own then.

        On one process: on several, what one has heard, another may not.
        """
        return self._change.listening() if due and distributed.world_size() == 1 else nullcontext()

    def look(self, params: list[Tensor]) -> float:
        """Look at the representations before the update; `changed` tells how far it has moved them. Returns the cost.

        That is a forward pass unless it was heard, and what the source spends; 0 where nothing can be evaluated again.
        A look that fails is over: `changed` knows nothing then, and costs nothing.
        """
        spent = 0.0

        def begin() -> Replay | None:
            nonlocal spent
            replay = self.sources.forward(params, self._replays)
            spent = float(self._replays.spent)
            of_closure = self.sources.closure.ready and not self.sources.verdict.failures
            if replay is not None and not (of_closure and self._change.heard):
                spent += FORWARD
                self._change.before(replay)
            return replay

        found = self._guarded(begin, params)
        if isinstance(found, Measurement):
            self._looked_at = None
            return spent or found.cost
        blind = found is not None and not self._change.heard
        if blind and not self._said_blind:
            log.info(BLIND)
        self._said_blind = self._said_blind or blind
        self._looked_at = found if not blind or distributed.world_size() > 1 else None  # ranks meet after the update
        return spent

    def changed(self) -> tuple[float, float]:
        """The relative representation change of the update made since `look`, nan if not to be seen; and the cost."""
        replay, self._looked_at = self._looked_at, None
        if replay is None:
            return math.nan, 0.0
        found = self._guarded(lambda: self._change.after(replay), replay.params)
        return (math.nan if isinstance(found, Measurement) else found), FORWARD

    def _guarded(self, work: Callable[[], Result], params: list[Tensor]) -> Result | Measurement:
        """Nothing that goes wrong in `work`, here or on another rank, reaches training; what it cost is counted."""
        self._replays.spent = 0
        try:
            with self._replays.ranks.together(params), self.around():
                result = work()
        except distributed.OnAnotherRank as error:
            return failed(str(error), float(self._replays.spent))
        except Exception as error:
            return failed(first_line(error), float(self._replays.spent))
        if isinstance(result, Measurement) and result.reason and not result.cost:
            return replace(result, cost=float(self._replays.spent))
        return result
