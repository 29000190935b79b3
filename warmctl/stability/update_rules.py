"""Stability threshold and diagonal preconditioner of the update that an optimizer is about to make.

With its coefficients held, an update is linear in the parameters and stable while every root of its
characteristic polynomial lies inside the unit circle. The first root to leave does so at z = −1, for every
rule below and for any mix of rates and momenta over groups. Hence one symmetric eigenvalue decides:

    stability ratio   r = λ_max(D^½ (H + c) D^½),   D = η / ((1 − ηw/2) τ P q),   stable iff r < 1

with, group by group, η the learning rate, τ the `edge` of the rule, P its `preconditioner`, c and w its
`coupled_decay` and `decoupled_decay`, q its `momentum_share`. But for ηw/2, which is small, a common
factor on the rates is a factor on r. Where all groups have the same η and w, r = 1 reads

    η·λ_max(P^-½ (H + c) P^-½) = τ (1 − ηw/2) q

and `threshold` is the right side without q. H is the Hessian of what the optimizer minimises: under
`maximize` the caller takes −H, and passes the raw gradient all the same.

An optimizer that is not known here has no rule (`update_rule` returns None). Rprop, Adafactor, Muon and
SparseAdam (whose moments move only in the rows in use) are left to a ratio measured along the update; LBFGS is
refused. To teach another:

    from warmctl.stability.update_rules import UpdateRule, register_update_rule, update_rule

    register_update_rule(HeavyBall, UpdateRule(edge=lambda group: 2 * (1 + group["momentum"])))

    # A subclass that overrides `step`, to log for instance, but updates as AdamW does.
    register_update_rule(LoggedAdamW, update_rule(torch.optim.AdamW))

    # schedulefree: the gradient is taken at (1 − β) z + β x, and the average x soon moves slowly.
    register_update_rule(
        SGDScheduleFree,
        UpdateRule(edge=lambda g: 2 / (1 - g["momentum"]), coupled_decay=lambda g: g["weight_decay"]),
    )

Sources: Cohen et al. 2021 (arXiv 2103.00065) for momentum, Cohen et al. 2022 (arXiv 2207.14484) for Adam and
RMSprop; the rest follows from the root at z = −1 and is tested against the optimizers themselves.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from warmctl.rates import learning_rate

Group = Mapping[str, Any]
State = Mapping[str, Any]
Tensors = Sequence[Tensor]
States = Sequence[State]
Scalar = float | Tensor
"""A number, or a 0-dim tensor that stays on its accelerator (the step counters of capturable optimizers)."""

Preconditioner = Callable[[Tensors, Tensors, States, Group], list[Tensor]]


def _nothing(group: Group) -> float:
    return 0.0


@dataclass(frozen=True)
class UpdateRule:
    """What the stability of an update depends on. Every field is a function of one parameter group.

    Args:
        edge: group -> τ > 0, the largest stable η·λ_max(P^-½HP^-½) in the long run, without weight decay.
        preconditioner: (params, grads, states, group) -> P of the coming step, of the parameters' shapes;
            `grads` as the step will see them (unscaled, clipped), `states` as the last step left them, empty
            before the first, neither to be written to. None means 1.
        momentum_share: (states, group) -> q, one a parameter: the edge of the coming step over τ. For Adam
            1 − β₁ᵗ, because bias correction makes the first step 1/(1 − β₁) times as bold. None means 1.
        coupled_decay: group -> c of L2 decay, which joins the gradient, and so the Hessian, before P.
        decoupled_decay: group -> w of decay that multiplies the parameters by 1 − ηw beside the update.
        tolerates_overshoot: a catapult undoes a step a little over the edge (SGD); an adaptive rule would
            keep an inflated second moment and stall.
    """

    edge: Callable[[Group], float]
    preconditioner: Preconditioner | None = None
    momentum_share: Callable[[States, Group], list[Scalar]] | None = None
    coupled_decay: Callable[[Group], float] = _nothing
    decoupled_decay: Callable[[Group], float] = _nothing
    tolerates_overshoot: bool = False

    def self_limiting(self, group: Group) -> bool:
        """No momentum, and a P that takes in the gradient of the coming step: no step is far larger than η."""
        return self.preconditioner is not None and not self.tolerates_overshoot and self.edge(group) <= 2.0

    def threshold(self, group: Group) -> float:
        """τ (1 − ηw/2): the edge with decoupled decay, 0 where the decay alone is unstable (ηw ≥ 2)."""
        shrinkage = learning_rate(group) * self.decoupled_decay(group)
        return self.edge(group) * max(1 - shrinkage / 2, 0.0)

    @torch.no_grad()
    def scale(self, params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
        """D = η / (τ P q) of the coming step: a new tensor for each parameter, of its shape. No gradients."""
        if not params:
            return []
        if self.preconditioner is None:
            scale = [torch.ones_like(p) for p in params]
        else:
            scale = list(torch._foreach_reciprocal(self.preconditioner(params, grads, states, group)))
        if self.momentum_share is not None:
            _divide_(scale, self.momentum_share(states, group))
        torch._foreach_mul_(scale, learning_rate(group) / self.edge(group))
        return scale


def register_update_rule(optimizer_class: type, rule: UpdateRule) -> None:
    """Use `rule` for a class and for its subclasses that keep its `step`; replaces an earlier registration.

    Raises: TypeError unless given a class and an UpdateRule.
    """
    if not isinstance(optimizer_class, type):
        raise TypeError(f"expected an optimizer class, not an instance of {type(optimizer_class).__name__}")
    if not isinstance(rule, UpdateRule):
        raise TypeError(f"expected an UpdateRule for {optimizer_class.__name__}, not {type(rule).__name__}")
    _RULES[optimizer_class] = rule


def update_rule(optimizer: torch.optim.Optimizer | type) -> UpdateRule | None:
    """The rule of an optimizer or its class, or of the base whose `step` it inherits; None if not known."""
    optimizer_class = optimizer if isinstance(optimizer, type) else type(optimizer)
    for ancestor in optimizer_class.__mro__:
        if ancestor in _RULES:
            return _RULES[ancestor] if _step_of(ancestor) is _step_of(optimizer_class) else None
    return None


def stability_threshold(optimizer: torch.optim.Optimizer) -> list[float]:
    """Largest stable η·λ_max(P^-½HP^-½) in the long run, for each parameter group with its present settings.

    2 for plain SGD, 3.8 with momentum .9, 38 for Adam; a little less with decoupled weight decay.

    Raises: ValueError if the optimizer has no registered rule.
    """
    own = getattr(optimizer, "rule", None)  # an AdaptiveWarmup's
    rule = own if isinstance(own, UpdateRule) else update_rule(optimizer)
    if rule is None:
        name = type(getattr(optimizer, "base", optimizer)).__name__
        raise ValueError(
            f"no stability threshold is known for {name}; if it has one, state it with "
            f"warmctl.register_update_rule({name}, UpdateRule(edge=lambda group: ...))"
        )
    return [rule.threshold(group) for group in optimizer.param_groups]


def _step_of(optimizer_class: type) -> object:
    # The first instance of a class makes torch wrap its `step`, inherited or not: compare what is inside.
    step: Any = getattr(optimizer_class, "step", None)
    return inspect.unwrap(step)


# Scalars and moments --------------------------------------------------------------------------------------


def _number(value: Scalar) -> Scalar:
    """A Python float, unless reading it would wait for an accelerator."""
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def _coming_steps(states: States) -> list[Scalar]:
    """Number of the coming step for each parameter, from 1."""
    return [_number(state.get("step", 0.0)) + 1 for state in states]


def _bias_correction(decay: float, step: Scalar) -> Scalar:
    return 1 - decay**step


def _divide_(tensors: list[Tensor], divisors: Sequence[Scalar]) -> None:
    """tensors[i] /= divisors[i], in place."""
    numbers = [divisor for divisor in divisors if not isinstance(divisor, Tensor)]
    if len(numbers) == len(tensors):
        torch._foreach_div_(tensors, numbers)
    else:
        for tensor, divisor in zip(tensors, divisors, strict=True):
            tensor.div_(divisor)


def _moments(states: States, name: str, like: Tensors) -> list[Tensor]:
    """A running average as the last step left it, zeros where there is none yet."""
    pairs = zip(states, like, strict=True)
    return [state[name] if name in state else torch.zeros_like(t) for state, t in pairs]


def _averaged_square(old: Tensors, grads: Tensors, decay: float) -> list[Tensor]:
    """decay·v + (1 − decay)·g²"""
    new = list(torch._foreach_mul(list(old), decay))
    torch._foreach_addcmul_(new, list(grads), list(grads), value=1 - decay)
    return new


def _decay(group: Group) -> float:
    return float(group.get("weight_decay", 0.0))


@torch.no_grad()
def _decayed(params: Tensors, grads: Tensors, group: Group, decay: float) -> list[Tensor]:
    """The gradients as the optimizer takes them: dense, negated to maximise, coupled decay added."""
    taken = [g.to_dense() if g.is_sparse else g.detach() for g in grads]
    if group.get("maximize"):
        taken = list(torch._foreach_neg(taken))
    if decay != 0:
        taken = list(torch._foreach_add(taken, list(params), alpha=decay))
    return taken


def _betas(group: Group) -> tuple[float, float]:
    beta1, beta2 = group["betas"]
    return float(beta1), float(beta2)


# Gradient descent and momentum ----------------------------------------------------------------------------


def _sgd_weight(group: Group) -> float:
    """Weight of a new gradient in the momentum buffer: 1 − dampening, which is ignored without momentum.

    Dampening 1 keeps gradients out of the buffer altogether: never unstable, kept finite here.
    """
    return max(1 - float(group["dampening"]), sys.float_info.epsilon) if group["momentum"] != 0 else 1.0


def _sgd_edge(group: Group) -> float:
    momentum, weight = float(group["momentum"]), _sgd_weight(group)
    return 2 * (1 + momentum) / (1 + momentum + momentum * weight if group["nesterov"] else weight)


def _sgd_share(states: States, group: Group) -> list[Scalar]:
    """The first gradient enters the buffer undampened."""
    first = 1.0 if group["nesterov"] else _sgd_weight(group)
    return [first if state.get("momentum_buffer") is None else 1.0 for state in states]


def _rmsprop_edge(group: Group) -> float:
    return 2 * (1 + float(group["momentum"]))


def _plain_edge(group: Group) -> float:
    return 2.0


def _asgd_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """(1 + lambd·η·t)^alpha after t steps: the step taken is η over this.

    ASGD reads that rate from its state, where the step before put it, and so obeys a new η one step late.
    Here it comes from η: had η been scaled for the step before, the rate in the state would be scaled again.
    """
    drift, alpha = float(group["lambd"]) * learning_rate(group), float(group["alpha"])
    preconditioner = [torch.ones_like(p) for p in params]
    _divide_(preconditioner, [(1 + drift * (step - 1)) ** -alpha for step in _coming_steps(states)])
    return preconditioner


def _asgd_decay(group: Group) -> float:
    """`lambd` shrinks the parameters by the very rate of the gradient step, which is L2 decay."""
    return _decay(group) + float(group["lambd"])


# Adaptive rules -------------------------------------------------------------------------------------------


def _rmsprop_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """√v + ε, or √(v − ḡ²) + ε if centered; v is not bias-corrected, so the first steps find a small P."""
    grads, alpha = _decayed(params, grads, group, _decay(group)), float(group["alpha"])
    square = _averaged_square(_moments(states, "square_avg", grads), grads, alpha)
    if group["centered"]:
        mean = torch._foreach_lerp(_moments(states, "grad_avg", grads), grads, 1 - alpha)
        torch._foreach_addcmul_(square, mean, mean, value=-1)
    torch._foreach_sqrt_(square)
    torch._foreach_add_(square, float(group["eps"]))
    return square


def _adagrad_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """(√(Σ g²) + ε) (1 + (t − 1)·lr_decay)"""
    grads = _decayed(params, grads, group, _decay(group))
    start = float(group.get("initial_accumulator_value", 0.0))
    sums = [s["sum"] if "sum" in s else torch.full_like(g, start) for s, g in zip(states, grads, strict=True)]
    total = list(torch._foreach_addcmul(sums, grads, grads))
    torch._foreach_sqrt_(total)
    torch._foreach_add_(total, float(group["eps"]))
    _divide_(total, [1 / (1 + (step - 1) * float(group["lr_decay"])) for step in _coming_steps(states)])
    return total


def _adadelta_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """√(v + ε) / √(u + ε), u the average of squared updates up to the last one"""
    grads, eps = _decayed(params, grads, group, _decay(group)), float(group["eps"])
    square = _averaged_square(_moments(states, "square_avg", grads), grads, float(group["rho"]))
    updates = list(torch._foreach_add(_moments(states, "acc_delta", grads), eps))
    torch._foreach_add_(square, eps)
    torch._foreach_div_(square, updates)
    torch._foreach_sqrt_(square)
    return square


def _adamax_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """max(β₂ u, |g| + ε)"""
    grads = _decayed(params, grads, group, _decay(group))
    size = list(torch._foreach_abs(grads))
    torch._foreach_add_(size, float(group["eps"]))
    torch._foreach_maximum_(size, torch._foreach_mul(_moments(states, "exp_inf", grads), _betas(group)[1]))
    return size


def _adam_preconditioner(
    params: Tensors, grads: Tensors, states: States, group: Group, *, decoupled: bool = False
) -> list[Tensor]:
    """√(v / (1 − β₂ᵗ)) + ε; amsgrad: the running maximum of v in its place. Adam, AdamW and NAdam."""
    grads, beta2 = _decayed(params, grads, group, _coupled_decay(group, default=decoupled)), _betas(group)[1]
    square = _averaged_square(_moments(states, "exp_avg_sq", grads), grads, beta2)
    if group.get("amsgrad"):
        torch._foreach_maximum_(square, _moments(states, "max_exp_avg_sq", grads))
    _divide_(square, [_bias_correction(beta2, step) for step in _coming_steps(states)])
    torch._foreach_sqrt_(square)
    torch._foreach_add_(square, float(group["eps"]))
    return square


def _radam_preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
    """(√v + ε) / (√(1 − β₂ᵗ) · rectification), and 1 for the first steps, which follow the bare momentum"""
    grads, beta2 = _decayed(params, grads, group, _coupled_decay(group)), _betas(group)[1]
    square = _averaged_square(_moments(states, "exp_avg_sq", grads), grads, beta2)
    torch._foreach_sqrt_(square)
    torch._foreach_add_(square, float(group["eps"]))
    return [_rectified(root, step, beta2) for root, step in zip(square, _coming_steps(states), strict=True)]


def _rectified(root: Tensor, step: Scalar, beta2: float) -> Tensor:
    """RAdam's P from √v + ε; `longest` and `length` are ρ_∞ and ρ_t of Liu et al. 2019 (arXiv 1908.03265)."""
    longest, correction = 2 / (1 - beta2) - 1, _bias_correction(beta2, step)
    length = longest - 2 * step * beta2**step / correction
    if isinstance(length, float) and length <= 5:
        return torch.ones_like(root)
    variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    rectified = root / (correction * variance) ** 0.5
    return torch.where(length > 5, rectified, 1.0) if isinstance(length, Tensor) else rectified


