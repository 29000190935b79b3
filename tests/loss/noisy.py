"""A model and a closure that draw from every random stream."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from warmctl.loss.replay import Replay


def noisy_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


def noisy_closure(model: nn.Module, after_backward: Callable[[], object] = lambda: None) -> Callable[[], Tensor]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))

    def closure() -> Tensor:
        model.zero_grad()
        noise = float(np.random.rand()) + random.random()
        loss = model(x).square().mean() * (1 + noise)
        loss.backward()
        after_backward()
        return loss

    return closure


def replay_of(model: nn.Module) -> Replay:
    return Replay(noisy_closure(model), list(model.parameters()), module=model)
