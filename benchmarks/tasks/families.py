"""The families of tasks: each draws a network, its data and its loss from a stream of random numbers.

A drawing is made of plain choices (`Draw`), which are kept beside the task for tables: what is weak can be looked up
by width, norm, activation or batch size as well as by family.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tasks import data, models
from benchmarks.tasks.data import Batch, Sampler


class Draw(random.Random):
    """Random choices by name, remembered."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.made: dict[str, Any] = {}

    def one_of(self, name: str, options: Sequence[Any]) -> Any:
        self.made[name] = self.choice(list(options))
        return self.made[name]

    def between(self, name: str, low: float, high: float) -> float:
        """Log-uniform, to three digits."""
        self.made[name] = float(f"{low * (high / low) ** self.random():.3g}")
        return float(self.made[name])


@dataclass(frozen=True)
class Workload:
    """What is trained on what: everything of a task but its optimizer."""

    model: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    train: Sampler
    held_out: Sampler
    gain: float = 1.0  # on all weight matrices at the start
    clip: float | None = None  # norm that each gradient is clipped to
    choices: dict[str, Any] = field(default_factory=dict)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def squared(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def absolute(model: nn.Module, batch: Batch) -> Tensor:
    return F.smooth_l1_loss(model(batch[0]), batch[1])


def reconstruction(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[0].flatten(1))


def reconstructed_bits(model: nn.Module, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]), (batch[0].flatten(1) > 0).float())


def last_of(model: nn.Module, batch: Batch) -> Tensor:
    """Of networks that answer at each place where only the last ones count."""
    logits = model(batch[0])[:, -batch[1].shape[1] :]
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def _classes(draw: Draw, batch: int) -> tuple[int, int, Sampler, Sampler]:
    """(features, classes, train, held out) of digits or of a random teacher."""
    if draw.one_of("data", ("digits", "teacher")) == "digits":
        noise = draw.between("noise", 0.3, 1.0)
        return 64, 10, data.digit_sampler(False, batch, noise), data.digit_sampler(True, 256, noise)
    features, classes = draw.one_of("features", (16, 32, 64)), draw.one_of("classes", (4, 8, 16))
    condition, seed = draw.between("condition", 1, 30), draw.randrange(10**6)
    train, held = (data.teacher_sampler(seed, n, features, classes, condition, True) for n in (batch, 256))
    return features, classes, train, held


def mlp(draw: Draw) -> Workload:
    batch, width = draw.one_of("batch", (8, 16, 32, 64, 128, 256)), draw.one_of("width", (32, 64, 128, 192))
    depth, activation = draw.one_of("depth", (1, 2, 3)), draw.one_of("activation", tuple(models.ACTIVATIONS))
    norm = draw.one_of("norm", ("none", "none", "batch", "layer"))
    features, classes, train, held = _classes(draw, batch)
    sizes = [features, *[width] * depth, classes]
    return Workload(
        lambda: models.mlp(sizes, activation, norm), cross_entropy, train, held, draw.between("gain", 0.4, 2.5)
    )


def deep_mlp(draw: Draw) -> Workload:
    batch, width = draw.one_of("batch", (16, 32, 64, 128, 256)), draw.one_of("width", (32, 48, 64, 96))
    depth, activation = draw.one_of("depth", (5, 7, 9)), draw.one_of("activation", ("relu", "tanh", "gelu"))
    features, classes, train, held = _classes(draw, batch)
    # PyTorch's own weights shrink activations by 1/√3 a layer (1/√6 with ReLU): the gain brings them back near 1.
    gain = draw.between("gain", 0.8, 1.2) * (3**0.5 if activation == "tanh" else 6**0.5)
    sizes = [features, *[width] * depth, classes]
    return Workload(lambda: models.mlp(sizes, activation), cross_entropy, train, held, gain)


def convolution(draw: Draw) -> Workload:
    batch, width = draw.one_of("batch", (8, 16, 32, 64)), draw.one_of("width", (8, 12, 16))
    depth, activation = draw.one_of("depth", (2, 3)), draw.one_of("activation", ("relu", "gelu", "tanh"))
    norm, pool = draw.one_of("norm", ("none", "none", "batch", "group")), draw.one_of("pool", (False, True))
    noise = draw.between("noise", 0.1, 0.6)
    train, held = data.digit_sampler(False, batch, noise, 12), data.digit_sampler(True, 256, noise, 12)
    made = lambda: models.conv(width, depth, activation, norm, pool)  # noqa: E731
    return Workload(made, cross_entropy, train, held, draw.between("gain", 0.6, 2.5))


