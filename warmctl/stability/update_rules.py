"""Which update rule an optimizer has: the table of those that are known, and how to add to it.

What a rule says, and why one eigenvalue decides, is in `rules/rule.py`; those of torch.optim and of some other packages
are beside it.

An optimizer that is not known here has no rule (`update_rule` returns None). Rprop, Adafactor, Muon and
SparseAdam (whose moments move only in the rows in use) are left to a ratio measured along the update; LBFGS is
refused. To teach another:

    from warmctl.stability.update_rules import UpdateRule, register_update_rule, update_rule

    register_update_rule(HeavyBall, UpdateRule(edge=lambda group: 2 * (1 + group["momentum"])))

    # A subclass that overrides `step`, to log for instance, but updates as AdamW does.
    register_update_rule(LoggedAdamW, update_rule(torch.optim.AdamW))
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from warmctl.chained import ChainedOptimizer
from warmctl.proxy import OptimizerProxy
from warmctl.stability.rules import adaptive, descent, third_party
from warmctl.stability.rules.by_group import RuleByGroup
from warmctl.stability.rules.rule import UpdateRule as UpdateRule

_RULES: dict[type, UpdateRule] = {**descent.RULES, **adaptive.RULES}


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
    """The rule of an optimizer or its class, or of the base whose `step` it inherits; None if not known.

    Of a chain: each group's rule is that of its member; None if one has none.
    """
    if isinstance(optimizer, ChainedOptimizer):
        return _rule_of_chain(optimizer)
    optimizer_class = optimizer if isinstance(optimizer, type) else type(optimizer)
    for ancestor in optimizer_class.__mro__:
        rule = _RULES.get(ancestor) or third_party.rule_by_name(ancestor, optimizer)
        if rule is not None:
            return rule if _step_of(ancestor) is _step_of(optimizer_class) else None
    return None


def _rule_of_chain(chain: ChainedOptimizer) -> UpdateRule | None:
    rules = [rule for member in chain.members if (rule := update_rule(member)) is not None]
    if len(rules) < len(chain.members):
        return None

    def of(group: Any) -> UpdateRule:
        return rules[chain.members.index(chain.member_of(group))]

    return RuleByGroup.of_rules(rules, of)


def stability_threshold(optimizer: torch.optim.Optimizer) -> list[float]:
    """Largest stable η·λ_max(P^-½HP^-½) in the long run, for each parameter group with its present settings.

    2 for plain SGD, 3.8 with momentum .9, 38 for Adam; a little less with decoupled weight decay.

    Raises: ValueError if the optimizer has no registered rule.
    """
    wrapped = optimizer.base if isinstance(optimizer, OptimizerProxy) else optimizer
    rule = update_rule(wrapped)
    if rule is None:
        name = type(wrapped).__name__
        raise ValueError(
            f"no stability threshold is known for {name}; if it has one, state it with "
            f"warmctl.register_update_rule({name}, UpdateRule(edge=lambda group: ...))"
        )
    return [rule.threshold(group) for group in optimizer.param_groups]


def _step_of(optimizer_class: type) -> object:
    # The first instance of a class makes torch wrap its `step`, inherited or not: compare what is inside.
    step: Any = getattr(optimizer_class, "step", None)
    return inspect.unwrap(step)
