"""What the functions of a traced forward pass can do to a small change of each of their inputs."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from warmctl.planning.layers import max_pool_gain
from warmctl.planning.linearised import jacobian_norms
from warmctl.planning.operator_norm import operator_norm
from warmctl.vectors import wide


class Doubt(Exception):
    """The bound does not hold beyond this point; the words say which."""


SLOPES: dict[Any, float] = {
    **dict.fromkeys((torch.relu, F.relu, F.relu6, torch.tanh, F.tanh, F.hardtanh, F.softplus, F.softsign), 1.0),
    **{torch.sigmoid: 0.25, F.sigmoid: 0.25, F.gelu: 1.1290, F.silu: 1.0999, F.mish: 1.0885},
    **{F.softmax: 0.5, torch.softmax: 0.5, torch.masked_fill: 1.0, "masked_fill": 1.0},
    **dict.fromkeys((torch.chunk, torch.split, torch.unbind, "chunk", "split", "unbind"), 1.0),
    **dict.fromkeys(
        (torch.flatten, torch.reshape, torch.transpose, torch.permute, torch.squeeze, torch.unsqueeze), 1.0
    ),
    **dict.fromkeys((operator.neg, torch.neg), 1.0),
    **dict.fromkeys(("relu", "tanh", "flatten", "view", "reshape", "transpose", "permute", "contiguous"), 1.0),
    **{"squeeze": 1.0, "unsqueeze": 1.0, "sigmoid": 0.25, "neg": 1.0, "float": 1.0, "softmax": 0.5},
}
"""The steepest slope of functions and methods of one tensor; rounded up."""
SUMS = {operator.add, operator.iadd, torch.add, operator.sub, operator.isub, torch.sub, "add", "add_", "sub", "sub_"}
PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
QUOTIENTS = {operator.truediv, torch.div, "div"}
AVERAGES = {torch.mean, "mean"}
TOTALS = {torch.sum, "sum"}
MATRIX_PRODUCTS = {operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm"}
POOLS = {F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d}
MAX_POOLS: dict[Any, int] = {torch.nn.functional.max_pool1d: 1, torch.nn.functional.max_pool2d: 2}

Gains = dict[fx.Node, float]


def function_gains(node: fx.Node, values: Mapping[fx.Node, Any]) -> Gains:
    """‖∂output/∂input‖ for each input node that is a tensor. Raises `Doubt` for functions without a rule."""
    output, target = values[node], node.target
    sources = [n for n in node.all_input_nodes if _bends(values[n])]
    if not _bends(output):  # a shape, a number
        return {}
    if target in SLOPES:
        return dict.fromkeys(sources, SLOPES[target])
    if (rule := _RULES.get(target)) is not None:
        return rule(node, sources, values)
    where = ".".join(list(node.meta.get("nn_module_stack", {}))[-1:]) or "the model's own forward"
    raise Doubt(f"the bound does not compose through {getattr(target, '__name__', target)} in {where}")


def _bends(value: Any) -> bool:
    """Whether it is, or holds, a tensor with a derivative."""
    return any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(value))


def _spread(output: Tensor, value: Tensor) -> float:
    """The norm of broadcasting."""
    return math.sqrt(output.numel() / max(value.numel(), 1))


def _sum(node: fx.Node, sources: list[fx.Node], values: Mapping[Any, Any]) -> Gains:
    weight: Any = node.kwargs.get("alpha", 1.0)
    gains: Gains = {}
    for place, arg in enumerate(node.args):
        if isinstance(arg, fx.Node) and arg in sources:
            factor = _spread(values[node], values[arg]) * (abs(float(weight)) if place == 1 else 1.0)
            gains[arg] = gains.get(arg, 0.0) + factor
    return gains


def _product(node: fx.Node, sources: list[fx.Node], values: Mapping[Any, Any]) -> Gains:
    """Of a ⊙ b: the other factor's largest entry, with a change of one entry spread where it is broadcast."""
    gains: Gains = {}
    for arg, other in zip(node.args, reversed(node.args), strict=True):
        if isinstance(arg, fx.Node) and arg in sources:
            factor = values.get(other, other)
            largest = float(factor.abs().max()) if isinstance(factor, Tensor) else abs(float(factor))
            gains[arg] = gains.get(arg, 0.0) + largest * _spread(values[node], values[arg])
    return gains


