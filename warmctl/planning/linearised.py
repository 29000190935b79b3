"""Norms of a module's or a function's Jacobians at one batch, by products alone: attention, which has no closed form.

Dot-product attention has no Lipschitz constant, but at a given batch its Jacobian is a matrix like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from warmctl.loss.switches import MATH, NO_FASTPATH
from warmctl.planning.operator_norm import jacobian_norm
from warmctl.vectors import wide

ATTENTION = nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder, nn.TransformerDecoderLayer
"""Exactly these types."""
Place = fx.Node | str
"""An input by its node, a parameter by its name."""


def jacobian_norms(node: fx.Node, values: Mapping[fx.Node, Any], module: nn.Module | None) -> Callable[..., float]:
    """‖∂output/∂(those together)‖ of a call, as a function of the places of its inputs, or of its parameters.

    Cost: one call, and at most 100 products with the Jacobian and its adjoint, on graphs that are kept.

    Args:
        module: the one that is called; None for a function.

    Raises: NotImplementedError in words where no two calls are alike.
    """
    _alike(node, module)
    target: Any = node.target
    held = {} if module is None else {name: wide(p.detach()) for name, p in module.named_parameters()}
    given = {n: _wide(values[n]) for n in node.all_input_nodes}

    def output(tangible: dict[Place, Tensor]) -> Tensor:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: tangible.get(n, given[n]))
        if module is None:
            found = target(*args, **kwargs)
        else:
            found = functional_call(module, {name: tangible.get(name, held[name]) for name in held}, args, kwargs)
        return torch.cat([leaf.flatten() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)])

    def norm(*places: Place) -> float:
        at = [held[p] if isinstance(p, str) else given[p] for p in places]
        with MATH, NO_FASTPATH:
            return jacobian_norm(lambda x: output(dict(zip(places, x, strict=True))), at)

    return norm


def _alike(node: fx.Node, module: nn.Module | None) -> None:
    inside = [] if module is None else list(module.modules())
    rates = [
        m.p if isinstance(m, nn.Dropout) else m.dropout for m in inside if hasattr(m, "p") or hasattr(m, "dropout")
    ]
    noisy = module is not None and module.training and any(isinstance(p, float) and p > 0.0 for p in rates)
    if noisy or node.kwargs.get("dropout_p") or (len(node.args) > 4 and node.args[4]):
        raise NotImplementedError("dropout, which is on: plan in eval mode")


def _wide(value: Any) -> Any:
    return wide(value.detach()) if isinstance(value, Tensor) and value.is_floating_point() else value
