"""Models as they are built, with a batch each: every layer that the bound composes over is in one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A model in float64, a loss and a batch."""

    model: nn.Module
    loss_fn: Callable[[nn.Module, Batch], Tensor]
    batch: Batch


def classification(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def regression(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


class Residual(nn.Module):
    """x + f(x)"""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


class Positions(nn.Module):
    """A learnt vector for each position, added."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.position


class Gated(nn.Module):
    """A gate, a mean over the tokens and a scaled head, written as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.value(x) * torch.sigmoid(self.gate(x))
        y: Tensor = self.head(F.dropout(torch.cat((mixed, F.silu(mixed)), 1), 0.1, False).mean(1)) / 2
        return y


def regression_line() -> nn.Module:
    return nn.Linear(5, 2)


def tanh_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def deep_relu_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), *(m for _ in range(4) for m in (nn.Linear(7, 7), nn.ReLU())))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.SiLU(),
        nn.AvgPool2d(2, padding=1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def batch_norm_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm1d(4), nn.LeakyReLU(), nn.Dropout(0.2),
        nn.Conv1d(4, 4, 3, groups=2, dilation=2), nn.GroupNorm(2, 4), nn.ELU(), nn.AdaptiveAvgPool1d(2), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip


def residual_net() -> nn.Module:
    def block() -> nn.Module:
        return Residual(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)))

    return nn.Sequential(nn.Linear(5, 6), block(), block(), nn.RMSNorm(6), nn.Linear(6, 3))


def bag_of_tokens() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(7, 4, padding_idx=0), Positions(6, 4), nn.Flatten(), nn.Sigmoid(), nn.Linear(24, 5), nn.Softplus(),
        nn.Linear(5, 3),
    )  # fmt: skip


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return nn.Sequential(nn.Embedding(7, 6), Positions(5, 6), layer, nn.LayerNorm(6), nn.Linear(6, 3))


class Attending(nn.Module):
    """Causal attention in three ways: a module, a function, and written out."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.MultiheadAttention(4, 2, batch_first=True)
        self.inputs, self.written, self.head = nn.Linear(4, 12), nn.Linear(4, 12), nn.Linear(4, 3)
        self.later: Tensor
        self.register_buffer("later", torch.ones(4, 4, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.module(x, x, x)[0]
        q, k, v = self.inputs(x).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        q, k, v = self.written(x).split(4, dim=-1)
        weights = torch.softmax((q @ k.transpose(-2, -1) / 2).masked_fill(self.later, -torch.inf), -1)
        y: Tensor = self.head(x + weights @ v)
        return y


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape)


def classes(*shape: int) -> Tensor:
    return torch.randint(3, shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Batch]]] = {
    "linear regression": (regression_line, lambda: (rows(20, 5), rows(20, 2))),
    "tanh MLP": (tanh_mlp, lambda: (rows(24, 5), classes(24))),
    "ReLU MLP, five layers": (deep_relu_mlp, lambda: (rows(24, 5), classes(24))),
    "convolutions": (convolutions, lambda: (rows(12, 1, 6, 6), classes(12))),
    "batch and group norm": (batch_norm_net, lambda: (rows(10, 2, 9), classes(10))),
    "residual, pre-norm": (residual_net, lambda: (rows(24, 5), classes(24))),
    "embedding": (bag_of_tokens, lambda: (torch.randint(7, (16, 6)), classes(16))),
    "transformer layer": (transformer, lambda: (torch.randint(7, (6, 5)), classes(6, 5))),
    "attention, three ways": (Attending, lambda: (rows(5, 4, 4), classes(5, 4))),
    "gate, mean, concatenation": (Gated, lambda: (rows(16, 5, 4), rows(16, 3))),
}


def case(name: str, seed: int = 0) -> Case:
    """A model of `MODELS` by name, at its initialisation."""
    torch.manual_seed(seed)
    make, batch = MODELS[name]
    model = make().double()
    x, y = batch()
    x = x if x.dtype == torch.long else x.double()
    return Case(model, classification, (x, y)) if y.dtype == torch.long else Case(model, regression, (x, y.double()))
