"""The training problems that the demo and the benchmarks share.

Nothing is downloaded: bytes come from the standard library's own source, images from scikit-learn, signals
from mnist1d's generator. Weights depend on `build`'s seed alone, the order of the data on `batches`' seed
alone, and neither touches the global random streams: policies given one seed see the same weights and data.
All problems are sized for one thread of a CPU: 2 to 12 ms a step.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

Batch = tuple[Tensor, Tensor]  # inputs, integer targets

CORPUS_BYTES = 2_000_000
EVAL_FRACTION = 0.1


# -- data -------------------------------------------------------------------------------------------------


@lru_cache
def corpus() -> tuple[Tensor, Tensor]:
    """(train, eval): source text of the standard library's top-level modules, 2 MB of bytes as int64."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = b"".join(file.read_bytes() for file in sorted(stdlib.glob("*.py")))[:CORPUS_BYTES]
    if len(text) < CORPUS_BYTES // 2:
        raise RuntimeError(f"{stdlib} holds only {len(text)} bytes of source: is this a full Python?")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    cut = int(len(data) * (1 - EVAL_FRACTION))
    return data[:cut], data[cut:]


@lru_cache
def mnist1d(samples: int = 20_000) -> tuple[Batch, Batch]:
    """(train, eval): four fifths and one fifth of the signals [1, 40], ten classes. Takes about six seconds.

    The published 5000 samples are learnt by heart within 2000 steps, which would reward slow training.
    The generator seeds the global streams of numpy and random; they are put back.
    """
    from mnist1d.data import get_dataset_args, make_dataset  # late: imports matplotlib and requests

    args = get_dataset_args()
    args.num_samples = samples
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        data = make_dataset(args)
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
    x, y, x_eval, y_eval = (torch.from_numpy(data[key]) for key in ("x", "y", "x_test", "y_test"))
    return (x.float()[:, None], y.long()), (x_eval.float()[:, None], y_eval.long())


