"""The closure as the source of the loss, and closures that cannot be repeated."""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers import FORWARD_COST, batch_of, closure_for, closure_of, loss_fn, mlp, noisy_net
from tests.loss.helpers import dense, exact_monitor, sharpness_of
from warmctl import AdaptiveWarmup


def test_closure() -> None:
    model = mlp()
    expected = dense(model)
    opt = exact_monitor(model)
    opt.step(closure_for(opt, model, batch_of(0)))
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("stream", ["torch", "numpy", "python"])
def test_the_global_random_streams_are_repeated(stream: str) -> None:
    model = mlp()
    opt = exact_monitor(model)

    def closure() -> Tensor:
        draw = {"torch": lambda: float(torch.rand(())), "numpy": np.random.rand, "python": random.random}[stream]()
        opt.zero_grad()
        loss = (1 + draw) * loss_fn(model, batch_of(0))
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            opt.step(closure)
    assert opt.sources.verdict.repeats == 1.0 and sharpness_of(opt) > 0


def test_dropout_and_batch_norm_can_be_repeated() -> None:
    model = noisy_net()
    opt = exact_monitor(model, hvp="finite_difference", probe_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            opt.step(closure_for(opt, model, batch_of(step)))
    assert opt.sources.verdict.repeats == 1.0 and sharpness_of(opt) > 0
    assert int(model[1].num_batches_tracked) == 3


def test_backward_of_the_wrapper_inside_a_closure() -> None:
    model = mlp()
    expected = dense(model)
    opt = exact_monitor(model, hvp="finite_difference", probe_steps=25)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_fn(model, batch_of(0))
        opt.backward(loss)
        return loss

    opt.step(closure)
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-2)
    assert opt.metrics["overhead"] == pytest.approx(51 + FORWARD_COST)  # and the check


# Closures that cannot be repeated ---------------------------------------------------------------------------


def drawing(kind: str, opt: AdaptiveWarmup, model: nn.Module) -> Callable[[], Tensor]:
    data: Iterator[int] = itertools.count()
    own, drift = np.random.default_rng(0), [1.0]

    def closure() -> Tensor:
        drift[0] *= 1.5
        factor = {
            "data iterator": 1.0,
            "generator of its own": float(own.normal()) + 3,
            "drifting state": drift[0],
        }[kind]
        batch = batch_of(next(data) if kind == "data iterator" else 0)
        opt.zero_grad()
        loss = factor * loss_fn(model, batch)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("kind", ["data iterator", "generator of its own", "drifting state"])
def test_a_closure_that_cannot_be_repeated_is_noticed_once_and_measured_on_its_live_graph(kind: str) -> None:
    model = mlp()
    opt = exact_monitor(model, hvp="auto", probe_steps=3)
    closure = drawing(kind, opt, model)
    before = model[0].weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="observe") as caught:
        for _ in range(4):
            opt.step(closure)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert not torch.equal(model[0].weight, before)
    assert sharpness_of(opt) > 0 and opt.metrics["probes"] == 4
    assert opt.metrics["hvps"] == 6 + 3 + 3  # none in the first probe; twice as many from cold


def test_the_live_graph_of_a_closure_gives_the_sharpness() -> None:
    model = mlp()
    opt = exact_monitor(model)
    closure = drawing("data iterator", opt, model)
    with pytest.warns(RuntimeWarning, match="observe"):
        opt.step(closure)
    expected = dense(model, batch_of(2))  # the first step took 0 and its check 1
    opt.step(closure)
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)
    assert math.isfinite(opt.metrics["overhead"])


def test_an_observed_batch_helps_a_closure_that_cannot_be_repeated() -> None:
    model = mlp()
    expected = dense(model, batch_of(5))
    opt = exact_monitor(model, loss_fn=loss_fn)
    opt.observe(batch_of(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(drawing("data iterator", opt, model))
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_a_closure_that_runs_out_of_data_in_the_check_does_not_stop_training() -> None:
    model = mlp()
    opt = exact_monitor(model)
    batches = iter([batch_of(0)])

    def closure() -> Tensor:
        return closure_for(opt, model, next(batches))()

    before = model[0].weight.detach().clone()
    with pytest.warns(RuntimeWarning, match="StopIteration"):
        opt.step(closure)
    assert not torch.equal(model[0].weight, before)


def test_a_loss_that_asks_for_derivatives_of_its_own_is_looked_at() -> None:
    """As physics-informed ones do: under `no_grad` it cannot be evaluated."""
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 1e-2), model)
    x = batch_of(0)[0].requires_grad_()

    def loss() -> Tensor:
        u = model(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return slope.square().mean() + u.square().mean()

    for _ in range(2):
        opt.step(closure_of(opt, loss))
    assert opt.metrics["representation_change"] > 0.0
