"""The closure given to `step`: watched while it runs for the step, and run again for a probe.

The first probe evaluates it once more in place: one that draws its own data or keeps state cannot be measured on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from warmctl import distributed
from warmctl.loss.backward import intercept_backward
from warmctl.loss.marks import GradientWatch, Marks
from warmctl.loss.random_state import RandomState
from warmctl.loss.replay import Closure, NotReplayable
from warmctl.loss.source import EXACT, NEVER, Replays, StepLoss, Verdict
from warmctl.vectors import Vector, as_copied, copied_gradients, dense_gradient
from warmctl.warning import first_line

NOT_REPLAYABLE = (
    "the closure cannot be repeated: {error}. Draw the batch, and what your own generators give, outside of the "
    "closure, and keep a hidden state for the next step after opt.step(); or give AdaptiveWarmup a loss_fn and call "
    "opt.observe(batch) before opt.step()."
)

ON_ANOTHER_RANK = "the closure could not be repeated on another rank"
CHECK_FAILED = (
    "the closure failed when it was evaluated again: {error}. The next probe tries again. If it goes on: draw the "
    "batch outside of the closure, or give AdaptiveWarmup a loss_fn and call opt.observe(batch) before opt.step()."
)


class ClosureSource:
    """Attributes: run: the evaluation of this step's closure, once there was one."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.run: ClosureRun | None = None

    @property
    def ready(self) -> bool:
        return self.run is not None and not self.run.skipped and self.verdict.repeats != NEVER

    def forget(self) -> None:
        self.run = None

    def __reduce__(self) -> Any:
        return ClosureSource, (self.verdict,)

    def step_loss(self, params: list[Tensor], replays: Replays) -> StepLoss | None:
        """Cost: 1 the first time, else 0. Raises ArithmeticError then for a loss or gradient that is not finite."""
        run = self.run
        if run is None:
            return None
        gradient, weight = run.gradient(), run.weight
        if not distributed.everywhere(gradient is not None, params[0].device):
            gradient = None
        if self.verdict.untried:
            self._check(run, gradient, params, replays)
        if self.verdict.untried or self.verdict.repeats == NEVER:
            return None
        return StepLoss(replays.of(run.closure, params, run.random_state), gradient, weight, run.loss)

    def _check(self, run: ClosureRun, gradient: list[Tensor] | None, params: list[Tensor], replays: Replays) -> None:
        """Evaluate it once more in place, on every rank, and agree on whether it gave the same."""
        loss = math.nan if run.loss is None else float(run.loss)
        if not math.isfinite(distributed.agree([loss], params[0].device)[0]):
            raise ArithmeticError("the loss is not finite")
        if gradient is not None and not math.isfinite(distributed.inner_product(params)(gradient, gradient)):
            raise ArithmeticError("the gradient is not finite")
        differs, why_not = [0.0, 0.0], ""
        try:
            replays.of(run.closure, params, run.random_state).verify(loss, gradient)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except distributed.OnAnotherRank:
            differs, why_not = [0.0, 1.0], ON_ANOTHER_RANK
        except NotReplayable as error:
            differs, why_not = [1.0, 0.0], NOT_REPLAYABLE.format(error=error)
        except Exception as error:
            differs, why_not = [0.0, 1.0], CHECK_FAILED.format(error=first_line(error))
        never, failed = distributed.agree(differs, params[0].device)
        why_not = why_not or ON_ANOTHER_RANK
        if never:
            self.verdict.repeats, self.verdict.why_not = NEVER, why_not
        elif failed:
            self.verdict.fail(why_not)
        else:
            self.verdict.repeats = EXACT


