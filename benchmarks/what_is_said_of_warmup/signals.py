"""Claims 4, 5, 7 and 10: what passes through a network, forward and back, with and without warmup."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from benchmarks.tasks import models
from benchmarks.tasks.data import Batch, digit_sampler, seeded, text_sampler
from benchmarks.what_is_said_of_warmup.claim import Claim, Figures
from benchmarks.what_is_said_of_warmup.setting import ABOVE, SHARE, Setting
from warmctl import AdaptiveWarmup, BatchNormMomentum

SYMBOLS, CONTEXT = 64, 32


def transformer(post_norm: bool) -> nn.Module:
    return models.Transformer(SYMBOLS, SYMBOLS, CONTEXT, 32, 3, 4, post_norm, "gelu")


def adam(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    return Adam(parameters, rate)


def adamw(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    return AdamW(parameters, rate, betas=(0.9, 0.95), weight_decay=0.1)


TANH = Setting(
    "deep tanh",
    lambda: models.mlp([64, *[64] * 6, 10], "tanh"),
    digit_sampler(False, 32, 0.5),
    rate=0.03162,
    steps=300,
    chance=math.log(10),
)
POST_LN = Setting(
    "post-LN",
    lambda: transformer(True),
    text_sampler(False, 8, CONTEXT),
    rate=0.00316,
    steps=150,
    chance=3.14,
    optimizer=adam,
)
PRE_LN = Setting(
    "pre-LN, clipped",
    lambda: transformer(False),
    text_sampler(False, 8, CONTEXT),
    rate=0.00316,
    steps=150,
    chance=3.14,
    optimizer=adamw,
    clip=1.0,
)
CONV = Setting(
    "convolution with batch norm",
    lambda: models.conv(8, 3, "relu", "batch", pool=True),
    digit_sampler(False, 32, 0.3, field=12),
    rate=0.1,
    steps=300,
    chance=math.log(10),
)
SETTINGS = (TANH, POST_LN, PRE_LN, CONV)
BOTH = {"with": SHARE, "without": 0.0}


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))


# 4 ---------------------------------------------------------------------------------------------------------------


def saturated(model: nn.Module, x: Tensor) -> float:
    """Share of |tanh| > 0.97, over all units and the batch."""
    shares = []
    with torch.no_grad():
        for layer in model.children():
            x = layer(x)
            if isinstance(layer, nn.Tanh):
                shares.append(float((x.abs() > 0.97).float().mean()))
    return mean(shares)


def saturation(seed: int, quick: bool) -> Figures:
    """In the last tenth of the run, when the rate has been the same for long: units, and gradients first to last."""
    steps = 100 if quick else TANH.steps
    figures = {}
    for name, share in BOTH.items():
        shares, ratios = [], []

        def watch(
            step: int, model: Any, batch: Batch, shares: list[float] = shares, ratios: list[float] = ratios
        ) -> None:
            if step >= 0.9 * steps:
                shares.append(saturated(model, batch[0]))
                first, last = (gradient_norm([model[place].weight]) for place in (1, -1))
                ratios.append(math.log10(max(first, 1e-12) / max(last, 1e-12)))

        losses = TANH.train(seed, ABOVE * TANH.rate, round(share * steps), steps, watch)
        figures[f"saturated, {name}"], figures[f"gradient, {name}"] = mean(shares), mean(ratios)
        figures[f"loss, {name}"] = TANH.final(losses, steps)
    return figures


# 5 ---------------------------------------------------------------------------------------------------------------


def layer_norms(seed: int, quick: bool) -> Figures:
    """How far σ of the layer norms' inputs moves, and whether the gradients before them rise where it falls."""
    steps = 60 if quick else POST_LN.steps
    figures = {}
    for name, share in BOTH.items():
        sigmas: dict[str, list[float]] = {}
        gradients: dict[str, list[float]] = {}

        def watch(step: int, model: Any, batch: Batch, sigmas: Any = sigmas, gradients: Any = gradients) -> None:
            for place, (norm, before) in norms_of(model).items():
                gradients.setdefault(place, []).append(math.log(max(gradient_norm(before.parameters()), 1e-12)))
                if step == 0:
                    norm.register_forward_pre_hook(
                        lambda _, x, place=place: sigmas.setdefault(place, []).append(
                            math.log(float(x[0].detach().var(-1, unbiased=False).mean().sqrt()))
                        )
                    )

        POST_LN.train(seed, ABOVE * POST_LN.rate, round(share * steps), steps, watch)
        figures[f"drift, {name}"] = max(max(abs(s - line[0]) for s in line) for line in sigmas.values())
        figures[f"correlation, {name}"] = mean(
            np.corrcoef(np.diff(sigmas[place]), np.diff(gradients[place][1:]))[0, 1] for place in sigmas
        )
    return figures


def norms_of(model: Any) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Each layer norm of a post-LN transformer, with the branch whose output goes into it."""
    found: dict[str, tuple[nn.Module, nn.Module]] = {}
    for i, block in enumerate(model.blocks):
        found |= {f"{i}.1": (block.norm1, block.attention), f"{i}.2": (block.norm2, block.mlp)}
    return found


# 7 ---------------------------------------------------------------------------------------------------------------

EARLY = 60
HELD_OUT = digit_sampler(True, 360, 0.3, field=12)


def behind(model: nn.Module) -> float:
    """ln of the held-out loss with the running averages over that with the batch's own statistics, at most 5."""
    batch, other = HELD_OUT(seeded(0)), copy.deepcopy(model)
    with torch.no_grad():
        own = float(CONV.loss(other.train(), batch))
        other.load_state_dict(model.state_dict())
        running = float(CONV.loss(other.eval(), batch))
    return min(5.0, math.log(running / own))


