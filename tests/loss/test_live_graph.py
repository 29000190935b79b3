"""`opt.backward(loss)`: a probe on the live graph, which it does not keep."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from tests.helpers import batch_of, loss_fn, mlp
from tests.loss.helpers import dense, exact_monitor, sharpness_of
from warmctl import AdaptiveWarmup


def test_backward() -> None:
    model = mlp()
    expected = dense(model)
    opt = exact_monitor(model)
    opt.zero_grad()
    opt.backward(loss_fn(model, batch_of(0)))
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_a_probe_on_the_live_graph_does_not_keep_it() -> None:
    model = mlp()
    opt = exact_monitor(model)

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    for _ in range(3):
        alive: weakref.WeakSet[Saved] = weakref.WeakSet()

        def pack(tensor: Tensor, alive: weakref.WeakSet[Saved] = alive) -> Saved:
            saved = Saved(tensor)
            alive.add(saved)
            return saved

        opt.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            loss = loss_fn(model, batch_of(0))
        assert len(alive) > 0
        opt.backward(loss)
        opt.step()
        gc.collect()
        assert len(alive) == 0 and loss.grad_fn is not None
    assert opt.metrics["probes"] == 3


@pytest.mark.parametrize("to_none", [True, False])
def test_passes_of_a_skipped_step_do_not_count(to_none: bool) -> None:
    def run(skipped: int) -> float:
        model = mlp()
        opt = AdaptiveWarmup(SGD(model.parameters(), 1e-3), model, control=False, every=1)
        for _ in range(skipped):
            opt.backward(loss_fn(model, batch_of(0)))
            opt.zero_grad(set_to_none=to_none)
        opt.backward(loss_fn(model, batch_of(0)))
        opt.step()
        return float(opt.metrics["sharpness"])

    assert run(3) == pytest.approx(run(0), rel=0.05)  # not four times it


@pytest.mark.parametrize("to_none", [True, False])
def test_a_step_after_one_that_a_scaler_skipped_is_no_part_of_it(to_none: bool) -> None:
    model = mlp()
    opt = AdaptiveWarmup(SGD(model.parameters(), 1e-3), model, skip_nonfinite=True, every=1)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(8):
        opt.zero_grad(set_to_none=to_none)
        loss = loss_fn(model, batch_of(step))
        opt.backward(scaler.scale(loss) * (math.inf if step in (0, 1, 5) else 1.0))
        scaler.step(opt)
        scaler.update()
    assert opt.history["step"] == [1, 2, 3, 4, 5]
    assert all(map(math.isfinite, opt.history["loss"]))


def test_a_sum_over_its_own_count_is_a_mean_whatever_the_count() -> None:
    def run(reduction: str) -> float:
        model = mlp()
        opt = AdaptiveWarmup(SGD(model.parameters(), 1e-5), model, control=False, every=1)
        for size in (2, 16):
            x, y = batch_of(0, size)
            loss = torch.nn.functional.mse_loss(model(x), y, reduction=reduction)
            opt.backward(loss / y.numel() if reduction == "sum" else loss)
        opt.step()
        return float(opt.metrics["sharpness"])

    assert run("sum") == pytest.approx(run("mean"), rel=1e-3)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_count_by_what_their_losses_are_multiplied_by(as_tensor: bool) -> None:
    """As those of unequal size do; here all are of one example, which makes every loss the same."""

    def run(sizes: tuple[int, ...]) -> list[float]:
        model = mlp()
        opt = AdaptiveWarmup(SGD(model.parameters(), 1e-5), model, control=False, every=1)
        x, y = (t[:1] for t in batch_of(0))
        for _ in range(3):
            opt.zero_grad()
            for size in sizes:
                loss = loss_fn(model, (x.expand(size, -1), y.expand(size, -1)))
                share = size / sum(sizes)
                opt.backward(torch.tensor(share) * loss if as_tensor else loss * share)
            opt.step()
        return opt.history["sharpness"][1:]

    assert run((16, 16, 2)) == pytest.approx(run((34,)), rel=0.02)


def test_micro_batches_are_probed_once_and_not_at_rate_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    opt = AdaptiveWarmup(SGD(model.parameters(), 0.0), model)
    probes = []
    on_graph = opt.meter.prober.on_graph
    monkeypatch.setattr(opt.meter.prober, "on_graph", lambda *args: (probes.append(1), on_graph(*args))[1])
    opt.backward(loss_fn(model, batch_of(0)))
    opt.step()
    assert not probes
    opt.param_groups[0]["lr"] = 0.1
    for step in range(4):
        opt.backward(loss_fn(model, batch_of(step)))
    opt.step()
    assert len(probes) == opt.metrics["probes"] == 1