def residual(draw: Draw) -> Workload:
    batch, width = draw.one_of("batch", (8, 16, 32, 64)), draw.one_of("width", (8, 12, 16))
    depth, activation = draw.one_of("depth", (1, 2, 3)), draw.one_of("activation", ("relu", "gelu"))
    norm, noise = draw.one_of("norm", ("none", "batch", "group")), draw.between("noise", 0.1, 0.6)
    train, held = data.digit_sampler(False, batch, noise, 12), data.digit_sampler(True, 256, noise, 12)
    made = lambda: models.resnet(width, depth, activation, norm)  # noqa: E731
    return Workload(made, cross_entropy, train, held, draw.between("gain", 0.6, 1.5))


def autoencoder(draw: Draw) -> Workload:
    batch, width = draw.one_of("batch", (8, 16, 32, 64, 128, 256)), draw.one_of("width", (48, 96, 160))
    code, depth = draw.one_of("code", (3, 6, 12)), draw.one_of("depth", (1, 2))
    activation, loss = draw.one_of("activation", ("relu", "tanh", "silu")), draw.one_of("loss", ("mse", "bits"))
    sizes = [64, *[width] * depth, code, *[width] * depth, 64]
    train, held = data.digit_sampler(False, batch, 0.1), data.digit_sampler(True, 256, 0.1)
    objective = reconstruction if loss == "mse" else reconstructed_bits
    return Workload(lambda: models.mlp(sizes, activation), objective, train, held, draw.between("gain", 0.5, 2.5))


def regression(draw: Draw) -> Workload:
    batch, width = draw.one_of("batch", (8, 16, 32, 64, 128, 256)), draw.one_of("width", (32, 64, 128))
    depth, activation = draw.one_of("depth", (1, 2, 4)), draw.one_of("activation", tuple(models.ACTIVATIONS))
    norm, loss = draw.one_of("norm", ("none", "none", "layer")), draw.one_of("loss", ("mse", "mse", "smooth l1"))
    features, outputs = draw.one_of("features", (8, 16, 32)), draw.one_of("outputs", (1, 4, 16))
    condition, seed = draw.between("condition", 1, 300), draw.randrange(10**6)
    train, held = (data.teacher_sampler(seed, n, features, outputs, condition, False) for n in (batch, 256))
    sizes = [features, *[width] * depth, outputs]
    objective = squared if loss == "mse" else absolute
    return Workload(lambda: models.mlp(sizes, activation, norm), objective, train, held, draw.between("gain", 0.4, 2.5))


def factorisation(draw: Draw) -> Workload:
    batch, size = draw.one_of("batch", (32, 64, 128, 256)), draw.one_of("size", (24, 48, 96))
    rank, seed = draw.one_of("rank", (2, 4, 8)), draw.randrange(10**6)
    train, held = (data.ratings_sampler(seed, n, size, rank) for n in (batch, 1024))
    return Workload(lambda: models.Factors(size, 2 * rank), squared, train, held, draw.between("gain", 0.1, 1.0))


def recurrent(draw: Draw) -> Workload:
    batch, length = draw.one_of("batch and length", ((8, 16), (16, 12), (32, 8), (64, 6)))
    kind, width = draw.one_of("cell", ("rnn", "gru", "lstm")), draw.one_of("width", (24, 32, 48))
    depth = draw.one_of("depth", (1, 1, 2))
    train, held = data.text_sampler(False, batch, length), data.text_sampler(True, 128, length)
    made = lambda: models.Recurrent(kind, data.SYMBOLS, width, depth, data.SYMBOLS)  # noqa: E731
    return Workload(made, cross_entropy, train, held, draw.between("gain", 0.6, 2.0))


def _text_transformer(draw: Draw, post_norm: bool) -> Workload:
    batch, length = draw.one_of("batch and length", ((8, 24), (16, 16), (32, 8), (64, 6)))
    width, depth = draw.one_of("width and depth", ((24, 3), (32, 1), (32, 2), (32, 3), (48, 1), (48, 2)))
    heads, activation = draw.one_of("heads", (2, 4)), draw.one_of("activation", ("gelu", "relu"))
    train, held = data.text_sampler(False, batch, length), data.text_sampler(True, 64, length)
    symbols = data.SYMBOLS
    made = lambda: models.Transformer(symbols, symbols, length, width, depth, heads, post_norm, activation)  # noqa: E731
    return Workload(made, cross_entropy, train, held, draw.between("gain", 0.6, 1.8))


def pre_norm_text(draw: Draw) -> Workload:
    return _text_transformer(draw, False)


