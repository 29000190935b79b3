"""What a run may do about warmup: fixed schedules, peers, AdaptiveWarmup."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.harness.problems import Problem
from warmctl import AdaptiveWarmup

Wrap = Callable[[Optimizer, nn.Module], AdaptiveWarmup]

LINEAR = {f"linear-{percent}%": percent / 100 for percent in (1, 2, 5, 10, 20, 50)}
HAND_TUNED = ("none", *LINEAR)  # what the oracle chooses from
ADAM_ONLY = ("untuned", "radam", "seeded")
POLICIES = (*HAND_TUNED, *ADAM_ONLY, "schedulefree", "warmctl")
SCHEDULE_FREE_WARMUP = 0.05  # of all steps, as in its paper


def schedule(step: int, steps: int, warmup: int = 0) -> float:
    """Share of the peak rate at `step`, from 0 on: a linear rise over `warmup` steps, cosine decay to 0.1."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def uses_adam(problem: Problem) -> bool:
    return getattr(problem.rule, "func", problem.rule) in (Adam, AdamW)


def policies_for(problem: Problem, among: Sequence[str] = POLICIES) -> list[str]:
    return [policy for policy in among if policy not in ADAM_ONLY or uses_adam(problem)]


def prepare(
    policy: str, problem: Problem, model: nn.Module, lr: float, steps: int, wrap: Wrap = AdaptiveWarmup
) -> tuple[Optimizer, Callable]:
    """The optimizer, and what to call after each of its steps; `wrap` makes the policy "warmctl"."""
    base = problem.optimizer(model.parameters(), lr)
    if policy == "schedulefree":
        optimizer = schedule_free(base, round(SCHEDULE_FREE_WARMUP * steps))
        optimizer.train()
        return optimizer, lambda: None
    if policy == "radam":
        base = RAdam(decoupled_weight_decay=isinstance(base, AdamW), **like(base, "betas", "eps", "weight_decay"))
    if policy == "seeded":
        base.register_step_pre_hook(seed_second_moment)
    optimizer = wrap(base, model) if policy == "warmctl" else base
    warmup = round(LINEAR.get(policy, 0.0) * steps)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, steps, warmup))
    return optimizer, untuned_tick(optimizer, scheduler) if policy == "untuned" else scheduler.step


def like(base: Optimizer, *names: str) -> dict[str, Any]:
    """Arguments for another optimizer of the same parameters."""
    group = base.param_groups[0]
    return {"params": group["params"], "lr": group["lr"], **{name: group[name] for name in names}}


def seed_second_moment(adam: Optimizer, *_: object) -> None:
    """v = g₀² before Adam's first step, bias correction kept: GI-Adam of Kalra & Barkeshli, arXiv 2406.09405."""
    for group in adam.param_groups:
        for p in group["params"]:
            if p.grad is not None and not adam.state[p]:
                zero = torch.zeros_like(p)
                adam.state[p] = {"step": torch.tensor(0.0), "exp_avg": zero, "exp_avg_sq": p.grad.detach().square()}


def schedule_free(base: Optimizer, warmup: int) -> Optimizer:
    """The schedule-free form of an optimizer, with its own warmup and no decay.

    Schedule-free SGD averages where momentum sums, so it is given lr / (1 − momentum). RMSprop has no
    schedule-free form of its own; the nearest is AdamW's.
    """
    from schedulefree import AdamWScheduleFree, SGDScheduleFree

    group = base.param_groups[0]
    if isinstance(base, SGD):
        rate = group["lr"] / (1 - group["momentum"])
        return SGDScheduleFree(**like(base, "momentum", "weight_decay") | {"lr": rate}, warmup_steps=warmup)
    betas = group.get("betas", (0.9, group.get("alpha", 0.999)))
    return AdamWScheduleFree(**like(base, "eps", "weight_decay"), betas=betas, warmup_steps=warmup)


def untuned_tick(optimizer: Optimizer, scheduler: LambdaLR) -> Callable[[], None]:
    from pytorch_warmup import UntunedLinearWarmup

    warmup = UntunedLinearWarmup(optimizer)  # after the scheduler: its constructor changes the rate

    def tick() -> None:
        with warmup.dampening():
            scheduler.step()

    return tick
