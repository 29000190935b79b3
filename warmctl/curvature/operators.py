"""Products with the Hessian of a loss, and with its scaling D^½ H D^½.

Three ways to the product Hv, by cost in gradient evaluations (one forward and one backward pass):

* finite difference, (∇L(θ + εv) − ∇L(θ)) / ε: 1, given the gradient at θ; 2 for the central difference. Works with
  every kernel, compiled or sharded; error of the top eigenvalue about 1e-3 in float32 on smooth losses.
* double backward, ∇(∇L·v): about 2.4 on a graph that is kept while the operator lives.
* forward over reverse, torch.func.jvp of torch.func.grad: about 3.3; takes blocks of vectors by vmap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from warmctl.loss.backward import check_graph, check_loss, graph_nodes, twice_differentiable
from warmctl.loss.replay import Replay
from warmctl.vectors import Vector, add_, dot, local, locals_of, scale_

METHODS = ("auto", "double_backward", "forward_over_reverse", "finite_difference")
COST_GRAPH, COST_DOUBLE_BACKWARD, COST_FORWARD_OVER_REVERSE = 1.3, 2.4, 3.3
"""Gradient evaluations by time, as `benchmarks/costs_what_it_says.py` measures them."""

FD_STEP = 1e-4
"""‖ε v‖ / max(1, ‖θ‖/√(number of tensors)) in float32; other precisions by their square root, at most 5e-3.

