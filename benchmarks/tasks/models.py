"""The networks of the tasks, small enough for a step of one to three milliseconds on one thread."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from benchmarks.harness.models import Block

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}


def mlp(sizes: Sequence[int], activation: str, norm: str = "none", embed: nn.Module | None = None) -> nn.Sequential:
    """Flattens its input; `embed` comes before that."""
    layers: list[nn.Module] = [] if embed is None else [embed]
    layers.append(nn.Flatten())
    for a, b in pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), *_norm(norm, b), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def _norm(norm: str, width: int) -> list[nn.Module]:
    made = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
    return [made[norm](width)] if norm in made else []


def norm2d(norm: str, width: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width)
    return nn.GroupNorm(4, width) if norm == "group" else nn.Identity()


def conv(width: int, depth: int, activation: str, norm: str, pool: bool) -> nn.Sequential:
    """Images [B, 1, 12, 12] to logits [B, 10]."""
    layers: list[nn.Module] = []
    channels, side = 1, 12
    for i in range(depth):
        stride = 2 if i < 2 else 1
        layers += [nn.Conv2d(channels, width, 3, stride, 1), norm2d(norm, width), ACTIVATIONS[activation]()]
        channels, side = width, -(-side // stride)
    if pool:
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, 10))


class Residual(nn.Module):
    """x + f(x), f two convolutions, each behind its norm."""

    def __init__(self, width: int, activation: str, norm: str) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            norm2d(norm, width), ACTIVATIONS[activation](), nn.Conv2d(width, width, 3, padding=1),
            norm2d(norm, width), ACTIVATIONS[activation](), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def resnet(width: int, depth: int, activation: str, norm: str) -> nn.Sequential:
    """Images [B, 1, 12, 12] to logits [B, 10]."""
    blocks = [Residual(width, activation, norm) for _ in range(depth)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(nn.Conv2d(1, width, 3, 3, 1), *blocks, norm2d(norm, width), *head)


class Factors(nn.Module):
    """Places [B, 2] of a matrix to its entries: u·v."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.left, self.right = nn.Embedding(size, rank), nn.Embedding(size, rank)
        for table in (self.left, self.right):
            nn.init.normal_(table.weight, std=rank**-0.25)

    def forward(self, places: Tensor) -> Tensor:
        return (self.left(places[:, 0]) * self.right(places[:, 1])).sum(1)


class Recurrent(nn.Module):
    """Symbols [B, T] to logits [B, T, symbols]."""

    def __init__(self, kind: str, symbols: int, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(symbols, width), nn.Linear(width, outputs)
        cell = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[kind]
        self.cell = cell(width, width, num_layers=depth, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.tokens(x))[0])


class Transformer(nn.Module):
    """Symbols [B, T] to logits [B, T, outputs]; those of the last `answers` places if given."""

    def __init__(
        self, symbols: int, outputs: int, length: int, width: int, depth: int, heads: int,
        post_norm: bool, activation: str, causal: bool = True, answers: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.answers = answers
        self.tokens, self.positions = nn.Embedding(symbols, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(
            *(Block(width, heads, causal, post_norm, ACTIVATIONS[activation]) for _ in range(depth))
        )
        self.norm = nn.Identity() if post_norm else nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.blocks(self.tokens(x) + self.positions.weight[: x.shape[1]]))
        return self.head(hidden if self.answers is None else hidden[:, -self.answers :])


class ViT(nn.Module):
    """Images [B, 1, 9, 9] in nine patches to logits [B, 10]."""

    def __init__(self, width: int, depth: int, heads: int, post_norm: bool, activation: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=3, stride=3)
        self.positions = nn.Parameter(0.1 * torch.randn(9, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, False, post_norm, ACTIVATIONS[activation]) for _ in range(depth))
        )
        self.norm = nn.Identity() if post_norm else nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(hidden)).mean(1))
