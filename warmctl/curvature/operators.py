"""Products with the Hessian of a loss: one operator, three ways to the product Hv.

Each has a file of its own; a product costs, in gradient evaluations (one forward and one backward pass):

* `finite_difference`: 1, given the gradient at θ; 2 for the central difference. Works with every kernel.
* `double_backward`: about 2.4 on a graph that is kept while the operator lives.
* `forward_over_reverse`: about 3.3; takes blocks of vectors by vmap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from warmctl.curvature import double_backward, finite_difference, forward_over_reverse
from warmctl.loss.backward import twice_differentiable
from warmctl.loss.replay import Replay
from warmctl.vectors import Vector, dot, local, locals_of, owned

METHODS = ("auto", "double_backward", "forward_over_reverse", "finite_difference")


class HessianOperator:
    """The Hessian of `loss` with respect to `params`, known through its products.

    Args:
        loss: computes the scalar loss at the present parameters. Every evaluation starts from the same
            random state and leaves no trace in gradients, random streams or, if a `Replay` with a module is
            given, its buffers.
        params: parameters that require grad, at least one, real. Where the loss does not depend on one of
            them, rows and columns are zero.
        method: "double_backward", "forward_over_reverse", "finite_difference", or "auto": finite differences
            where the gradient is already there and the precision allows (they are cheapest then), double
            backward otherwise, finite differences again where the model has no second derivative.
        gradient: ∇L(θ) if the caller has it; saves the finite difference one evaluation.
        central: use the central difference: twice the cost, error O(ε²).
        inner: inner product of two vectors; over all shards where the parameters are sharded.
        step: of the finite difference, relative; `finite_difference.STEP` if omitted.

    Attributes: `method` in use, `hvps` products made, `cost` gradient evaluations spent, `fallback` the reason
        why "auto" left double backward ("" if it did not).

    Raises: ValueError for an unknown method, no parameters, or one that is given twice, frozen, complex or meta.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor] | Replay,
        params: Sequence[Tensor],
        method: str = "auto",
        *,
        gradient: Vector | None = None,
        central: bool = False,
        inner: Callable[[Vector, Vector], float] = dot,
        step: float | None = None,
    ) -> None:
        self.params = list(params)
        _check(self.params, method)
        self.replay = loss if isinstance(loss, Replay) else Replay.of_loss(loss, self.params)
        self.gradient = gradient
        self.central = central
        self.inner, self.step = inner, finite_difference.STEP if step is None else step
        self.hvps, self.cost, self.fallback = 0, 0.0, ""
        self._graph: tuple[Tensor | GradientEdge, ...] | None = None
        self._size: float | None = None
        self._may_fall_back = method == "auto"
        self.method = self._cheapest() if method == "auto" else method

    @classmethod
    def on_graph(
        cls,
        loss: Tensor,
        params: Sequence[Tensor],
        reduce: Callable[[Vector], None] | None = None,
        module: nn.Module | None = None,
        **options: Any,
    ) -> HessianOperator:
        """By double backward on a graph that is alive already: that of `loss`. Cost: as double backward.

        Args:
            reduce: called on a finished product, in place; averages over ranks, as a `Replay` does.
            module: whose buffers and modes are put back: checkpointed modules run again in each product.
        """
        operator = cls(Replay(lambda: loss, params, module, reduce=reduce), params, "double_backward", **options)
        operator._graph = double_backward.connected_gradient(loss, operator.params)
        operator.cost += 1.0
        return operator

    def graph_gradient(self, reduce: Callable[[Vector], None]) -> list[Tensor | None]:
        """The gradient of the loss given to `on_graph`, reduced; None for parameters that it does not depend on."""
        graph = [g for g in self._graph or () if isinstance(g, Tensor)]  # `on_graph` keeps the values
        gradient = [g.detach().clone() for g in graph]
        reduce(locals_of(gradient))
        return [g if of.requires_grad or bool(g.any()) else None for g, of in zip(gradient, graph, strict=True)]

    @property
    def template(self) -> Vector:
        """Tensors of the shapes, dtypes and devices of the vectors: this process's part of the parameters."""
        return locals_of(self.params)

    def matvec(self, vector: Vector, scale: Vector | None = None) -> Vector:
        """Hv, or H(scale ∘ v), a new list of tensors of the shapes of `params`.

        A finite difference never holds scale ∘ v beside its snapshot: that saves the memory of one vector.

        Cost: see the class; counted in `cost`.
        """
        self.hvps += 1
        if self.method == "finite_difference":
            precise = self._precise()
            product = self._finite_difference(vector, scale)
            if self._precise() == precise:
                return product
            # Autocast has shown itself in this first evaluation: the step was too short for it.
            if not self._may_fall_back or self.fallback:
                return self._finite_difference(vector, scale)
            self.method = "double_backward"
        vector = vector if scale is None else list(torch._foreach_mul(vector, scale))
        try:
            if self.method == "forward_over_reverse":
                return self._forward_over_reverse([v[None] for v in vector])[0]
            product = self._double_backward(vector)
            if not self._may_fall_back or math.isfinite(self.inner(product, product)):
                return product
            self._fall_back("the exact product is not finite")
        except RuntimeError as error:
            self._fall_back(error)
        return self._finite_difference(vector)

    def matmat(self, block: Vector) -> Vector:
        """Products with k vectors at once: tensors of shape (k, *param.shape) in and out."""
        if self.method == "forward_over_reverse":
            columns = self._forward_over_reverse(block)
            self.hvps += len(columns)
        else:
            columns = [self.matvec([b[i] for b in block]) for i in range(block[0].shape[0])]
        return [torch.stack([column[i] for column in columns]) for i in range(len(block))]

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """A float64 LinearOperator on flat vectors, as `scipy.sparse.linalg.eigsh` takes it."""
        template = self.template
        sizes = [t.numel() for t in template]

        def matmat(matrix: np.ndarray) -> np.ndarray:
            flat = torch.from_numpy(np.ascontiguousarray(np.atleast_2d(matrix.T), dtype=np.float64))
            parts = torch.split(flat, sizes, dim=1)
            block = [part.to(t).reshape(len(flat), *t.shape) for part, t in zip(parts, template, strict=True)]
            out = [t.flatten(1).to("cpu", torch.float64) for t in self.matmat(block)]
            result: np.ndarray = torch.cat(out, dim=1).numpy().T
            return result

        return scipy.sparse.linalg.LinearOperator(
            (sum(sizes), sum(sizes)),
            matvec=lambda vector: matmat(vector.reshape(-1, 1))[:, 0],
            matmat=matmat,
            dtype=np.float64,
        )

    def present_gradient(self) -> Vector:
        """∇L(θ), a new vector. Cost: 1; by double backward that of the graph, which the products need anyway."""
        if self.method == "double_backward" and self._graph is None:
            try:
                return self._reduced([owned(g) for g in self._build_graph()])
            except RuntimeError as error:
                self._fall_back(error)
        gradient = self._gradient()
        if self.method == "finite_difference" and not self.central:
            self.gradient = [g.clone() for g in gradient]
        return gradient

    def close(self) -> None:
        """Drop the graph and the gradient."""
        self._graph = self.gradient = None

    def __enter__(self) -> HessianOperator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _cheapest(self) -> str:
        if any(local(p) is not p for p in self.params):
            self.fallback = "the parameters are sharded"
            return "finite_difference"
        return "finite_difference" if self.gradient is not None and self._precise() else "double_backward"

    def _fall_back(self, why: str | RuntimeError) -> None:
        """To finite differences; raises the error again where the method is the caller's choice."""
        if isinstance(why, RuntimeError):
            if not self._may_fall_back:
                raise why
            why = f"{type(why).__name__}: {str(why).strip().splitlines()[0][:160]}"
        self.method, self.fallback, self._graph = "finite_difference", why, None

    def _precise(self) -> bool:
        return finite_difference.is_precise(self.replay.precision)

    def _finite_difference(self, vector: Vector, scale: Vector | None = None) -> Vector:
        if self.gradient is None and not self.central:
            self.gradient = self._gradient()
        step = self._step(vector if scale is None else list(torch._foreach_mul(vector, scale)))
        if step == 0.0 or math.isnan(step):
            return [torch.full_like(v, step) for v in vector]
        at_rest = None if self.central else self.gradient
        return finite_difference.product(self._gradient, at_rest, self.params, vector, scale, step)

    def _step(self, vector: Vector) -> float:
        length = math.sqrt(max(self.inner(vector, vector), 0.0))
        if self._size is None:  # the parameters do not move while the operator lives
            shards = [local(p.data) for p in self.params]
            self._size = math.sqrt(max(self.inner(shards, shards), 0.0) / len(shards))
        return finite_difference.step_length(self.step, length, self._size, self.replay.precision, self.central)

    def _gradient(self) -> Vector:
        self.cost += 1.0
        return self.replay.gradient()[1]

    def _build_graph(self) -> tuple[Tensor, ...]:
        """∇L(θ) with its graph, of which the ends are kept: the values need not stay in memory."""
        self.cost += double_backward.COST_GRAPH
        with self.replay.untouched():  # around both passes: checkpoints run forward passes in the second
            gradient = double_backward.connected_gradient(self.replay.bare_loss(), self.params)
        self._graph = tuple(get_gradient_edge(g) if g.requires_grad else g for g in gradient)
        return gradient

    def _double_backward(self, vector: Vector) -> Vector:
        if self._graph is None:
            self._build_graph()
        assert self._graph is not None
        self.cost += double_backward.COST
        with self.replay.untouched(), twice_differentiable():
            product = double_backward.product(self._graph, self.params, vector)
        return self._reduced(product)

    def _reduced(self, product: Vector) -> Vector:
        """The mean over ranks: autograd.grad and torch.func bypass the reducer of DDP."""
        if self.replay.reduce is not None:
            self.replay.reduce(product)
        return product

    def _forward_over_reverse(self, block: Vector) -> list[Vector]:
        self.cost += forward_over_reverse.COST * block[0].shape[0]
        with self.replay.untouched(), twice_differentiable():
            products = forward_over_reverse.products(self.replay.bare_loss, self.params, block)
        return [self._reduced(product) for product in products]


def _check(params: Sequence[Tensor], method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not params:
        raise ValueError("params is empty: give at least one parameter that requires grad")
    if len({id(p) for p in params}) < len(params):
        raise ValueError("params holds a parameter twice: give tied weights once")
    for index, p in enumerate(params):
        what = f"params[{index}] of shape {tuple(p.shape)}"
        if p.is_complex():
            raise ValueError(f"{what} is complex: curvature is defined for real parameters; use torch.view_as_real")
        if p.device.type == "meta":
            raise ValueError(f"{what} is on the meta device: materialise the model (to_empty and load) first")
        if not p.requires_grad:
            raise ValueError(f"{what} does not require grad: leave frozen parameters out")
