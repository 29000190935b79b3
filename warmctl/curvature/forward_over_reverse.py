"""Hv by a forward derivative of the gradient: torch.func.jvp of torch.func.grad, for blocks of vectors by vmap.

torch.func differentiates functions of their arguments; a user's loss is a function of tensors that it has hold of.
`Substitute` puts other values in the place of these while the loss is computed. Takes about 3.3 gradient evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from warmctl.loss.switches import NO_MKLDNN
from warmctl.vectors import Vector, owned

COST = 3.3
"""Gradient evaluations a product, by time, as `benchmarks/costs_what_it_says` measures them."""


def products(loss: Callable[[], Tensor], params: Sequence[Tensor], block: Vector) -> list[Vector]:
    """The product with each of the k rows of `block`, tensors of shape (k, *param.shape)."""
    at = tuple(p.detach() for p in params)

    def loss_of(values: tuple[Tensor, ...]) -> Tensor:
        with Substitute(params, values):
            return loss()

    def one(tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tangent: Any = torch.func.jvp(torch.func.grad(loss_of), (at,), (tangents,))[1]
        return tuple(t if isinstance(t, Tensor) else torch.zeros_like(p) for t, p in zip(tangent, at, strict=True))

    with NO_MKLDNN:
        if block[0].shape[0] == 1:
            return [[owned(t) for t in one(tuple(b[0] for b in block))]]
        rows = torch.func.vmap(one, randomness="same")(tuple(block))
    return [[owned(t[i]) for t in rows] for i in range(block[0].shape[0])]


class Substitute(TorchFunctionMode):
    """Runs code on other values of its parameters: a functional call without a module."""

    def __init__(self, params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        self.values = {id(p): value for p, value in zip(params, values, strict=True)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def swap(tensor: Tensor) -> Tensor:
            return self.values.get(id(tensor), tensor)

        kwargs = dict(kwargs or {})
        # torch.func forbids writing to captured tensors: leave out the records that batch norm keeps for
        # evaluation.
        if func is Tensor.add_ and args[0].dtype == torch.long and args[0].ndim == 0:  # num_batches_tracked
            return args[0]
        if func is F.batch_norm and kwargs.get("training", args[5] if len(args) > 5 else False):
            args = (args[0], None, None, *args[3:])
        if func is F.mse_loss and len(args) > 1:  # torch 2.13: its second derivative forbids a constant target
            args = (args[0], args[1] + 0 * args[0], *args[2:])
        if func is F.instance_norm and kwargs.get("use_input_stats", args[5] if len(args) > 5 else True):
            args = (args[0], None, None, *args[3:])
        return func(*tree_map_only(Tensor, swap, args), **tree_map_only(Tensor, swap, kwargs))