def _quotient(node: fx.Node, sources: list[fx.Node], values: Mapping[fx.Node, Any]) -> Gains:
    by = node.args[1]
    if not isinstance(by, int | float):
        raise Doubt("the bound does not compose through a division by a tensor")
    return dict.fromkeys(sources, 1 / abs(by))


def _average(node: fx.Node, sources: list[fx.Node], values: Mapping[fx.Node, Any]) -> Gains:
    return {n: math.sqrt(values[node].numel() / values[n].numel()) for n in sources}


def _total(node: fx.Node, sources: list[fx.Node], values: Mapping[fx.Node, Any]) -> Gains:
    return {n: math.sqrt(values[n].numel() / values[node].numel()) for n in sources}


def _joined(node: fx.Node, sources: list[fx.Node], values: Mapping[fx.Node, Any]) -> Gains:
    parts = list(node.args[0])  # type: ignore[arg-type]
    return {n: math.sqrt(parts.count(n)) for n in sources}


def _part(node: fx.Node, sources: list[fx.Node], values: Mapping[fx.Node, Any]) -> Gains:
    """Indexing by numbers and slices picks each entry at most once."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not isinstance(values[sources[0]], Tensor):  # one of several outputs
        return dict.fromkeys(sources, 1.0)
    if not all(isinstance(i, int | slice | type(None) | type(...)) for i in index):
        raise Doubt("the bound does not compose through indexing by tensors")
    return dict.fromkeys(sources, 1.0)


def _matmul(node: fx.Node, sources: list[fx.Node], values: Mapping[fx.Node, Any]) -> Gains:
    """Of A B in each of the leading places: ‖B‖ for A, ‖A‖ for B, the more where one stands for several places."""
    args: Any = node.args
    if len(args) != 2 or any(not isinstance(n, fx.Node) or values[n].dim() < 2 for n in args):
        raise Doubt("the bound does not compose through a product with a vector")
    places = values[node].shape[:-2].numel()
    gains: Gains = {}
    for arg, other in (args, args[::-1]):
        if arg in sources:
            factor = float(torch.linalg.matrix_norm(wide(values[other].detach()), 2).max())
            spread = math.sqrt(places / values[arg].shape[:-2].numel())
            gains[arg] = gains.get(arg, 0.0) + factor * spread
    return gains


def _attention(node: fx.Node, sources: list[fx.Node], values: Mapping[fx.Node, Any]) -> Gains:
    try:
        norm = jacobian_norms(node, values, None)
    except NotImplementedError as error:
        raise Doubt(f"the bound does not compose through scaled_dot_product_attention with {error}") from None
    return {n: norm(n) for n in sources}


def _dropout(node: fx.Node, sources: list[fx.Node], values: Mapping[fx.Node, Any]) -> Gains:
    """Whether it is on hangs on more than the graph: taken to be on."""
    p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    return dict.fromkeys(sources, 1 / max(1 - float(p), 1e-30))  # type: ignore[arg-type]


def _pool(node: fx.Node, sources: list[fx.Node], values: Mapping[fx.Node, Any]) -> Gains:
    pool: Any = node.target
    return {n: operator_norm(lambda v: pool(v, *node.args[1:], **node.kwargs), values[n][:1]) for n in sources}


def _max_pool(node: fx.Node, sources: list[fx.Node], values: Mapping[fx.Node, Any]) -> Gains:
    target: Any = node.target
    kernel = node.args[1] if len(node.args) > 1 else node.kwargs["kernel_size"]
    stride = node.args[2] if len(node.args) > 2 else node.kwargs.get("stride")
    return dict.fromkeys(sources, max_pool_gain(kernel, stride, MAX_POOLS[target]))


_RULES: dict[Any, Callable[[fx.Node, list[fx.Node], Mapping[fx.Node, Any]], Gains]] = {
    **dict.fromkeys(SUMS, _sum),
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(QUOTIENTS, _quotient),
    **dict.fromkeys(AVERAGES, _average),
    **dict.fromkeys(TOTALS, _total),
    **dict.fromkeys(MATRIX_PRODUCTS, _matmul),
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(MAX_POOLS, _max_pool),
    operator.getitem: _part,
    torch.cat: _joined,
    F.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
}
