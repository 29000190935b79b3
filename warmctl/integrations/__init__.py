"""What users of a training framework need beyond the wrapper: a file a framework, imported only by name.

Accelerate needs none: `accelerator.prepare` takes the wrapper, `unwrap(opt).observe(batch)` gives it the batch where
the loss is computed outside of the model, `accelerator.log(scalars(opt))` logs it.
"""

from __future__ import annotations

import math
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
    """The numbers among `metrics`, as a logger takes them: no words, and no values that are not known yet."""
    metrics = unwrap(optimizer).metrics
    return {prefix + k: float(v) for k, v in metrics.items() if not isinstance(v, str) and math.isfinite(v)}