A step relative to the whole ‖θ‖ grows with depth and is far too long for top eigenvectors, which live in a few
tensors.
"""


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
        step: of the finite difference, relative; `FD_STEP` if omitted.

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
        self.inner, self.step = inner, FD_STEP if step is None else step
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
        **options: Any,
    ) -> HessianOperator:
        """By double backward on a graph that is alive already: that of `loss`. Cost: as double backward.

        Args:
            reduce: called on a finished product, in place; averages over ranks, as a `Replay` does.
        """
        operator = cls(Replay(lambda: loss, params, reduce=reduce), params, "double_backward", **options)
        operator._graph = _connected_gradient(loss, operator.params, create_graph=True)
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
                return self._reduced([_owned(g) for g in self._build_graph()])
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
        """Whether gradients are exact enough to be subtracted from each other."""
        return self.replay.precision <= torch.finfo(torch.float32).eps

    def _finite_difference(self, vector: Vector, scale: Vector | None = None) -> Vector:
        if self.gradient is None and not self.central:
            self.gradient = self._gradient()
        shards = [local(p.data) for p in self.params]  # .data: graphs that saved these parameters stay valid
        step = self._step(shards, vector if scale is None else list(torch._foreach_mul(vector, scale)))
        if step == 0.0 or math.isnan(step):
            return [torch.full_like(v, step) for v in vector]
        snapshot = [s.clone() for s in shards]
        try:
            _move(shards, vector, scale, step)
            difference = self._gradient()
            if self.central:
                torch._foreach_copy_(shards, snapshot)
                _move(shards, vector, scale, -step)
                return scale_(add_(difference, self._gradient(), -1.0), 0.5 / step)
            assert self.gradient is not None
            return scale_(add_(difference, self.gradient, -1.0), 1.0 / step)
        finally:
            torch._foreach_copy_(shards, snapshot)  # copied back, never subtracted: bit for bit

    def _step(self, shards: Vector, vector: Vector) -> float:
        """ε such that ‖εv‖ is FD_STEP·max(1, root mean square of the tensors' norms), in float32.

        Three times that for the central difference, whose error is of second order.
        """
        length = math.sqrt(max(self.inner(vector, vector), 0.0))
        if self._size is None:  # the parameters do not move while the operator lives
            self._size = math.sqrt(max(self.inner(shards, shards), 0.0) / len(shards))
        precision = self.replay.precision / torch.finfo(torch.float32).eps
        step = min(self.step * math.sqrt(precision), 5e-3) * max(1.0, self._size) * (3.0 if self.central else 1.0)
        if length == 0.0:
            return 0.0
        return step / length if math.isfinite(length) else math.nan

    def _gradient(self) -> Vector:
        self.cost += 1.0
        return self.replay.gradient()[1]

    def _build_graph(self) -> tuple[Tensor, ...]:
        """∇L(θ) with its graph, of which the ends are kept: the values need not stay in memory."""
        self.cost += COST_GRAPH
        with self.replay.untouched():  # around both passes: checkpoints run forward passes in the second
            gradient = _connected_gradient(self.replay.bare_loss(), self.params, create_graph=True)
        self._graph = tuple(get_gradient_edge(g) if g.requires_grad else g for g in gradient)
        return gradient

    def _double_backward(self, vector: Vector) -> Vector:
        if self._graph is None:
            self._build_graph()
        assert self._graph is not None
        self.cost += COST_DOUBLE_BACKWARD
        ends = zip(self._graph, vector, strict=True)
        outputs = [(end, v) for end, v in ends if isinstance(end, GradientEdge) or end.requires_grad]
        if not outputs:  # the gradient is constant
            return [torch.zeros_like(v) for v in vector]
        with self.replay.untouched(), twice_differentiable():
            product = list(
                torch.autograd.grad(
                    [end for end, _ in outputs],  # type: ignore[arg-type]
                    self.params,
                    [v for _, v in outputs],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
            )
        for index, part in enumerate(product):  # one by one: never two vectors at once
            product[index] = _owned(part)
        return self._reduced(product)

    def _reduced(self, product: Vector) -> Vector:
        """The mean over ranks: autograd.grad and torch.func bypass the reducer of DDP."""
        if self.replay.reduce is not None:
            self.replay.reduce(product)
        return product

    def _forward_over_reverse(self, block: Vector) -> list[Vector]:
        """One vector for each of the k rows of `block`, tensors of shape (k, *param.shape)."""
        self.cost += COST_FORWARD_OVER_REVERSE * block[0].shape[0]
        params = tuple(p.detach() for p in self.params)

        def loss(values: tuple[Tensor, ...]) -> Tensor:
            with Substitute(self.params, values):
                return self.replay.bare_loss()

        def product(tangents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tangent: Any = torch.func.jvp(torch.func.grad(loss), (params,), (tangents,))[1]
            return tuple(
                t if isinstance(t, Tensor) else torch.zeros_like(p) for t, p in zip(tangent, params, strict=True)
            )

        with self.replay.untouched(), twice_differentiable(), _without_mkldnn():
            if block[0].shape[0] == 1:
                return [self._reduced([_owned(t) for t in product(tuple(b[0] for b in block))])]
            rows = torch.func.vmap(product, randomness="same")(tuple(block))
        return [self._reduced([_owned(t[i]) for t in rows]) for i in range(block[0].shape[0])]


class ScaledOperator:
    """D^½ A D^½ for a diagonal D ≥ 0, plus an optional diagonal shift inside: D^½ (±A + diag(shift)) D^½.

    It is symmetric and has the spectrum of D·A, which is not.

    Args:
        root: D^½, one tensor per parameter.
        shift: the coupled weight decay of each tensor, which joins the Hessian.
        sign: −1 where the optimizer maximises.
    """

    def __init__(self, operator: HessianOperator, root: Vector, shift: Sequence[float] = (), sign: float = 1.0) -> None:
        self.operator, self.root, self.sign = operator, root, sign
        self.shift = list(shift) or [0.0] * len(root)

    @property
    def template(self) -> Vector:
        return self.root

    def inner(self, a: Vector, b: Vector) -> float:
        return self.operator.inner(a, b)

    def matvec(self, vector: Vector) -> Vector:
        if not vector:
            return []
        product = self.operator.matvec(vector, self.root)
        if self.sign != 1.0:
            scale_(product, self.sign)
        if any(self.shift):
            direction = torch._foreach_mul(vector, self.root)
            torch._foreach_mul_(direction, self.shift)
            torch._foreach_add_(product, direction)
        torch._foreach_mul_(product, self.root)
        return product


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


def _connected_gradient(loss: Tensor, params: Sequence[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    """∇loss with zeros for parameters that it does not depend on."""
    check_loss(loss)
    check_graph(loss)
    if not loss.requires_grad:
        return tuple(torch.zeros_like(p) for p in params)
    gradient = torch.autograd.grad(
        loss, list(params), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    # autograd.grad walks round these nodes without a word: the product would be wrong, not missing.
    if create_graph and any(node.name() == "torch::autograd::Error" for node in graph_nodes(gradient)):
        raise RuntimeError("a function of the model is once_differentiable: it has no second derivative")
    return gradient


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Its recurrences have no forward derivative. (`mkldnn.flags` sets, and warns of, TF32 as well.)"""
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.enabled
    mkldnn.enabled = False
    try:
        yield
    finally:
        mkldnn.enabled = before


@torch.no_grad()
def _move(shards: Vector, vector: Vector, scale: Vector | None, step: float) -> None:
    """shards += step · (scale ∘ vector) in place."""
    if scale is None:
        add_(shards, vector, step)
    else:
        torch._foreach_addcmul_(shards, vector, scale, value=step)


def _owned(tensor: Tensor) -> Tensor:
    """A copy that may be written to: products can be expanded scalars, or the very vector that went in."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


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
