"""`sharpness`: the largest eigenvalue of a model's Hessian in one line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from warmctl.curvature.eigen import EigenResult, lanczos
from warmctl.curvature.operators import HessianOperator
from warmctl.loss.random_state import RandomState, stream_put_back
from warmctl.loss.replay import Replay
from warmctl.vectors import Vector, add_, dot, locals_of

FORWARD = 1e-2
"""Tolerance from which a finite difference on one batch is the forward one: half the cost, error about 1e-3."""


def sharpness(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    *,
    tol: float = 1e-3,
    method: str = "auto",
    steps: int = 100,
    seed: int = 0,
) -> EigenResult:
    """Largest algebraic eigenvalue of the Hessian of the loss in the trainable parameters of `model`.

    The model is used in its present mode and left without a trace: parameters, gradients, buffers, random
    streams and modes stay as they are. With several batches the loss is Σ n_b L_b / Σ n_b, where n_b is the
    first dimension of the first tensor in batch b: the loss on all rows at once, if each L_b is a mean over
    rows.

    Args:
        loss_fn: loss_fn(model, batch) -> scalar tensor.
        batch: one batch (a tensor, tuple, dict or list of tensors), or several (a DataLoader, an iterator,
            or a list of tuples, lists or dicts). An iterable is read once and its batches are kept.
        tol: stops when the residual ‖Hv − λv‖ is at most `tol`·|λ|. The eigenvalue is then off by about
            `tol`² of itself where no other comes near it, by up to `tol` where one does.
        method: as in `HessianOperator`; "auto" is double backward, or finite differences where the model has
            no second derivative. These see the kinks of a piecewise linear model, which the Hessian does not
            have: on wide ReLU nets they return a multiple of its eigenvalue.
        steps: products at most, and parameter-sized vectors in memory at most.
        seed: of the random half of the start vector; the other half is the gradient, which mostly has a
            large part along the top eigenvectors.

    Returns: eigenvalue, unit eigenvector, residual, products spent, and whether the residual met `tol`. If it
    did not, a RuntimeWarning says so; the eigenvalue is then a lower bound.

    Cost: on one batch 2.4 gradient evaluations a product and 1.3 once; by differences 2 a product and 1 once,
    or 1 a product from tol=1e-2 on; on several batches 3.7 a product (2 by differences) and 1 once, with the
    graph of one batch in memory at a time. 10 to 60 products are usual for tol=1e-3, 3 to 14 for tol=0.03,
    which brings the eigenvalue to 1 % on the models of the tests.

    Raises: ValueError without trainable parameters, without batches, if the loss is not a scalar, or for a negative
    `tol`; TypeError if the loss is not a tensor, `model` no module or `loss_fn` no function.
    """
    params = _checked(model, loss_fn, tol)
    random_state = RandomState([p.device for p in params])
    batches = _read(batch, random_state) if _is_several(batch) else [(batch, 1.0)]
    losses = [
        (Replay.of_loss(partial(loss_fn, model, b), params, module=model, random_state=random_state), weight)
        for b, weight in batches
    ]
    with _WeightedSum(losses, params, method, central=len(losses) > 1 or tol < FORWARD) as operator:
        result = lanczos(operator, start=operator.gradient(), noise=1.0, steps=steps, tol=tol, seed=seed)
    if not result.converged:
        warnings.warn(
            f"sharpness did not reach tol={tol:g}: residual {result.residual:.3g} at eigenvalue "
            f"{result.eigenvalue:.6g} after {result.hvps} products; give more steps or a larger tol",
            RuntimeWarning,
            stacklevel=2,
        )
    return result


def _checked(model: nn.Module, loss_fn: Any, tol: float) -> list[Tensor]:
    """The trainable parameters; raises for arguments that cannot work."""
    if not isinstance(model, nn.Module) or not callable(loss_fn):
        given = f"{type(model).__name__} and {type(loss_fn).__name__}"
        raise TypeError(f"sharpness(model, loss_fn, batch) takes an nn.Module and loss_fn(model, batch), got {given}")
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, it is relative to the eigenvalue, got {tol!r}")
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("the model has no parameter that requires grad: there is no curvature to measure")
    return params


class _WeightedSum:
    """Σ w_b H_b. A single graph is kept between products; several are built and freed in turn."""

    def __init__(self, losses: list[tuple[Replay, float]], params: list[Tensor], method: str, central: bool) -> None:
        self.losses, self.params, self.method, self.central = losses, params, method, central
        self.inner = dot
        self.single = self._operator(losses[0][0]) if len(losses) == 1 else None

    @property
    def template(self) -> Vector:
        return locals_of(self.params)

    def matvec(self, vector: Vector) -> Vector:
        if self.single is not None:
            return self.single.matvec(vector)
        total = [torch.zeros_like(v) for v in vector]
        for loss, weight in self.losses:
            with self._operator(loss) as operator:
                add_(total, operator.matvec(vector), weight)
                self.method = operator.method  # once "auto" has fallen back it need not try again
        return total

    def gradient(self) -> Vector:
        """Σ w_b ∇L_b, a new vector."""
        if self.single is not None:
            return self.single.present_gradient()
        total = [torch.zeros_like(t) for t in self.template]
        for loss, weight in self.losses:
            add_(total, loss.gradient()[1], weight)
        return total

    def _operator(self, loss: Replay) -> HessianOperator:
        return HessianOperator(loss, self.params, self.method, central=self.central)

    def __enter__(self) -> _WeightedSum:
        return self

    def __exit__(self, *error: object) -> None:
        if self.single is not None:
            self.single.close()


def _is_several(batch: Any) -> bool:
    if isinstance(batch, list):
        return all(isinstance(item, (tuple, list, Mapping)) for item in batch)
    return isinstance(batch, Iterable) and not isinstance(batch, (Tensor, tuple, Mapping, str))


def _read(batches: Iterable[Any], random_state: RandomState) -> list[tuple[Any, float]]:
    """The batches with their share of the rows. Random numbers that a loader draws are put back."""
    with stream_put_back(batches):
        try:
            kept = list(batches)
        finally:
            random_state.restore()
    sizes = [_size(batch) for batch in kept]
    if not sum(sizes):
        raise ValueError("there are no batches to measure on: the iterable is empty (or was read before)")
    return [(batch, n / sum(sizes)) for batch, n in zip(kept, sizes, strict=True) if n]


def _size(batch: Any) -> int:
    found = rows_of(batch)
    if found is None:
        raise ValueError(
            f"a batch of several must hold a tensor, whose first dimension is its size; got {type(batch).__name__}"
        )
    return found


def rows_of(batch: Any) -> int | None:
    """First dimension of the first tensor of a batch that has one; None if there is none."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0]) if batch.ndim else None
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((n for item in items if (n := rows_of(item)) is not None), None)
