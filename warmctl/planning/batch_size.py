"""What a batch size asks of the rate and of the warmup. Rules of thumb of the field, in closed form.

Linear scaling: Goyal et al. 2017 (arXiv 1706.02677). It holds until the scaled rate meets the critical one, the wall.
"""

from __future__ import annotations

import math


def scaled_rate(rate: float, batch_size: float, to: float) -> float:
    """η(B) = η₀ B/B₀"""
    return rate * to / batch_size


def largest_batch(rate: float, batch_size: float, critical_rate: float) -> float:
    """B* = B₀ · critical rate / η₀: where the linearly scaled rate is the critical one."""
    return batch_size * critical_rate / rate


def second_moment_steps(beta2: float, batch_size: float, to: float, warmup_steps: float | None = None) -> int:
    """T_w(B) = (ln(B/B₀) − ln δ₀) / (−ln β₂), at least 0: steps until v has taken in all but δ₀B₀/B of E g².

    Before its bias correction v is short of E g² by the share β₂ᵗ. The larger the batch, the larger the rate and the
    smaller the shortfall that is borne.

    Args:
        warmup_steps: a warmup that is long enough at B₀: δ₀ = β₂ to that power. 2/(1 − β₂) if omitted, the untuned
            linear warmup of Ma and Yarats 2019 (arXiv 1910.04209), where δ₀ is about e⁻².
    """
    if beta2 <= 0.0:
        return 0
    steps = 2 / (1 - beta2) if warmup_steps is None else warmup_steps
    return max(math.ceil(steps + math.log(to / batch_size) / -math.log(beta2) - 1e-9), 0)
