"""What a gradient scaler for float16 has multiplied a loss by, read off its graph."""

from __future__ import annotations

import torch
from torch import Tensor

SCALED = 4096.0
"""A loss multiplied by this or more was scaled for float16, and its gradient is scaled back before the step."""


def loss_scale(loss: Tensor) -> Tensor:
    """What a gradient scaler has multiplied `loss` by, its last operation; 1 if none has. No device waits for it."""
    factor = getattr(loss.grad_fn, "_saved_other", None) if type(loss.grad_fn).__name__ == "MulBackward0" else None
    if not isinstance(factor, Tensor) or factor.numel() != 1:
        return torch.ones(())
    factor = factor.detach().float()
    # A GradScaler's factors are powers of two; below 16 they are taken for a weight that the user gave the loss.
    scaled = (factor >= SCALED) | ((factor >= 16.0) & (torch.frexp(factor).mantissa == 0.5))
    return torch.where(scaled, factor, 1.0).reshape(())
