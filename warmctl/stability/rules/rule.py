"""Stability threshold and diagonal preconditioner of the update that an optimizer is about to make.

With its coefficients held, an update is linear in the parameters and stable while every root of its
characteristic polynomial lies inside the unit circle. The first root to leave does so at z = −1, for every
rule here and for any mix of rates and momenta over groups. Hence one symmetric eigenvalue decides:

    stability ratio   r = λ_max(D^½ (H + c) D^½),   D = η / ((1 − ηw/2) τ P q),   stable iff r < 1

with, group by group, η the learning rate, τ the `edge` of the rule, P its `preconditioner`, c and w its
`coupled_decay` and `decoupled_decay`, q its `momentum_share`. But for ηw/2, which is small, a common
factor on the rates is a factor on r. Where all groups have the same η and w, r = 1 reads

    η·λ_max(P^-½ (H + c) P^-½) = τ (1 − ηw/2) q

and `threshold` is the right side without q. H is the Hessian of what the optimizer minimises: under
`maximize` the caller takes −H, and passes the raw gradient all the same.

Sources: Cohen et al. 2021 (arXiv 2103.00065) for momentum, Cohen et al. 2022 (arXiv 2207.14484) for Adam and
RMSprop; the rest follows from the root at z = −1 and is tested against the optimizers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
            divide_(scale, self.momentum_share(states, group))
        torch._foreach_mul_(scale, learning_rate(group) / self.edge(group))
        return scale


def divide_(tensors: list[Tensor], divisors: Sequence[Scalar]) -> None:
    """tensors[i] /= divisors[i], in place."""
    numbers = [divisor for divisor in divisors if not isinstance(divisor, Tensor)]
    if len(numbers) == len(tensors):
        torch._foreach_div_(tensors, numbers)
    else:
        for tensor, divisor in zip(tensors, divisors, strict=True):
            tensor.div_(divisor)
