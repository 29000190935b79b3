"""What a gradient scaler for float16 has multiplied a loss by, read off its graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from warmctl.vectors import gathered, local

POWERS = 16.0
"""From which on a power of two is taken for a GradScaler's factor, not for a weight that the user gave the loss."""
SCALED_BACK = 1e-3
"""Relative distance from the unscaled loss's gradient, at which that of the step was scaled and scaled back."""
SUM = 2
"""Of a loss of torch.nn.functional, as its node in the graph has the reduction."""
SCALED = 4096.0
"""A loss multiplied by this or more was scaled for float16, and its gradient is scaled back before the step."""


def loss_scale(loss: Tensor) -> Tensor:
    """What a gradient scaler has multiplied `loss` by, before products with and quotients by numbers; 1 if none has.

    No device waits for it.
    """
    for index, (node, factor) in enumerate(_last_factors(loss)):
        if factor.dtype == torch.float32:  # no number of Python's
            if type(node).__name__ == "MulBackward0" and not _on_the_left(node):
                factor = factor.detach()
                power = (factor >= POWERS) & (torch.frexp(factor).mantissa == 0.5)
                return torch.where(power if index else power | (factor >= SCALED), factor, 1.0).reshape(())
            break  # what comes before a tensor is a weight of the user's: n / total
    return torch.ones(())


def weight_of(loss: Tensor) -> float:
    """What `loss` was multiplied by last: of the passes of one step, what each counts. No device waits for it.

    1 for a sum, whose own count it may have been divided by.
    """
    weight, within = 1.0, loss.grad_fn
    for node, factor in _last_factors(loss):
        if factor.device.type != "cpu":
            break
        weight *= float(factor) if type(node).__name__ == "MulBackward0" else 1.0 / (float(factor) or math.inf)
        within = node.next_functions[int(_on_the_left(node))][0]
    is_sum = type(within).__name__.startswith("Sum") or getattr(within, "_saved_reduction", None) == SUM
    return weight if 0.0 < weight < math.inf and not is_sum else 1.0


def _last_factors(loss: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """The nodes that multiply and divide `loss` by one number each before its backward pass, the last first."""
    node: Any = loss.grad_fn
    while type(node).__name__ in ("MulBackward0", "DivBackward0"):
        left = _on_the_left(node)
        factor = node._saved_self if left else node._saved_other
        if not isinstance(factor, Tensor) or factor.numel() != 1 or factor.requires_grad:
            return
        yield node, factor
        node = node.next_functions[int(left)][0]


def _on_the_left(node: Any) -> bool:
    """Whether the number is the first factor."""
    return node.next_functions[0][0] is None


def trained_on(losses: Sequence[Tensor], weights: Sequence[Tensor], scaled: bool) -> Tensor | None:
    """The loss of a step from those of its backward passes; the loss itself of one, None of none. No device waits.

    Args:
        weights: what each was multiplied by before its pass.
        scaled: a gradient scaler's factor is known to be in them. Then, and where they are as large as one, the mean of
            the losses is taken, else their weighted sum.
    """
    if len(losses) < 2:
        return losses[-1] if losses else None
    factors, values = (gathered([local(x).reshape(()) for x in numbers]) for numbers in (weights, losses))
    total, sum_of_factors = factors @ values, factors.sum()
    mean = total / sum_of_factors
    return mean if scaled else torch.where(sum_of_factors >= SCALED, mean, total)


def scaled_back(weight: float, seen: float, single: bool) -> bool:
    """Whether what had multiplied the loss was divided out of its gradient again, as by a GradScaler.

    Args:
        weight: what the loss was multiplied by.
        seen: how much of the gradient without it is in that of the step: the weight; or 1, less where it was clipped,
            anything small where other micro-batches have other gradients.
    """
    power = math.log2(weight) if weight >= POWERS else 0.5
    halfway = math.sqrt(weight) if abs(power - round(power)) < 1e-4 else 0.0
    return weight != 1.0 and ((single and abs(seen - 1.0) < SCALED_BACK) or abs(seen) < halfway)
