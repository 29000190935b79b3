"""MLflow: `log(opt)` after each step of the active run."""

from __future__ import annotations

from typing import Any

from warmctl.integrations import scalars, unwrap


def log(optimizer: Any, run_id: str | None = None) -> None:
    """The wrapper's numbers as metrics of the active run, or of `run_id`, at its step; the last reason as a tag."""
    import mlflow

    metrics = unwrap(optimizer).metrics
    mlflow.log_metrics(scalars(optimizer), step=metrics["step"], run_id=run_id)
    if metrics["reason"] and run_id is None:
        mlflow.set_tag("warmup.reason", f"step {metrics['step']}: {metrics['reason']}")
