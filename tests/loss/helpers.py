"""A wrapper that measures exactly, a model that returns its own loss, and the dense truth."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import batch_of, loss_fn, mlp, monitor
from tests.problems_closed_form import dense_hessian
from warmctl import AdaptiveWarmup


class Returns(nn.Module):
    """A model that returns its own loss, in one form or another."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.form = mlp(), form

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        out = self.body(x)
        return out if y is None else self.form(F.mse_loss(out, y), out)


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "attribute": lambda loss, out: SimpleNamespace(loss=loss, logits=out),
    "tuple": lambda loss, out: (out, loss),
    "dict": lambda loss, out: {"logits": out, "total": loss},
    "dict with loss": lambda loss, out: {"loss": loss, "other": loss * 2},
    "loss itself": lambda loss, out: loss,
}


def loss_of(output: Any) -> Tensor:
    if isinstance(output, dict):
        return output.get("loss", output.get("total"))
    return output if isinstance(output, Tensor) else getattr(output, "loss", None) or output[1]


def exact_monitor(model: nn.Module, base: torch.optim.Optimizer | None = None, **options: Any) -> AdaptiveWarmup:
    """Measures at every step until the eigenvalue has converged, by exact products."""
    base = base or torch.optim.SGD(model.parameters(), 0.1)
    return monitor(model, base, **({"probe_steps": 25, "hvp": "double_backward"} | options))


def sharpness_of(opt: AdaptiveWarmup) -> float:
    assert opt.meter.last is not None and not opt.meter.last.reason, opt.meter.last
    return opt.meter.last.sharpness


def dense(model: nn.Module, batch: Any = None, loss: Any = loss_fn) -> float:
    return float(np.linalg.eigvalsh(dense_hessian(model, loss, batch_of(0) if batch is None else batch)).max())
