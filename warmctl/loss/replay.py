"""Evaluating a loss again without leaving a trace.

A probe needs the gradient of one and the same loss at several points. `Replay` evaluates a closure as often
as asked, each time from the same random state, and puts back what an evaluation touches: gradients, buffers
(the counters of batch norm included), random streams, train/eval mode. What it cannot put back is Python
state of the caller, such as a data iterator inside the closure; `Replay.verify` notices that.

Gradients are taken where `backward` returns, before anything else in the closure (clipping, say) can change
them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from warmctl import distributed
from warmctl.loss.backward import (
    as_list,
    check_loss,
    graph_nodes,
    intercept_backward,
    run_backward,
    twice_differentiable,
)
from warmctl.loss.no_trace import no_trace, set_aside
from warmctl.loss.random_state import RandomState
from warmctl.loss.ranks import Ranks
from warmctl.vectors import Vector, add_, dot, local

Closure = Callable[[], Any]


NO_BACKWARD = "the closure did not call backward(): it must compute the loss, call loss.backward() and return it"


FAR, REACH = 0.5, 1e-2
"""Relative distance from the loss of the step at which one is looked at; and the length, relative to the parameters, of
a step that could explain it, twice that of the longest of a finite difference."""


class NotReplayable(RuntimeError):
    """A loss that gives another value or gradient when it is evaluated again at the same point."""


T = TypeVar("T")


def _with_grads_if_needed(evaluate: Callable[[Replay], T]) -> Callable[[Replay], T]:
    """Evaluates once more, with zeros in `.grad`, a closure that fails between its backward and its end."""

    @functools.wraps(evaluate)
    def evaluate_again(replay: Replay) -> T:
        try:
            return evaluate(replay)
        except (AttributeError, RuntimeError, TypeError):
            if replay._needs_grads or not replay._intercepted:
                raise
            replay._needs_grads = True
            return evaluate(replay)

    return evaluate_again


def _on_every_rank(evaluate: Callable[[Replay], T]) -> Callable[[Replay], T]:
    @functools.wraps(evaluate)
    def evaluate_together(replay: Replay) -> T:
        with replay.on_every_rank():
            return evaluate(replay)

    return evaluate_together


class Replay:
    """A loss that can be evaluated again and again, always from the same random state.

    Args:
        closure: computes the loss, calls backward any number of times, returns the loss.
        params: the parameters whose gradient is wanted.
        module: whose buffers and modes are put back after every evaluation.
        random_state: the streams at the start of the evaluation to repeat; the present ones if omitted.
        reduce: called on a finished gradient, in place; averages over ranks where the closure does not.
        own: the closure asks for its backward passes by `run_backward`.
        ranks: where all ranks evaluate it at once: it gives its result on every rank then, or raises on every rank.

    Attributes:
        precision: the coarsest machine epsilon of the forward pass, known after the first `gradient`: that
            of the parameters, or of bfloat16 or float16 where autocast is on. Compiled code hides it.
        compares: an evaluation raises ArithmeticError if it cannot be the loss of the step, near its parameters.
        expected: that loss, and its gradient if it is known; where the loss is not, the first evaluation's.
        moving: the gradient of the step is not zero.

    While the closure runs, and after its backward, every `.grad` is None; or zero if it turns out that the
    closure cannot do without (clip_grad_value_, say), which costs one parameter-sized vector while it runs.
    """

    def __init__(
        self,
        closure: Closure,
        params: Sequence[Tensor],
        module: nn.Module | None = None,
        random_state: RandomState | None = None,
        reduce: Callable[[Vector], None] | None = None,
        own: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        self.closure = closure
        self.params = list(params)
        self.module = module
        self.random_state = random_state or RandomState({p.device for p in params})
        self.reduce, self.own, self.ranks = reduce, own, ranks
        self.compares, self.moving = False, False
        self.expected: tuple[float, Vector | None] = math.nan, None
        self.precision = max((torch.finfo(p.dtype).eps for p in params), default=0.0)
        self._bystanders: list[Tensor] | None = None
        self._needs_grads = self._intercepted = self._differentiates = False

    @classmethod
    def of_loss(cls, loss: Callable[[], Tensor], params: Sequence[Tensor], **kwargs: Any) -> Replay:
        """From a function that only computes the loss."""

        def closure() -> Tensor:
            value = loss()
            check_loss(value)
            run_backward(value)
            return value

        return cls(closure, params, own=True, **kwargs)

    @property
    def inspected(self) -> bool:
        """Whether `precision` is known: a gradient has been computed."""
        return self._bystanders is not None

    def on_every_rank(self) -> AbstractContextManager[None]:
        """What is inside is done on every rank or raises on every rank, as each evaluation does by itself."""
        return nullcontext() if self.ranks is None else self.ranks.together(self.params)

    @_on_every_rank
    @_with_grads_if_needed
    def gradient(self) -> tuple[float, Vector]:
        """The loss and its gradient (dense, this process's shards), by a real backward pass. Cost: 1."""
        total: Vector = []

        def collect(original: Callable[..., None], tensors: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal total
            self._inspect(tensors)
            with set_aside(self._bystanders or []):
                if any(t.requires_grad for t in as_list(tensors)):  # else a loss that depends on nothing
                    original(tensors, *args, **kwargs)
            new = [p.grad for p in self.params]
            for p in self.params:
                p.grad = None
            dense = [
                torch.zeros_like(local(p.detach())) if g is None else _dense(g)
                for p, g in zip(self.params, new, strict=True)
            ]
            total = add_(total, dense) if total else dense

        loss = self._evaluate(collect)
        if not total:
            raise ValueError(NO_BACKWARD)
        value = _as_float(loss)
        if self.compares:
            self._compare(value, total)  # this rank's loss and gradient
        if self.reduce is not None:
            self.reduce(total)
        return value, total

    def _compare(self, loss: float, gradient: Vector | None = None) -> None:
        before, at_rest = self.expected
        if math.isnan(before):
            if self.moving and loss == 0.0 and (gradient is None or dot(gradient, gradient) == 0.0):
                raise ArithmeticError("the probe saw a loss of zero that has no gradient, the step has one")
            self.expected = loss, gradient
            return
        gap = abs(loss - before)
        if not gap > FAR * abs(before):  # what is not finite is noticed elsewhere
            return
        shards = [local(p.detach()) for p in self.params]
        slope = max((dot(g, g) for g in (gradient, at_rest) if g is not None), default=0.0)
        parts = distributed.world_size() if distributed.is_sharded(self.params) else 1  # a rank has its shards alone
        if gap > REACH * parts * math.sqrt(max(dot(shards, shards), 1.0) * slope):
            raise ArithmeticError(f"the probe saw a loss of {loss:.6g}, the step one of {before:.6g}")

    @_on_every_rank
    def loss(self) -> Tensor:
        """The loss with its graph alive, by twice differentiable kernels. Cost: one forward pass."""
        with self.untouched():
            return self.bare_loss()

    @_with_grads_if_needed
    def bare_loss(self) -> Tensor:
        """`loss` without putting anything back: for use inside `untouched`, and in torch.func transforms."""
        parts: list[Tensor] = []

        def keep(_: Callable[..., None], tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
            outputs = as_list(tensors)
            weights = [None] * len(outputs) if grad_tensors is None else as_list(grad_tensors)
            for output, weight in zip(outputs, weights, strict=True):
                parts.append((output if weight is None else output * weight).sum())

        with twice_differentiable():
            loss = self._run(keep)
        if not parts:
            raise ValueError(NO_BACKWARD)
        if self.compares:
            self._compare(_as_float(loss))
        return torch.stack([part.float() if part.dtype.itemsize < 4 else part for part in parts]).sum()

    @_on_every_rank
    @_with_grads_if_needed
    def value(self) -> float:
        """The loss alone, without gradient. Cost: one forward pass, about a third of a gradient."""
        if not self._differentiates:
            try:
                return _as_float(self._evaluate(lambda *args, **kwargs: None, grad=False))
            except RuntimeError as error:  # it asks for derivatives of its own
                if "does not require grad" not in str(error):
                    raise
                self._differentiates = True
        return _as_float(self._evaluate(lambda *args, **kwargs: None))

    def verify(self, loss: float, gradient: Vector | None) -> None:
        """Raise NotReplayable unless a second evaluation gives this loss, and this gradient if it is known;
        ArithmeticError if it is not finite, which says nothing about repeating it. Cost: 1.

        The tolerances (1e-3, of a gradient at least four roundings) allow for kernels that do not add in a fixed order,
        not for another batch.
        """
        again, repeated = self.gradient()
        if not math.isfinite(again) or not math.isfinite(dot(repeated, repeated)):
            raise ArithmeticError("the loss or its gradient was not finite")
        same = abs(again - loss) <= 1e-3 * max(abs(loss), 1e-3)
        if gradient is not None:
            size = dot(gradient, gradient)
            drift = math.sqrt(dot(add_(repeated, gradient, -1.0), repeated) / max(size, 1e-24))
            same = same and drift <= max(1e-3, 4 * self.precision)
        if not same:
            raise NotReplayable(
                f"evaluating the loss again at the same parameters gave {again:.6g} after {loss:.6g}, "
                "so the closure draws new data or keeps state"
            )

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """What is evaluated inside leaves no trace; see `no_trace`."""
        with no_trace(self.params, self.module):
            yield

    def _evaluate(self, on_backward: Callable[..., None], grad: bool = True) -> Any:
        with self.untouched(), nullcontext() if grad else torch.no_grad():
            return self._run(on_backward)

    def _run(self, on_backward: Callable[..., None]) -> Any:
        def handle(*args: Any, **kwargs: Any) -> None:
            distributed.meet("backward")
            for p in self.params:
                p.grad = None
            on_backward(*args, **kwargs)
            self._intercepted = True
            if self._needs_grads:
                for p in self.params:
                    p.grad = torch.zeros_like(p)

        # Autocast caches the parameters it has cast: neither may we see them, nor the caller ours.
        self._intercepted = False
        torch.clear_autocast_cache()
        try:
            with self.ranks.evaluation() if self.ranks else nullcontext(), intercept_backward(handle, self.own):
                self.random_state.restore()
                return self.closure()
        finally:
            torch.clear_autocast_cache()

    def _inspect(self, tensors: Any) -> None:
        """Note, once, the precision of the forward pass and what other leaves backward writes to."""
        if self._bystanders is not None:
            return
        leaves = list(self.module.parameters()) if self.module is not None else []
        dtypes: set[torch.dtype] = set()
        for node in graph_nodes(as_list(tensors)):
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves.append(leaf)
            dtypes.update(output.dtype for output in getattr(node, "_input_metadata", ()))
        self.precision = max([self.precision, *(torch.finfo(d).eps for d in dtypes if d.is_floating_point)])
        others = {id(leaf): leaf for leaf in leaves}
        for p in self.params:
            others.pop(id(p), None)
        self._bystanders = list(others.values())


def _dense(grad: Tensor) -> Tensor:
    """This process's part as a dense tensor that the next backward pass will not write into."""
    part = local(grad.detach())
    if part.layout != torch.strided:
        return part.to_dense()
    return part.clone() if grad._is_view() else part


def _as_float(loss: Any) -> float:
    while isinstance(loss, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(loss):
        loss = torch._C._functorch.get_unwrapped(loss)  # of the primal, which is one, in torch.func transforms
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss) if loss is not None else math.nan
