"""Models and optimizers whose probes go wrong. Each model maps six numbers to three."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.helpers import mlp, noisy_net
from tests.stability.outputs import LoRA

Optimizers = list[torch.optim.Optimizer]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Tanh())
        self.again, self.head = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.again, self.first(x), use_reentrant=self.use_reentrant))


class LazyBuffers(nn.Module):
    """Registers its buffers in the first forward pass, and binds another tensor to one in each."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.full((8,), 0.9))
            self.register_buffer("mean", torch.zeros(8), persistent=False)
        if self.training:
            self.mean = self.mean * 0.9 + hidden.detach().mean(0) * 0.1
        return self.head(hidden * self.mask - 0.1 * self.mean)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.spectrum = nn.Parameter(torch.randn(5, 2))
        self.register_buffer("turn", torch.polar(torch.ones(5), torch.arange(5.0)))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(torch.tanh(self.first(x.float()).float()))
        return self.head(torch.fft.irfft(spectrum * torch.view_as_complex(self.spectrum) * self.turn))


class Embedded(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.one, self.bag = nn.Embedding(7, 6, sparse=sparse), nn.EmbeddingBag(7, 6, sparse=sparse)
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        words = (x[:, :2].abs() * 3).long().clamp(max=6)
        return self.net(x + self.one(words[:, 0]) + self.bag(words))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.head = nn.Linear(6, 8), nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x).view(1, -1, 8)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrence, self.head = nn.GRU(2, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrence(x.view(-1, 3, 2))[0][:, -1])


def lora() -> nn.Module:
    net = mlp()
    return nn.Sequential(LoRA(net[0]), nn.Dropout(0.1), net[1], LoRA(net[2]))


def frozen() -> nn.Module:
    net = noisy_net()
    net[0].requires_grad_(False)
    return net


def normed() -> nn.Module:
    net = mlp()
    parametrizations.spectral_norm(net[0]), parametrizations.weight_norm(net[2])
    return net


def half_eval() -> nn.Module:
    net = noisy_net()
    net[1].eval()
    return net


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "noisy": noisy_net,
    "tied": Tied,
    "checkpointed": partial(Checkpointed, False),
    "reentrant": partial(Checkpointed, True),
    "lazy buffers": LazyBuffers,
    "complex": Complex,
    "embedded": partial(Embedded, False),
    "sparse": partial(Embedded, True),
    "attention": Attention,
    "recurrent": Recurrent,
    "lora": lora,
    "frozen": frozen,
    "spectral and weight norm": normed,
    "half in eval mode": half_eval,
}


def muon_and_adamw(params: list[Tensor]) -> Optimizers:
    matrices = [p for p in params if p.ndim == 2]
    others = [p for p in params if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=0.02)
    return [muon, torch.optim.AdamW(others, lr=0.01)] if others else [muon]


def two_groups(params: list[Tensor]) -> Optimizers:
    groups = [{"params": params[:1], "lr": 0.02, "weight_decay": 0.0}, {"params": params[1:]}]
    return [torch.optim.AdamW(groups, lr=0.01)]


def prodigy(params: list[Tensor]) -> Optimizers:
    from prodigyopt import Prodigy

    return [Prodigy(params, lr=1.0)]


def lion(params: list[Tensor]) -> Optimizers:
    from lion_pytorch import Lion

    return [Lion(params, lr=1e-3)]


def schedule_free(params: list[Tensor]) -> Optimizers:
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(params, lr=0.01)
    optimizer.train()
    return [optimizer]


def one(cls: Any, *rate: Any, **options: Any) -> Callable[[list[Tensor]], Optimizers]:
    return lambda params: [cls(params, *rate, **options)]


OPTIMIZERS: dict[str, Callable[[list[Tensor]], Optimizers]] = {
    "sgd": one(torch.optim.SGD, 0.1, momentum=0.9),
    "plain sgd": one(torch.optim.SGD, 0.1),
    "nesterov": one(torch.optim.SGD, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": one(torch.optim.Adam, 0.01),
    "amsgrad": one(torch.optim.Adam, 0.01, amsgrad=True),
    "adamw": one(torch.optim.AdamW, 0.01),
    "fused": one(torch.optim.AdamW, 0.01, fused=True),
    "rate in a tensor": lambda params: [torch.optim.AdamW(params, torch.tensor(0.01), foreach=False)],
    "two groups": two_groups,
    "nadam": one(torch.optim.NAdam, 0.01),
    "radam": one(torch.optim.RAdam, 0.01),
    "adamax": one(torch.optim.Adamax, 0.01),
    "adagrad": one(torch.optim.Adagrad, 0.01),
    "adadelta": one(torch.optim.Adadelta, 0.5),
    "rmsprop": one(torch.optim.RMSprop, 0.01, momentum=0.5, centered=True),
    "asgd": one(torch.optim.ASGD, 0.01),
    "rprop": one(torch.optim.Rprop, 0.01),
    "adafactor": one(torch.optim.Adafactor, 0.01),
    **({"muon and adamw": muon_and_adamw} if hasattr(torch.optim, "Muon") else {}),
    "prodigy": prodigy,
    "lion": lion,
    "schedule-free": schedule_free,
}
ALONG = ("rprop", "adafactor", "muon and adamw", "prodigy", "lion")
"""Without a registered rule: measured along their updates, which `opt.backward` cannot do."""
THIRD_PARTY = ("prodigy", "lion", "schedule-free")
OF_SPARSE = ("plain sgd", "adagrad")
"""Those that take sparse gradients."""
