"""The training problem of all claims but the heatmap's, the optimizers on it, and the figures to be reproduced."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from benchmarks.harness.data import Batch, mnist1d
from benchmarks.harness.oracle import preconditioner, top_eigenvalue

Rule = Callable[..., Optimizer]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Setting:
    """An optimizer at a constant rate, its edge in η·λ, and the figures to be reproduced."""

    rule: Rule
    edge: float
    expected: float  # settled ratio
    start: float | None = None  # η·λ_P at the first step
    back: int | None = None  # step at which it is at the edge again


SETTINGS = {
    "GD, η=0.3": Setting(partial(SGD, lr=0.3), 2.0, 1.0),
    "Nesterov .9, η=0.2": Setting(partial(SGD, lr=0.2, momentum=0.9, nesterov=True), 3.8 / 2.8, 0.995),
    "Adam, η=1e-3": Setting(partial(Adam, lr=1e-3, betas=(0.9, 0.99)), 38.0, 1.012, 190, 500),
    "Adam, η=3e-3": Setting(partial(Adam, lr=3e-3, betas=(0.9, 0.99)), 38.0, 1.013, 609, 300),
}


@lru_cache
def signals(count: int) -> Batch:
    """The first `count` of 1000 signals [N, 40] and their one-hot targets [N, 10]."""
    (x, y), _ = mnist1d(1250)
    return x[:count].flatten(1), F.one_hot(y[:count], 10).float()


def tanh_mlp(seed: int, width: int = 40) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(40, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10)
        )  # fmt: skip


def square_loss(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return 0.5 * (model(x) - y).square().sum(1).mean()


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def closure_for(
    optimizer: Optimizer, model: nn.Module, batch: Batch, loss_fn: Loss = square_loss
) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def oracle_ratio(
    model: nn.Module,
    batch: Batch,
    optimizer: Optimizer,
    edge: float,
    loss_fn: Loss = square_loss,
    least: float = 0.0,
) -> float:
    """η λ_max(P^-½ H P^-½) / edge of the coming step, in float64 by plain autograd and ARPACK, by definition.

    Without the weights whose gradient is below `least` of the largest; nan where the loss is not finite.
    """
    twin = copy.deepcopy(model).double()
    params = list(twin.parameters())
    loss = loss_fn(twin, (batch[0].double(), batch[1].double()))
    if not math.isfinite(loss.item()):
        return math.nan
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    root = preconditioner(optimizer, [g.detach() for g in gradient]).rsqrt()
    size = torch.cat([g.detach().flatten() for g in gradient]).abs()
    root[size < least * size.max()] = 0.0
    (group,) = optimizer.param_groups
    return float(group["lr"] * top_eigenvalue(gradient, params, 1e-8, root) / edge)
