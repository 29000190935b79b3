"""Adam on a network ten times as wide, and what its first ratio rests on."""

from __future__ import annotations

import torch

from benchmarks.edge_of_stability.monitored import back_at, monitored
from benchmarks.edge_of_stability.problem import SETTINGS, closure_for, oracle_ratio, signals, tanh_mlp
from benchmarks.harness.results import Row

WIDTH = 400
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Of the largest entry of a gradient: what is smaller is rounding, and the meter leaves such weights out."""


def wide(name: str, seed: int, steps: int) -> Row:
    """The monitored run; and the oracle's ratio at its first step without the weights that the meter leaves out."""
    setting, model, batch = SETTINGS[name], tanh_mlp(seed, WIDTH), signals(256)
    rule = setting.rule(model.parameters())
    closure_for(rule, model, batch)()
    size = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).abs()
    return monitored(setting, seed, steps, WIDTH) | {
        "without": oracle_ratio(model, batch, rule, setting.edge, least=ROUNDING),
        "left out": int((size < ROUNDING * size.max()).sum()),
        "weights": len(size),
    }


def by_oracle(run: Row) -> Row:
    """The row with the oracle's ratio for the meter's at the first step. Needs all probes in its series."""
    if run.get("diverged"):
        return run
    ratios = dict(zip(*run["series"], strict=True)) | {1: run["oracle"]["1"]}
    back = back_at(ratios) if ratios[1] > 1 else None
    return run | {"start": ratios[1], "back": back, "series": [list(ratios), list(ratios.values())]}
