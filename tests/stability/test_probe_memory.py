"""What a probe keeps: a few vectors while it runs, the eigenvector afterwards, no graph."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers import batch_of, closure_for, loss_fn, mlp, monitor
from tests.stability.dense import measured


class LargeTensors(TorchDispatchMode):
    """The largest number of tensors of at least `size` elements alive at once, of those made inside."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.peak = size, 0
        self.old: set[int] = set()
        self.made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.made += [weakref.ref(t) for t in tensors if t.numel() >= self.size]
        self.peak = max(self.peak, self.alive())
        return out

    def alive(self) -> int:
        self.made = [ref for ref in self.made if ref() is not None]
        return len({ref().untyped_storage().data_ptr() for ref in self.made} - self.old)  # type: ignore[union-attr]


def one_large_matrix() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 400, bias=False), nn.Tanh(), nn.Linear(400, 3, bias=False))


def peak_of_a_step(opt: torch.optim.Optimizer, model: nn.Module, clipped: bool, first: bool = False) -> LargeTensors:
    def closure(index: int) -> Tensor:
        loss = closure_for(opt, model, batch_of(index, size=2))()
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        return loss

    if not first:
        opt.step(lambda: closure(0))
    opt.zero_grad()
    gc.collect()
    tensors = LargeTensors(3 * 400)
    states = [v for state in opt.state.values() for v in state.values() if isinstance(v, Tensor)]
    tensors.old = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *states]}
    with tensors:
        opt.step(lambda: closure(1))
    return tensors


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("clipped", [False, True])
def test_memory_of_a_probe(make: Any, steps: int, clipped: bool) -> None:
    """At most `probe_steps` + 3 parameter-sized vectors beyond training, and the average of the parameters that the end
    slope keeps; one is two large tensors here.
    """
    plain, model = one_large_matrix(), one_large_matrix()
    bare = peak_of_a_step(make(plain.parameters(), 0.1), plain, clipped)
    opt = monitor(model, make(model.parameters(), 0.1), probe_steps=steps, hvp="finite_difference")
    wrapped = peak_of_a_step(opt, model, clipped)
    assert measured(opt) and opt.counts.probes == 2
    assert (wrapped.peak - bare.peak) / 2 <= steps + 3 + 1
    assert wrapped.alive() == bare.alive() + 4  # the eigenvector and the average


@pytest.mark.parametrize("steps", [2, 5])
def test_memory_of_the_first_probe(steps: int) -> None:
    """At most 2 `probe_steps` + 3: it makes twice as many products, and Lanczos keeps a vector for each.

    One more is the average of the parameters, begun at this step.
    """
    plain, model = one_large_matrix(), one_large_matrix()
    bare = peak_of_a_step(torch.optim.SGD(plain.parameters(), 0.1), plain, False, first=True)
    opt = monitor(model, torch.optim.SGD(model.parameters(), 0.1), probe_steps=steps, hvp="finite_difference")
    wrapped = peak_of_a_step(opt, model, False, first=True)
    assert opt.counts.probes == 1
    assert steps + 3 < (wrapped.peak - bare.peak) / 2 <= 2 * steps + 3 + 1


@pytest.mark.parametrize("hvp", ["finite_difference", "double_backward"])
@pytest.mark.parametrize("source", ["closure", "backward"])
def test_no_graph_and_no_vector_survives_a_probe(hvp: str, source: str) -> None:
    model = mlp()
    opt = monitor(model, torch.optim.SGD(model.parameters(), 0.1), probe_steps=2, hvp=hvp)
    graphs: list[weakref.ref[Any]] = []

    class Marker:
        def __call__(self, gradient: Tensor) -> None:
            pass

    def mark(module: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            marker = Marker()
            out.register_hook(marker)  # lives as long as the graph
            graphs.append(weakref.ref(marker))

    model.register_forward_hook(mark)
    for index in range(3):
        if source == "closure":
            opt.step(closure_for(opt, model, batch_of(index)))
        else:
            opt.zero_grad()
            opt.backward(loss_fn(model, batch_of(index)))
            opt.step()
    gc.collect()
    assert len(graphs) >= 3 and measured(opt)
    assert not any(ref() is not None for ref in graphs)
    assert opt.meter.estimator.vector is not None and not any(v.requires_grad for v in opt.meter.estimator.vector)