def post_norm_text(draw: Draw) -> Workload:
    return _text_transformer(draw, True)


def modular(draw: Draw) -> Workload:
    batch, modulus = draw.one_of("batch", (32, 64, 128, 256)), draw.one_of("modulus", (11, 17, 23))
    kind, activation = draw.one_of("network", ("mlp", "pre-LN", "post-LN")), draw.one_of("activation", ("relu", "gelu"))
    multiply, width = draw.one_of("multiply", (False, True)), draw.one_of("width", (24, 32, 48))
    train, held = (data.modular_sampler(n, modulus, multiply) for n in (batch, 512))
    gain = draw.between("gain", 0.6, 1.8)
    if kind == "mlp":
        sizes = [2 * width, 4 * width, modulus]
        embed = lambda: nn.Embedding(modulus, width)  # noqa: E731
        return Workload(lambda: models.mlp(sizes, activation, embed=embed()), cross_entropy, train, held, gain)
    depth, post = draw.one_of("depth", (1, 2)), kind == "post-LN"
    made = lambda: models.Transformer(  # noqa: E731
        modulus, modulus, 2, width, depth, 2, post, activation, causal=False, answers=1
    )
    return Workload(made, cross_entropy, train, held, gain)


def copying(draw: Draw) -> Workload:
    batch, length = draw.one_of("batch and length", ((8, 8), (16, 6), (32, 4), (64, 3)))
    symbols, network = draw.one_of("symbols", (4, 8, 16)), draw.one_of("network", ("gru", "lstm", "pre-LN", "post-LN"))
    width, depth = draw.one_of("width", (24, 32, 48)), draw.one_of("depth", (1, 2))
    train, held = (data.copy_sampler(n, symbols, length) for n in (batch, 128))
    gain = draw.between("gain", 0.6, 1.8)
    if network in ("gru", "lstm"):
        made = lambda: models.Recurrent(network, symbols + 1, width, 1, symbols)  # noqa: E731
        return Workload(made, last_of, train, held, gain)
    post = network == "post-LN"
    attention = lambda: models.Transformer(  # noqa: E731
        symbols + 1, symbols, 2 * length, width, depth, 2, post, "gelu", answers=length
    )
    return Workload(attention, cross_entropy, train, held, gain)


def patches(draw: Draw) -> Workload:
    batch, width = draw.one_of("batch", (8, 16, 32)), draw.one_of("width", (24, 32, 48))
    depth, heads = draw.one_of("depth", (1, 2)), draw.one_of("heads", (2, 4))
    post, activation = draw.one_of("post-LN", (False, False, True)), draw.one_of("activation", ("gelu", "relu"))
    noise = draw.between("noise", 0.1, 0.6)
    train, held = data.digit_sampler(False, batch, noise, 9), data.digit_sampler(True, 256, noise, 9)
    made = lambda: models.ViT(width, depth, heads, post, activation)  # noqa: E731
    return Workload(made, cross_entropy, train, held, draw.between("gain", 0.6, 1.8))


def next_symbol(draw: Draw) -> Workload:
    batch, context = draw.one_of("batch", (16, 32, 64, 128, 256)), draw.one_of("context", (3, 5, 8))
    width, embedding = draw.one_of("width", (48, 96, 160)), draw.one_of("embedding", (8, 16, 32))
    activation, norm = draw.one_of("activation", ("tanh", "relu", "silu")), draw.one_of("norm", ("none", "layer"))
    train, held = data.next_symbol_sampler(False, batch, context), data.next_symbol_sampler(True, 512, context)
    sizes = [context * embedding, width, data.SYMBOLS]
    made = lambda: models.mlp(sizes, activation, norm, nn.Embedding(data.SYMBOLS, embedding))  # noqa: E731
    return Workload(made, cross_entropy, train, held, draw.between("gain", 0.6, 2.0))


FAMILIES: dict[str, Callable[[Draw], Workload]] = {
    "MLP": mlp,
    "pre-LN text": pre_norm_text,
    "convolution": convolution,
    "regression": regression,
    "post-LN text": post_norm_text,
    "deep MLP": deep_mlp,
    "recurrent": recurrent,
    "autoencoder": autoencoder,
    "modular": modular,
    "residual": residual,
    "next symbol": next_symbol,
    "copying": copying,
    "patches": patches,
    "factorisation": factorisation,
}


@torch.no_grad()
def scaled(model: nn.Module, gain: float) -> nn.Module:
    """The weight matrices times `gain`; norms, biases and positions stay."""
    for p in model.parameters():
        if p.dim() > 1 and gain != 1.0:
            p.mul_(gain)
    return model
