"""Watching the user's own backward passes: what one evaluation of the loss left in `.grad`, and whether it is there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from warmctl import distributed
from warmctl.loss.no_trace import measuring
from warmctl.vectors import Vector, dense_gradient, local, owned
from warmctl.warning import warn

FORGOTTEN = 1000
"""Backward passes without a step after which that is said: more than any accumulation."""
NO_STEP = (
    f"warmctl: {FORGOTTEN} backward passes, and the wrapper's step was not called. If the wrapped optimizer's own was, "
    "nothing is warmed up: call that of the wrapper in its place"
)


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

    Where the coming step is measured, the gradient is copied then: the loop may clip or rescale it.

    Args: due: why it is measured, or "".

    Attributes:
        passes: backward passes since `clear`.
        marks: the gradients as the last of them left them.
        marking: False leaves it at counting them, where nothing will be measured.
    """

    def __init__(self, params: list[Tensor], due: Callable[[], str]) -> None:
        self.marking, self._due = True, due
        self._handle: Any = None
        self.follow(params)

    def follow(self, params: list[Tensor]) -> None:
        """Watch these from now on, and no others."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self.params = params
        self._smallest: Any = min((p for p in params if p.numel()), key=Tensor.numel, default=None)
        self.clear()
        if self._smallest is not None:
            self._handle = self._smallest.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]

    def __reduce__(self) -> Any:
        return GradientWatch, (self.params, _never), {"_due": self._due}

    def clear(self) -> None:
        """A step was made: the next gradient begins."""
        self.passes = 0
        self.marks: Marks | None = None
        self._copy: Vector | None = None

    @property
    def holding(self) -> bool:
        """Whether `.grad` holds an earlier backward pass of this step, neither cleared nor changed since."""
        return self.marks is not None and self.marks.hold()

    def gradient(self) -> Vector | None:
        """What the one pass of this step left in `.grad`, whatever became of that since; None if it is not known.

        Cost: none. Given out once.
        """
        copy, self._copy = self._copy, None
        if self.passes != 1:
            return None
        return [dense_gradient(p) for p in self.params] if self.holding else copy

    def _accumulated(self, param: Tensor) -> None:
        if param.grad is not None and not measuring([param]):
            self.passes += 1
            if self.passes == FORGOTTEN:
                warn(NO_STEP)
            if self.marking:
                torch.autograd.Variable._execution_engine.queue_callback(self._ended)

    def _ended(self) -> None:
        self.marks = Marks(self.params)
        # On several ranks what is in `.grad` here may not have been averaged yet.
        kept = self.passes == 1 and distributed.world_size() == 1 and self._due() != ""
        self._copy = [owned(dense_gradient(p)) for p in self.params] if kept else None


def _never() -> str:
    return ""
