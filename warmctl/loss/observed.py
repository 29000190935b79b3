"""A mini-batch handed over by `observe`, and the user's own function from it to the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from warmctl.loss.backward import check_loss, run_backward
from warmctl.loss.random_state import RandomState
from warmctl.loss.source import Replays, StepLoss

LOSS_FN = "loss_fn failed: it must run the model itself, as lambda model, batch: criterion(model(batch[0]), batch[1])"


class ObservedSource:
    """The batch given to `observe` since the last step, if there was one, through `loss_fn(model, batch)`."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor] | None) -> None:
        self.model, self.loss_fn = model, loss_fn
        self._batch: Any = None
        self._random_state: RandomState | None = None

    def observe(self, batch: Any, params: list[Tensor]) -> None:
        """Raises: ValueError without a loss_fn."""
        if self.loss_fn is None:
            raise ValueError("observe(batch) needs AdaptiveWarmup(..., loss_fn=lambda model, batch: loss)")
        self._batch, self._random_state = batch, RandomState({p.device for p in params})

    @property
    def ready(self) -> bool:
        return self._random_state is not None

    def forget(self) -> None:
        self._batch = self._random_state = None

    def step_loss(self, params: list[Tensor], replays: Replays) -> StepLoss | None:
        """Cost: 0. Its gradient is never at hand: the loop's own may be of another loss."""
        batch = self._batch

        def closure() -> Tensor:
            value = self._loss(batch)
            check_loss(value)
            run_backward(value)
            return value

        return StepLoss(replays.of(closure, params, self._random_state, own=True))

    def _loss(self, batch: Any) -> Tensor:
        assert self.loss_fn is not None
        try:
            return self.loss_fn(self.model, batch)
        except (TypeError, AttributeError) as error:
            raise type(error)(f"{LOSS_FN} ({error})") from error
