"""TensorBoard: `log(writer, opt)` after each step."""

from __future__ import annotations

from typing import Any

from warmctl.integrations import scalars, unwrap


def log(writer: Any, optimizer: Any) -> None:
    """The wrapper's numbers as scalars of `writer`, a `SummaryWriter`, at its step; a reason as text."""
    metrics = unwrap(optimizer).metrics
    step, reason = metrics["step"], metrics["reason"]
    for name, value in scalars(optimizer).items():
        writer.add_scalar(name, value, step)
    if reason:
        writer.add_text("warmup/reason", reason, step)
