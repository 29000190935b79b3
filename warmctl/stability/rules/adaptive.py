"""Rules that divide each coordinate by the size of its gradients: RMSprop, Adagrad, Adadelta and Adam's family."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from warmctl.stability.rules.coming_step import (
    averaged_square,
    betas,
    bias_correction,
    coming_steps,
    decayed,
    moments,
    numbers,
    weight_decay,
)
from warmctl.stability.rules.descent import GRADIENT_DESCENT
from warmctl.stability.rules.rule import Group, Scalar, States, Tensors, UpdateRule, divide_


def _rmsprop_edge(group: Group) -> float:
    return 2 * (1 + float(group["momentum"]))


def _rmsprop_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """√v + ε, or √(v − ḡ²) + ε if centered; v is not bias-corrected, so the first steps find a small P."""
    grads, alpha = decayed(params, grads, group, weight_decay(group)), float(group["alpha"])
    square = averaged_square(moments(states, "square_avg", grads), grads, alpha)
    if group["centered"]:
        mean = torch._foreach_lerp(moments(states, "grad_avg", grads), grads, 1 - alpha)
        torch._foreach_addcmul_(square, mean, mean, value=-1)
    torch._foreach_sqrt_(square)
    torch._foreach_add_(square, float(group["eps"]))
    return square


def _adagrad_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """(√(Σ g²) + ε) (1 + (t − 1)·lr_decay)"""
    grads = decayed(params, grads, group, weight_decay(group))
    start = float(group.get("initial_accumulator_value", 0.0))
    sums = [s["sum"] if "sum" in s else torch.full_like(g, start) for s, g in zip(states, grads, strict=True)]
    total = list(torch._foreach_addcmul(sums, grads, grads))
    torch._foreach_sqrt_(total)
    torch._foreach_add_(total, float(group["eps"]))
    divide_(total, [1 / (1 + (step - 1) * float(group["lr_decay"])) for step in coming_steps(states)])
    return total


def _adadelta_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """√(v + ε) / √(u + ε), u the average of squared updates up to the last one"""
    grads, eps = decayed(params, grads, group, weight_decay(group)), float(group["eps"])
    square = averaged_square(moments(states, "square_avg", grads), grads, float(group["rho"]))
    updates = list(torch._foreach_add(moments(states, "acc_delta", grads), eps))
    torch._foreach_add_(square, eps)
    torch._foreach_div_(square, updates)
    torch._foreach_sqrt_(square)
    return square


def _adamax_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """max(β₂ u, |g| + ε)"""
    grads = decayed(params, grads, group, weight_decay(group))
    size = list(torch._foreach_abs(grads))
    torch._foreach_add_(size, float(group["eps"]))
    torch._foreach_maximum_(size, torch._foreach_mul(moments(states, "exp_inf", grads), betas(group)[1]))
    return size


def _adam_preconditioner(
    params: Tensors, grads: Tensors, states: States, group: Group, *, decoupled: bool = False
) -> list[Tensor]:
    """√(v / (1 − β₂ᵗ)) + ε; amsgrad: the running maximum of v in its place. Adam, AdamW and NAdam."""
    grads, beta2 = decayed(params, grads, group, _coupled_decay(group, default=decoupled)), betas(group)[1]
    square = averaged_square(moments(states, "exp_avg_sq", grads), grads, beta2)
    if group.get("amsgrad"):
        torch._foreach_maximum_(square, moments(states, "max_exp_avg_sq", grads))
    divide_(square, [bias_correction(beta2, step) for step in coming_steps(states)])
    torch._foreach_sqrt_(square)
    torch._foreach_add_(square, float(group["eps"]))
    return square


def _radam_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """(√v + ε) / (√(1 − β₂ᵗ) · rectification), and 1 for the first steps, which follow the bare momentum"""
    grads, beta2 = decayed(params, grads, group, _coupled_decay(group)), betas(group)[1]
    square = averaged_square(moments(states, "exp_avg_sq", grads), grads, beta2)
    torch._foreach_sqrt_(square)
    torch._foreach_add_(square, float(group["eps"]))
    return [_rectified(root, step, beta2) for root, step in zip(square, coming_steps(states), strict=True)]


def _rectified(root: Tensor, step: Scalar, beta2: float) -> Tensor:
    """RAdam's P from √v + ε; `longest` and `length` are ρ_∞ and ρ_t of Liu et al. 2019 (arXiv 1908.03265)."""
    longest, correction = 2 / (1 - beta2) - 1, bias_correction(beta2, step)
    length = longest - 2 * step * beta2**step / correction
    if isinstance(length, float) and length <= 5:
        return torch.ones_like(root)
    variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    rectified = root / (correction * variance) ** 0.5
    return torch.where(length > 5, rectified, 1.0) if isinstance(length, Tensor) else rectified


