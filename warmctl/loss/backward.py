"""Seeing a backward pass where it starts, and the graph that it goes through."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from warmctl.loss.switches import EAGER, MATH


class _Interception(TorchFunctionMode):
    """Hands every backward pass that is asked for to `handler`, and lets everything else through."""

    def __init__(self, handler: Callable[..., None]) -> None:
        super().__init__()
        self.handler = handler

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            return self._of_tensor(*args, **(kwargs or {}))
        if func is torch.autograd.backward:
            return self._of_tensors(*args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)

    def _of_tensor(
        self,
        loss: Tensor,
        gradient: Any = None,
        retain_graph: Any = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        self._hand_over(loss, gradient, retain_graph, create_graph, inputs)

    def _of_tensors(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: Any = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> None:
        alone = tensors[0] if isinstance(tensors, (tuple, list)) and len(tensors) == 1 else tensors
        self._hand_over(alone, grad_tensors, retain_graph, create_graph, inputs)

    def _hand_over(self, tensors: Any, weights: Any, retain_graph: Any, create_graph: bool, inputs: Any) -> None:
        more = {} if inputs is None else {"inputs": inputs}
        self.handler(torch.autograd.backward, tensors, weights, retain_graph, create_graph, **more)


_handlers = threading.local()


@contextmanager
def intercept_backward(handler: Callable[..., None], own: bool = False) -> Iterator[None]:
    """Call `handler(torch.autograd.backward, tensors, *args, **kwargs)` in place of every backward pass that is asked
    for in this block, and in this thread: what other threads do is not seen, nor touched.

    Where a pass starts is the only place where the gradient of a closure can be seen before the closure clips or
    rescales it. Passes started inside the handler (reentrant checkpointing) go through untouched.

    Args:
        own: the code of the block asks for its passes by `run_backward`. It needs no torch function mode then, under
            which a compiled model is compiled once more. Some older torch does not show such a mode
            `torch.autograd.backward(...)` called by name; `loss.backward()` is always seen.
    """
    before = getattr(_handlers, "current", None)
    _handlers.current = handler
    try:
        with nullcontext() if own else _Interception(handler):
            yield
    finally:
        _handlers.current = before


def run_backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    """`loss.backward(gradient)`, seen by `intercept_backward` at no cost."""
    handler = getattr(_handlers, "current", None)
    if handler is None:
        loss.backward(gradient)  # type: ignore[no-untyped-call]
        return
    _handlers.current = None
    try:
        handler(torch.autograd.backward, loss, gradient)
    finally:
        _handlers.current = handler


class _DenseEmbedding(TorchFunctionMode):
    """Embeddings with sparse=True have no second derivative; their dense twins do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding:
            args, kwargs = args[:6], {k: v for k, v in (kwargs or {}).items() if k != "sparse"}
        return func(*args, **(kwargs or {}))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Twice differentiable kernels: math attention, eager modules, dense embeddings, no cuDNN recurrence."""
    with _DenseEmbedding(), MATH, EAGER:
        yield


def graph_nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of the autograd graph, each once."""
    stack: list[Any] = [t.grad_fn for t in outputs if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)


def check_loss(loss: Any) -> None:
    """Raise unless `loss` is a scalar tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must be a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"the loss must be a scalar, got shape {tuple(loss.shape)}; reduce it with .mean()")


def check_graph(loss: Tensor) -> None:
    """Raise RuntimeError where the graph hides parameters, which would pass for unused ones."""
    if any("CheckpointFunction" in node.name() for node in graph_nodes([loss])):
        raise RuntimeError("reentrant checkpointing hides parameters from the graph: set use_reentrant=False")


def as_list(tensors: Any) -> list[Any]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
