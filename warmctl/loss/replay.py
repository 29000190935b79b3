"""Evaluating a loss again without leaving a trace.

A probe needs the gradient of one and the same loss at several points. `Replay` evaluates a closure as often
as asked, each time from the same random state, and puts back what an evaluation touches: gradients, buffers
(the counters of batch norm included), random streams, train/eval mode. What it cannot put back is Python
state of the caller, such as a data iterator inside the closure; `Replay.verify` notices that.

Gradients are taken where `backward` returns, before anything else in the closure (clipping, say) can change
them.
"""

from __future__ import annotations

import ctypes
import functools
import math
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from warmctl.vectors import Vector, add_, dot, local

Closure = Callable[[], Any]


NO_BACKWARD = "the closure did not call backward(): it must compute the loss, call loss.backward() and return it"


class NotReplayable(RuntimeError):
    """A loss that gives another value or gradient when it is evaluated again at the same point."""


class RandomState:
    """The state of every random stream a training step may draw from: torch on each device, NumPy, Python."""

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self.devices = [d for d in dict.fromkeys(devices) if d.type not in ("cpu", "meta")]
        self.cpu = torch.get_rng_state()
        self.device_states = [torch.get_device_module(d).get_rng_state(d) for d in self.devices]
        self.numpy, self.python = _NUMPY.read(), random.getstate()

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in zip(self.devices, self.device_states, strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
        _NUMPY.restore(*self.numpy)
        random.setstate(self.python)


class _NumpyState:
    """NumPy's global generator. To read its state takes 60 µs: it is read again only once the generator has moved.

    A spare normal is drawn without moving it: once one has been seen, the state is read and set every time.
    """

    def __init__(self) -> None:
        self.spares = False
        self.last: tuple[Any, Any] = None, None

    def read(self) -> tuple[Any, Any]:
        """A mark of where it stands, or None if there is no telling, and the state."""
        mark = None if self.spares else self.mark()
        if mark is None or mark != self.last[0]:
            state: Any = np.random.get_state()
            self.spares = self.spares or bool(state[3])
            self.last = None if self.spares else mark, state
        return self.last

    def restore(self, mark: Any, state: Any) -> None:
        if mark is None or mark != self.mark():
            np.random.set_state(state)

    @staticmethod
    def mark() -> tuple[int, bytes] | None:
        """The generator's 624 words and the position in them."""
        generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if not isinstance(generator, np.random.MT19937):
            return None
        address = generator.ctypes.state_address
        return address, ctypes.string_at(address, 625 * 4)


_NUMPY = _NumpyState()


_open = 0
"""How many `no_trace` are open."""


def measuring() -> bool:
    """Whether what runs now is a measurement: its passes through a model are not those of training."""
    return _open > 0


@contextmanager
def no_trace(params: Sequence[Tensor], module: nn.Module | None) -> Iterator[None]:
    """Put back `.grad`, buffers, random streams, train/eval mode and the autograd mode on leaving.

    Inside, every `.grad` is None. Buffers are copied (one copy of all buffers); `.grad` tensors are only set
    aside.
    """
    global _open
    random_state = RandomState({p.device for p in params})
    others = module.parameters() if module is not None else ()  # another optimizer's: the closure clears them too
    held = list({id(p): p for p in (*params, *others)}.values())
    grads = [p.grad for p in held]
    shared = [(g, g.clone()) for g in grads if g is not None and g._is_view()]  # DDP reuses its buckets
    modules = list(module.modules()) if module is not None else []
    modes = [m.training for m in modules]
    buffers = [(m, name, b, b.data.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    try:
        _open += 1
        for p in held:
            p.grad = None
        with torch.enable_grad():
            yield
    finally:
        _open -= 1
        for p, grad in zip(held, grads, strict=True):
            p.grad = grad
        for grad, value in shared:
            grad.data.copy_(value)
        for m, mode in zip(modules, modes, strict=True):
            if m.training != mode:
                m.training = mode
        for m, name, buffer, value in buffers:
            buffer.data.copy_(value)  # .data: no new version, a graph of the caller's that saved it stays valid
            m._buffers[name] = buffer
        random_state.restore()


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


class Replay:
    """A loss that can be evaluated again and again, always from the same random state.

    Args:
        closure: computes the loss, calls backward any number of times, returns the loss.
        params: the parameters whose gradient is wanted.
        module: whose buffers and modes are put back after every evaluation.
        random_state: the streams at the start of the evaluation to repeat; the present ones if omitted.
        reduce: called on a finished gradient, in place; averages over ranks where the closure does not.

    Attributes:
        precision: the coarsest machine epsilon of the forward pass, known after the first `gradient`: that
            of the parameters, or of bfloat16 or float16 where autocast is on. Compiled code hides it.

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
    ) -> None:
        self.closure = closure
        self.params = list(params)
        self.module = module
        self.random_state = random_state or RandomState({p.device for p in params})
        self.reduce = reduce
        self.precision = max((torch.finfo(p.dtype).eps for p in params), default=0.0)
        self._bystanders: list[Tensor] | None = None
        self._needs_grads = self._intercepted = False

    @classmethod
    def of_loss(cls, loss: Callable[[], Tensor], params: Sequence[Tensor], **kwargs: Any) -> Replay:
        """From a function that only computes the loss."""

        def closure() -> Tensor:
            value = loss()
            check_loss(value)
            value.backward()  # type: ignore[no-untyped-call]
            return value

        return cls(closure, params, **kwargs)

    @property
    def inspected(self) -> bool:
        """Whether `precision` is known: a gradient has been computed."""
        return self._bystanders is not None

    @_with_grads_if_needed
    def gradient(self) -> tuple[float, Vector]:
        """The loss and its gradient (dense, this process's shards), by a real backward pass. Cost: 1."""
        total: Vector = []

        def collect(original: Callable[..., None], tensors: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal total
            self._inspect(tensors)
            with _set_aside(self._bystanders or []):
                if any(t.requires_grad for t in _as_list(tensors)):  # else a loss that depends on nothing
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
        if self.reduce is not None:
            self.reduce(total)
        return _as_float(loss), total

    def loss(self) -> Tensor:
        """The loss with its graph alive, by twice differentiable kernels. Cost: one forward pass."""
        with self.untouched():
            return self.bare_loss()

    @_with_grads_if_needed
    def bare_loss(self) -> Tensor:
        """`loss` without putting anything back: for use inside `untouched`, and in torch.func transforms."""
        parts: list[Tensor] = []

        def keep(_: Callable[..., None], tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
            outputs = _as_list(tensors)
            weights = [None] * len(outputs) if grad_tensors is None else _as_list(grad_tensors)
            for output, weight in zip(outputs, weights, strict=True):
                parts.append((output if weight is None else output * weight).sum())

        with twice_differentiable():
            self._run(keep)
        if not parts:
            raise ValueError(NO_BACKWARD)
        return torch.stack([part.float() if part.dtype.itemsize < 4 else part for part in parts]).sum()

    @_with_grads_if_needed
    def value(self) -> float:
        """The loss alone, without gradient. Cost: one forward pass, about a third of a gradient."""
        return _as_float(self._evaluate(lambda *args, **kwargs: None, grad=False))

    def verify(self, loss: float, gradient: Vector | None) -> None:
        """Raise NotReplayable unless a second evaluation gives this loss, and this gradient if it is known.
        Cost: 1.

        The tolerances (1e-3, of a gradient at least four roundings) allow for kernels that do not add in a fixed order,
        not for another batch.
        """
        again, repeated = self.gradient()
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
            with intercept_backward(handle):
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
        for node in _graph_nodes(_as_list(tensors)):
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves.append(leaf)
            dtypes.update(output.dtype for output in getattr(node, "_input_metadata", ()))
        self.precision = max([self.precision, *(torch.finfo(d).eps for d in dtypes if d.is_floating_point)])
        others = {id(leaf): leaf for leaf in leaves}
        for p in self.params:
            others.pop(id(p), None)
        self._bystanders = list(others.values())


@contextmanager
def _set_aside(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Put back the `.grad` of other leaves that a backward pass accumulates into."""
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad


def _graph_nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
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


def _as_list(tensors: Any) -> list[Any]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def check_loss(loss: Any) -> None:
    """Raise unless `loss` is a scalar tensor."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"the loss must be a scalar tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"the loss must be a scalar, got shape {tuple(loss.shape)}; reduce it with .mean()")


def check_graph(loss: Tensor) -> None:
    """Raise RuntimeError where the graph hides parameters, which would pass for unused ones."""
    if any("CheckpointFunction" in node.name() for node in _graph_nodes([loss])):
        raise RuntimeError("reentrant checkpointing hides parameters from the graph: set use_reentrant=False")


def _dense(grad: Tensor) -> Tensor:
    """This process's part as a dense tensor that the next backward pass will not write into."""
    part = local(grad.detach())
    if part.layout != torch.strided:
        return part.to_dense()
    return part.clone() if grad._is_view() else part


def _as_float(loss: Any) -> float:
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss) if loss is not None else math.nan