def _adam_edge(group: Group) -> float:
    beta1, _ = _betas(group)
    return 2 * (1 + beta1) / (1 - beta1)


def _adam_share(states: States, group: Group) -> list[Scalar]:
    """1 − β₁ᵗ: bias correction divides the rate by it (part of P in Cohen et al. 2022)"""
    beta1, _ = _betas(group)
    return [_bias_correction(beta1, step) for step in _coming_steps(states)]


def _nadam_edge(group: Group) -> float:
    beta1, _ = _betas(group)
    return 2 * (1 + beta1) / ((1 - beta1) * (1 + 2 * beta1))


def _nadam_share(states: States, group: Group) -> list[Scalar]:
    """NAdam's momentum μ grows from β₁/2 to β₁ over ten thousand steps: q = .14, .26, .36 at 1, 100, 3000.

    The step is a·g + b·m with a = (1 − μₜ)/(1 − Πμ), b = μₜ₊₁/(1 − Πμ·μₜ₊₁), products up to t; its edge is
    2(1 + β₁) / (a(1 + β₁) + b(1 − β₁)).
    """
    beta1, decay = _betas(group)[0], float(group["momentum_decay"])
    asymptotic = (1 - beta1) * (1 + 2 * beta1)
    shares: list[Scalar] = []
    for state, step in zip(states, _coming_steps(states), strict=True):
        now = beta1 * (1 - 0.5 * 0.96 ** (step * decay))
        later = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * decay))
        product = _number(state.get("mu_product", 1.0)) * now
        direct, momentum = (1 - now) / (1 - product), later / (1 - product * later)
        shares.append(asymptotic / (direct * (1 + beta1) + momentum * (1 - beta1)))
    return shares


