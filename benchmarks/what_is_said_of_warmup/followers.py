"""What moves with the rate by `opt.follow`: each follower against none, under AdaptiveWarmup and a cosine decay.

At the problem's rate the scale is 1 almost from the start, so the same is tried at ten times it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD

from benchmarks.harness.policies import schedule
from benchmarks.harness.problems import cross_entropy
from benchmarks.what_is_said_of_warmup.claim import Claim
from benchmarks.what_is_said_of_warmup.problems import PROBLEMS, RHO, drawn, graded
from benchmarks.what_is_said_of_warmup.regimes import layers
from benchmarks.what_is_said_of_warmup.training import LOG_LOSS, MARGIN, Ascent, Run, gain, train
from benchmarks.what_is_said_of_warmup.transfers import TRANSFERS
from warmctl import (
    AdaptiveWarmup,
    BatchNormMomentum,
    Difficulty,
    Dither,
    EasyFirst,
    Momentum,
    SAMRadius,
    Unfreezing,
    WeightDecay,
)

ALL = PROBLEMS | TRANSFERS
ABOVE = {1.0: "at the rate that linear warmup bears", 10.0: "at ten times it"}
NUMBER = 20
"""Place of the followers in the table, after the claims of the sources."""


def controlled(
    name: str, above: float, seed: int, quick: bool, follower: Callable[[nn.Module], Any] | None = None, **options: Any
) -> Run:
    """Train a problem under the wrapper at `above` times its rate, with a follower that is made of the model."""
    problem = ALL[name]

    def wrap(model: nn.Module, optimizer: Any) -> AdaptiveWarmup:
        wrapped = AdaptiveWarmup(optimizer, model)
        return wrapped.follow(follower(model)) if follower else wrapped

    cosine = partial(schedule, steps=problem.length(quick))
    options = {"prepare": wrap, "lr": above * problem.lr} | options
    return train(problem, seed, quick, cosine, **options)


def sides(without: Run, followed: Run) -> dict[str, float]:
    """Log held-out losses, and the mean scale: at 1 there is nothing to follow."""
    scales = without.optimizer.history["scale"]
    return {
        "without": without.log_loss,
        "with": followed.log_loss,
        "mean scale, without": float(sum(scales) / len(scales)),
    }


def ended(name: str, follower: Callable[[], Any], above: float, seed: int, quick: bool) -> dict[str, float]:
    return sides(controlled(name, above, seed, quick), controlled(name, above, seed, quick, lambda model: follower()))


def radius(above: float, seed: int, quick: bool) -> dict[str, float]:
    run = partial(controlled, "noisy labels, SAM", above, seed, quick)
    fixed, following = Ascent(RHO), Ascent(RHO)
    return sides(run(step=fixed), run(lambda model: SAMRadius(following), step=following))


def averages(above: float, seed: int, quick: bool) -> dict[str, float]:
    """Mean of log held-out losses, every fifth step from the fifth to the fortieth of 80; however high."""
    x, y = ALL["placed, batch norm"].held(seed)
    found = {}
    for name, follower in (("without", None), ("with", BatchNormMomentum)):
        seen: list[float] = []

        def look(t: int, model: nn.Module, optimizer: Any, seen: list[float] = seen) -> None:
            if t in range(5, 41, 5):
                model.eval()
                with torch.no_grad():
                    seen.append(math.log(min(float(cross_entropy(model, (x, y))), 1e9)))
                model.train()

        controlled("placed, batch norm", above, seed, True, follower, before=look)
        found[name] = sum(seen) / len(seen)
    return found


def difficulty(above: float, seed: int, quick: bool) -> dict[str, float]:
    data, noise = graded(seed)
    sampler = EasyFirst(noise, seed)
    run = partial(controlled, "graded", above, seed, quick)
    return sides(run(), run(lambda model: Difficulty(sampler), stream=drawn(sampler, data)))


def by_layer(model: nn.Module, optimizer: Any, unfreezing: Callable[[list[nn.Module]], Unfreezing] | None) -> Any:
    """The wrapper round an optimizer that has a parameter group for each layer."""
    stages, first = layers(model), optimizer.param_groups[0]
    groups = [{"params": list(stage.parameters())} for stage in stages]
    wrapped = AdaptiveWarmup(SGD(groups, lr=first["lr"], momentum=first["momentum"]), model)
    return wrapped.follow(unfreezing(stages)) if unfreezing else wrapped


@lru_cache
def at_once(above: float, seed: int, quick: bool) -> Run:
    return controlled("new classes", above, seed, quick, prepare=partial(by_layer, unfreezing=None))


def thawing(every_third: bool, above: float, seed: int, quick: bool) -> dict[str, float]:
    every = TRANSFERS["new classes"].length(quick) // 3 if every_third else None
    prepare = partial(by_layer, unfreezing=partial(Unfreezing, every=every))
    run = controlled("new classes", above, seed, quick, prepare=prepare)
    return sides(at_once(above, seed, quick), run) | {"stage": run.optimizer.metrics["stage"]}


NOISY = "MLP on 400 digits, a fifth of the labels wrong"
THAW = "convolution net trained on digits 0–4, fresh head, 200 images of 5–9, SGD .9"
LINES: tuple[tuple[str, str, Callable[[float, int, bool], dict[str, float]], str], ...] = (
    ("SAMRadius: a radius that follows the rate", f"{NOISY}; SAM on SGD .9", radius, LOG_LOSS),
    ("BatchNormMomentum: averages that follow the rate, evaluated early",
     "residual net with batch norm on digits in a noisy field, SGD .9", averages,
     "mean log held-out loss of steps 5 to 40, without − with"),
    ('WeightDecay("compensate")', f"{NOISY}; AdamW, decay .1",
     partial(ended, "noisy labels, AdamW", partial(WeightDecay, "compensate")), LOG_LOSS),
    ('WeightDecay("delay")', f"{NOISY}; AdamW, decay .1",
     partial(ended, "noisy labels, AdamW", partial(WeightDecay, "delay")), LOG_LOSS),
    ("Difficulty: data that grow harder with the rate",
     "MLP 64-96-96-10 on digits each of its own noise, the score; SGD .9", difficulty, LOG_LOSS),
    ("Dither: a swing of the rate in place of noise", f"{NOISY}; full batch, SGD .9, period 8, amplitude .5",
     partial(ended, "noisy labels, full batch", partial(Dither, 8, 0.5)), LOG_LOSS),
    ("Momentum: from .85 up to Muon's .95", f"{NOISY}; Muon",
     partial(ended, "noisy labels, Muon", partial(Momentum, low=0.85)), LOG_LOSS),
    ("Unfreezing, the next stage at the end of warmup", THAW, partial(thawing, False),
     "log held-out loss, all at once − in stages"),
    ("Unfreezing, a stage each third of the run", THAW, partial(thawing, True),
     "log held-out loss, all at once − in stages"),
)  # fmt: skip
CLAIMS: tuple[Claim, ...] = tuple(
    Claim(
        NUMBER, f"{title}; {at}", "opt.follow", f"{problem}; AdaptiveWarmup", partial(trial, above), gain, unit, MARGIN
    )
    for above, at in ABOVE.items()
    for title, problem, trial, unit in LINES
)  # fmt: skip
