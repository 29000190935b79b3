"""A wrapper at a rate that is far too high, and the rate that its steps are made at."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers import mlp
from warmctl import AdaptiveWarmup

STEEP = 50.0
"""A rate far above what these problems carry with SGD: the scale stays well below 1."""


def wrapped(
    rate: float = STEEP, optimizer_class: Any = torch.optim.SGD, model: Any = None, **options: Any
) -> tuple[Any, AdaptiveWarmup]:
    model = model or mlp()
    kwargs = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    options = {"every": 1, **options}
    return model, AdaptiveWarmup(optimizer_class(model.parameters(), lr=rate, **kwargs), model, **options)


def rates_in_step(opt: torch.optim.Optimizer) -> list[float]:
    """Filled with the first group's rate at the end of each step, still inside the wrapped optimizer."""
    seen: list[float] = []
    opt.register_step_post_hook(lambda base, *_: seen.append(float(base.param_groups[0]["lr"])))
    return seen