class ClosureRun:
    """One watched evaluation of the user's closure, and all that is needed to repeat it.

    Args:
        backward: takes (loss, backward) in place of a plain `loss.backward()`, to measure on the live graph.
        copies: the gradient is copied where backward returns, for the closure may clip it. One parameter-sized vector.

    Attributes:
        random_state: all streams just before it.
        loss: its value, detached.
        skipped: the closure called no backward this time; `.grad` is from before. There is nothing to measure on.
    """

    def __init__(
        self,
        closure: Closure,
        params: list[Tensor],
        watch: GradientWatch,
        backward: Callable[[Tensor, Callable[[], None]], None] | None,
        copies: bool = False,
    ) -> None:
        self.closure, self.params, self.watch, self.backward = closure, params, watch, backward
        self.copies = copies and distributed.world_size() == 1  # else it may not have been averaged yet
        self.random_state = RandomState({p.device for p in params})
        self.loss: Tensor | None = None
        self.skipped = False
        self._left: Marks | None = None
        self._copy: Vector | None = None
        self._mixed = False  # changed between two of its passes
        self._passes_before: int | None = None

    def evaluate(self) -> Any:
        """The closure's loss, which is also kept. Raises TypeError, ValueError or RuntimeError as `check_returned`."""
        before, marks = Marks(self.params), self.watch.marks
        # Only where a pass has to be seen before it starts, or later than the watch sees it end. Elsewhere the closure
        # runs under no mode of ours, which would take its time and have a compiled model compiled again.
        intercepting = self.backward is not None or self.watch.holding or self.copies or distributed.world_size() > 1
        with torch.enable_grad(), intercept_backward(self._intercepted) if intercepting else nullcontext():
            loss = self.closure()
        if self._left is None and self.watch.marks is not marks:
            self._left = self.watch.marks
        has_gradient = any(p.grad is not None for p in self.params)
        check_returned(loss, has_gradient, self._left is not None or not before.hold())
        self.loss = value_of(loss)
        self.skipped = loss is None and self._left is None
        return loss

    def gradient(self) -> Vector | None:
        """Of this evaluation alone, before it was clipped or rescaled; None if it is not known. Given out once."""
        copy, self._copy = self._copy, None
        if self._left is None or self._passes_before or self._mixed:
            return None
        if not self._left.hold():
            return copy
        return [dense_gradient(p) for p in self.params] if copy is None else as_copied(self.params, copy)

    @property
    def weight(self) -> float:
        """How often the loss is in `.grad`: more than once where the closure added to earlier micro-batches."""
        before = self._passes_before or 0
        return self.watch.passes / max(self.watch.passes - before, 1) if before else 1.0  # (k + n) / n passes

    def _intercepted(self, original: Callable[..., None], tensors: Any, *args: Any, **kwargs: Any) -> None:
        if self._passes_before is None:
            self._passes_before = self.watch.passes if self.watch.holding else 0
        self._mixed = self._mixed or (self._left is not None and not self._left.hold())
        self._copy = None
        if self.backward is not None and _is_plain_loss(tensors, *args, **kwargs):
            self.backward(tensors, lambda: original(tensors))
        else:
            original(tensors, *args, **kwargs)
        self._left = Marks(self.params)
        if self.copies:
            self._copy = copied_gradients(self.params)


def evaluated(closure: Closure, params: list[Tensor], watch: GradientWatch) -> Any:
    """The closure's loss, where no more is asked of it than its contract. Raises as `check_returned`."""
    before, passes = Marks(params), watch.passes
    with torch.enable_grad():
        loss = closure()
    check_returned(loss, any(p.grad is not None for p in params), watch.passes > passes or not before.hold())
    return loss


def value_of(loss: Any) -> Tensor | None:
    """What a closure has returned, as a tensor without a graph."""
    if loss is None or isinstance(loss, Tensor):
        return None if loss is None else loss.detach()
    return torch.tensor(float(loss))


def check_returned(loss: Any, has_gradient: bool, new_gradient: bool) -> None:
    """Raise unless a closure did what `Optimizer.step` asks of it. One that skips the step is let through.

    Args:
        has_gradient: a parameter has a gradient now; new_gradient: it is not the one from before the closure.
    """
    if isinstance(loss, Tensor) and loss.requires_grad and not new_gradient and bool(loss.detach().isfinite().all()):
        raise RuntimeError("the closure returned a loss but did not call loss.backward() on it")
    if not has_gradient or (loss is None and not new_gradient):
        return
    if loss is None:
        raise TypeError("the closure returned None: it must return the loss it called backward on")
    if isinstance(loss, Tensor) and loss.numel() != 1:
        raise ValueError(f"the closure returned a tensor of shape {tuple(loss.shape)}: it must return a scalar loss")
    if not isinstance(loss, Tensor) and not hasattr(loss, "__float__"):
        raise TypeError(f"the closure returned {type(loss).__name__}: it must return the scalar loss alone")


def _is_plain_loss(tensors: Any, grad_tensors: Any = None, keep: Any = None, create: bool = False, **more: Any) -> bool:
    """Whether these arguments of `torch.autograd.backward` say no more than `loss.backward()`."""
    plain = grad_tensors is None and not keep and not create and all(v is None for v in more.values())
    return isinstance(tensors, Tensor) and tensors.numel() == 1 and plain
