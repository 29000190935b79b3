"""What a run may do about warmup: linear schedules, peers, warmctl. All but schedule-free decay by a cosine to 10 %."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from scipy.integrate import quad
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.tasks.tasks import Task
from warmctl import AdaptiveWarmup

Tick = Callable[[float], Any]  # given the loss of the step just made
Wrap = Callable[[Optimizer, nn.Module], Any]

LINEAR = {f"linear-{percent}%": percent / 100 for percent in (0, 2, 5, 10, 20, 50)}
ORACLES = {"0–20 %": tuple(LINEAR)[:5], "0–50 %": tuple(LINEAR)}
"""What people set by hand, and what may also change the shape of the schedule."""
PEERS = ("radam", "untuned", "loss-driven", "radam-schedulefree", "schedulefree")
OURS = "warmctl"
POLICIES = (*LINEAR, *PEERS, OURS)
SCHEDULE_FREE_WARMUP = 0.05  # of all steps, as in its paper
FINAL = 0.1


def applies(policy: str, optimizer: type) -> bool:
    """Whether a peer has a form for this optimizer."""
    if policy in ("radam", "untuned", "radam-schedulefree"):
        return optimizer in (Adam, AdamW)
    return policy != "schedulefree" or optimizer in (SGD, Adam, AdamW)


def cosine(step: int, steps: int) -> float:
    """From 1 at step 0 to `FINAL`."""
    return FINAL + (1 - FINAL) / 2 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


def linear(step: int, steps: int, warmup: int) -> float:
    return (step + 1) / warmup if step < warmup else cosine(step - warmup, steps - warmup)


def prepare(
    policy: str, drawn: Task, model: nn.Module, lr: float, steps: int, wrap: Wrap = AdaptiveWarmup
) -> tuple[Optimizer, Tick]:
    """The optimizer, and what to call after each of its steps. `wrap` makes the policies that are no peer's."""
    base = drawn.optimizer(model, lr)
    if policy in ("schedulefree", "radam-schedulefree"):
        free = schedule_free(base, round(SCHEDULE_FREE_WARMUP * steps), rectified=policy == "radam-schedulefree")
        free.train()
        return free, lambda loss: None
    if policy == "radam":
        base = RAdam(**like(base, "betas", "eps", "weight_decay"), decoupled_weight_decay=isinstance(base, AdamW))
    if policy == "loss-driven":
        driven = LossDriven(base, lr, steps)
        return base, driven.tick
    optimizer = base if policy in LINEAR or policy in PEERS else wrap(base, model)
    warmup = round(LINEAR.get(policy, 0.0) * steps)
    scheduler = LambdaLR(optimizer, lambda step: linear(step, steps, warmup))
    if policy == "untuned":
        from pytorch_warmup import UntunedLinearWarmup

        untuned = UntunedLinearWarmup(optimizer)  # after the scheduler: its constructor changes the rate

        def tick(loss: float) -> None:
            with untuned.dampening():
                scheduler.step()

        return optimizer, tick
    return optimizer, lambda loss: scheduler.step()


def like(base: Optimizer, *names: str) -> dict[str, Any]:
    """Arguments for another optimizer of the same parameters."""
    group = base.param_groups[0]
    return {"params": group["params"], "lr": group["lr"], **{name: group[name] for name in names}}


def schedule_free(base: Optimizer, warmup: int, rectified: bool) -> Any:
    """The schedule-free form of SGD or Adam. SGD's averages where momentum sums, so it is given lr / (1 − momentum)."""
    from schedulefree import AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree

    group = base.param_groups[0]
    if isinstance(base, SGD):
        momentum = group["momentum"] or 0.9
        lr = group["lr"] / (1 - group["momentum"])
        return SGDScheduleFree(
            group["params"], lr=lr, momentum=momentum, weight_decay=group["weight_decay"], warmup_steps=warmup
        )
    arguments = like(base, "betas", "eps", "weight_decay")
    return RAdamScheduleFree(**arguments) if rectified else AdamWScheduleFree(**arguments, warmup_steps=warmup)


class LossDriven:
    """η = Δ / (K₀ + K₁Δ + K₂Δ²) of the loss Δ above f* = 0, and the decay once Δ has passed Δ* (arXiv 2602.05813).

    The constants are set as in its published runs: η is the peak at Δ* and 1/25 of it at the first loss; Δ* is the one
    for which the mean of η over losses from 0 to the first is largest.
    """

    RISE = 25.0

    def __init__(self, optimizer: Optimizer, lr: float, steps: int) -> None:
        self.optimizer, self.lr, self.steps = optimizer, lr, steps
        self.first = math.nan
        self.made, self.passed = 0, -1
        self.set(1 / self.RISE)

    def set(self, share: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * share

    def tick(self, loss: float) -> None:
        """Sets the rate of the coming step from the loss of the last."""
        if self.made == 0:
            self.first = max(loss, 1e-12)
        self.made += 1
        turn, k0, k1, k2 = loss_law(self.RISE)
        gap = loss / self.first
        if self.passed < 0 and gap <= turn:
            self.passed = self.made
        if self.passed >= 0:
            self.set(cosine(self.made - self.passed, self.steps - self.passed))
        else:
            self.set(min(1.0, max(0.0, gap / (k0 + k1 * gap + k2 * gap * gap))))


@lru_cache
def loss_law(rise: float) -> tuple[float, float, float, float]:
    """(Δ*, K₀, K₁, K₂) for a first loss of 1 and a peak of 1."""

    def constants(turn: float) -> tuple[float, float, float]:
        k2 = (rise - 1) / (1 - turn) ** 2
        return k2 * turn**2, 1 - 2 * k2 * turn, k2

    def mean_rate(turn: float) -> float:
        k0, k1, k2 = constants(turn)
        return float(quad(lambda x: x / (k0 + k1 * x + k2 * x * x), 0.0, 1.0)[0])

    turn = max((i / 50 for i in range(1, 50)), key=mean_rate)
    return (turn, *constants(turn))
