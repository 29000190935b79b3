"""Hv by a second backward pass, ∇(∇L·v), over the graph of the gradient.

The graph is built once for 1.3 gradient evaluations and serves every product at these parameters, at about 2.4 each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from warmctl.loss.backward import check_graph, check_loss, graph_nodes
from warmctl.vectors import Vector, owned

COST_GRAPH, COST = 1.3, 2.4
"""Gradient evaluations by time, of the graph and of a product, as `benchmarks/costs_what_it_says` measures them."""


def connected_gradient(loss: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """∇loss with its graph; zeros for parameters that it does not depend on."""
    check_loss(loss)
    check_graph(loss)
    if not loss.requires_grad:
        return tuple(torch.zeros_like(p) for p in params)
    gradient = torch.autograd.grad(loss, list(params), create_graph=True, allow_unused=True, materialize_grads=True)
    # autograd.grad walks round these nodes without a word: the product would be wrong, not missing.
    if any(node.name() == "torch::autograd::Error" for node in graph_nodes(gradient)):
        raise RuntimeError("a function of the model is once_differentiable: it has no second derivative")
    return gradient


def product(graph: Sequence[Tensor | GradientEdge], params: Sequence[Tensor], vector: Vector) -> Vector:
    """Hv on the graph of the gradient, given by its ends or its values; a new vector."""
    pairs = zip(graph, vector, strict=True)
    outputs = [(end, v) for end, v in pairs if isinstance(end, GradientEdge) or end.requires_grad]
    if not outputs:  # the gradient is constant
        return [torch.zeros_like(v) for v in vector]
    found = list(
        torch.autograd.grad(
            [end for end, _ in outputs],  # type: ignore[arg-type]
            list(params),
            [v for _, v in outputs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )
    for index, part in enumerate(found):  # one by one: never two vectors at once
        found[index] = owned(part)
    return found
