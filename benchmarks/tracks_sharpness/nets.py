"""What is measured on: three models of at most 2000 parameters to track, three of a million to start on from cold."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from benchmarks.harness.data import Batch, class_batches, corpus, digits, mnist1d, place
from benchmarks.harness.models import GPT, mlp, small_conv
from benchmarks.harness.problems import PROBLEMS

CROSS_ENTROPY = nn.CrossEntropyLoss()


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = CROSS_ENTROPY(net(batch[0]), batch[1])
    return loss


def flat(net: nn.Module) -> nn.Module:
    """Logits [B, T, C] as [B·T, C], as all libraries take them."""
    return nn.Sequential(net, nn.Flatten(0, -2))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return flat(make())


@dataclass(frozen=True)
class Tracked:
    """A model of at most 2000 parameters and its examples."""

    make: Callable[[], nn.Module]
    pool: Callable[[], Batch]
    sgd: float
    adam: float
    size: int  # rows of a batch

    def optimizer(self, kind: str, net: nn.Module) -> Optimizer:
        params = net.parameters()
        return SGD(params, self.sgd, momentum=0.9) if kind == "SGD" else Adam(params, self.adam, betas=(0.9, 0.99))

    def batches(self, kind: str) -> Iterator[Batch]:
        (x, y), size = self.pool(), self.size
        if kind == "one batch":
            yield from itertools.repeat((x[:size], y[:size].flatten()))
        for rows, targets in class_batches((x, y), torch.Generator().manual_seed(0), size):
            yield rows, targets.flatten()


def letters_gpt() -> nn.Module:
    """27 letters, 16 at a time: 532 parameters."""
    net = GPT(width=4, depth=1, context=16)
    net.tokens, net.head = nn.Embedding(27, 4), nn.Linear(4, 27, bias=False)
    nn.init.normal_(net.tokens.weight, std=0.02)
    return net


@lru_cache
def letters() -> Batch:
    """512 lines of 16 letters, and the letters that follow: the alphabet in either case, all else is 26."""
    text = corpus()[0][: 512 * 17]
    index = torch.full((256,), 26)
    for case in (b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        index[list(case)] = torch.arange(26)
    lines = index[text].view(512, 17)
    return lines[:, :-1], lines[:, 1:]


@lru_cache
def images() -> Batch:
    (x, y), _ = digits()
    return place(x[:512], torch.Generator().manual_seed(0), 12), y[:512]


@lru_cache
def signals() -> Batch:
    (x, y), _ = mnist1d(1000)
    return x[:512], y[:512]


def tanh_mlp() -> nn.Module:
    return nn.Sequential(*(nn.Tanh() if isinstance(layer, nn.ReLU) else layer for layer in mlp(20, 2)))


TRACKED = {
    "tanh MLP": Tracked(tanh_mlp, signals, sgd=0.1, adam=1e-2, size=64),
    "ReLU conv": Tracked(partial(small_conv, 3), images, sgd=0.1, adam=1e-2, size=32),
    "GELU GPT": Tracked(letters_gpt, letters, sgd=0.1, adam=1e-2, size=16),
}


@dataclass(frozen=True)
class Cold:
    """A model of a million parameters and how it has been trained before it is measured."""

    make: Callable[[], nn.Module]
    problem: str
    batch: int
    rule: Callable[..., Optimizer]

    def trained(self, steps: int) -> tuple[nn.Module, Batch]:
        """The net after `steps` training steps, in eval mode, and the batch to measure on."""
        problem = PROBLEMS[self.problem]
        stream = problem.stream(problem.data()[0], torch.Generator().manual_seed(0), self.batch)
        net = built(self.make)
        optimizer = self.rule(net.parameters())
        for _ in range(steps):
            x, y = next(stream)
            optimizer.zero_grad()
            loss_of(net, (x, y.flatten())).backward()
            optimizer.step()
        x, y = next(stream)
        net.zero_grad(set_to_none=True)
        return net.eval(), (x, y.flatten())


COLD = {
    "MLP": Cold(partial(mlp, 640, 4), "mlp", 256, partial(SGD, lr=0.1, momentum=0.9)),
    "convolutional": Cold(partial(small_conv, 235), "digits", 64, partial(SGD, lr=0.03, momentum=0.9)),
    "GPT": Cold(partial(GPT, 144, 4), "gpt", 8, partial(AdamW, lr=1e-3)),
}
