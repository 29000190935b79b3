"""One probe: from whatever source of the loss there is to a Measurement, whatever goes wrong on the way.

Sources, in this order: the closure given to `step`; an observed batch with `loss_fn`; the model's own loss, captured from
its last forward. A probe that fails is a Measurement with a reason: nothing that goes wrong in here reaches training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from warmctl import distributed
from warmctl.capture import ModelCapture
from warmctl.estimator import Measurement, SharpnessEstimator, failed
from warmctl.operators import HessianOperator
from warmctl.replay import Closure, NotReplayable, RandomState, Replay, check_loss
from warmctl.vectors import Vector, add_, dense_gradient, locals_of

NO_SOURCE = """AdaptiveWarmup has no loss to measure the sharpness of. One line gives it one:
  opt.step(closure)      with a closure that clears gradients, computes the loss, calls backward and returns the loss; or
  opt.backward(loss)     in place of loss.backward(); or
  opt.observe(batch)     before opt.step(), with AdaptiveWarmup(..., loss_fn=lambda model, batch: loss)."""
FORWARD_COST = 1 / 3
"""A forward pass in gradient evaluations."""
NOT_REPLAYABLE = (
    "{error}. Draw the batch outside of the closure, or give AdaptiveWarmup a loss_fn and call opt.observe(batch) before "
    "opt.step()."
)


@dataclass(frozen=True)
class Evaluation:
    """How the gradient of the coming step came about.

    Attributes:
        closure: repeats it, or None.
        random_state: all streams just before it, or None.
        loss: its value, or None.
        untouched: `.grad` still holds what one evaluation left there: not accumulated, clipped or rescaled.
    """

    closure: Closure | None = None
    random_state: RandomState | None = None
    loss: Tensor | None = None
    untouched: bool = False


class Prober:
    """Finds a loss that can be repeated and measures on it."""

    def __init__(
        self, model: nn.Module, estimator: SharpnessEstimator, loss_fn: Callable[[nn.Module, Any], Tensor] | None
    ) -> None:
        self.model, self.estimator, self.loss_fn = model, estimator, loss_fn
        self.capture = ModelCapture(model)
        self.observed: tuple[Any, RandomState] | None = None
        self.closure_replays: bool | None = None
        self.why_no_source = "there is no loss that can be evaluated again"

    def has_source(self, evaluation: Evaluation) -> bool:
        return evaluation.closure is not None or self.observed is not None or self.capture.forwards > 0

    def probe(self, evaluation: Evaluation, params: list[Tensor], seed: int) -> Measurement:
        """Measure the coming step. Cost: the estimator's; 1 more at the first, to see that the closure can be repeated."""
        extra = 0.0
        self.capture.enabled = False
        try:
            if evaluation.closure is not None and self.closure_replays is None:
                extra = 1.0
                self._check_closure(evaluation, params)
            source = self._source(evaluation, params)
            if source is None:
                return failed(self.why_no_source, extra)
            replay, gradient, weight = source
            found = self.estimator.measure(replay, gradient, seed)
            return replace(found.times(weight), cost=found.cost + extra)
        except (RuntimeError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
            return failed(_first_line(error), extra)
        finally:
            self.capture.enabled = True

    def on_graph(self, loss: Tensor, params: list[Tensor], seed: int) -> Measurement:
        """Measure on the graph of `loss`, still alive after its backward pass, by double backward; `.grad` is set."""
        try:
            with HessianOperator.on_graph(loss, params, inner=distributed.inner_product(params)) as operator:
                return self.estimator.measure_on(operator, seed)
        except (RuntimeError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
            return failed(f"{_first_line(error)}. This model cannot be differentiated twice: use opt.step(closure) instead")

    def realised(self, evaluation: Evaluation, params: list[Tensor], before: Vector, scale: float) -> Measurement:
        """The stability ratio along the update just made, 1 − ΔL/(gᵀΔ), over `scale`: for rules without a threshold.

        Args:
            before: the parameters before the update; `.grad` still holds the gradient there.
            scale: the scale at which it was made, above 0.

        Cost: one forward pass. Undefined, and said so, where the update was not a descent direction.
        """
        self.capture.enabled = False
        try:
            source = self._source(evaluation, params)
            if source is None:
                return failed(self.why_no_source)
            replay, gradient, _ = source
            inner = distributed.inner_product(params)
            update = add_([t.clone() for t in locals_of(params)], before, -1.0)
            slope = inner(gradient if gradient is not None else [dense_gradient(p) for p in params], update)
            if not slope < 0:
                return failed("the update does not descend the gradient of its batch", FORWARD_COST)
            after = replay.value()
            start = float(evaluation.loss) if evaluation.loss is not None else math.nan
            ratio = (1.0 - (after - start) / slope) / scale
            return Measurement(ratio, 0.0, math.nan, 1.0, 0, FORWARD_COST, "")
        except (RuntimeError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
            return failed(_first_line(error))
        finally:
            self.capture.enabled = True

    def forget(self) -> None:
        """Drop the batch of the step just made."""
        self.observed = None
        self.capture.clear()

    def _source(self, evaluation: Evaluation, params: list[Tensor]) -> tuple[Replay, Vector | None, float] | None:
        """A replay, its gradient at the present parameters if it is at hand, and its weight in the whole loss."""
        present = [dense_gradient(p) for p in params] if evaluation.untouched else None
        if evaluation.closure is not None and self.closure_replays:
            return self._replay(evaluation.closure, params, evaluation.random_state), present, 1.0
        if self.observed is not None and self.loss_fn is not None:
            batch, random_state = self.observed
            loss_fn = self.loss_fn

            def closure() -> Tensor:
                value = loss_fn(self.model, batch)
                check_loss(value)
                value.backward()  # type: ignore[no-untyped-call]
                return value

            return self._replay(closure, params, random_state), None, 1.0
        captured = self.capture.closure()
        if captured is None:
            return None
        replay = self._replay(captured, params, self.capture.random_state)
        if present is not None and self.capture.forwards == 1:
            return replay, present, 1.0
        gradient = replay.gradient()[1]
        return replay, gradient, self._accumulation_weight(gradient, params)

    def _accumulation_weight(self, gradient: Vector, params: list[Tensor]) -> float:
        """n where the n micro-batches of this step were summed, 1 where they were averaged (or there was one).

        An average of gradients cannot reach further along one of them than that one does; a sum does.
        """
        count = self.capture.forwards
        if count < 2:
            return 1.0
        inner = distributed.inner_product(params)
        reach = inner([dense_gradient(p) for p in params], gradient) / max(inner(gradient, gradient), 1e-30)
        return float(count) if reach > 1.05 else 1.0

    def _check_closure(self, evaluation: Evaluation, params: list[Tensor]) -> None:
        """Evaluate the closure once more in place: one that draws data or keeps state cannot be measured on."""
        replay = self._replay(evaluation.closure, params, evaluation.random_state)
        loss = float(evaluation.loss) if evaluation.loss is not None else math.nan
        try:
            replay.verify(loss, [dense_gradient(p) for p in params] if evaluation.untouched else None)
            agreed = 1.0
        except NotReplayable as error:
            self.why_no_source = NOT_REPLAYABLE.format(error=error)
            agreed = 0.0
        self.closure_replays = distributed.agree([agreed], params[0].device)[0] == 1.0

    def _replay(self, closure: Closure | None, params: list[Tensor], random_state: RandomState | None) -> Replay:
        assert closure is not None
        average = None if distributed.is_sharded(params) else distributed.average_
        return Replay(closure, params, self.model, random_state, average)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
