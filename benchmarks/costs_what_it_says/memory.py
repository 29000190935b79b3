"""Part 2: parameter-sized vectors beyond training, counted in storages."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.costs_what_it_says.training import Batches, Make, Rule, Training
from benchmarks.harness.models import size_of
from benchmarks.harness.results import Row


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that were made inside and are alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, tuple[weakref.ref[Any], int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in inputs:
                storage = tensor.untyped_storage()  # one Python object for each storage, as long as it lives
                self.made.setdefault(id(storage), (weakref.ref(storage), storage.nbytes()))
        self.peak = max(self.peak, self.alive())
        return out

    def alive(self) -> int:
        self.made = {key: (ref, size) for key, (ref, size) in self.made.items() if ref() is not None}
        return sum(size for _, size in self.made.values())


def memory(make: Make, batches: Batches, rule: Rule, steps: int | None) -> Row:
    """Parameter-sized vectors at the peak of the second step and after it; a bare optimizer for `steps` None.

    The batch is two examples, that activations weigh nothing.
    """
    options = {} if steps is None else {"probe_steps": steps, "hvp": "finite_difference", "every": 1}
    training = Training(make, rule, **options)
    stream = batches(2)
    training.step(next(stream))
    training.optimizer.zero_grad()
    if training.wrapped:
        training.optimizer.meter.estimator.vector = [v.clone() for v in training.optimizer.meter.estimator.vector]
    held = 0 if steps is None else 1  # the eigenvector of the first probe was made outside
    gc.collect()
    batch = next(stream)
    with Storages() as storages:
        training.step(batch)
    gc.collect()
    vector = 4 * size_of(training.model)
    return {"peak": storages.peak / vector + held, "after": storages.alive() / vector}


def added_memory(make: Make, stream: Batches, rule: Rule, steps: int) -> Row:
    """What the wrapper adds to the bare optimizer's peak, and what stays."""
    bare, wrapped = (memory(make, stream, partial(rule, lr=1e-3), probes) for probes in (None, steps))
    return {"allowed": steps + 3} | {key: wrapped[key] - bare[key] for key in ("peak", "after")}
