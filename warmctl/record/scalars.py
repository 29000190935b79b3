"""The metrics of a step as a logger takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PHASES = ("warmup", "guard", "done")


def scalars(metrics: Mapping[str, Any], prefix: str = "warmup/") -> dict[str, float]:
    """The finite numbers among `metrics` under names with a slash, as floats: "warmup/scale" and so on.

    "warmup/phase" is 0 in warmup, 1 on guard, 2 when done. Words, and values that are not known yet, are left out.
    """
    numbers = {**metrics, "phase": PHASES.index(metrics["phase"])} if metrics.get("phase") in PHASES else metrics
    return {
        prefix + name: float(value)
        for name, value in numbers.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }
