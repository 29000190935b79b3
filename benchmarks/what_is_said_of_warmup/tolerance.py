"""Claims 8 and 9: how large a rate is borne, by activation and by batch size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

from torch import nn

from benchmarks.tasks import models
from benchmarks.tasks.data import digit_sampler
from benchmarks.what_is_said_of_warmup.claim import Claim, Figures
from benchmarks.what_is_said_of_warmup.setting import SHARE, Setting

# 8 ---------------------------------------------------------------------------------------------------------------


def activated(activation: Callable[[], nn.Module]) -> nn.Module:
    """Five hidden layers in He's initialisation, the same weights whatever the activation."""
    sizes = [64] * 6
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    net = nn.Sequential(*layers, nn.Linear(64, 10))
    for layer in net.children():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


RELU = Setting(
    "ReLU", lambda: activated(nn.ReLU), digit_sampler(False, 32, 0.5), rate=0.03162, steps=100, chance=math.log(10)
)
ELU = replace(RELU, name="ELU", build=lambda: activated(nn.ELU))


def borne(seed: int, quick: bool) -> Figures:
    """log10 of the largest rate of a grid at which training ends below half of chance, by activation and warmup."""
    steps, fine = (40, 2) if quick else (RELU.steps, 6)
    grid = [exponent / fine for exponent in range(-3 * fine, fine // 2 + 1)]
    figures = {}
    for setting in (RELU, ELU):
        for name, warmup in (("with", round(SHARE * steps)), ("without", 0)):
            trained = (
                log_rate
                for log_rate in reversed(grid)
                if setting.final(setting.train(seed, 10**log_rate, warmup, steps), steps) < setting.chance / 2
            )
            figures[f"{setting.name}, {name}"] = next(trained, grid[0])
    return figures


# 9 ---------------------------------------------------------------------------------------------------------------

BATCH, SCALED, FAR = 8, 8, 64


def batched(batch: int) -> Setting:
    """As many examples in all whatever the batch; the best rate is that of the smallest."""
    return Setting(
        f"batch of {batch}",
        lambda: models.mlp([144, 64, 64, 10], "relu"),
        digit_sampler(False, batch, 0.3, field=12),
        rate=0.01,
        steps=16_000 // batch,
        chance=math.log(10),
    )


def linear_scaling(seed: int, quick: bool) -> Figures:
    """Final loss: a small batch at its best rate; larger ones at rates as much larger, with and without warmup."""
    figures = {}
    for times in (1, SCALED, FAR):
        setting = batched(BATCH * times)
        steps = setting.steps // (8 if quick else 1)
        for name, warmup in (("with", round(SHARE * steps)), ("without", 0)):
            if times > 1 or not warmup:
                losses = setting.train(seed, times * setting.rate, warmup, steps)
                figures[f"{times}, {name}"] = setting.final(losses, steps)
    return figures


SETTINGS = (batched(BATCH),)
GROWN = f"two hidden layers on digits in a field, SGD momentum .9, 16 000 examples; {BATCH} at the best plain rate"
CLAIMS = (
    Claim(
        8,
        "ELU bears a larger rate than ReLU without warmup",
        "common advice, after Clevert et al. 2016",
        f"five hidden layers of 64 in He's initialisation on noisy digits, SGD momentum .9, {RELU.steps} steps; the "
        "largest rate of an sixth-decade grid that trains",
        borne,
        lambda figures: figures["ELU, without"] - figures["ReLU, without"],
        "decades of the largest rate without warmup, ELU − ReLU",
        margin=0.1,
    ),
    Claim(
        8,
        "… and gains less by warmup",
        "common advice",
        "the same, linear warmup over a fifth of the steps",
        borne,
        lambda figures: (
            figures["ReLU, with"] - figures["ReLU, without"] - figures["ELU, with"] + figures["ELU, without"]
        ),
        "decades of the largest rate, with − without, ReLU − ELU",
        margin=0.1,
    ),
    Claim(
        9,
        "At a large batch and a rate scaled with it, warmup ends lower than none",
        "Goyal et al. 2017",
        f"{GROWN}, {BATCH * SCALED} at {SCALED} times the rate",
        linear_scaling,
        lambda figures: math.log(figures[f"{SCALED}, without"] / figures[f"{SCALED}, with"]),
        "ln of the final loss, without − with",
        margin=0.05,
    ),
    Claim(
        9,
        "… and as low as the small batch",
        "Goyal et al. 2017",
        "the same",
        linear_scaling,
        lambda figures: math.log(figures["1, without"] / figures[f"{SCALED}, with"]) + 0.1,
        "0.1 + ln of the final loss, small − large with warmup",
    ),
    Claim(
        9,
        "Linear scaling ends at a wall, whatever the warmup",
        "Goyal et al. 2017; Shallue et al. 2019",
        f"{GROWN}, {BATCH * FAR} at {FAR} times the rate with warmup",
        linear_scaling,
        lambda figures: math.log(figures[f"{FAR}, with"] / figures["1, without"]),
        "ln of the final loss, large − small",
        margin=0.1,
    ),
)
