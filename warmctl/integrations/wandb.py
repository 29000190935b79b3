"""Weights & Biases: `log(run, opt)` after each step."""

from __future__ import annotations

from typing import Any

from warmctl.integrations import scalars, unwrap


def log(run: Any, optimizer: Any) -> None:
    """The wrapper's numbers in `run`, of `wandb.init`, over their own axis "warmup/step"; a reason as "warmup/reason".

    They go with the next values that are logged: call it before `run.log` of your own, or `run.log({})`.
    """
    metrics = unwrap(optimizer).metrics
    if metrics["step"] <= 1:
        run.define_metric("warmup/*", step_metric="warmup/step")
    said = {"warmup/reason": metrics["reason"]} if metrics["reason"] else {}
    run.log({**scalars(optimizer), **said}, commit=False)
