"""Small runs, trained to show one thing each, logged as anyone would."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Row = dict[str, Any]
Watch = Callable[[nn.Module], Row]
STEPS = 200


def batch_of(step: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs, and the largest of eight fixed features as their class."""
    x = torch.randn(size, 16, generator=torch.Generator().manual_seed(step))
    features = torch.randn(16, 8, generator=torch.Generator().manual_seed(99))
    return x, (x @ features).argmax(-1)


def net(seed: int, activation: type[nn.Module] = nn.ReLU, depth: int = 2, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for width in (16, *[32] * (depth - 1)):
        layers += [nn.Linear(width, 32), *([nn.LayerNorm(32)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(32, 8))


def linear(step: int, warmup: int, steps: int = STEPS) -> float:
    """A linear warmup and a cosine decay, of steps that are counted from 1."""
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def train(
    model: nn.Module,
    lr: float,
    warmup: int = 0,
    steps: int = STEPS,
    bad_batch: int | None = None,
    clip: float = math.inf,
    watch: Watch | None = None,
    weight_decay: float = 0.0,
) -> list[Row]:
    """Momentum SGD; a row a step. `bad_batch`: the step whose inputs are 30 times too large."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
    rows = []
    for step in range(1, steps + 1):
        rate = lr * linear(step, warmup, steps)
        optimizer.param_groups[0]["lr"] = rate
        x, y = batch_of(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(30 * x if step == bad_batch else x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        row = {"step": step, "loss": loss.item(), "lr": rate, "grad_norm": norm.item()}
        optimizer.step()
        rows.append({**row, **(watch(model) if watch else {})})
    return rows


def saturated(model: nn.Module) -> Row:
    """Shares of saturated units by layer, in the columns that a diagnosis reads."""
    row, x = {}, batch_of(0)[0]
    with torch.no_grad():
        for name, layer in model.named_children():
            x = layer(x)
            if isinstance(layer, nn.Tanh):
                row[f"vitals/{name}/saturated"] = (x.abs() > 0.97).float().mean().item()
    return row


def spread(model: nn.Module) -> Row:
    """σ of the inputs of each layer norm."""
    row, x = {}, batch_of(0)[0]
    with torch.no_grad():
        for name, layer in model.named_children():
            if isinstance(layer, nn.LayerNorm):
                row[f"vitals/{name}/sigma"] = x.std(-1).mean().item()
            x = layer(x)
    return row
