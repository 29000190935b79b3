"""Families of other kinds: losses, networks and data such as no task of `families` has.

They were written when the law was done, from problems on which it had done badly. One of them, a physics-informed loss
under SGD, has had a say since: it showed that a run which breaks up has to be probed. Drawn as the others are, with the
same optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tasks import data, models
from benchmarks.tasks.data import Batch, Sampler, seeded
from benchmarks.tasks.families import Draw, Workload, cross_entropy, squared

CODE = 8
"""Dimensions of the variational code."""


def mapped(sampler: Sampler, make: Callable[[Batch, torch.Generator], Batch]) -> Sampler:
    """Batches made of another sampler's and more random numbers."""
    return lambda generator: make(sampler(generator), generator)


def _digits(batch: int, noise: float, make: Callable[[Batch, torch.Generator], Batch]) -> tuple[Sampler, Sampler]:
    return (
        mapped(data.digit_sampler(False, batch, noise), make),
        mapped(data.digit_sampler(True, 256, noise), make),
    )


# -- generative and self-supervised ----------------------------------------------------------------------


class Variational(nn.Module):
    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.encoder = models.mlp([64, width, 2 * CODE], activation)
        self.decoder = models.mlp([CODE, width, 64], activation)


def evidence_bound(model: nn.Module, batch: Batch) -> Tensor:
    """Bits of the image and the divergence of its code; the noise comes with the batch."""
    image, noise = batch
    mean, log_variance = model.encoder(image).chunk(2, 1)
    logits = model.decoder(mean + noise * (log_variance / 2).exp())
    bits = F.binary_cross_entropy_with_logits(logits, (image > 0).float(), reduction="none").sum(1)
    return (bits + 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1)).mean()


def variational(draw: Draw) -> Workload:
    batch, width = draw.one_of("batch", (32, 64, 128)), draw.one_of("width", (64, 128))
    activation = draw.one_of("activation", ("relu", "silu"))
    made = lambda b, g: (b[0].flatten(1), torch.randn(len(b[0]), CODE, generator=g))  # noqa: E731
    train, held = _digits(batch, 0.1, made)
    return Workload(lambda: Variational(width, activation), evidence_bound, train, held)


def diffusion(draw: Draw) -> Workload:
    """The noise in an image, given how much there is of it."""
    batch, width = draw.one_of("batch", (32, 64, 128)), draw.one_of("width", (96, 160))
    depth, activation = draw.one_of("depth", (1, 2)), draw.one_of("activation", ("silu", "relu"))

    def noisy(batch: Batch, generator: torch.Generator) -> Batch:
        image = batch[0].flatten(1)
        angle = math.pi / 2 * torch.rand(len(image), 1, generator=generator)
        noise = torch.randn(image.shape, generator=generator)
        waves = angle * torch.exp(torch.linspace(0, 3, 8))
        return torch.cat([angle.cos() * image + angle.sin() * noise, waves.sin(), waves.cos()], 1), noise

    train, held = _digits(batch, 0.05, noisy)
    return Workload(lambda: models.mlp([80, *[width] * depth, 64], activation), squared, train, held)


