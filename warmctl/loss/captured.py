"""The loss that a model returns itself (Hugging Face, nanoGPT), recorded by a forward hook.

What is recorded: the arguments of the last training forward, the random state and the autocast mode before it. Nothing
in the user's loop changes. What makes the loss of the model's outputs elsewhere has it recorded by `computed`.
"""

from __future__ import annotations

import gc
import math
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from warmctl import distributed
from warmctl.loss.backward import run_backward
from warmctl.loss.marks import GradientWatch
from warmctl.loss.no_trace import measuring
from warmctl.loss.random_state import RandomState
from warmctl.loss.replay import Replay
from warmctl.loss.scaler import POWERS, SCALED, scaled_back
from warmctl.loss.source import CLOSE, EXACT, NEVER, Replays, StepLoss, Verdict
from warmctl.state import FLAG, check
from warmctl.vectors import Vector, add_, as_copied, dense_gradient, wide

NOT_CAPTURED = (
    "the model's own loss is not what is trained on: its gradient is not the gradient of the step. Give opt.step() a "
    "closure, or call opt.backward(loss) in place of loss.backward(); in the Hugging Face Trainer, put "
    "warmctl.integrations.transformers.WarmupTrainerMixin before it."
)

Call = tuple[Callable[..., Any], Any, Any, list[Any]]
"""What is called again, its arguments, and the autocast modes."""


def find_loss(output: Any) -> Tensor | None:
    """The loss in a model's output: `.loss`, or the one scalar in a tuple, list or dict.

    It requires grad, unless gradients are off.
    """

    def differentiable(value: Tensor) -> bool:
        return value.requires_grad or not torch.is_grad_enabled()

    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss if loss.numel() == 1 and differentiable(loss) else None
    items = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    scalars = [t for t in items if isinstance(t, Tensor) and t.ndim == 0 and differentiable(t)]
    return scalars[0] if len(scalars) == 1 else None


def _plain(model: nn.Module) -> list[nn.Module]:
    """What this one was compiled from, if it is compiled."""
    plain = getattr(model, "_orig_mod", None)
    return [plain] if isinstance(plain, nn.Module) else []


def _compiled(model: nn.Module) -> list[nn.Module]:
    """What was compiled from this one. Goes through all objects there are, which takes tens of milliseconds."""
    if "torch._dynamo" not in sys.modules:
        return []
    from torch._dynamo import OptimizedModule

    instances = [thing for thing in gc.get_referrers(OptimizedModule) if type(thing) is OptimizedModule]
    return [m for m in instances if m._orig_mod is model or getattr(m._orig_mod, "module", None) is model]


