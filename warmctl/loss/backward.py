"""Seeing a backward pass where it starts, and the graph that it goes through."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def intercept_backward(handler: Callable[..., None]) -> Iterator[None]:
    """Call `handler(original, tensors, *args, **kwargs)` in place of every backward pass this thread starts.

    `torch.autograd.backward` is the one function through which `Tensor.backward`, Accelerate, Fabric and
    Lightning all go, and the only place where a closure's gradient can be seen before the closure clips or
    rescales it. Backward passes started inside the handler (reentrant checkpointing) go through untouched.
    """
    original = torch.autograd.backward
    owner, busy = threading.get_ident(), False

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal busy
        if busy or threading.get_ident() != owner:
            return original(tensors, *args, **kwargs)
        busy = True
        try:
            handler(original, tensors, *args, **kwargs)
        finally:
            busy = False

    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original


class _DenseEmbedding(TorchFunctionMode):
    """Embeddings with sparse=True have no second derivative; their dense twins do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding:
            args, kwargs = args[:6], {k: v for k, v in (kwargs or {}).items() if k != "sparse"}
        return func(*args, **(kwargs or {}))


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Twice differentiable kernels: math attention, eager modules, dense embeddings, no cuDNN recurrence."""
    with ExitStack() as stack:
        stack.enter_context(_DenseEmbedding())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:  # nothing is compiled otherwise, and importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
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
