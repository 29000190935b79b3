"""What users of a framework or a logger need beyond the wrapper: a file for each, imported only by name.

Accelerate needs none: `accelerator.prepare` takes the wrapper, `unwrap(opt).observe(batch)` gives it the batch where
the loss is computed outside of the model, `accelerator.log(scalars(opt))` logs it.
"""

from __future__ import annotations

from typing import Any

from warmctl.optimizer import AdaptiveWarmup


def unwrap(optimizer: Any) -> AdaptiveWarmup:
    """The AdaptiveWarmup inside a framework's own optimizer wrapper. Raises TypeError if there is none."""
    inner = optimizer
    while not isinstance(inner, AdaptiveWarmup) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, AdaptiveWarmup):
        raise TypeError(f"the optimizer is no AdaptiveWarmup but {type(inner).__name__}: there is no warmup to log")
    return inner


def scalars(optimizer: Any, prefix: str = "warmup/") -> dict[str, float]:
    """The finite numbers among `metrics`, as a logger takes them; "warmup/phase" is 0, 1 or 2."""
    return unwrap(optimizer).scalars(prefix)
