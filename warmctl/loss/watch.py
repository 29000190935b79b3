"""Watching the user's own backward passes: is `.grad` what one evaluation of the loss left there?"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warmctl import arguments as checks
from warmctl.loss.replay import Closure, RandomState, intercept_backward, measuring
from warmctl.stability.probe import Evaluation
from warmctl.vectors import local


class Marks:
    """Which gradients there were, and their versions: whether one was replaced or written to since."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        self.seen = [None if (g := p.grad) is None else (weakref.ref(g), local(g)._version) for p in params]

    def hold(self) -> bool:
        for p, seen in zip(self.params, self.seen, strict=True):
            grad = p.grad
            if grad is None or seen is None:
                if grad is not None or seen is not None:
                    return False
            elif seen[0]() is not grad or local(grad)._version != seen[1]:
                return False
        return True


class GradientWatch:
    """Tells whether `.grad` is what one backward pass left there: every gradient is marked when the pass has ended.

    The pass announces itself by the hook of one (the smallest) parameter; a hook on each would cost more than it.

    Attributes:
        passes: backward passes since `clear`.
        marking: False leaves it at counting them, where nothing will be measured.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self.params, self.marking = params, True
        self.param: Any = min((p for p in params if p.numel()), key=Tensor.numel, default=None)
        self.clear()
        self._handle = None if self.param is None else self.param.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Watch no longer."""
        if self._handle is not None:
            self._handle.remove()

    def clear(self) -> None:
        """A step was made: the next gradient begins."""
        self.passes = 0
        self._marks: Marks | None = None

    @property
    def holding(self) -> bool:
        """Whether `.grad` holds an earlier backward pass of this step, neither cleared nor changed since."""
        return self._marks is not None and self._marks.hold()

    @property
    def untouched(self) -> bool:
        return self.passes == 1 and self.holding

    def _accumulated(self, param: Tensor) -> None:
        if param.grad is not None and not measuring():
            self.passes += 1
            if self.marking:
                torch.autograd.Variable._execution_engine.queue_callback(self._ended)

    def _ended(self) -> None:
        self._marks = Marks(self.params)


class ClosureRun:
    """One watched evaluation of the user's closure, and all that is needed to repeat it.

    Args:
        backward: takes (loss, backward) in place of a plain `loss.backward()`, to measure on the live graph.
    """

    def __init__(
        self,
        closure: Closure,
        params: list[Tensor],
        watch: GradientWatch,
        backward: Callable[[Tensor, Callable[[], None]], None] | None,
    ) -> None:
        self.closure, self.params, self.watch, self.backward = closure, params, watch, backward
        self.random_state = RandomState({p.device for p in params})
        self.loss: Tensor | None = None
        self.skipped = False
        self._left: Marks | None = None
        self._added_to: int | None = None

    def evaluate(self) -> Any:
        """The closure's loss, which is also kept. Raises TypeError, ValueError or RuntimeError as `returned_loss`."""
        before = Marks(self.params)
        self.watch.marking = False  # done here, behind each pass
        try:
            with torch.enable_grad(), intercept_backward(self._intercepted):
                loss = self.closure()
        finally:
            self.watch.marking = True
        has_gradient = any(p.grad is not None for p in self.params)
        checks.returned_loss(loss, has_gradient, self._left is not None or not before.hold())
        if loss is not None:
            self.loss = loss.detach() if isinstance(loss, Tensor) else torch.tensor(float(loss))
        self.skipped = loss is None and self._left is None
        return loss

    def evaluation(self) -> Evaluation:
        """What a probe needs to know, read off before anything is changed."""
        passes, added_to = self.watch.passes, self._added_to or 0  # micro-batches whose gradient was there already
        weight = passes / max(passes - added_to, 1) if added_to else 1.0
        untouched = self._left is not None and self._left.hold() and not added_to
        return Evaluation(self.closure, self.random_state, self.loss, untouched, weight, self.skipped)

    def _intercepted(self, original: Callable[..., None], tensors: Any, *args: Any, **kwargs: Any) -> None:
        if self._added_to is None:
            self._added_to = self.watch.passes if self.watch.holding else 0
        if self.backward is not None and _is_plain_loss(tensors, *args, **kwargs):
            self.backward(tensors, lambda: original(tensors))
        else:
            original(tensors, *args, **kwargs)
        self._left = Marks(self.params)


def _is_plain_loss(tensors: Any, grad_tensors: Any = None, keep: Any = None, create: bool = False, **more: Any) -> bool:
    """Whether these arguments of `torch.autograd.backward` say no more than `loss.backward()`."""
    plain = grad_tensors is None and not keep and not create and all(v is None for v in more.values())
    return isinstance(tensors, Tensor) and tensors.numel() == 1 and plain
