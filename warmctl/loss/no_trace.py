"""What a measurement touches in a training process, put back when it is over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from warmctl.loss.random_state import RandomState

_open = 0
"""How many `no_trace` are open."""


def measuring() -> bool:
    """Whether what runs now is a measurement: its passes through a model are not those of training."""
    return _open > 0


@contextmanager
def no_trace(params: Sequence[Tensor], module: nn.Module | None) -> Iterator[None]:
    """Put back `.grad`, buffers, random streams, train/eval mode and the autograd mode on leaving.

    Inside, every `.grad` is None. Buffers are copied (one copy of all buffers); `.grad` tensors are only set
    aside. Buffers that are registered inside go again.
    """
    global _open
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
        yield
    finally:
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
