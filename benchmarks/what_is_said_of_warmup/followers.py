"""What moves with the rate by `opt.follow`: each follower against none, under AdaptiveWarmup and a cosine decay."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from torch import nn
from torch.optim import SGD

from benchmarks.harness.policies import schedule
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
NUMBER = 20
"""Place of the followers in the table, after the claims of the sources."""


def controlled(name: str, seed: int, quick: bool, *followers: Callable[[nn.Module], Any], **options: Any) -> Run:
    """Train a problem at its rate under the wrapper, with followers that are made of the model."""
    problem = ALL[name]

    def wrap(model: nn.Module, optimizer: Any) -> AdaptiveWarmup:
        return AdaptiveWarmup(optimizer, model).follow(*(follower(model) for follower in followers))

    cosine = partial(schedule, steps=problem.length(quick))
    return train(problem, seed, quick, cosine, prepare=options.pop("prepare", wrap), **options)


def ended(name: str, follower: Callable[[], Any]) -> Callable[[int, bool], dict[str, float]]:
    """Log held-out losses."""
    return lambda seed, quick: {
        "without": controlled(name, seed, quick).log_loss,
        "with": controlled(name, seed, quick, lambda model: follower()).log_loss,
    }


def radius(seed: int, quick: bool) -> dict[str, float]:
    name = "noisy labels, SAM"
    fixed, following = Ascent(RHO), Ascent(RHO)
    return {
        "without": controlled(name, seed, quick, step=fixed).log_loss,
        "with": controlled(name, seed, quick, lambda model: SAMRadius(following), step=following).log_loss,
    }


def averages(seed: int, quick: bool) -> dict[str, float]:
    """Mean of log held-out losses, every fifth step from the fifth to the fortieth."""
    problem = PROBLEMS["placed, batch norm"]
    found = {}
    for name, followers in (("without", ()), ("with", (BatchNormMomentum,))):
        seen: list[float] = []

        def look(t: int, model: nn.Module, optimizer: Any, seen: list[float] = seen) -> None:
            if t in range(5, 41, 5):
                seen.append(problem.held_out(model, seed))

        run = controlled("placed, batch norm", seed, quick, *followers, before=look)
        found[name] = sum(seen) / len(seen)
        found[f"{name}, at the end"] = run.log_loss
    return found


def difficulty(seed: int, quick: bool) -> dict[str, float]:
    data, noise = graded(seed)
    sampler = EasyFirst(noise, seed)
    stream = drawn(sampler, data)
    return {
        "without": controlled("graded", seed, quick).log_loss,
        "with": controlled("graded", seed, quick, lambda model: Difficulty(sampler), stream=stream).log_loss,
    }


@lru_cache
def at_once(seed: int, quick: bool) -> float:
    return controlled("new classes", seed, quick, prepare=partial(by_layer, unfreezing=None)).log_loss


def by_layer(model: nn.Module, optimizer: Any, unfreezing: Callable[[list[nn.Module]], Unfreezing] | None) -> Any:
    """The wrapper round an optimizer that has a parameter group for each layer."""
    stages, first = layers(model), optimizer.param_groups[0]
    groups = [{"params": list(stage.parameters())} for stage in stages]
    wrapped = AdaptiveWarmup(SGD(groups, lr=first["lr"], momentum=first["momentum"]), model)
    return wrapped.follow(unfreezing(stages)) if unfreezing else wrapped


def thawing(every_third: bool) -> Callable[[int, bool], dict[str, float]]:
    def trial(seed: int, quick: bool) -> dict[str, float]:
        every = TRANSFERS["new classes"].length(quick) // 3 if every_third else None
        prepare = partial(by_layer, unfreezing=partial(Unfreezing, every=every))
        run = controlled("new classes", seed, quick, prepare=prepare)
        return {"without": at_once(seed, quick), "with": run.log_loss, "stage": run.optimizer.metrics["stage"]}

    return trial


NOISY = "MLP on 400 digits, a fifth of the labels wrong"
THAW = "convolution net trained on digits 0–4, fresh head, 200 images of 5–9, SGD .9"
LINES: tuple[tuple[str, str, Callable[[int, bool], dict[str, float]], str], ...] = (
    ("SAMRadius: a radius that follows the rate", f"{NOISY}; SAM on SGD .9", radius, LOG_LOSS),
    ("BatchNormMomentum: averages that follow the rate, evaluated early",
     "residual net with batch norm on digits in a noisy field, SGD .9", averages,
     "mean log held-out loss of steps 5 to 40, without − with"),
    ('WeightDecay("compensate")', f"{NOISY}; AdamW, decay .1",
     ended("noisy labels, AdamW", partial(WeightDecay, "compensate")), LOG_LOSS),
    ('WeightDecay("delay")', f"{NOISY}; AdamW, decay .1",
     ended("noisy labels, AdamW", partial(WeightDecay, "delay")), LOG_LOSS),
    ("Difficulty: data that grow harder with the rate",
     "MLP 64-96-96-10 on digits each of its own noise, the score; SGD .9", difficulty, LOG_LOSS),
    ("Dither: a swing of the rate in place of noise", f"{NOISY}; full batch, SGD .9, period 8, amplitude .5",
     ended("noisy labels, full batch", partial(Dither, 8, 0.5)), LOG_LOSS),
    ("Momentum: from .85 up to Muon's .95", f"{NOISY}; Muon",
     ended("noisy labels, Muon", partial(Momentum, low=0.85)), LOG_LOSS),
    ("Unfreezing, the next stage at the end of warmup", THAW, thawing(every_third=False),
     "log held-out loss, all at once − in stages"),
    ("Unfreezing, a stage each third of the run", THAW, thawing(every_third=True),
     "log held-out loss, all at once − in stages"),
)  # fmt: skip
CLAIMS: tuple[Claim, ...] = tuple(
    Claim(NUMBER, title, "opt.follow", f"{problem}; AdaptiveWarmup, 200 steps", trial, gain, unit, MARGIN)
    for title, problem, trial, unit in LINES
)
