"""Momentum of parameter groups, by the names that optimizers give it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 0.999
"""No momentum counts for more."""


def momentum(group: Mapping[str, Any]) -> float:
    """β of the first moment: the first of `betas`, or `momentum`; 0 where a group has neither."""
    betas = group.get("betas")
    return float(betas[0] if betas is not None else group.get("momentum") or 0.0)


def persistence(groups: Sequence[Mapping[str, Any]]) -> float:
    """√((1 + β) / (1 − β)), by the largest β: how much farther steps lead that momentum makes alike.

    Steps that differ by the noise of their batches alone are a random walk. Under momentum their autocorrelation is βᵏ,
    and the root of their mean square displacement is that of independent steps of the same length times this: 4.4 at
    .9. Waits for the device where β is a tensor there.
    """
    largest = max([momentum(group) or float(group.get("beta1") or 0.0) for group in groups], default=0.0)
    beta = min(max(largest, 0.0), MOST)
    return math.sqrt((1.0 + beta) / (1.0 - beta))
