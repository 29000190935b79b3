"""Hugging Face Trainer: `optimizers=(AdaptiveWarmup(...), None)` and no `warmup_steps`, or a Trainer with the mixin."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from numbers import Real
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "warmctl.integrations.transformers needs transformers: pip install 'warmctl[transformers]'"
    ) from error

from warmctl.integrations import scalars, unwrap
from warmctl.optimizer import AdaptiveWarmup
from warmctl.proxy import OptimizerProxy
from warmctl.warning import warn

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

TWICE = (
    "warmctl: {name}={value:g} is left in TrainingArguments: the Trainer's linear warmup multiplies AdaptiveWarmup's "
    "own. Leave {name} out"
)


class WarmupLogger(TrainerCallback):
    """Adds the wrapper's metrics to the Trainer's logs, as "warmup/scale" and so on; see `log_warmup`.

    The Trainer's own `learning_rate` is the schedule's; "warmup/lr", that times "warmup/scale", is what was applied.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scalars(kwargs["optimizer"])  # now, not at the first log, if it is no AdaptiveWarmup

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:  # not those of an evaluation
            found = scalars(kwargs["optimizer"])
            logs.update(found)
            state.log_history[-1].update(found)


def log_warmup(trainer: Trainer) -> None:
    """Log the wrapper's metrics with the loss: in `trainer.state.log_history` and through every reporter.

    The Trainer puts its own callbacks before those it is given; this one must come first to be seen by them. Warns of a
    warmup of the Trainer's own that is left in.
    """
    trainer.callback_handler.callbacks.insert(0, WarmupLogger())
    if not isinstance(trainer, WarmupTrainerMixin):
        _warn_of_another_warmup(trainer)


class WarmupTrainerMixin(_Base):
    """Before a Trainer, of whatever class, it wraps the optimizer, logs, and shows the loss that is trained on.

        class WarmupTrainer(WarmupTrainerMixin, Trainer): ...

    Whichever way `compute_loss` makes the loss (`label_smoothing_factor`, `compute_loss_func`, a method of a subclass),
    probes repeat it; where it is the model's own, the model alone. An optimizer that is no AdaptiveWarmup yet is
    wrapped, at the rate that it has from the arguments.

    Args:
        warmup: options of `AdaptiveWarmup`; all others are those of the Trainer.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, Trainer) and cls.__mro__.index(Trainer) < cls.__mro__.index(WarmupTrainerMixin):
            raise TypeError(
                f"WarmupTrainerMixin comes before the Trainer: class {cls.__name__}(WarmupTrainerMixin, ...)"
            )

    def __init__(self, *args: Any, warmup: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.warmup = dict(warmup or {})
        super().__init__(*args, **kwargs)
        log_warmup(self)

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The Trainer's own, wrapped."""
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)  # v4 has no model
        if not isinstance(optimizer, OptimizerProxy):
            trained: Any = self.model if model is None else model
            self.optimizer = AdaptiveWarmup(optimizer, trained, **self.warmup)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's own, with a word on a warmup that it has."""
        _warn_of_another_warmup(self)
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As the Trainer's own, and what it returns is recorded for probes."""
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        compute_loss, again = super().compute_loss, False

        def compute() -> Any:
            nonlocal again
            with _unchanged(self) if again else nullcontext():
                again = True
                return compute_loss(model, {**inputs}, num_items_in_batch=num_items_in_batch)  # labels are popped

        return unwrap(self.optimizer).sources.captured.capture.computed(compute)


@contextmanager
def _unchanged(trainer: Trainer) -> Iterator[None]:
    """Put back the numbers that a `compute_loss` keeps on the trainer, alone or in dicts and lists."""
    before = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if _of_numbers(value)}
    try:
        yield
    finally:
        vars(trainer).update(before)


def _of_numbers(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return all(map(_of_numbers, value))
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad)


def _warn_of_another_warmup(trainer: Trainer) -> None:
    """Once; not where the user's own scheduler stands in for that of the arguments."""
    name = next((n for n in ("warmup_steps", "warmup_ratio") if getattr(trainer.args, n, 0)), None)
    if name is None or trainer.lr_scheduler is not None or getattr(trainer, "_warned_of_warmup", False):
        return
    vars(trainer)["_warned_of_warmup"] = True
    warn(TWICE.format(name=name, value=getattr(trainer.args, name)))
