"""Rules of optimizers from other packages, found by the name of their class: nothing is imported for them.

Schedule-free (Defazio et al. 2024, arXiv 2405.15682), AdaBelief (Zhuang et al. 2020, arXiv 2010.07468), ADOPT
(Taniguchi et al. 2024, arXiv 2411.02853) and torchao's Adam in few bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from warmctl.rates import learning_rate
from warmctl.stability.rules.adaptive import RULES as ADAPTIVE
from warmctl.stability.rules.coming_step import averaged_square, betas, bias_correction, decayed, moments, weight_decay
from warmctl.stability.rules.rule import Group, Scalar, States, Tensors, UpdateRule

CHANGING = "rectify", "ams_bound", "adanorm", "adam_debias", "cautious", "stable_adamw"
"""Options of pytorch_optimizer that make another rule of one here."""


def _free_momentum(group: Group) -> float:
    return float(group["momentum"] if "momentum" in group else betas(group)[0])


def _free_edge(group: Group) -> float:
    return 2 / (1 - _free_momentum(group))


def _free_share(states: States, group: Group) -> list[Scalar]:
    """(1 − β) / (1 − β + β c / (2 − c)), c the weight of z in the average x: 1 at first, towards 0.

    The gradient is taken at y = (1 − β) z + β x. At the root −1 of z ← z − ηλy, x ← (1 − c) x + c z that leaves
    ηλ = 2 / (1 − β + βc/(2 − c)).
    """
    step, momentum = int(group["k"]) + 1, _free_momentum(group)
    rate = max(learning_rate(group) * min(step / max(int(group["warmup_steps"]), 1), 1.0), float(group["lr_max"]))
    weight = step ** float(group["r"]) * rate ** float(group["weight_lr_power"])
    total = float(group["weight_sum"]) + weight
    new = weight / total if total > 0 else 0.0
    return [(1 - momentum) / (1 - momentum + momentum * new / (2 - new))] * len(states)


def _free_adam_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """√(v / (1 − β₂ᵗ)) + ε"""
    taken, beta2 = decayed(params, grads, group, 0.0), betas(group)[1]
    square = averaged_square(moments(states, "exp_avg_sq", taken), taken, beta2)
    torch._foreach_div_(square, bias_correction(beta2, int(group["k"]) + 1))
    torch._foreach_sqrt_(square)
    torch._foreach_add_(square, float(group["eps"]))
    return square


def _free_adam_decay(group: Group) -> float:
    """Decay goes through z like a gradient and takes ηw of the edge τ itself, not half of it: 2w/τ of the usual."""
    return weight_decay(group) * 2 / _free_edge(group)


def _belief_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """√((s + ε) / (1 − β₂ᵗ)) + ε, s the average of (g − m)²"""
    taken, (beta1, beta2), eps = decayed(params, grads, group, _coupled_decay(group)), betas(group), float(group["eps"])
    mean = torch._foreach_lerp(moments(states, "exp_avg", taken), taken, 1 - beta1)
    apart = torch._foreach_sub(taken, mean)
    square = averaged_square(moments(states, "exp_avg_var", taken), apart, beta2)
    torch._foreach_add_(square, eps)
    torch._foreach_div_(square, bias_correction(beta2, int(group.get("step", 0)) + 1))
    torch._foreach_sqrt_(square)
    torch._foreach_add_(square, eps)
    return square


def _belief_share(states: States, group: Group) -> list[Scalar]:
    return [bias_correction(betas(group)[0], int(group.get("step", 0)) + 1)] * len(states)


def _adopt_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """max(√v, ε) of the steps before; the first step moves nothing. That ADOPT clips g/P is left out: r is not less."""
    if int(group.get("step", 0)) == 0:
        return [torch.full_like(p, math.inf) for p in params]
    roots = torch._foreach_sqrt(moments(states, "exp_avg_sq", list(params)))
    torch._foreach_clamp_min_(roots, float(group["eps"]))
    return list(roots)


def _coupled_decay(group: Group) -> float:
    return 0.0 if group["weight_decouple"] else weight_decay(group)


def _decoupled_decay(group: Group) -> float:
    if not group["weight_decouple"]:
        return 0.0
    rate = learning_rate(group) if group["fixed_decay"] else 1.0  # p ← (1 − w) p, whatever the rate
    return weight_decay(group) / rate if rate > 0 else 0.0


def _few_bits(of: type[Optimizer]) -> UpdateRule:
    """The rule of Adam or AdamW on moments that are stored in few bits."""
    rule = ADAPTIVE[of]
    preconditioner = rule.preconditioner
    assert preconditioner is not None

    def on_floats(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
        floats = [{k: v.dequantize() if isinstance(v, Tensor) else v for k, v in state.items()} for state in states]
        return preconditioner(params, [g.float() for g in grads], floats, group)

    return replace(rule, preconditioner=on_floats)


_ADAM = ADAPTIVE[Adam]
_SCHEDULE_FREE = UpdateRule(edge=_free_edge, momentum_share=_free_share)
_SCHEDULE_FREE_SGD = replace(_SCHEDULE_FREE, coupled_decay=weight_decay)
_SCHEDULE_FREE_ADAM = replace(
    _SCHEDULE_FREE, preconditioner=_free_adam_preconditioner, decoupled_decay=_free_adam_decay
)
_ADOPT = UpdateRule(
    edge=_ADAM.edge,
    preconditioner=_adopt_preconditioner,
    coupled_decay=_coupled_decay,
    decoupled_decay=_decoupled_decay,
)

RULES: Mapping[str, UpdateRule] = {
    "schedulefree.sgd_schedulefree.SGDScheduleFree": _SCHEDULE_FREE_SGD,
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": _SCHEDULE_FREE_ADAM,
    "pytorch_optimizer.optimizer.adabelief.AdaBelief": replace(
        _ADOPT, preconditioner=_belief_preconditioner, momentum_share=_belief_share
    ),
    "pytorch_optimizer.optimizer.adopt.ADOPT": _ADOPT,
    **{f"torchao.optim.adam.Adam{bits}": _few_bits(Adam) for bits in ("8bit", "4bit", "Fp8")},
    **{f"torchao.optim.adam.AdamW{bits}": _few_bits(AdamW) for bits in ("8bit", "4bit", "Fp8")},
}


def rule_by_name(optimizer_class: type, optimizer: Optimizer | type) -> UpdateRule | None:
    """The rule of this class, unless the optimizer was given an option that makes it another."""
    rule = RULES.get(f"{optimizer_class.__module__}.{optimizer_class.__qualname__}")
    return None if rule is None or (isinstance(optimizer, Optimizer) and _changed(optimizer)) else rule


def _changed(optimizer: Optimizer) -> bool:
    options = (group.get(option) for group in optimizer.param_groups for option in CHANGING)
    return bool(getattr(optimizer, "maximize", False)) or any(options)
