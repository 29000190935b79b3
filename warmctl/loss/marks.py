"""Watching the user's own backward passes: is `.grad` what one evaluation of the loss left there?"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from warmctl import distributed
from warmctl.loss.no_trace import measuring
from warmctl.vectors import Vector, copied_gradients, local, strided
from warmctl.warning import warn

UNSTEPPED = 128
NEVER_STEPPED = (
    f"warmctl: {UNSTEPPED} backward passes, and opt.step() of AdaptiveWarmup has not been called yet. If the optimizer "
    "inside is stepped in its place, nothing is measured or scaled: call step() of the wrapper"
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

    Attributes:
        passes: backward passes since `clear`.
        copy: what `copy_pass` has copied.
        marks: the gradients as the last of them left them.
        marking: False leaves it at counting them, where nothing will be measured.
        stepped: whether a step was ever made after such passes.
    """

    def __init__(self, params: list[Tensor]) -> None:
        self.marking, self.stepped = True, False
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
            hook = partial(_while_it_lives, weakref.WeakMethod(self._accumulated))  # a wrapper may be made anew
            self._handle = self._smallest.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            weakref.finalize(self, self._handle.remove).atexit = False

    def __reduce__(self) -> Any:
        return GradientWatch, (self.params,)

    def clear(self) -> None:
        """A step was made: the next gradient begins."""
        self.passes = 0
        self.marks: Marks | None = None
        self.copy: Vector | None = None

    @property
    def holding(self) -> bool:
        """Whether `.grad` holds an earlier backward pass of this step, neither cleared nor changed since."""
        return self.marks is not None and self.marks.hold()

    @property
    def cleared(self) -> bool:
        """Whether `.grad` holds nothing: it is None, or zeros that were written since the last backward pass.

        Waits for the device where somebody has written to gradients since.
        """
        grads = [p.grad for p in self.params if p.grad is not None]
        alone = distributed.world_size() == 1  # else they are written to by whoever averages them
        written = alone and self.marks is not None and not self.marks.hold()
        return not grads or (written and not any(bool(strided(local(grad)).any()) for grad in grads))

    @property
    def untouched(self) -> bool:
        return self.passes == 1 and self.holding

    def copy_pass(self) -> None:
        """Copy the gradient that the pass under way leaves, where none was there before it: the loop may clip it.

        Call it from a hook of the pass itself: passes inside of it, of checkpointed parts, end before it does. Not on
        several ranks, where what is in `.grad` then may not have been averaged yet.
        """
        if distributed.world_size() == 1 and all(p.grad is None for p in self.params):
            torch.autograd.Variable._execution_engine.queue_callback(self._copied)

    def _accumulated(self, param: Tensor) -> None:
        if param.grad is not None and not measuring([param]):
            self.passes += 1
            if self.passes == UNSTEPPED and not self.stepped:
                warn(NEVER_STEPPED)
            if self.marking:
                torch.autograd.Variable._execution_engine.queue_callback(self._ended)

    def _copied(self) -> None:
        if any(p.grad is not None for p in self.params):  # not by `torch.autograd.grad`
            self.copy = copied_gradients(self.params)

    def _ended(self) -> None:
        self.marks = Marks(self.params)


def _while_it_lives(method: weakref.WeakMethod[Any], param: Tensor) -> None:
    if (call := method()) is not None:
        call(param)