class Contrastive(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.temperature = models.mlp([64, width, 32], "relu"), nn.Parameter(torch.tensor(math.log(14.0)))


def agreement(model: nn.Module, batch: Batch) -> Tensor:
    """Which of the other views is of the same image, both ways; the temperature is learnt."""
    one, other = (F.normalize(model.body(view), dim=1) for view in batch)
    logits = model.temperature.exp() * one @ other.T
    same = torch.arange(len(logits))
    return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2


def contrastive(draw: Draw) -> Workload:
    batch, width = draw.one_of("batch", (32, 64, 128)), draw.one_of("width", (64, 128))

    def views(batch: Batch, generator: torch.Generator) -> Batch:
        image = batch[0].flatten(1)
        kept = torch.rand(2, *image.shape, generator=generator) > 0.3
        return image * kept[0], image * kept[1]

    train, held = _digits(batch, 0.2, views)
    return Workload(lambda: Contrastive(width), agreement, train, held)


# -- losses of several parts, and of derivatives ----------------------------------------------------------


def residual_of_poisson(model: nn.Module, batch: Batch) -> Tensor:
    """u'' = f on (0, 1) with u = 0 at the ends: the squared residual, by second derivatives of the network."""
    with torch.enable_grad():
        x = batch[0].clone().requires_grad_()
        u = model(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        return (second - batch[1]).square().mean() + 100 * model(torch.tensor([[0.0], [1.0]])).square().mean()


def physics(draw: Draw) -> Workload:
    batch, width = draw.one_of("batch", (32, 64, 128)), draw.one_of("width", (32, 48))
    depth, frequency = draw.one_of("depth", (2, 3)), draw.one_of("frequency", (1, 2, 3))

    def sampler(size: int) -> Sampler:
        def sample(generator: torch.Generator) -> Batch:
            x = torch.rand(size, 1, generator=generator)
            return x, sum(-((k * math.pi) ** 2) * torch.sin(k * math.pi * x) for k in (1, frequency))

        return sample

    made = lambda: models.mlp([1, *[width] * depth, 1], "tanh")  # noqa: E731
    return Workload(made, residual_of_poisson, sampler(batch), sampler(256))


class Heads(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = models.mlp([64, width, width], "relu")
        self.heads = nn.ModuleList(nn.Linear(width, outputs) for outputs in (10, 64, 1))


def three_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Classes, the image itself a hundred times over, and a number far from 0: gradients of very different sizes."""
    image = batch[0].flatten(1)
    features = F.relu(model.body(image))
    classes, again, number = (head(features) for head in model.heads)
    far = 0.01 * F.mse_loss(number[:, 0], 50 + 10 * batch[1].float())
    return F.cross_entropy(classes, batch[1]) + 100 * F.mse_loss(again, image) + far


def multitask(draw: Draw) -> Workload:
    batch, width = draw.one_of("batch", (16, 32, 64)), draw.one_of("width", (64, 96))
    train, held = data.digit_sampler(False, batch, 0.1), data.digit_sampler(True, 256, 0.1)
    clip = draw.one_of("clip", (None, 1.0))
    return Workload(lambda: Heads(width), three_losses, train, held, clip=clip)


# -- other networks ---------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Each row goes to one of six small networks, whichever the router likes best."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inward, self.router, self.outward = nn.Linear(64, width), nn.Linear(width, 6), nn.Linear(width, 10)
        self.experts = nn.ModuleList(models.mlp([width, width, width], "relu") for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.inward(x.flatten(1)))
        weight, chosen = self.router(hidden).softmax(1).max(1)
        moved = torch.zeros_like(hidden)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                moved = moved.index_add(0, rows, expert(hidden[rows]) * weight[rows, None])
        return self.outward(hidden + moved)


def experts(draw: Draw) -> Workload:
    batch, width, noise = draw.one_of("batch", (32, 64)), draw.one_of("width", (32, 48)), draw.between("noise", 0.3, 1)
    train, held = data.digit_sampler(False, batch, noise), data.digit_sampler(True, 256, noise)
    return Workload(lambda: Experts(width), cross_entropy, train, held)


class Binary(nn.Linear):
    """Weights and inputs are signs; gradients go past the sign."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(-1, 1)
        size = self.weight.abs().mean()
        weight = self.weight + (self.weight.sign() * size - self.weight).detach()
        return F.linear(x + (x.sign() - x).detach(), weight, self.bias)


def binary(draw: Draw) -> Workload:
    batch, width, noise = draw.one_of("batch", (32, 64)), draw.one_of("width", (96, 128)), draw.between("noise", 0.3, 1)
    train, held = data.digit_sampler(False, batch, noise), data.digit_sampler(True, 256, noise)
    norms = lambda: nn.BatchNorm1d(width)  # noqa: E731
    made = lambda: nn.Sequential(  # noqa: E731
        nn.Flatten(), nn.Linear(64, width), norms(), Binary(width, width), norms(), nn.ReLU(), nn.Linear(width, 10)
    )
    return Workload(made, cross_entropy, train, held)


class Flow(nn.Module):
    """Where a vector field takes a point: a dozen midpoint steps through it, all of them returned."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, x: Tensor) -> Tensor:
        path = []
        for _ in range(12):
            x = x + 0.15 * self.field(x + 0.075 * self.field(x))
            path.append(x)
        return torch.stack(path, 1)


def flow(draw: Draw) -> Workload:
    """The paths of a damped cubic oscillator."""
    batch, width, turn = draw.one_of("batch", (16, 32, 64)), draw.one_of("width", (32, 48)), draw.between("turn", 1, 2)
    truth = Flow(lambda x: x**3 @ torch.tensor([[-0.1, -turn], [turn, -0.1]]))  # type: ignore[arg-type]

    def sampler(size: int) -> Sampler:
        def sample(generator: torch.Generator) -> Batch:
            x = 2.4 * torch.rand(size, 2, generator=generator) - 1.2
            return x, truth(x)

        return sample

    return Workload(lambda: Flow(models.mlp([2, width, 2], "tanh")), squared, sampler(batch), sampler(256))


class Waves(nn.Module):
    """sin of a linear map of coordinates, as in implicit images; the map is trained where `trained`."""

    def __init__(self, width: int, frequency: float, trained: bool) -> None:
        super().__init__()
        self.inward = nn.Linear(2, width).requires_grad_(trained)
        nn.init.normal_(self.inward.weight, std=frequency)
        self.rest = models.mlp([width, width, width, 1], "relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(torch.sin(self.inward(x)))


def coordinates(draw: Draw) -> Workload:
    """A picture of 36 digits, point by point."""
    batch, width = draw.one_of("batch", (128, 256)), draw.one_of("width", (64, 96))
    frequency, trained = draw.between("frequency", 8, 25), draw.one_of("trained", (False, True))
    images = data.digits(False)[0][:36, 0]
    picture = torch.cat([torch.cat(list(images[row : row + 6]), 1) for row in range(0, 36, 6)])

    def sampler(size: int) -> Sampler:
        def sample(generator: torch.Generator) -> Batch:
            at = torch.randint(0, 48, (size, 2), generator=generator)
            return at / 24.0 - 1.0, picture[at[:, 0], at[:, 1]][:, None]

        return sample

    return Workload(lambda: Waves(width, frequency, trained), squared, sampler(batch), sampler(1024))


# -- few parameters ---------------------------------------------------------------------------------------


def raw_features(draw: Draw) -> Workload:
    """Logistic regression from zero on features as they come: some a thousand times as large as others."""
    batch, spread = draw.one_of("batch", (16, 64, 256)), draw.between("spread", 30, 1000)
    sizes = spread ** (torch.linspace(0, 1, 64)[torch.randperm(64, generator=seeded(draw.randrange(10**6)))])
    train, held = _digits(batch, 0.5, lambda b, g: (b[0].flatten(1) * sizes, b[1]))

    def made() -> nn.Module:
        model = nn.Linear(64, 10)
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        return model

    return Workload(made, cross_entropy, train, held)


class Tensor3(nn.Module):
    """Places [B, 3] of an array to its entries: a sum of products of three factors, held in a list."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.factors = nn.ParameterList(torch.randn(size, rank) * rank ** (-1 / 6) * 0.5 for _ in range(3))

    def forward(self, places: Tensor) -> Tensor:
        one, two, three = (factor[places[:, i]] for i, factor in enumerate(self.factors))
        return (one * two * three).sum(1)


def tensor(draw: Draw) -> Workload:
    batch, size = draw.one_of("batch", (64, 256)), draw.one_of("size", (12, 20))
    rank, seed = draw.one_of("rank", (2, 4)), draw.randrange(10**6)
    truth = torch.randn(3, size, rank, generator=seeded(seed)) / rank ** (1 / 6)

    def sampler(count: int) -> Sampler:
        def sample(generator: torch.Generator) -> Batch:
            places = torch.randint(0, size, (count, 3), generator=generator)
            entries = (truth[0, places[:, 0]] * truth[1, places[:, 1]] * truth[2, places[:, 2]]).sum(1)
            return places, entries + 0.05 * torch.randn(count, generator=generator)

        return sample

    return Workload(lambda: Tensor3(size, 2 * rank), squared, sampler(batch), sampler(1024))


OTHER_FAMILIES: dict[str, Callable[[Draw], Workload]] = {
    "variational": variational,
    "diffusion": diffusion,
    "physics": physics,
    "experts": experts,
    "multitask": multitask,
    "flow": flow,
    "contrastive": contrastive,
    "binary": binary,
    "raw features": raw_features,
    "coordinates": coordinates,
    "tensor": tensor,
}