class ModelCapture:
    """Remembers the model's last training forward that returned a loss and was followed by a backward pass.

    Args:
        verdict: as long as it is open, the first of several passes is kept.
        copies: whether `watch` is to copy the gradient of the pass under way.

    Attributes:
        forwards: how many there were since `clear`, whatever came of them.
        weights: one for each that a backward pass went through: what its loss was multiplied by before, 1/n in an
            average of n. More than one means gradient accumulation.
        losses: their values, detached.
        trained_on: whether there were such passes at the last step; a loop may ignore the model's loss.
        bare: the model returned nothing else; that may be a prediction.
        first: of several passes, as long as the verdict is open, what repeats the first, the random state before it,
            and the gradient that it has left.
        last: the last training forward of this step, whatever it returned: its arguments, and the random state before.
        scaled: a gradient scaler multiplies the loss, by however little: the weights are no part of the step's.
    """

    def __init__(self, model: nn.Module, watch: GradientWatch, verdict: Verdict, copies: Callable[[], bool]) -> None:
        self.model, self._watch, self._verdict, self._copies = model, watch, verdict, copies
        self._handles: list[Any] = []
        self._heard: list[nn.Module] = []
        self.trained_on, self.scaled, self.bare = True, False, False
        self._hear(model, *_plain(model))  # the compiled one is looked for once nothing was heard
        self.forwards = 0
        self._hooked: list[tuple[weakref.ref[Tensor], Any]] | None = None
        self.clear()

    @property
    def enabled(self) -> bool:
        """Whether forwards are recorded."""
        return bool(self._handles)

    def record(self) -> None:
        """Record forwards, as from the start, if none are."""
        if not self._handles:
            self._hear(self.model, *_plain(self.model))
        self.find_compiled()

    def _hear(self, *modules: nn.Module) -> None:
        for module in modules:
            self._heard.append(module)
            self._handles += [
                module.register_forward_pre_hook(_Hook(self, "_remember"), with_kwargs=True),
                module.register_forward_hook(_Hook(self, "_confirm"), with_kwargs=True),
            ]

    def find_compiled(self) -> bool:
        """Hear the module that `torch.compile` has made of this one too. True if it is new.

        Hooks of a module inside compiled code are a part of its graph: they hear nothing.
        """
        found = [twin for twin in _compiled(self.model) if not any(twin is heard for heard in self._heard)]
        self._hear(*found)
        return bool(found)

    def remove(self) -> None:
        """Record no more forwards. They need not pass through hooks then."""
        self._heard = []
        while self._handles:
            self._handles.pop().remove()

    def clear(self) -> None:
        """Forget the batch."""
        if self.forwards:
            self.trained_on = bool(self.weights)
        self.forwards = 0
        self.weights: list[Tensor] = []
        self.first: tuple[Callable[[], Tensor], RandomState, Vector] | None = None
        self.losses: list[Tensor] = []
        self.random_state: RandomState | None = None
        self.last: tuple[Call, RandomState] | None = None
        self._call: Call | None = None
        self._pending: tuple[Call, RandomState] | None = None

    def closure(self) -> Callable[[], Tensor] | None:
        """Repeats the last forward and calls backward on its loss; None if nothing was recorded or trained on.

        The loss counts as often as all those of this step together, so that sums and averages of micro-batches come
        out right; once, where it was scaled up for float16.
        """
        if self._call is None:
            return None
        return self._repeating(self._call, self.weight())

    def _repeating(self, call: Call, weight: float) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = find_loss(self.again(call))
            if loss is None:
                raise RuntimeError("the model returned no loss when its forward was repeated")
            run_backward(loss, torch.full_like(loss, weight))
            return loss

        return closure

    def again(self, call: Call) -> Any:
        """The model's output for the same arguments, in the same autocast mode."""
        function, args, kwargs, autocast = call
        with ExitStack() as stack:
            for context in autocast:
                stack.enter_context(torch.autocast(**context))
            return function(*args, **kwargs)

    def computed(self, compute: Callable[[], Any]) -> Any:
        """The loss that `compute` makes of the model's outputs, which is recorded unless it is the model's own."""
        if not self._recording:
            return compute()
        call, random_state = self._about_to_call(compute, (), {})
        self._hooked = []
        try:
            loss = compute()
        finally:
            hooked, self._hooked = self._hooked, None
        if any(own() is loss for own, _ in hooked):
            return loss
        for _, handle in hooked:
            handle.remove()
        self.forwards -= len(hooked)
        self._record(loss, call, random_state)
        return loss

    def weight(self) -> float:
        """The sum of `weights`, or 1 where a gradient scaler has multiplied them, now or at an earlier probe."""
        total = float(torch.stack([wide(w).sum() for w in self.weights]).sum())
        self.scaled = self.scaled or total >= SCALED
        return 1.0 if self.scaled else total

    @property
    def _recording(self) -> bool:
        return self.enabled and torch.is_grad_enabled() and not measuring(self.model.parameters())

    def _about_to_call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Call, RandomState]:
        devices = list(dict.fromkeys(p.device for p in self.model.parameters()))
        autocast = [
            {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": True}
            for kind in dict.fromkeys(["cpu", *(d.type for d in devices)])
            if torch.is_autocast_enabled(kind)
        ]
        return (function, args, kwargs, autocast), RandomState(devices)

    def _remember(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._pending = None  # of one that raised
        if self._recording:
            copy, self._watch.copy = self._watch.copy, None  # more micro-batches: it is not the gradient of the step
            state = self.random_state
            first = self._verdict.untried and len(self.weights) == 1
            if first and copy is not None and self._call is not None and state is not None:
                self.first = self._repeating(self._call, float(self.weights[0])), state, copy
            self._pending = self._about_to_call(module, args, kwargs)

    def _confirm(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.enabled or self._pending is None:
            return
        self.last = call, random_state = self._pending
        self._pending = None
        self._record(output, call, random_state)

    def _record(self, output: Any, call: Call, random_state: RandomState) -> None:
        loss = find_loss(output)
        if loss is not None:
            self.forwards, self.bare = self.forwards + 1, output is loss and isinstance(call[0], nn.Module)
            value, hook = loss.detach(), _Hook(self, "_trained")
            handle = loss.register_hook(lambda gradient: hook(gradient, value, call, random_state))  # type: ignore[no-untyped-call]
            if self._hooked is not None:
                self._hooked.append((weakref.ref(loss), handle))

    def _trained(self, gradient: Tensor, loss: Tensor, call: Call, state: RandomState) -> None:
        if self.enabled and not measuring(self.model.parameters()):
            if self.weights and not distributed.is_sharded(self._watch.params) and self._watch.cleared:
                self.weights, self.losses = [], []  # that step was skipped; shards have no gradient before the last
            self._call, self.random_state = call, state
            self.weights.append(gradient.detach())
            self.losses.append(loss)
            if self._copies():
                self._watch.copy_pass()

    def state_values(self) -> list[float]:
        return [float(self.enabled), float(self.trained_on), float(self.scaled)]

    def load_state_values(self, values: list[float]) -> None:
        recording, self.trained_on, self.scaled = map(bool, values)
        if recording:
            self.record()
        else:
            self.remove()


class CapturedSource:
    """The model's own loss, if the loop trains on it: the first time, its gradient must be that of the step."""

    def __init__(self, model: nn.Module, verdict: Verdict, watch: GradientWatch, copies: Callable[[], bool]) -> None:
        self.verdict, self.watch, self._copies = verdict, watch, copies
        self.capture = ModelCapture(model, watch, verdict, copies)
        self._sought = False

    @property
    def ready(self) -> bool:
        return bool(self.capture.weights) and self.verdict.repeats != NEVER

    @property
    def expected(self) -> bool:
        """Whether it will be ready after the backward pass, as far as can be told before it."""
        return self.capture.forwards > 0 and self.capture.trained_on and self.verdict.repeats != NEVER

    def forget(self) -> None:
        """After a step. Once, if nothing was heard in it, look for what is called in the model's place."""
        if not self._sought and self.capture.enabled and self.capture.last is None:
            self._sought = True
            self.capture.find_compiled()
        self.capture.clear()

    def step_loss(self, params: list[Tensor], replays: Replays) -> StepLoss | None:
        """Cost: 0 where the gradient of the one pass is at hand, untouched or copied; else 1, at first up to 3."""
        closure = self.capture.closure()
        if closure is None:
            return None
        device = params[0].device
        copy, self.watch.copy = self.watch.copy, None
        present = None if self.capture.scaled else copy  # that would be scaled
        if distributed.everywhere(self.watch.untouched, device):
            present = [dense_gradient(p) for p in params] if present is None else as_copied(params, present)
        replay = replays.of(closure, params, self.capture.random_state, own=True)
        single = distributed.everywhere(len(self.capture.weights) == 1, device)
        held = {id(p) for p in params}  # another optimizer may have moved the others since the backward pass
        alone = all(id(p) in held for p in self.capture.model.parameters() if p.requires_grad)
        if present is not None and single and alone and self.verdict.repeats == EXACT:
            self.watch.copy = copy if present is copy else None  # should it be compared again
            return StepLoss(replay, present, value=self.capture.losses[-1])
        gradient = replay.gradient()[1]
        inner = distributed.inner_product(params)
        step = [dense_gradient(p) for p in params]
        reach, size = inner(step, gradient), inner(gradient, gradient)  # ⟨step, ∇L⟩ and ‖∇L‖²
        if not math.isfinite(size):
            raise ArithmeticError("the gradient of the model's own loss is not finite")
        if self.verdict.untried:
            weight = self.capture.weight()
            each = weight / len(self.capture.weights)  # 1 in a plain sum of micro-batches
            back = (single or each >= POWERS) and scaled_back(weight, weight * reach / size, single)
            if distributed.everywhere(back, device):
                self.capture.scaled, self.watch.copy = True, copy
                return self.step_loss(params, replays)
            if single:
                self._compare(step if copy is None else copy, gradient, weight, present, inner)
            elif self.capture.first is not None:  # one of several micro-batches tells as much
                again, state, left = self.capture.first
                first = replays.of(again, params, state, own=True).gradient()[1]
                self._compare(left, first, 1.0, left, inner)
            if self.verdict.repeats == NEVER:
                return None
        # Behind a gradient scaler the weights are unknown. An average of gradients cannot reach further along one of
        # them than that one does; a sum does.
        summed = self.capture.scaled and reach > 1.05 * size
        return StepLoss(replay, gradient, float(len(self.capture.weights)) if summed else 1.0, self.capture.losses[-1])

    def forward(self, params: list[Tensor], replays: Replays) -> Replay | None:
        """Repeats the last training forward of this step, without a loss: enough to look at representations."""
        if self.capture.last is None:
            return None
        call, random_state = self.capture.last

        def closure() -> None:
            self.capture.again(call)

        return replays.of(closure, params, random_state, own=True)

    def _compare(
        self,
        step: Vector,
        gradient: Vector,
        weight: float,
        present: Vector | None,
        inner: Callable[[Vector, Vector], float],
    ) -> None:
        """Is the gradient of the step that of the model's own loss? A loop may add other terms, or use none of it.

        Args: present: what the pass has left, before it was clipped; None if that is not known.

        On every rank the answer is that of the rank with the least.
        """
        reach, size = inner(step, gradient), inner(gradient, gradient)
        # A prediction E, trained on by f(E), has the gradient f'(E)∇E, and f'(E) is the weight.
        predicts = self.capture.bare and weight != 1.0
        alike = reach >= 0.99 * math.sqrt(size * inner(step, step))  # not so where one is nan
        rest = [] if present is None else add_([g.clone() for g in present], gradient, -1.0)
        same = EXACT if rest and inner(rest, rest) <= 1e-6 * size else CLOSE
        found = NEVER if predicts or not alike else same
        self.verdict.repeats = -distributed.largest(-found, step[0].device)
        if self.verdict.repeats == NEVER:
            self.verdict.why_not = NOT_CAPTURED

    def state_values(self) -> list[float]:
        return self.capture.state_values()

    def check_state_values(self, values: list[float]) -> None:
        check(values, {"enabled": FLAG, "trained_on": FLAG, "scaled": FLAG})

    def load_state_values(self, values: list[float]) -> None:
        self.capture.load_state_values(values)

    def __reduce__(self) -> Any:
        return CapturedSource, (self.capture.model, self.verdict, self.watch, self._copies), self.state_values()

    def __setstate__(self, values: list[float]) -> None:
        self.load_state_values(values)


class _Hook:
    """Forwards to a capture while it lives; a copied or unpickled model has one that does nothing."""

    def __init__(self, capture: ModelCapture | None, method: str) -> None:
        self.capture, self.method = (lambda: None) if capture is None else weakref.ref(capture), method

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():  # a part of the graph otherwise
            return
        capture = self.capture()
        if capture is not None:
            getattr(capture, self.method)(*args)

    def __reduce__(self) -> Any:
        return _Hook, (None, self.method)
