"""Lightning: return the wrapper from `configure_optimizers`, give Trainer `callbacks=[WarmupLogger()]`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any
from unittest import mock

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loops.optimization.automatic import Closure
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError("warmctl.integrations.lightning needs lightning: pip install 'warmctl[lightning]'") from error

from torch import Tensor

from warmctl.integrations import scalars, unwrap
from warmctl.loss.backward import graph_nodes
from warmctl.optimizer import AdaptiveWarmup


class WarmupLogger(Callback):
    """Logs the wrapper's metrics at every step, and keeps probes out of the user's logs.

    A probe runs training_step again. Without this callback what it logs then counts too: epoch means
    and torchmetrics take in the batches of probes. Training itself is the same with and without.

    In manual optimization it shows the wrappers the losses that `manual_backward` is given, each to those whose
    parameters it depends on: `opt.step()` needs no closure then.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for _, optimizer in _wrapped(trainer):
            optimizer.meter.prober.around = partial(_nothing_logged, trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if pl_module.automatic_optimization:
            return
        leaves = {id(node.variable) for node in graph_nodes([loss]) if hasattr(node, "variable")}
        for _, optimizer in _wrapped(trainer):
            if any(id(p) in leaves for p in optimizer.trainable):
                optimizer.backward_on_graph(loss, lambda: None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        for index, optimizer in _wrapped(trainer):
            prefix = "warmup/" if len(trainer.optimizers) == 1 else f"warmup_{index}/"
            pl_module.log_dict(scalars(optimizer, prefix))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for _, optimizer in _wrapped(trainer):
            optimizer.meter.prober.around = nullcontext


def _wrapped(trainer: Trainer) -> list[tuple[int, AdaptiveWarmup]]:
    """The wrappers among the optimizers, and their places. Raises TypeError where none of them is one."""
    found = []
    for place, optimizer in enumerate(trainer.optimizers):
        with suppress(TypeError):
            found.append((place, unwrap(optimizer)))
    if not found and trainer.optimizers:
        unwrap(trainer.optimizers[0])
    return found


@contextmanager
def _nothing_logged(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Puts back what Lightning keeps of a training step: logged values, its output, metrics, counters."""
    loop = trainer.fit_loop.epoch_loop
    counter = loop.automatic_optimization.optim_progress.optimizer.zero_grad
    results, counts = loop._results, copy.deepcopy(counter.__dict__)
    metrics = [(m, _copied(m)) for m in module.modules() if isinstance(m, Metric)]
    loop._results = type(results)(training=True)
    loop._results.__dict__.update(results.__dict__)
    try:
        with mock.patch.object(Closure, "__call__", lambda closure, *args: closure.closure(*args).loss):
            yield
    finally:
        loop._results = results
        counter.__dict__.update(counts)
        for metric, state in metrics:
            metric.__dict__.update(state)


def _copied(metric: Metric) -> dict[str, Any]:
    """A metric's accumulated values, which are neither buffers nor parameters."""
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    return {name: copy.deepcopy(metric.__dict__[name]) for name in names if name in metric.__dict__}