@lru_cache
def digits() -> tuple[Batch, Batch]:
    """(train, eval): 1437 and 360 images [1, 8, 8] in [0, 1], ten classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(data.images).float()[order, None] / 16, torch.from_numpy(data.target)[order]
    cut = int(len(y) * 0.8)
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def place(x: Tensor, generator: torch.Generator, size: int, noise: float = 0.2) -> Tensor:
    """Images [B, 1, 8, 8] at random places in a noisy field [B, 1, size, size].

    The bare images are too few and too easy: every schedule would reach a loss of nearly zero.
    """
    batch, _, height, width = x.shape
    top, left = torch.randint(0, size - height + 1, (2, batch, 1, 1), generator=generator)
    field = noise * torch.randn(batch, 1, size, size, generator=generator)
    rows, columns = top + torch.arange(height)[:, None], left + torch.arange(width)
    field[torch.arange(batch)[:, None, None], 0, rows, columns] += x[:, 0]
    return field


def text_batches(data: Tensor, generator: torch.Generator, batch: int, context: int) -> Iterator[Batch]:
    """Windows at random places of the text, and the same windows one byte later: [B, T] each."""
    while True:
        start = torch.randint(0, len(data) - context, (batch, 1), generator=generator)
        window = data[start + torch.arange(context + 1)]
        yield window[:, :-1], window[:, 1:]


def class_batches(data: Batch, generator: torch.Generator, batch: int) -> Iterator[Batch]:
    """Epochs in a new random order each; the incomplete last batch of an epoch is dropped."""
    x, y = data
    if batch > len(y):
        raise ValueError(f"a batch of {batch} from {len(y)} examples")
    while True:
        for rows in torch.randperm(len(y), generator=generator)[: len(y) // batch * batch].split(batch):
            yield x[rows], y[rows]


def placed_batches(data: Batch, generator: torch.Generator, batch: int, size: int = 12) -> Iterator[Batch]:
    """Like `class_batches`, every image at a new place with new noise each time."""
    for x, y in class_batches(data, generator, batch):
        yield place(x, generator, size), y


# -- models -----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Layer norm before each branch (pre-LN) or after each sum (post-LN)."""

    def __init__(self, width: int, heads: int, causal: bool, post_norm: bool = False) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.attention = Attention(width, heads, causal)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        if self.post_norm:
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes [B, T] to logits [B, T, 256]."""

    def __init__(self, width: int = 64, depth: int = 3, context: int = 64, post_norm: bool = False) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, 4, True, post_norm) for _ in range(depth)))
        self.norm = nn.Identity() if post_norm else nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.tokens(x) + self.positions.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(hidden)))


class ViT(nn.Module):
    """Images [B, 1, 9, 9] in nine patches of 3 x 3 to logits [B, 10]; mean over patches."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=3, stride=3)
        self.positions = nn.Parameter(0.02 * torch.randn(9, width))
        self.blocks = nn.Sequential(*(Block(width, 4, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(hidden)).mean(1))


class LSTM(nn.Module):
    """Bytes [B, T] to logits [B, T, 256]."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(256, width), nn.Linear(width, 256)
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(x))[0])


class Residual(nn.Module):
    """Two normalised convolutions round which the input passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def resnet(width: int = 24, depth: int = 2) -> nn.Module:
    """Images [B, 1, 12, 12] to logits [B, 10]."""
    stem = [nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [Residual(width) for _ in range(depth)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def cnn(width: int = 48) -> nn.Module:
    """Signals [B, 1, 40] to logits [B, 10], no normalisation."""
    return nn.Sequential(
        nn.Conv1d(1, width, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv1d(width, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv1d(width, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * width, 10),
    )  # fmt: skip


def mlp(width: int = 256, depth: int = 3) -> nn.Module:
    """Signals [B, 1, 40] to logits [B, 10]."""
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(40, width), nn.ReLU(), *hidden, nn.Linear(width, 10))


def small_conv(width: int = 16) -> nn.Module:
    """Images [B, 1, 12, 12] to logits [B, 10], no normalisation."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * width * 9, 10),
    )  # fmt: skip


# -- problems ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One training problem: a model, its data and the optimizer that suits it.

    `split` is "development" where warmctl's defaults may be chosen on the problem, "test" where they may not.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Any, Any]]  # () -> train, eval
    stream: Callable[[Any, torch.Generator, int], Iterator[Batch]]  # data, generator, batch size -> batches
    batch: int
    rule: Callable[..., Optimizer]  # params, lr=... -> optimizer
    lrs: tuple[float, ...]  # peak rates in half decades, reaching past where fixed schedules fail
    tuned_lr: float  # the best of `lrs` under 10 % linear warmup, 400 steps, mean over five seeds
    split: str
    eval_batch: int
    eval_count: int = 8

    @property
    def demo_lr(self) -> float:
        """A peak rate that is far too high: ten times the tuned one."""
        return 10 * self.tuned_lr

    def build(self, seed: int) -> nn.Module:
        """A new model whose weights depend on `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model()

    def optimizer(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        return self.rule(params, lr=lr)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats."""
        x, y = batch
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())

    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless training batches, in an order that depends on `seed` alone."""
        return self.stream(self.data()[0], torch.Generator().manual_seed(seed), self.batch)

    def eval_batches(self) -> list[Batch]:
        """The same held-out batches for every seed and policy."""
        return _eval_batches(self)

    def evaluate(self, model: nn.Module) -> float:
        """Mean loss over `eval_batches` in eval mode; the mode is put back."""
        was_training = model.training
        model.eval()
        with torch.no_grad():
            losses = [self.loss(model, batch).item() for batch in self.eval_batches()]
        model.train(was_training)
        return sum(losses) / len(losses)

    def chance(self) -> float:
        """Entropy of the held-out targets in nats: who ends here has learnt no more than the frequencies."""
        counts = torch.cat([y.flatten() for _, y in self.eval_batches()]).bincount().double()
        return torch.distributions.Categorical(counts).entropy().item()


@lru_cache
def _eval_batches(problem: Problem) -> list[Batch]:
    stream = problem.stream(problem.data()[1], torch.Generator().manual_seed(0), problem.eval_batch)
    return [next(stream) for _ in range(problem.eval_count)]


def half_decades(low: float, count: int = 7) -> tuple[float, ...]:
    """Peak rates 1, 3, 10, 30, … from `low` on: seven span three decades."""
    rates = [float(f"{digit}e{exponent}") for exponent in range(-6, 4) for digit in (1, 3)]
    return tuple(rates[rates.index(low) :][:count])


def _problems() -> Iterator[Problem]:
    text = partial(Problem, data=corpus, stream=partial(text_batches, context=64), batch=8, eval_batch=32)
    lines = partial(Problem, data=corpus, stream=partial(text_batches, context=32), batch=16, eval_batch=64)
    signals = partial(Problem, data=mnist1d, stream=class_batches, batch=128, eval_batch=500)
    images = partial(Problem, data=digits, stream=partial(placed_batches, size=12), batch=64, eval_batch=180)
    patches = partial(Problem, data=digits, stream=partial(placed_batches, size=9), batch=64, eval_batch=180)
    post_gpt = partial(GPT, post_norm=True)
    momentum = partial(SGD, momentum=0.9)
    nesterov = partial(SGD, momentum=0.9, nesterov=True)
    adamw = partial(AdamW, betas=(0.9, 0.95), weight_decay=0.1)

    yield text("gpt", GPT, rule=adamw, lrs=half_decades(3e-4), tuned_lr=3e-3, split="test")
    yield text("gpt-post", post_gpt, rule=Adam, lrs=half_decades(1e-4), tuned_lr=3e-3, split="development")
    yield text("gpt-sgd", GPT, rule=momentum, lrs=half_decades(1e-2), tuned_lr=0.1, split="development")
    yield signals("cnn", cnn, rule=momentum, lrs=half_decades(1e-2), tuned_lr=0.1, split="development")
    yield signals("mlp", mlp, rule=momentum, lrs=half_decades(1e-2), tuned_lr=0.3, split="test")
    yield signals("mlp-adam", mlp, rule=Adam, lrs=half_decades(3e-4), tuned_lr=1e-2, split="development")
    yield images("resnet", resnet, rule=nesterov, lrs=half_decades(3e-2), tuned_lr=0.3, split="development")
    yield patches("vit", ViT, rule=adamw, lrs=half_decades(3e-4), tuned_lr=3e-3, split="test")
    yield lines("lstm", LSTM, rule=RMSprop, lrs=half_decades(1e-3), tuned_lr=3e-2, split="test")
    yield images("digits", small_conv, rule=momentum, lrs=half_decades(1e-2), tuned_lr=0.1, split="test")


PROBLEMS = {problem.name: problem for problem in _problems()}
