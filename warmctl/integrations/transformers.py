"""Hugging Face Trainer: give it `optimizers=(AdaptiveWarmup(...), None)` and no `warmup_steps`."""

from __future__ import annotations

from typing import Any

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError(
        "warmctl.integrations.transformers needs transformers: pip install 'warmctl[transformers]'"
    ) from error

from warmctl.integrations import scalars


class WarmupLogger(TrainerCallback):
    """Adds the wrapper's metrics to the Trainer's logs, as "warmup/scale" and so on; see `log_warmup`."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:  # not those of an evaluation
            found = scalars(kwargs["optimizer"])
            logs.update(found)
            state.log_history[-1].update(found)


def log_warmup(trainer: Trainer) -> None:
    """Log the wrapper's metrics with the loss: in `trainer.state.log_history` and through every reporter.

    The Trainer puts its own callbacks before those it is given; this one must come first to be seen by them.
    """
    trainer.callback_handler.callbacks.insert(0, WarmupLogger())
