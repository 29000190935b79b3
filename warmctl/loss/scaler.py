"""What `torch.amp.GradScaler` leaves on the optimizer it is given, handed on to the wrapped one for one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warmctl.vectors import local


def lend_scaler(wrapper: Any, base: Any, params: list[Tensor]) -> bool:
    """Hand it on. True if the step will be skipped.

    Args:
        params: their gradients are unscaled here, as the fused kernel would: a probe needs the true ones.
    """
    scale, found_inf = wrapper.__dict__.get("grad_scale"), wrapper.__dict__.get("found_inf")
    if found_inf is None:
        return False
    base.grad_scale, base.found_inf = scale, found_inf
    if float(found_inf) != 0.0:
        return True
    grads = [local(p.grad) for p in params if p.grad is not None]
    if scale is not None and grads:
        torch._foreach_div_(grads, scale.to(grads[0].device))
        base.grad_scale = None
    return False


def take_back_scaler(base: Any) -> None:
    for name in ("grad_scale", "found_inf"):
        base.__dict__.pop(name, None)
