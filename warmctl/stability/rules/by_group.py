"""The rule of several optimizers on one model: that of each for its own groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from warmctl.stability.rules.rule import Group, Scalar, States, Tensors, UpdateRule


@dataclass(frozen=True)
class RuleByGroup(UpdateRule):
    """One symmetric eigenvalue decides for them together, as it does for the groups of one optimizer."""

    of: Callable[[Group], UpdateRule] = field(kw_only=True)

    @classmethod
    def of_rules(cls, rules: Sequence[UpdateRule], of: Callable[[Group], UpdateRule]) -> RuleByGroup:
        """Args: of: group -> its rule, one of `rules`."""

        def preconditioner(params: Tensors, grads: Tensors, states: States, group: Group) -> list[Tensor]:
            own = of(group).preconditioner
            return [torch.ones_like(p) for p in params] if own is None else own(params, grads, states, group)

        def momentum_share(states: States, group: Group) -> list[Scalar]:
            own = of(group).momentum_share
            return [1.0] * len(states) if own is None else own(states, group)

        adaptive = any(rule.preconditioner is not None for rule in rules)
        return cls(
            edge=lambda group: of(group).edge(group),
            preconditioner=preconditioner if adaptive else None,
            momentum_share=momentum_share,
            coupled_decay=lambda group: of(group).coupled_decay(group),
            decoupled_decay=lambda group: of(group).decoupled_decay(group),
            tolerates_overshoot=all(rule.tolerates_overshoot for rule in rules),
            of=of,
        )

    def self_limiting(self, group: Group) -> bool:
        """Whether the group's own rule is."""
        return self.of(group).self_limiting(group)
