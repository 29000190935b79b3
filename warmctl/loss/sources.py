"""The choice among the sources of the loss, in this order: closure, observed batch, model's own loss, live graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from warmctl import distributed
from warmctl.loss.captured import CapturedSource
from warmctl.loss.closure import ClosureRun, ClosureSource, evaluated, value_of
from warmctl.loss.live_graph import LiveGraph
from warmctl.loss.marks import GradientWatch
from warmctl.loss.observed import ObservedSource
from warmctl.loss.replay import Closure, Replay
from warmctl.loss.scaler import trained_on
from warmctl.loss.source import EXACT, NEVER, Replays, Source, StepLoss, Verdict
from warmctl.state import Saved
from warmctl.warning import warn

Decide = Callable[[Tensor | None], None]
BackwardOnGraph = Callable[[Tensor, Callable[[], None]], None]

OBSERVE_PATIENCE = 10
"""Steps at the scale of before the first probe after which a loop that has a loss_fn but observes nothing is warned."""
NOT_OBSERVED = (
    f"warmctl: loss_fn was given, but observe(batch) was not called in {OBSERVE_PATIENCE} steps: call "
    "opt.observe(batch) before opt.step(). Until then no curvature is measured"
)
NO_SOURCE = """AdaptiveWarmup has no loss to measure the sharpness of. One line gives it one:
  opt.step(closure)      with a closure that clears gradients, computes the loss, calls backward and returns it; or
  opt.backward(loss)     in place of loss.backward(); or
  opt.observe(batch)     before opt.step(), with AdaptiveWarmup(..., loss_fn=lambda model, batch: loss).