def _coupled_decay(group: Group, default: bool = False) -> float:
    return 0.0 if group.get("decoupled_weight_decay", default) else _decay(group)


def _decoupled_decay(group: Group, default: bool = False) -> float:
    return _decay(group) - _coupled_decay(group, default)


_ADAM = UpdateRule(
    edge=_adam_edge,
    preconditioner=_adam_preconditioner,
    momentum_share=_adam_share,
    coupled_decay=_coupled_decay,
    decoupled_decay=_decoupled_decay,
)
_GRADIENT_DESCENT = UpdateRule(edge=_plain_edge, coupled_decay=_decay)

_RULES: dict[type, UpdateRule] = {
    torch.optim.SGD: replace(_GRADIENT_DESCENT, edge=_sgd_edge, momentum_share=_sgd_share, tolerates_overshoot=True),
    torch.optim.ASGD: replace(
        _GRADIENT_DESCENT,
        preconditioner=_asgd_preconditioner,
        coupled_decay=_asgd_decay,
        tolerates_overshoot=True,
    ),
    torch.optim.RMSprop: replace(_GRADIENT_DESCENT, edge=_rmsprop_edge, preconditioner=_rmsprop_preconditioner),
    torch.optim.Adagrad: replace(_GRADIENT_DESCENT, preconditioner=_adagrad_preconditioner),
    torch.optim.Adadelta: replace(_GRADIENT_DESCENT, preconditioner=_adadelta_preconditioner),
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
