"""Claims 16 to 19: fine-tuning, thawing, curricula, and warmup beside what is said to stand in for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import nn
from torch.optim import RAdam

from benchmarks.harness.policies import schedule, seed_second_moment
from benchmarks.what_is_said_of_warmup.claim import Claim
from benchmarks.what_is_said_of_warmup.problems import PROBLEMS, drawn, graded
from benchmarks.what_is_said_of_warmup.training import LOG_LOSS, MARGIN, difference, gain, train
from benchmarks.what_is_said_of_warmup.transfers import TRANSFERS
from warmctl import EasyFirst

# 16. Fine-tuning

SHORT, LONG = 0.02, 0.3
"""Shares of the steps."""


@lru_cache
def shifted(seed: int, quick: bool) -> dict[str, float]:
    """Log held-out loss of a near and a far target, and of the source after the far one; short and long warmup."""
    found = {}
    for name, target in (("far", TRANSFERS["shifted"]), ("near", TRANSFERS["noisier"])):
        for length, share in (("short", SHORT), ("long", LONG)):
            run = train(target, seed, quick, target.linear(quick, share))
            found[f"{name}, {length}"] = run.log_loss
            if name == "far":
                found[f"source, {length}"] = PROBLEMS["placed, momentum"].held_out(run.model, seed)
    found["length matters, far"] = found["far, short"] - found["far, long"]
    found["length matters, near"] = found["near, short"] - found["near, long"]
    return found


# 17. Thawing

STAGES = 3
"""Of a convolution net of three layers: the head, the second, the first."""


def layers(model: nn.Module) -> list[nn.Module]:
    """With weights, the head first."""
    return [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))][::-1]


def thawed(seed: int, quick: bool) -> dict[str, float]:
    """All layers from the first step on, or one more each third of the run, with a linear warmup of a fifth of it."""
    problem = TRANSFERS["new classes"]
    third = problem.length(quick) // STAGES

    def thaw(t: int, model: nn.Module, optimizer: Any) -> None:
        for place, layer in enumerate(layers(model)):
            layer.requires_grad_(place <= t // third)

    def staged(t: int) -> float:
        rise = min(1.0, (t % third + 1) / (problem.warmup * third)) if t < STAGES * third else 1.0
        return rise * schedule(t, problem.length(quick))

    return {
        "without": train(problem, seed, quick, problem.linear(quick)).log_loss,
        "with": train(problem, seed, quick, staged, before=thaw).log_loss,
    }


# 18. Curriculum

EASIEST = 0.3


def curriculum(seed: int, quick: bool, difficulty: Callable[[int], float], hard_first: bool = False) -> float:
    """Log held-out loss on all data after training on the easiest `difficulty(step)` of them."""
    problem = PROBLEMS["graded"]
    data, noise = graded(seed)
    sampler = EasyFirst(-noise if hard_first else noise, seed)

    def move(t: int, model: nn.Module, optimizer: Any) -> None:
        sampler.difficulty = difficulty(t + 1)  # the batch of this step is drawn

    sampler.difficulty = difficulty(0)
    stream = drawn(sampler, data)
    return train(problem, seed, quick, problem.linear(quick), stream=stream, before=move).log_loss


@lru_cache
def curricula(seed: int, quick: bool) -> dict[str, float]:
    """Difficulty along with the rate, against it, and at other lengths; and how each correlates with the rate."""
    problem = PROBLEMS["graded"]
    steps = problem.length(quick)

    def rising(share: float) -> Callable[[int], float]:
        return lambda t: EASIEST + (1 - EASIEST) * min(1.0, (t + 1) / (share * steps))

    def falling(t: int) -> float:
        return 1.0 - (1 - EASIEST) * min(1.0, (t + 1) / (problem.warmup * steps))

    shapes = {
        "none": lambda t: 1.0, "with the rate": rising(problem.warmup), "twice as long": rising(2 * problem.warmup),
        "half as long": rising(problem.warmup / 2), "to the end": rising(1.0), "falling": falling,
    }  # fmt: skip
    found = {name: curriculum(seed, quick, shape) for name, shape in shapes.items()}
    found["hard first"] = curriculum(seed, quick, shapes["with the rate"], hard_first=True)
    linear = problem.linear(quick)
    rates = [linear(t) for t in range(steps)]
    alignments = {
        name: float(np.corrcoef(rates, [shape(t) for t in range(steps)])[0, 1])
        for name, shape in shapes.items()
        if name != "none"
    }
    found |= {f"alignment, {name}": value for name, value in alignments.items()}
    found["correlation"] = float(np.corrcoef(list(alignments.values()), [-found[name] for name in alignments])[0, 1])
    return found


# 19. Warmup, and what stands in for it


@lru_cache
def ended(name: str, policy: str, seed: int, quick: bool) -> float:
    """Log held-out loss. All but inverse root decay by a cosine to a tenth; the peak rate is the same."""
    problem = PROBLEMS[name]
    steps = problem.length(quick)
    length = round(problem.warmup * steps)
    scales: dict[str, Callable[[int], float]] = {
        "linear": problem.linear(quick),
        "exponential": lambda t: -math.expm1(-3 * (t + 1) / length) * schedule(t, steps),
        "inverse root": lambda t: min((t + 1) / length, math.sqrt(length / (t + 1))),
    }
    scale = scales.get(policy, problem.linear(quick, 0.0))
    return train(problem, seed, quick, scale, prepare=PREPARE.get(policy, as_it_is)).log_loss


def as_it_is(model: nn.Module, optimizer: Any) -> Any:
    return optimizer


def rectified(model: nn.Module, optimizer: Any) -> RAdam:
    return RAdam(model.parameters(), lr=optimizer.param_groups[0]["lr"], betas=optimizer.param_groups[0]["betas"])


def seeded_moment(model: nn.Module, optimizer: Any) -> Any:
    optimizer.register_step_pre_hook(seed_second_moment)
    return optimizer


PREPARE = {"RAdam": rectified, "v seeded": seeded_moment}


def compared(name: str, without: str, policy: str) -> Callable[[int, bool], dict[str, float]]:
    return lambda seed, quick: {
        "without": ended(name, without, seed, quick),
        "with": ended(name, policy, seed, quick),
    }


def as_good(figures: Any) -> float:
    """How far the log loss is from being worse by the margin."""
    return MARGIN + gain(figures)


def against(number: int, lines: Sequence[tuple[str, str, str, str, str]]) -> tuple[Claim, ...]:
    """Each: title, source, problem by name, policy without, policy with; the policy with is better."""
    return tuple(
        Claim(number, title, source, WORDS[name], compared(name, a, b), gain, f"log held-out loss, {a} − {b}", MARGIN)
        for title, source, name, a, b in lines
    )


def no_worse(number: int, lines: Sequence[tuple[str, str, str, str]]) -> tuple[Claim, ...]:
    """Each: title, source, problem by name, policy: it ends no more than the margin above linear warmup."""
    return tuple(
        Claim(
            number, title, source, WORDS[name], compared(name, "linear", policy), as_good,
            f"{MARGIN:g} + log held-out loss, linear − {policy}", 0.0,
        )
        for title, source, name, policy in lines
    )  # fmt: skip


WORDS = {
    "placed, SGD": "convolution net on digits in a noisy field; SGD, 200 steps",
    "placed, momentum": "convolution net on digits in a noisy field; SGD .9, 200 steps",
    "text, Adam": "post-LN transformer on program text; Adam, 200 steps",
}
FINE = "convolution net trained on placed digits, 400 target images, SGD .9, 200 steps; warmup of 2 and 30 %"
GRADED = "MLP 64-96-96-10 on digits each of its own noise, the score; SGD .9, linear warmup over 40 of 200 steps"
CLAIMS: tuple[Claim, ...] = (
    Claim(
        16, "Under a shifted source a long warmup fine-tunes better than a short one", "common advice",
        f"{FINE}; target turned by 90°", shifted, difference("far, short", "far, long"),
        "log held-out loss, short − long", MARGIN,
    ),
    Claim(
        16, "The further the shift, the more a long warmup is worth", "common advice",
        f"{FINE}; target turned by 90°, against only noisier", shifted,
        difference("length matters, far", "length matters, near"),
        "log held-out loss, short − long, far − near", MARGIN,
    ),
    Claim(
        16, "A long warmup forgets less of the source", "common advice",
        f"{FINE}; target turned by 90°", shifted, difference("source, short", "source, long"),
        "log loss on the source, short − long", MARGIN,
    ),
    Claim(
        17, "Thawing in stages, each with its warmup, fine-tunes better than all at once", "Howard & Ruder 2018",
        "convolution net trained on digits 0–4, fresh head, 200 images of 5–9, SGD .9, 200 steps", thawed, gain,
        "log held-out loss, all at once − in stages", MARGIN,
    ),
    Claim(
        18, "Data that grow harder with the rate train better than all data at once", "Bengio et al. 2009",
        GRADED, curricula, difference("none", "with the rate"), LOG_LOSS, MARGIN,
    ),
    Claim(
        18, "Easy data first is better than hard data first", "Bengio et al. 2009",
        GRADED, curricula, difference("hard first", "with the rate"), "log held-out loss, hard first − easy first",
        MARGIN,
    ),
    Claim(
        18, "The better a curriculum is aligned with the rate, the better the end", "common advice",
        f"{GRADED}; five curricula", curricula, lambda figures: figures["correlation"],
        "correlation of alignment and −log held-out loss", 0.3,
    ),
    *against(
        19,
        [
            ("SGD ends better with warmup", "Goyal et al. 2017", "placed, SGD", "none", "linear"),
            ("SGD with momentum ends better with warmup", "Goyal et al. 2017", "placed, momentum", "none", "linear"),
            ("Adam ends better with warmup", "Vaswani et al. 2017", "text, Adam", "none", "linear"),
            ("RAdam without warmup is better than Adam without", "Liu et al. 2020", "text, Adam", "none", "RAdam"),
            ("v seeded with g₀² is better than Adam without warmup", "Kalra & Barkeshli 2024", "text, Adam", "none",
             "v seeded"),
        ],
    ),
    *no_worse(
        19,
        [
            ("RAdam needs no warmup: as good as Adam with", "Liu et al. 2020", "text, Adam", "RAdam"),
            ("v seeded with g₀² needs no warmup: as good as Adam with", "Kalra & Barkeshli 2024", "text, Adam",
             "v seeded"),
            ("Exponential warmup is as good as linear", "Ma & Yarats 2021", "text, Adam", "exponential"),
            ("Inverse-root decay from warmup's end is as good as linear warmup and cosine", "Vaswani et al. 2017",
             "text, Adam", "inverse root"),
        ],
    ),
)  # fmt: skip