In the Hugging Face Trainer: warmctl.integrations.transformers.WarmupTrainerMixin."""

COMPILED_IN_PLACE = """
The model was compiled in place, by model.compile(): a loss of its own cannot be seen. Use torch.compile(model)."""


class Sources:
    """All sources of one wrapper, and the watch on the gradients that they leave.

    Args: due: why the coming step is to be measured, or "".

    Attributes:
        verdict: whether the loss can be evaluated again; what the first probe finds holds for all later ones.
        in_closure: the user's closure is running.
    """

    def __init__(
        self,
        model: nn.Module,
        params: list[Tensor],
        due: Callable[[], str],
        loss_fn: Callable[[nn.Module, Any], Tensor] | None,
    ) -> None:
        self.verdict = Verdict()
        self.watch, self._due = GradientWatch(params), due
        self.closure = ClosureSource(self.verdict)
        self.observed = ObservedSource(model, loss_fn)
        self.captured = CapturedSource(model, self.verdict, self.watch, self._copies)
        self.graph = LiveGraph()
        self.in_closure = self._checked = False

    def in_order(self) -> tuple[Source, ...]:
        """Of those that can be evaluated again; the live graph comes last, where none of them is ready."""
        return self.closure, self.observed, self.captured

    @property
    def parts(self) -> tuple[Saved, ...]:
        """What a checkpoint keeps of them."""
        return self.graph, self.captured, self.verdict

    @property
    def ready(self) -> bool:
        """Whether a loss of the coming step can be evaluated again, as far as is known before it is tried."""
        return any(source.ready for source in self.in_order())

    @property
    def skipped(self) -> bool:
        """The closure of this step called no backward, and no other source has its loss."""
        run = self.closure.run
        return run is not None and run.skipped and not self.ready and not self.graph.passes

    def step_loss(self, params: list[Tensor], replays: Replays) -> StepLoss | None:
        """That loss, from the first source that has it. Cost: at most 3, at the first probe."""
        for source in self.in_order():
            if source.ready and (found := source.step_loss(params, replays)) is not None:
                return found
        return None

    def forward(self, params: list[Tensor], replays: Replays) -> Replay | None:
        """What evaluates the model again on the step's batch, whether or not it gives the loss.

        Cost: 1 for a closure that was not checked yet, else 0.
        """
        closures: tuple[Source, ...] = () if self.verdict.failures else (self.closure,)  # the next probe tries again
        for source in (*closures, self.observed):
            if source.ready and (found := source.step_loss(params, replays)) is not None:
                return found.replay
        return self.captured.forward(params, replays)

    @property
    def trusting(self) -> bool:
        """Whether the step's gradient is taken for that of the loss since an earlier step has shown them the same.

        A term may have joined the loss that a model returns.
        """
        sure = self.closure.ready or self.observed.ready
        return self.captured.ready and not sure and self.verdict.repeats == EXACT

    @property
    def live(self) -> bool:
        """Whether the closure is measured on its graph, as it cannot be evaluated again."""
        return self.verdict.repeats == NEVER or self.verdict.failures > 0

    @property
    def expected(self) -> bool:
        """Whether there will be one, as far as can be told before the backward pass."""
        return self.observed.ready or self.captured.expected

    @property
    def evaluations(self) -> int:
        """Gradient evaluations that went into this step: more than one where micro-batches are accumulated."""
        return 1 if self.in_closure else max(self.watch.passes, self.graph.passes, 1)

    @property
    def loss(self) -> Tensor | None:
        """Of all backward passes of this step, detached; None if they went past all sources."""
        capture = self.captured.capture
        if self.graph.loss is not None:
            return self.graph.loss
        return trained_on(capture.losses, capture.weights, capture.scaled)

    def _copies(self) -> bool:
        """Whether the gradient of the model's own loss, in the pass under way, is what a probe will begin with."""
        alone = self.observed.loss_fn is None and not self.in_closure
        return alone and (self.verdict.untried or self.verdict.repeats == EXACT) and self._due() != ""

    def deciding(
        self,
        closure: Closure,
        decide: Decide,
        backward_on_graph: BackwardOnGraph | None,
        listening: AbstractContextManager[None],
    ) -> Closure:
        """The closure for the wrapped optimizer, which may call it again: the first evaluation decides the step.

        Args:
            decide: called with the loss, while the batch is at hand.
            backward_on_graph: called with (loss, backward) in place of a backward pass, if the closure cannot be
                repeated; None if nothing will be measured at this step, and then the closure is not watched.
            listening: entered for that evaluation, if it is watched.
        """
        called, self.watch.stepped = False, True

        def evaluate() -> Any:
            nonlocal called
            first, called = not called, True
            if first and backward_on_graph is not None:
                return self._watched(closure, decide, backward_on_graph, listening)
            marking, self.in_closure, self.watch.marking = self.watch.marking, True, False
            try:
                loss = evaluated(closure, self.params, self.watch)
                if first:
                    decide(value_of(loss))
            finally:
                self.in_closure, self.watch.marking = False, marking
            return loss

        return evaluate

    def _watched(
        self,
        closure: Closure,
        decide: Decide,
        backward_on_graph: BackwardOnGraph,
        listening: AbstractContextManager[None],
    ) -> Any:
        live = backward_on_graph if self.live and not distributed.is_sharded(self.params) else None  # no exact product
        copies = live is None and self.verdict.repeats != NEVER and self._due() != ""
        run = self.closure.run = ClosureRun(closure, self.params, self.watch, live, copies)
        self.in_closure = True
        try:
            with listening:
                loss = run.evaluate()
            if not run.skipped:
                self.captured.capture.remove()  # the closure is the better source
                self.captured.forget()
            decide(run.loss)
        finally:
            self.in_closure = False
        return loss

    def missing(self, steps: float, probes: float) -> None:
        """Nothing can be measured at this step. Raises RuntimeError at the first probe if nothing ever will be.

        A probe that has been made, or a batch that may be observed later, is worth waiting for.
        """
        if probes == 0 and self.observed.loss_fn is None:
            if self.captured.capture.find_compiled():  # since the wrapper was made: the next step will be heard
                return
            inside = any(m._compiled_call_impl is not None for m in self.captured.capture.model.modules())
            raise RuntimeError(NO_SOURCE + (COMPILED_IN_PLACE if inside else ""))
        if probes == 0 and steps == OBSERVE_PATIENCE:
            warn(NOT_OBSERVED)

    @property
    def params(self) -> list[Tensor]:
        """The trainable ones, as last followed."""
        return self.watch.params

    def follow(self, params: list[Tensor]) -> bool:
        """Watch these from now on. True if there is one that was not there before: thawed or added."""
        before = self.watch.params
        same = len(params) == len(before) and all(map(operator.is_, params, before))
        if not (same and self._checked):
            distributed.check_layout(self.captured.capture.model, params)
            self._checked = True
        if same:
            return False
        self.watch.follow(params)
        return not {id(p) for p in params} <= {id(p) for p in before}

    def rest(self) -> None:
        """Nothing will be measured any more: record no forwards, mark no gradients."""
        self.captured.capture.remove()
        self.watch.marking = False

    def wake(self) -> None:
        """Undo `rest`."""
        self.captured.capture.record()
        self.watch.marking = True

    def resume(self) -> None:
        """A saved state was loaded, which says itself whether forwards are recorded."""
        self.watch.marking = True

    def next_step(self, measured_on_graph: bool) -> None:
        """The step was made: forget its batch."""
        self.graph.next_step(measured_on_graph)
        for source in self.in_order():
            source.forget()
        self.watch.clear()
        self.watch.stepped = True
