"""Where the loss comes from when the user's loop does not hand over a closure.

A model that returns its own loss (Hugging Face, nanoGPT) is recorded by a forward hook: the arguments of its last
training forward, the random state and the autocast mode before it. Nothing in the user's loop changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from warmctl.distributed import is_sharded
from warmctl.loss.replay import RandomState, measuring
from warmctl.vectors import wide

SCALED = 4096.0
"""A loss multiplied by this or more was scaled for float16, and its gradient is scaled back before the step."""


def find_loss(output: Any) -> Tensor | None:
    """The loss in a model's output: `.loss`, or the one scalar that requires grad in a tuple, list or dict."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss if loss.numel() == 1 and loss.requires_grad else None
    items = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    scalars = [t for t in items if isinstance(t, Tensor) and t.ndim == 0 and t.requires_grad]
    return scalars[0] if len(scalars) == 1 else None


def loss_scale(loss: Tensor) -> Tensor:
    """What a gradient scaler has multiplied `loss` by, its last operation; 1 if none has. No device waits for it."""
    factor = getattr(loss.grad_fn, "_saved_other", None) if type(loss.grad_fn).__name__ == "MulBackward0" else None
    if not isinstance(factor, Tensor) or factor.numel() != 1:
        return torch.ones(())
    factor = factor.detach().float()
    # A GradScaler's factors are powers of two; below 16 they are taken for a weight that the user gave the loss.
    scaled = (factor >= SCALED) | ((factor >= 16.0) & (torch.frexp(factor).mantissa == 0.5))
    return torch.where(scaled, factor, 1.0).reshape(())


class ModelCapture:
    """Remembers the model's last training forward that returned a loss and was followed by a backward pass.

    Attributes:
        forwards: how many there were since `clear`, whatever came of them.
        weights: one for each that a backward pass went through: what its loss was multiplied by before, 1/n in an
            average of n. More than one means gradient accumulation.
        loss: the value of the last of these, detached.
        trained_on: whether there were such passes at the last step; a loop may ignore the model's loss.
        bare: the model returned nothing else; that may be a prediction.
        scaled: a gradient scaler multiplies the loss, by however little: the weights are no part of the step's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._handles: list[Any] = []
        self.enabled, self.trained_on, self.scaled, self.bare = True, True, False, False
        self.forwards = 0
        self.clear()

    @property
    def enabled(self) -> bool:
        """Whether forwards are recorded. False leaves the hooks in place; see `remove`."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        if value and not self._handles:
            self._handles = [
                self.model.register_forward_pre_hook(_Hook(self, "_remember"), with_kwargs=True),
                self.model.register_forward_hook(_Hook(self, "_confirm"), with_kwargs=True),
            ]

    def remove(self) -> None:
        """Record no more forwards, until enabled again. They need not pass through hooks then."""
        self._enabled = False
        while self._handles:
            self._handles.pop().remove()

    def clear(self) -> None:
        """Forget the batch."""
        if self.forwards:
            self.trained_on = bool(self.weights)
        self.forwards = 0
        self.weights: list[Tensor] = []
        self.loss: Tensor | None = None
        self.random_state: RandomState | None = None
        self._call: tuple[Any, Any, list[Any]] | None = None
        self._pending: tuple[tuple[Any, Any, list[Any]], RandomState] | None = None

    def closure(self) -> Callable[[], Tensor] | None:
        """Repeats the last forward and calls backward on its loss; None if nothing was recorded or trained on.

        The loss counts as often as all those of this step together, so that sums and averages of micro-batches come
        out right; once, where it was scaled up for float16.
        """
        if self._call is None:
            return None
        args, kwargs, autocast = self._call
        weight = self.weight()

        def closure() -> Tensor:
            with ExitStack() as stack:
                for context in autocast:
                    stack.enter_context(torch.autocast(**context))
                loss = find_loss(self.model(*args, **kwargs))
            if loss is None:
                raise RuntimeError("the model returned no loss when its forward was repeated")
            loss.backward(torch.full_like(loss, weight))  # type: ignore[no-untyped-call]
            return loss

        return closure

    def weight(self) -> float:
        """The sum of `weights`, or 1 where a gradient scaler has multiplied them, now or at an earlier probe."""
        total = float(torch.stack([wide(w).sum() for w in self.weights]).sum())
        self.scaled = self.scaled or total >= SCALED
        return 1.0 if self.scaled else total

    def _remember(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.enabled or measuring() or not torch.is_grad_enabled():
            return
        devices = list(dict.fromkeys(p.device for p in self.model.parameters()))
        autocast = [
            {"device_type": kind, "dtype": torch.get_autocast_dtype(kind), "enabled": True}
            for kind in dict.fromkeys(["cpu", *(d.type for d in devices)])
            if torch.is_autocast_enabled(kind)
        ]
        self._pending = (args, kwargs, autocast), RandomState(devices)

    def _confirm(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.enabled or self._pending is None:
            return
        call, random_state = self._pending
        self._pending = None
        loss = find_loss(output)
        if loss is not None:
            self.forwards, self.bare = self.forwards + 1, isinstance(output, Tensor)
            value, hook = loss.detach(), _Hook(self, "_trained")
            loss.register_hook(lambda gradient: hook(gradient, value, call, random_state))  # type: ignore[no-untyped-call]

    def _trained(self, gradient: Tensor, loss: Tensor, call: tuple[Any, Any, list[Any]], state: RandomState) -> None:
        if self.enabled and not measuring():
            params = list(self.model.parameters())
            if self.weights and not is_sharded(params) and all(p.grad is None for p in params):
                self.weights = []  # the step of earlier passes was skipped; shards have no gradient before the last
            self._call, self.random_state, self.loss = call, state, loss
            self.weights.append(gradient.detach())

    def __reduce__(self) -> Any:
        return ModelCapture, (self.model,), self.state_values()

    def __setstate__(self, values: list[float]) -> None:
        self.load_state_values(values)

    def state_values(self) -> list[float]:
        return [float(self.enabled), float(self.trained_on), float(self.scaled)]

    def load_state_values(self, values: list[float]) -> None:
        self.enabled, self.trained_on, self.scaled = map(bool, values)
        if not self.enabled:
            self.remove()


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
