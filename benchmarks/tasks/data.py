"""What the tasks train on: scikit-learn's digits, the standard library's source as text, and synthetic draws."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
Sampler = Callable[[torch.Generator], Batch]

SYMBOLS = 64
"""The most frequent bytes of the text have a symbol each, all others share the last."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@lru_cache
def text(held_out: bool) -> Tensor:
    """Source text of the standard library's top-level modules, a megabyte of symbols; a tenth is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    raw = b"".join(file.read_bytes() for file in files)[:1_000_000]
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    frequent = data.bincount(minlength=256).argsort(descending=True, stable=True)[: SYMBOLS - 1]
    symbols = torch.full((256,), SYMBOLS - 1)
    symbols[frequent] = torch.arange(SYMBOLS - 1)
    cut = len(data) * 9 // 10
    return symbols[data[cut:] if held_out else data[:cut]]


def text_sampler(held_out: bool, batch: int, context: int) -> Sampler:
    """Windows at random places, and the same windows one symbol later: [B, T] each."""

    def sample(generator: torch.Generator) -> Batch:
        data = text(held_out)
        window = data[
            torch.randint(0, len(data) - context, (batch, 1), generator=generator) + torch.arange(context + 1)
        ]
        return window[:, :-1], window[:, 1:]

    return sample


def next_symbol_sampler(held_out: bool, batch: int, context: int) -> Sampler:
    """Windows [B, T] and the one symbol that follows each: [B]."""

    def sample(generator: torch.Generator) -> Batch:
        data = text(held_out)
        window = data[
            torch.randint(0, len(data) - context, (batch, 1), generator=generator) + torch.arange(context + 1)
        ]
        return window[:, :-1], window[:, -1]

    return sample


@lru_cache
def digits(held_out: bool) -> Batch:
    """1437 and 360 images [1, 8, 8] of unit variance, ten classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=seeded(0))
    x, y = torch.from_numpy(data.images).float()[order, None], torch.from_numpy(data.target)[order]
    x = (x - x.mean()) / x.std()
    cut = len(y) * 8 // 10
    return (x[cut:], y[cut:]) if held_out else (x[:cut], y[:cut])


def digit_sampler(held_out: bool, batch: int, noise: float, field: int = 8) -> Sampler:
    """Noisy images at random places of a field, and their classes."""

    def sample(generator: torch.Generator) -> Batch:
        images, classes = digits(held_out)
        rows = torch.randint(0, len(classes), (batch,), generator=generator)
        x, y = images[rows], classes[rows]
        if field > 8:
            top, left = torch.randint(0, field - 7, (2, batch, 1, 1), generator=generator)
            placed = torch.zeros(batch, 1, field, field)
            at = torch.arange(batch)[:, None, None]
            placed[at, 0, top + torch.arange(8)[:, None], left + torch.arange(8)] = x[:, 0]
            x = placed
        return x + noise * torch.randn(x.shape, generator=generator), y

    return sample


def teacher_sampler(seed: int, batch: int, features: int, outputs: int, condition: float, classes: bool) -> Sampler:
    """Inputs whose variances fall by a power law to 1/condition, answered by a fixed random network."""
    fixed = seeded(seed)
    hidden = torch.randn(features, 4 * features, generator=fixed) / features**0.5
    last = torch.randn(4 * features, outputs, generator=fixed) / (4 * features) ** 0.5
    spread = condition ** (-0.5 * torch.linspace(0, 1, features))

    def sample(generator: torch.Generator) -> Batch:
        x = torch.randn(batch, features, generator=generator)
        y = 2 * torch.tanh(1.5 * x @ hidden) @ last
        noise = torch.randn(y.shape, generator=generator)
        return x * spread, (2 * y + 0.5 * noise).argmax(1) if classes else y + 0.1 * noise

    return sample


def ratings_sampler(seed: int, batch: int, size: int, rank: int) -> Sampler:
    """Places [B, 2] of a matrix of low rank, and its noisy entries there."""
    fixed = seeded(seed)
    left, right = torch.randn(2, size, rank, generator=fixed) / rank**0.25

    def sample(generator: torch.Generator) -> Batch:
        places = torch.randint(0, size, (batch, 2), generator=generator)
        entries = (left[places[:, 0]] * right[places[:, 1]]).sum(1)
        return places, entries + 0.1 * torch.randn(batch, generator=generator)

    return sample


def modular_sampler(batch: int, modulus: int, multiply: bool) -> Sampler:
    """Pairs of residues [B, 2], and their sum or product."""

    def sample(generator: torch.Generator) -> Batch:
        x = torch.randint(0, modulus, (batch, 2), generator=generator)
        return x, (x[:, 0] * x[:, 1] if multiply else x.sum(1)) % modulus

    return sample


def copy_sampler(batch: int, symbols: int, length: int) -> Sampler:
    """A random word, a mark, and the word again but for its last symbol: [B, 2L]; the word is the target: [B, L]."""

    def sample(generator: torch.Generator) -> Batch:
        word = torch.randint(0, symbols, (batch, length), generator=generator)
        return torch.cat([word, torch.full((batch, 1), symbols), word[:, :-1]], 1), word

    return sample


def mean_loss(loss: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batches: list[Batch]) -> float:
    """Over batches of one size, in eval mode; the mode is put back."""
    training = model.training
    model.eval()
    with torch.no_grad():
        losses = [float(loss(model, batch)) for batch in batches]
    model.train(training)
    return sum(losses) / len(losses)