def _adam_edge(group: Group) -> float:
    beta1, _ = betas(group)
    return 2 * (1 + beta1) / (1 - beta1)


def _adam_share(states: States, group: Group) -> list[Scalar]:
    """1 − β₁ᵗ: bias correction divides the rate by it (part of P in Cohen et al. 2022)"""
    beta1, _ = betas(group)
    return [bias_correction(beta1, step) for step in coming_steps(states)]


def _nadam_edge(group: Group) -> float:
    beta1, _ = betas(group)
    return 2 * (1 + beta1) / ((1 - beta1) * (1 + 2 * beta1))


def _nadam_share(states: States, group: Group) -> list[Scalar]:
    """NAdam's momentum μ grows from β₁/2 to β₁ over ten thousand steps: q = .14, .26, .36 at 1, 100, 3000.

    The step is a·g + b·m with a = (1 − μₜ)/(1 − Πμ), b = μₜ₊₁/(1 − Πμ·μₜ₊₁), products up to t; its edge is
    2(1 + β₁) / (a(1 + β₁) + b(1 − β₁)).
    """
    beta1, decay = betas(group)[0], float(group["momentum_decay"])
    asymptotic = (1 - beta1) * (1 + 2 * beta1)
    shares: list[Scalar] = []
    for before, step in zip(numbers(states, "mu_product", 1.0), coming_steps(states), strict=True):
        now = beta1 * (1 - 0.5 * 0.96 ** (step * decay))
        later = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * decay))
        product = before * now
        direct, momentum = (1 - now) / (1 - product), later / (1 - product * later)
        shares.append(asymptotic / (direct * (1 + beta1) + momentum * (1 - beta1)))
    return shares


def _coupled_decay(group: Group, default: bool = False) -> float:
    return 0.0 if group.get("decoupled_weight_decay", default) else weight_decay(group)


def _decoupled_decay(group: Group, default: bool = False) -> float:
    return weight_decay(group) - _coupled_decay(group, default)


_ADAM = UpdateRule(
    edge=_adam_edge,
    preconditioner=_adam_preconditioner,
    momentum_share=_adam_share,
    coupled_decay=_coupled_decay,
    decoupled_decay=_decoupled_decay,
)

RULES: dict[type, UpdateRule] = {
    torch.optim.RMSprop: replace(GRADIENT_DESCENT, edge=_rmsprop_edge, preconditioner=_rmsprop_preconditioner),
    torch.optim.Adagrad: replace(GRADIENT_DESCENT, preconditioner=_adagrad_preconditioner),
    torch.optim.Adadelta: replace(GRADIENT_DESCENT, preconditioner=_adadelta_preconditioner),
    torch.optim.Adam: _ADAM,
    # Before torch 2.7 the groups of AdamW do not say that its decay is decoupled.
    torch.optim.AdamW: replace(
        _ADAM,
        preconditioner=partial(_adam_preconditioner, decoupled=True),
        coupled_decay=partial(_coupled_decay, default=True),
        decoupled_decay=partial(_decoupled_decay, default=True),
    ),
    torch.optim.NAdam: replace(_ADAM, edge=_nadam_edge, momentum_share=_nadam_share),
    torch.optim.RAdam: replace(_ADAM, preconditioner=_radam_preconditioner),
    torch.optim.Adamax: replace(_ADAM, preconditioner=_adamax_preconditioner),
}
