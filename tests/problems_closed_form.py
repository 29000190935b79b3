"""Small problems with a known Hessian, shared by the tests, and the dense oracle they are held against.

The oracle differentiates twice with plain autograd, row by row, in float64, on a copy of the model, and
shares no code with the package.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Problem:
    name: str
    model: nn.Module
    loss_fn: LossFn
    batch: Any

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def loss(self) -> Tensor:
        return self.loss_fn(self.model, self.batch)


def double(tree: Any) -> Any:
    """The same batch in float64."""
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


def dense_hessian(model: nn.Module, loss_fn: LossFn, batch: Any) -> np.ndarray:
    """The Hessian over the trainable parameters in float64, in the present mode; the model is not touched."""
    twin = copy.deepcopy(model).double()
    for module in twin.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False
    params = [p for p in twin.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        loss = loss_fn(twin, double(batch))
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
        flat = torch.cat([g.flatten() for g in grads])
        rows = []
        for entry in flat:
            if entry.requires_grad:
                row = torch.autograd.grad(entry, params, retain_graph=True, allow_unused=True, materialize_grads=True)
            else:
                row = tuple(torch.zeros_like(p) for p in params)
            rows.append(torch.cat([r.flatten() for r in row]))
    return torch.stack(rows).detach().numpy()


_hessians: dict[str, np.ndarray] = {}


def oracle(problem: Problem) -> np.ndarray:
    """The dense Hessian of a problem of this file as it was made; computed once."""
    if problem.name not in _hessians:
        _hessians[problem.name] = dense_hessian(problem.model, problem.loss_fn, problem.batch)
    return _hessians[problem.name]


def flat(vector: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([v.detach().double().flatten() for v in vector]).numpy()


def unflat(array: np.ndarray, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.from_numpy(np.array(array)).split([t.numel() for t in like])
    return [p.to(t.dtype).reshape(t.shape) for p, t in zip(parts, like, strict=True)]


def classification(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


class LastStep(nn.Module):
    """The outputs of a recurrent network at the last step."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent, self.head = recurrent, nn.Linear(recurrent.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Transformer(nn.Module):
    """One pre-norm block with `F.scaled_dot_product_attention`, and an output layer tied to the embedding."""

    def __init__(self, vocabulary: int = 7, width: int = 6, heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout * self.training)
        x = x + attended.transpose(1, 2).reshape(batch, length, width)
        return self.head(x + self.mlp(x))


class Awkward(nn.Module):
    """Frozen, unused, zero-size and float64 parameters, and an embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, sparse=True)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(3))
        self.empty = nn.Parameter(torch.zeros(0, 2))
        self.head = nn.Linear(4, 3)
        self.precise = nn.Parameter(torch.randn(3, dtype=torch.float64))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.frozen(self.embedding(tokens)))
        return self.head(hidden) * self.precise + self.empty.sum()


def seeded(seed: int) -> None:
    torch.manual_seed(seed)


def linear_regression() -> Problem:
    seeded(0)
    return Problem("linear regression", nn.Linear(6, 1), mean_square, (torch.randn(32, 6), torch.randn(32, 1)))


def softmax_regression() -> Problem:
    seeded(1)
    return Problem("softmax regression", nn.Linear(5, 4), classification, (torch.randn(40, 5), torch.randint(4, (40,))))


def tanh_mlp() -> Problem:
    seeded(2)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    return Problem("tanh MLP", model, classification, (torch.randn(48, 5), torch.randint(3, (48,))))


def maximised() -> Problem:
    """Cross-entropy with the wrong sign: −λ_min is about ten times λ_max."""
    seeded(3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return Problem(
        "maximised MLP",
        model,
        lambda m, b: -classification(m, b),
        (torch.randn(48, 5), torch.randint(3, (48,))),
    )


def convolution() -> Problem:
    seeded(4)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(48, 3))
    return Problem("convolution", model, classification, (torch.randn(16, 1, 6, 6), torch.randint(3, (16,))))


def batch_norm() -> Problem:
    seeded(5)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).train()
    return Problem("batch norm in train mode", model, classification, (torch.randn(24, 5), torch.randint(3, (24,))))


def lstm() -> Problem:
    seeded(6)
    model = LastStep(nn.LSTM(3, 5, batch_first=True))
    return Problem("LSTM", model, classification, (torch.randn(12, 6, 3), torch.randint(3, (12,))))


def transformer() -> Problem:
    seeded(7)
    tokens = torch.randint(7, (4, 9))
    return Problem("transformer", Transformer(), classification, (tokens[:, :-1], tokens[:, 1:]))


def awkward() -> Problem:
    seeded(8)
    return Problem("awkward parameters", Awkward(), classification, (torch.randint(6, (20,)), torch.randint(3, (20,))))


def group_norm() -> Problem:
    seeded(9)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(24, 2))
    return Problem("group norm", model, mean_square, (torch.randn(10, 2, 8), torch.randn(10, 2)))


PROBLEMS: list[Callable[[], Problem]] = [
    linear_regression,
    softmax_regression,
    tanh_mlp,
    maximised,
    convolution,
    batch_norm,
    lstm,
    transformer,
    awkward,
    group_norm,
]
