"""What an optimizer makes of the coming step: D of D^½ H D^½, from its rule, its state and the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from warmctl import distributed
from warmctl.rates import learning_rate, trains
from warmctl.stability.update_rules import UpdateRule, update_rule
from warmctl.vectors import Vector, dense_gradient, local, locals_of, significant


class StepScale:
    """Args: optimizer: read only."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @cached_property
    def rule(self) -> UpdateRule | None:
        """The update rule of the optimizer; None if it has none, and then there is nothing to scale by."""
        return update_rule(self.optimizer)

    def __getstate__(self) -> dict[str, Any]:
        """Without the rule: a user's may not pickle, and that of several optimizers looks into these very ones."""
        return {name: value for name, value in self.__dict__.items() if name != "rule"}

    def scaling(self, params: Sequence[Tensor]) -> tuple[Vector, list[float], float]:
        """D^½ (zero where the coming step moves nothing), coupled weight decay per tensor, and the sign of H."""
        assert self.rule is not None
        known = {id(p): i for i, p in enumerate(params)}
        root = [torch.zeros_like(t) for t in locals_of(params)]
        shift = [0.0] * len(params)
        for group in self.optimizer.param_groups:
            members = [p for p in group["params"] if id(p) in known and p.grad is not None]
            states = [_local_state(self.optimizer.state.get(p, {})) for p in members]
            grads = [dense_gradient(p) for p in members]
            scale = self.rule.scale(locals_of(members), grads, states, group)
            # Decoupled decay takes its part of the edge: 1 − ηw/2 of it is left.
            left = max(self.rule.threshold(group) / self.rule.edge(group), 1e-6)
            for p, d in zip(members, scale, strict=True):
                root[known[id(p)]] = d.div_(left).clamp_(min=0.0).sqrt_()
                shift[known[id(p)]] = self.rule.coupled_decay(group)
        if self.rule.preconditioner is not None:
            gradient = [dense_gradient(p) for p in params]
            largest = max((float(g.abs().max()) for g in gradient if g.numel()), default=0.0)
            for r, kept in zip(root, significant(gradient, distributed.largest(largest, root[0].device)), strict=True):
                r.masked_fill_(~kept, 0.0)  # not times 0: without an eps it may be infinite there
        sign = -1.0 if self.optimizer.param_groups[0].get("maximize", False) else 1.0
        return root, shift, sign

    def momentum_share(self) -> float:
        """The least q of the parameters; D is of the coming step, whose edge is q·τ while momentum is still filling."""
        assert self.rule is not None
        shares = [1.0]
        for group in self.optimizer.param_groups:
            states = [_local_state(self.optimizer.state.get(p, {})) for p in group["params"] if p.grad is not None]
            if self.rule.momentum_share is not None:
                shares += [float(q) for q in self.rule.momentum_share(states, group)]
        return max(min(shares), 1e-6)

    def reference(self) -> tuple[float, float]:
        """Rate and threshold of the first group that trains, at a rate above 0."""
        assert self.rule is not None
        for group in self.optimizer.param_groups:
            if trains(group) and learning_rate(group) > 0:
                return learning_rate(group), self.rule.threshold(group)
        return 0.0, self.rule.threshold(self.optimizer.param_groups[0])

    def self_limiting(self) -> bool:
        """Whether the rule bounds its own steps in every group."""
        assert self.rule is not None
        return all(self.rule.self_limiting(group) for group in self.optimizer.param_groups)


def _local_state(state: dict[str, object]) -> dict[str, object]:
    return {k: local(v) if isinstance(v, Tensor) else v for k, v in state.items()}
