"""The stability ratio of the coming step by dense linear algebra in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.problems_closed_form import dense_hessian
from warmctl import AdaptiveWarmup

Loss = Callable[[nn.Module, Any], Tensor]


def exact_scaling(opt: torch.optim.Optimizer, params: list[Tensor], gradient: list[Tensor]) -> np.ndarray:
    """D = η / (τ P) of the coming step, for SGD and the Adam family; shares no code with the package."""
    parts = []
    for group in opt.param_groups:
        for p in group["params"]:
            if not p.requires_grad:
                continue
            g = gradient[[id(q) for q in params].index(id(p))].double()
            rate, state = float(group["lr"]), opt.state.get(p, {})
            if "betas" not in group:
                edge = 2 * (1 + group["momentum"])
                d = torch.full_like(g, rate / edge)
            else:
                beta1, beta2 = group["betas"]
                t = float(state.get("step", 0)) + 1
                shrink = rate * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
                g = -g if group["maximize"] else g
                if not group["decoupled_weight_decay"]:
                    g = g + group["weight_decay"] * p.detach().double()
                v = beta2 * state.get("exp_avg_sq", torch.zeros_like(p)).double() + (1 - beta2) * g * g
                root = (v / (1 - beta2**t)).sqrt() + group["eps"]
                edge = (2 - shrink) * (1 + beta1) / (1 - beta1) * (1 - beta1**t)
                d = rate / edge / root
            if p.grad is None and not float(gradient[[id(q) for q in params].index(id(p))].abs().sum()):
                d = torch.zeros_like(d)
            parts.append(d.flatten())
    return torch.cat(parts).numpy()


def exact_ratio(opt: torch.optim.Optimizer, model: nn.Module, loss: Loss, batch: Any) -> float:
    """λ_max(D^½ (±H + c) D^½) of the coming step; needs parameters in the order of the optimizer."""
    held = [p for group in opt.param_groups for p in group["params"] if p.requires_grad]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in held] == [id(p) for p in trainable]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    value = loss(model, batch)
    gradient = torch.autograd.grad(value, held, allow_unused=True, materialize_grads=True)
    for name, b in model.named_buffers():
        b.copy_(buffers[name])
    d = exact_scaling(opt, held, [g.to_dense() for g in gradient])
    h = dense_hessian(model, loss, batch)
    sign = -1.0 if opt.param_groups[0].get("maximize") else 1.0
    decay = [
        0.0 if group.get("decoupled_weight_decay") else group.get("weight_decay", 0.0)
        for group in opt.param_groups
        for p in group["params"]
        for _ in range(p.numel())
        if p.requires_grad
    ]
    return float(np.linalg.eigvalsh(np.sqrt(d)[:, None] * (sign * h + np.diag(decay)) * np.sqrt(d)).max())


def measured(opt: AdaptiveWarmup) -> float:
    assert opt.meter.last is not None and not opt.meter.last.reason, opt.meter.last
    return opt.meter.last.ratio / opt.meter.last.share  # of this very step
