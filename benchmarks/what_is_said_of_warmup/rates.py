"""The peak rates of `problems`: the largest half decade that linear warmup bears.

python -m benchmarks.what_is_said_of_warmup.rates [NAME …]
"""

from __future__ import annotations

import sys

import torch

from benchmarks.what_is_said_of_warmup.problems import PROBLEMS
from benchmarks.what_is_said_of_warmup.training import Ascent, Problem, train
from benchmarks.what_is_said_of_warmup.transfers import TRANSFERS

ALL = PROBLEMS | TRANSFERS
SEEDS = 100, 101
WITHIN = 0.1


def scores(problem: Problem) -> dict[float, float]:
    """Mean log held-out loss of each rate."""
    linear = problem.linear(quick=False)
    return {
        lr: sum(train(problem, seed, False, linear, lr=lr).log_loss for seed in SEEDS) / len(SEEDS)
        for lr in problem.rates
    }


def radii(problem: Problem) -> dict[float, float]:
    """Mean log held-out loss of each fixed radius of sharpness-aware minimisation at the problem's rate."""
    linear = problem.linear(quick=False)
    return {
        rho: sum(train(problem, seed, False, linear, step=Ascent(rho)).log_loss for seed in SEEDS) / len(SEEDS)
        for rho in (0.05, 0.1, 0.2, 0.5, 1.0)
    }


def largest(found: dict[float, float]) -> float:
    best = min(found.values())
    return max(lr for lr, score in found.items() if score <= best + WITHIN)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ALL:
        found = scores(ALL[name])
        print(name, {lr: round(score, 3) for lr, score in found.items()}, "→", largest(found), flush=True)
        if name == "noisy labels, SAM":
            print("radii", {rho: round(score, 3) for rho, score in radii(ALL[name]).items()}, flush=True)
