"""What a measurement touches in a training process, put back when it is over."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from warmctl.loss.random_state import RandomState

_measured: Counter[int] = Counter()
"""How many measurements each parameter takes part in, by id. Not by thread: a device's gradients are accumulated in a
thread of its own. Not one count for all: another thread may train another model meanwhile."""
_lock = threading.Lock()


def measuring(params: Iterable[Tensor]) -> bool:
    """Whether one of these is being measured: a pass through it now is not one of training."""
    return bool(_measured) and any(id(p) in _measured for p in params)


@contextmanager
def _measure(params: Sequence[Tensor]) -> Iterator[None]:
    ids = [id(p) for p in params]
    with _lock:
        _measured.update(ids)
    try:
        yield
    finally:
        with _lock:
            for index in ids:
                _measured[index] -= 1
                if not _measured[index]:
                    del _measured[index]


@contextmanager
def no_trace(params: Sequence[Tensor], module: nn.Module | None) -> Iterator[None]:
    """Put back `.grad`, buffers, random streams, train/eval mode and the autograd mode on leaving.

    Inside, every `.grad` is None. Buffers are copied (one copy of all buffers); `.grad` tensors are only set
    aside. Buffers that are registered inside go again.
    """
    random_state = RandomState({p.device for p in params})
    others = module.parameters() if module is not None else ()  # another optimizer's: the closure clears them too
    held = list({id(p): p for p in (*params, *others)}.values())
    grads = [p.grad for p in held]
    shared = [(g, g.clone()) for g in grads if g is not None and g._is_view()]  # DDP reuses its buckets
    modules = list(module.modules()) if module is not None else []
    modes = [m.training for m in modules]
    registered = [(m, dict(m._buffers), set(m._non_persistent_buffers_set)) for m in modules]
    buffers = [(b, b.data.clone()) for _, named, _ in registered for b in named.values() if b is not None]
    try:
        for p in held:
            p.grad = None
        with _measure(held), torch.enable_grad():
            yield
    finally:
        for p, grad in zip(held, grads, strict=True):
            p.grad = grad
        for grad, value in shared:
            grad.data.copy_(value)
        for m, mode in zip(modules, modes, strict=True):
            if m.training != mode:
                m.training = mode
        for buffer, value in buffers:
            buffer.data.copy_(value)  # .data: no new version, a graph of the caller's that saved it stays valid
        for m, named, not_persistent in registered:
            if not m._buffers and not named:
                continue
            for name in m._buffers.keys() - named.keys():
                del m._buffers[name]
            m._buffers.update(named)
            m._non_persistent_buffers_set.intersection_update(not_persistent)
            m._non_persistent_buffers_set.update(not_persistent)
        random_state.restore()


@contextmanager
def set_aside(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Put back the `.grad` of other leaves that a backward pass accumulates into."""
    grads = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        with _measure(leaves):
            yield
    finally:
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
