"""The training problem of all claims but the heatmap's, the optimizers on it, and the figures to be reproduced."""

from __future__ import annotations

import copy
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


def closure_for(optimizer: Optimizer, model: nn.Module, batch: Batch) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = square_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    return closure


def oracle_ratio(model: nn.Module, batch: Batch, optimizer: Optimizer, edge: float) -> float:
    """η λ_max(P^-½ H P^-½) / edge of the coming step, in float64 by plain autograd and ARPACK, by definition."""
    twin = copy.deepcopy(model).double()
    params = list(twin.parameters())
    loss = square_loss(twin, (batch[0].double(), batch[1].double()))
    gradient = torch.autograd.grad(loss, params, create_graph=True)
    root = preconditioner(optimizer, [g.detach() for g in gradient]).rsqrt()
    (group,) = optimizer.param_groups
    return float(group["lr"] * top_eigenvalue(gradient, params, 1e-8, root) / edge)
