"""One probe: from whatever source of the loss there is to a Measurement, whatever goes wrong on the way.

Sources, in this order: the closure given to `step`; an observed batch with `loss_fn`; the model's own loss, captured
from its last forward. A probe that fails is a Measurement with a reason: nothing that goes wrong in here reaches
training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from warmctl import distributed
from warmctl.curvature.operators import HessianOperator
from warmctl.loss.captured import ModelCapture, loss_scale
from warmctl.loss.replay import Closure, NotReplayable, RandomState, Replay, check_loss, no_trace
from warmctl.stability.estimator import SharpnessEstimator
from warmctl.stability.measurement import Measurement, failed, first_line
from warmctl.vectors import Vector, add_, dense_gradient, locals_of

NO_SOURCE = """AdaptiveWarmup has no loss to measure the sharpness of. One line gives it one:
  opt.step(closure)      with a closure that clears gradients, computes the loss, calls backward and returns it; or
  opt.backward(loss)     in place of loss.backward(); or
  opt.observe(batch)     before opt.step(), with AdaptiveWarmup(..., loss_fn=lambda model, batch: loss)."""
NOT_CAPTURED = (
    "the model's own loss is not what is trained on: its gradient is not the gradient of the step. Give opt.step() a "
    "closure, or call opt.backward(loss) in place of loss.backward()."
)
NOT_REPLAYABLE = (
    "the closure cannot be repeated: {error}. Draw the batch outside of the closure, or give AdaptiveWarmup a loss_fn "
    "and call opt.observe(batch) before opt.step()."
)
LOSS_FN = "loss_fn failed: it must run the model itself, as lambda model, batch: criterion(model(batch[0]), batch[1])"
SCALED_BACK = 1e-3
"""Relative distance from the unscaled loss's gradient, at which that of the step was scaled and scaled back."""
EXACT, CLOSE = 1.0, 0.5
"""How a repeated gradient compares with that of the step: the same, or the same but for clipping or a small term."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Evaluation:
    """How the gradient of the coming step came about.

    Attributes:
        closure: repeats it, or None.
        random_state: all streams just before it, or None.
        loss: its value, or None.
        untouched: `.grad` still holds what one evaluation left there: not accumulated, clipped or rescaled.
        weight: how often it is in `.grad`: more than once where a closure adds to earlier micro-batches.
        skipped: the closure called no backward this time; `.grad` is from before. There is nothing to measure on.
    """

    closure: Closure | None = None
    random_state: RandomState | None = None
    loss: Tensor | None = None
    untouched: bool = False
    weight: float = 1.0
    skipped: bool = False


@dataclass(frozen=True)
class RealisedUpdate:
    """What is needed to measure along an update once it is made: loss, parameters and gradient before it."""

    replay: Replay
    before: Vector
    gradient: Vector
    cost: float

    def measure(self, scale: float) -> Measurement:
        """−½ ΔᵀHΔ / (gᵀΔ) over `scale`, with HΔ from the gradients at both ends.

        On a quadratic that is 1 − ΔL/(gᵀΔ), but a small step is not lost in the rounding of the loss. A constant
        factor on the loss does not matter. Undefined, and said so, where the update was not a descent direction.
        """
        params = self.replay.params
        inner = distributed.inner_product(params)
        update = add_([t.clone() for t in locals_of(params)], self.before, -1.0)
        slope = inner(self.gradient, update)
        if not slope < 0:
            return failed("the update does not descend the gradient of its batch")
        bend = inner(self.replay.gradient()[1], update) - slope
        return Measurement(-0.5 * bend / slope / scale, 0.0, bend / inner(update, update), math.nan, 0, 1.0)


class Prober:
    """Finds a loss that can be repeated and measures on it."""

    def __init__(
        self,
        model: nn.Module,
        estimator: SharpnessEstimator,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    ) -> None:
        self.model, self.estimator, self.loss_fn = model, estimator, loss_fn
        self.capture = ModelCapture(model)
        self.observed: tuple[Any, RandomState] | None = None
        self.closure_replays = -1.0  # EXACT, CLOSE or 0 once tried
        self.around: Callable[[], AbstractContextManager[Any]] = (
            nullcontext  # for frameworks that keep state of their own
        )
        self._evaluations = 0
        self.why_no_source = "there is no loss that can be evaluated again"

    def has_source(self, evaluation: Evaluation) -> bool:
        """Whether there is something to evaluate again for this step."""
        repeats = evaluation.closure is not None or bool(self.capture.weights)
        return self.observed is not None or (repeats and self.closure_replays != 0.0)

    def expects_source(self) -> bool:
        """Whether there will be, as far as can be told before the backward pass."""
        repeats = self.capture.forwards > 0 and self.capture.trained_on
        return self.observed is not None or (repeats and self.closure_replays != 0.0)

    def probe(self, evaluation: Evaluation, params: list[Tensor], seed: int) -> Measurement:
        """Measure the coming step. Cost: the estimator's; 1 more at the first, to see that it can be repeated."""

        def measure() -> Measurement:
            source = self._checked_source(evaluation, params)
            if source is None:
                return failed(self.why_no_source)
            replay, gradient, weight = source
            before = self._evaluations
            found = self.estimator.measure(replay, gradient, seed)
            return replace(found.times(weight), cost=found.cost + before)

        return self._guarded(measure)

    def on_graph(self, loss: Tensor, params: list[Tensor], seed: int) -> Measurement:
        """Measure on the graph of `loss`, before its backward pass frees it, by double backward.

        The loss scale of a `GradScaler` is taken out of products and gradient, as it will be before the step.
        """
        grads = [p.grad for p in params]
        try:
            inner, average = distributed.inner_product(params), distributed.averager(params)
            scale = float(loss_scale(loss))

            def finish(vector: Vector) -> None:
                if average is not None:
                    average(vector)
                if scale != 1.0:
                    torch._foreach_div_(vector, scale)

            with no_trace(params, self.model):  # checkpointed modules run again
                operator = HessianOperator.on_graph(loss, params, finish, inner=inner)
            with operator:
                for p, gradient in zip(params, operator.graph_gradient(finish), strict=True):
                    if gradient is not None:
                        p.grad = gradient if p.grad is None else gradient + p.grad / scale
                return self.estimator.measure_on(operator, seed)
        except Exception as error:
            return failed(
                f"{first_line(error)}. This model cannot be differentiated twice: use opt.step(closure) instead"
            )
        finally:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad

    def before_update(self, evaluation: Evaluation, params: list[Tensor]) -> RealisedUpdate | Measurement:
        """Begin to measure along the update about to be made, for rules without a threshold; see `RealisedUpdate`.

        Cost: 1 if the gradient is not at hand, 1 at the first to see that the closure can be repeated.
        """

        def begin() -> RealisedUpdate | Measurement:
            source = self._checked_source(evaluation, params)
            if source is None:
                return failed(self.why_no_source)
            replay, gradient, _ = source
            # `.grad` is copied: the update may write to it.
            gradient = replay.gradient()[1] if gradient is None else [g.clone() for g in gradient]
            return RealisedUpdate(replay, [t.clone() for t in locals_of(params)], gradient, self._evaluations)

        return self._guarded(begin)

    def after_update(self, update: RealisedUpdate, scale: float) -> Measurement:
        """The ratio along the update that was made at `scale`. Cost: 1 more."""
        found = self._guarded(lambda: update.measure(scale))
        return replace(found, cost=found.cost + update.cost)

    def forget(self) -> None:
        """Drop the batch of the step just made."""
        self.observed = None
        self.capture.clear()

    def _guarded(self, work: Callable[[], Result]) -> Result | Measurement:
        """Nothing that goes wrong in `work` reaches training; what was spent until then is counted."""
        self._evaluations = 0
        try:
            with self.around():
                result = work()
        except Exception as error:
            return failed(first_line(error), float(self._evaluations))
        if isinstance(result, Measurement) and result.reason and not result.cost:
            return replace(result, cost=float(self._evaluations))
        return result

    def _checked_source(
        self, evaluation: Evaluation, params: list[Tensor]
    ) -> tuple[Replay, Vector | None, float] | None:
        if evaluation.closure is not None and self.closure_replays < 0:
            self._check_closure(evaluation, params)
        return self._source(evaluation, params)

    def _source(self, evaluation: Evaluation, params: list[Tensor]) -> tuple[Replay, Vector | None, float] | None:
        """A replay, its gradient at the present parameters if it is at hand, and its weight in the whole loss."""
        present = [dense_gradient(p) for p in params] if evaluation.untouched else None
        if evaluation.closure is not None and self.closure_replays > 0.0:
            return (
                self._replay(evaluation.closure, params, evaluation.random_state),
                present,
                evaluation.weight,
            )
        if self.observed is not None and self.loss_fn is not None:
            batch, random_state = self.observed
            loss_fn = self.loss_fn

            def closure() -> Tensor:
                value = self._loss_of(loss_fn, batch)
                check_loss(value)
                value.backward()  # type: ignore[no-untyped-call]
                return value

            return self._replay(closure, params, random_state), None, 1.0
        return self._captured(present, params)

    def _loss_of(self, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        try:
            return loss_fn(self.model, batch)
        except (TypeError, AttributeError) as error:
            raise type(error)(f"{LOSS_FN} ({error})") from error

    def _captured(self, present: Vector | None, params: list[Tensor]) -> tuple[Replay, Vector | None, float] | None:
        """The model's own loss. The first time, its gradient must be that of the step: a loop may add other terms."""
        closure = self.capture.closure()
        if closure is None or self.closure_replays == 0.0:
            return None
        replay = self._replay(closure, params, self.capture.random_state)
        single = len(self.capture.weights) == 1
        held = {id(p) for p in params}  # another optimizer may have moved the others since the backward pass
        alone = all(id(p) in held for p in self.model.parameters() if p.requires_grad)
        if present is not None and single and alone and self.closure_replays == EXACT:
            return replay, present, 1.0
        gradient = replay.gradient()[1]
        inner = distributed.inner_product(params)
        step = [dense_gradient(p) for p in params]
        reach, size = inner(step, gradient), inner(gradient, gradient)
        weight = self.capture.weight()
        if single and self.closure_replays < 0.0 and weight != 1.0 and abs(weight * reach / size - 1.0) < SCALED_BACK:
            self.capture.scaled = True
            return self._captured(present, params)
        if single and self.closure_replays < 0.0:
            # A prediction E, trained on by f(E), has the gradient f'(E)∇E, and f'(E) is the weight.
            alike = not (self.capture.bare and weight != 1.0) and reach >= 0.99 * math.sqrt(size * inner(step, step))
            rest = add_([s.clone() for s in step], gradient, -1.0)
            exact = present is not None and inner(rest, rest) <= 1e-6 * size
            self.closure_replays = (EXACT if exact else CLOSE) if alike else 0.0
            if not alike:
                self.why_no_source = NOT_CAPTURED
                return None
        # Behind a gradient scaler the weights are unknown. An average of gradients cannot reach further along one of
        # them than that one does; a sum does.
        summed = self.capture.scaled and reach > 1.05 * size
        return replay, gradient, float(len(self.capture.weights)) if summed else 1.0

    def _check_closure(self, evaluation: Evaluation, params: list[Tensor]) -> None:
        """Evaluate the closure once more in place: one that draws data or keeps state cannot be measured on."""
        replay = self._replay(evaluation.closure, params, evaluation.random_state)
        loss = math.nan if evaluation.loss is None else float(evaluation.loss)
        if not math.isfinite(distributed.agree([loss], params[0].device)[0]):
            raise ArithmeticError("the loss is not finite")
        gradient = [dense_gradient(p) for p in params] if evaluation.untouched else None
        if gradient is not None and not math.isfinite(distributed.inner_product(params)(gradient, gradient)):
            raise ArithmeticError("the gradient is not finite")
        try:
            replay.verify(loss, gradient)
            agreed = 1.0
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            what = (
                str(error) if isinstance(error, NotReplayable) else f"evaluating it again failed: {first_line(error)}"
            )
            self.why_no_source = NOT_REPLAYABLE.format(error=what)
            agreed = 0.0
        self.closure_replays = float(distributed.agree([agreed], params[0].device)[0] == 1.0)

    def _replay(self, closure: Closure | None, params: list[Tensor], random_state: RandomState | None) -> Replay:
        assert closure is not None
        repeated = closure

        def counted() -> Any:
            self._evaluations += 1
            return repeated()

        return Replay(counted, params, self.model, random_state, distributed.averager(params))