def averages(seed: int, quick: bool) -> Figures:
    """Mean over the first steps, every fifth looked at; warmup lasts as long."""
    figures = {}
    for name, warmup in (("with", EARLY), ("without", 0)):
        gaps: list[float] = []

        def watch(step: int, model: nn.Module, batch: Batch, gaps: list[float] = gaps) -> None:
            if step % 5 == 4:
                gaps.append(behind(model))

        CONV.train(seed, ABOVE * CONV.rate, warmup, EARLY, watch)
        figures[name] = mean(gaps)
    return figures


def averages_followed(seed: int, quick: bool) -> Figures:
    """The same under AdaptiveWarmup, with the averages' momentum moving with the rate and with it as it is."""
    figures = {}
    for name in ("with", "without"):
        model, data, gaps = CONV.model(seed), seeded(seed), []
        optimizer = AdaptiveWarmup(CONV.optimizer(model.parameters(), ABOVE * CONV.rate), model)
        if name == "with":
            optimizer.follow(BatchNormMomentum(model))
        for step in range(EARLY):
            batch = CONV.sample(data)

            def closure(batch: Batch = batch, model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = CONV.loss(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure)
            if step % 5 == 4:
                gaps.append(behind(model))
        figures[name] = mean(gaps)
    return figures


# 10 --------------------------------------------------------------------------------------------------------------


def clipping(seed: int, quick: bool) -> Figures:
    """Clipped steps a hundred: of the whole run, and of what comes after the warmup."""
    steps = 60 if quick else PRE_LN.steps
    figures = {}
    for name, share in BOTH.items():
        clipped: list[float] = []

        def watch(step: int, model: nn.Module, batch: Batch, clipped: list[float] = clipped) -> None:
            clipped.append(100.0 * (gradient_norm(model.parameters()) > PRE_LN.clip))

        losses = PRE_LN.train(seed, ABOVE * PRE_LN.rate, round(share * steps), steps, watch)
        figures |= {f"all, {name}": mean(clipped), f"after, {name}": mean(clipped[round(SHARE * steps) :])}
        figures[f"loss, {name}"] = PRE_LN.final(losses, steps)
    return figures


def without_minus_with(name: str) -> Callable[[Figures], float]:
    return lambda figures: figures[f"{name}without"] - figures[f"{name}with"]


WARMED = f"three times the best plain rate, linear warmup over {SHARE:.0%} of the steps and none"
CLAIMS = (
    Claim(
        4,
        "Warmup keeps tanh units out of saturation",
        "common advice, after Glorot & Bengio 2010",
        f"six tanh layers of 64 on noisy digits, SGD momentum .9, {TANH.steps} steps, {WARMED}",
        saturation,
        without_minus_with("saturated, "),
        "share of |tanh| > .97 in the last tenth of the run, without − with",
        margin=0.05,
    ),
    Claim(
        4,
        "… and the gradients of the first layers alive",
        "common advice, after Glorot & Bengio 2010",
        "the same",
        saturation,
        lambda figures: figures["gradient, with"] - figures["gradient, without"],
        "decades of gradient norm, first layer over last, in the last tenth, with − without",
        margin=0.1,
    ),
    Claim(
        5,
        "Without warmup σ at the layer norms is thrown off",
        "Xiong et al. 2020",
        f"post-LN transformer of three blocks on text, Adam, {POST_LN.steps} steps, {WARMED}",
        layer_norms,
        without_minus_with("drift, "),
        "largest |ln σ/σ₀| of the run, without − with",
        margin=0.2,
    ),
    Claim(
        5,
        "Where a layer norm's σ falls, the gradient before it rises: the loop of a collapse",
        "Xiong et al. 2020",
        "the same, without warmup",
        layer_norms,
        lambda figures: -figures["correlation, without"],
        "−correlation of the changes of ln σ and of ln ‖g‖ of the branch before, from step to step",
        margin=0.1,
    ),
    Claim(
        7,
        "At full rate from the start batch norm's averages lag behind the weights, and evaluation with them",
        "common advice",
        f"convolution with batch norm on digits in a field, SGD momentum .9, the first {EARLY} steps at three times "
        "the best plain rate, warmup as long and none",
        averages,
        without_minus_with(""),
        "ln of held-out loss, running averages over the batch's own, without − with",
        margin=0.1,
    ),
    Claim(
        7,
        "Averages whose momentum moves with the rate lag less",
        "this library's BatchNormMomentum",
        "the same under AdaptiveWarmup, with the follower and without",
        averages_followed,
        without_minus_with(""),
        "the same, without the follower − with",
        margin=0.1,
    ),
    Claim(
        10,
        "With warmup fewer steps are clipped",
        "common advice",
        f"pre-LN transformer of three blocks on text, AdamW, clipped at 1, {PRE_LN.steps} steps, {WARMED}",
        clipping,
        without_minus_with("all, "),
        "clipped steps a hundred, without − with",
        margin=2.0,
    ),
    Claim(
        10,
        "… also after it has ended",
        "common advice",
        "the same",
        clipping,
        without_minus_with("after, "),
        "clipped steps a hundred after the warmup, without − with",
        margin=2.0,
    ),
)
