"""Trackio: `log(opt)` after each step of the run of `trackio.init`."""

from __future__ import annotations

from typing import Any

from warmctl.integrations import scalars, unwrap


def log(optimizer: Any) -> None:
    """The wrapper's numbers at its step; a reason as "warmup/reason"."""
    import trackio

    metrics = unwrap(optimizer).metrics
    said = {"warmup/reason": metrics["reason"]} if metrics["reason"] else {}
    trackio.log({**scalars(optimizer), **said}, step=metrics["step"])
