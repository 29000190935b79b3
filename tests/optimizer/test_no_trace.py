"""Invariants 1 to 3: a probe leaves no trace, and what is not scaled is bitwise the bare optimizer."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Set
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import optim_db
from torch.utils.checkpoint import checkpoint

from tests.helpers import (
    Batch,
    OwnLoss,
    assert_same,
    batch_of,
    closure_for,
    everything,
    loss_fn,
    mlp,
    noisy_net,
    own_loss,
    train,
)
from warmctl import AdaptiveWarmup

# torch.testing has frozen the global switches of all backends, for every test of this process.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

REFUSED: set[Any] = {torch.optim.LBFGS, torch.optim.SparseAdam}
"""LBFGS by the wrapper; SparseAdam refuses dense gradients, see below."""
NO_RULE: set[Any] = {torch.optim.Adafactor, torch.optim.Muon, torch.optim.Rprop}


def dense_configurations(without: Set[Any] = REFUSED) -> list[Any]:
    """Every optimizer of torch with every one of the settings that torch's own tests give it."""
    return [
        pytest.param(info.optim_cls, example.kwargs, id=f"{info.name}-{example.desc}")
        for info in optim_db
        if info.optim_cls not in without
        for example in info.optim_inputs_func(device="cpu")
    ]


def pair(optimizer_class: Any, kwargs: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """(model, optimizer) twice from the same start: bare, and wrapped."""
    twins = []
    for _ in range(2):
        model = mlp()
        if optimizer_class is torch.optim.Muon:  # takes matrices only
            model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
            model.load_state_dict({"0.weight": mlp()[0].weight, "2.weight": mlp()[2].weight})
        twins.append((model, optimizer_class(model.parameters(), **copy.deepcopy(kwargs))))
    (bare_model, bare), (model, base) = twins
    return (bare_model, bare), (model, AdaptiveWarmup(base, model, every=2, **options))


def test_every_dense_optimizer_of_torch_is_here() -> None:
    tried = {param.values[0] for param in dense_configurations()}
    assert len(tried) >= 13
    assert tried > NO_RULE


@pytest.mark.parametrize(("optimizer_class", "kwargs"), dense_configurations())
def test_only_watching_is_bitwise_the_bare_optimizer(optimizer_class: Any, kwargs: dict[str, Any]) -> None:
    bare, wrapped = pair(optimizer_class, kwargs, control=False)
    for step in range(8):
        train(bare[1], bare[0], [step])
        train(wrapped[1], wrapped[0], [step])
        assert_same(everything(*wrapped), everything(*bare), f"step {step}")
    assert wrapped[1].metrics["probes"] >= 3


@pytest.mark.parametrize(("optimizer_class", "kwargs"), dense_configurations(REFUSED | NO_RULE))
def test_a_scale_of_1_is_bitwise_the_bare_optimizer(optimizer_class: Any, kwargs: dict[str, Any]) -> None:
    """At a rate so low that the first probe allows all of it."""
    rate = torch.tensor(1e-12) if isinstance(kwargs.get("lr"), Tensor) else 1e-12
    bare, wrapped = pair(optimizer_class, {**kwargs, "lr": rate})
    for step in range(6):
        train(bare[1], bare[0], [step])
        [row] = train(wrapped[1], wrapped[0], [step])
        assert row["scale"] == 1.0
        assert_same(everything(*wrapped), everything(*bare), f"step {step}")
    assert wrapped[1].metrics["probes"] >= 2


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adafactor, torch.optim.Muon])
def test_without_a_rule_the_scale_reaches_1_and_then_it_is_the_bare_optimizer(optimizer_class: Any) -> None:
    """Rprop is left out: its rate counts at the first step only."""
    _, (model, opt) = pair(optimizer_class, {"lr": 1e-3})
    for _ in range(150):
        [row] = train(opt, model, [0])
        if row["scale"] == 1.0:
            break
    assert row["scale"] == 1.0
    bare_model, bare = copy.deepcopy((model, opt.base))
    for _ in range(4):
        train(bare, bare_model, [0])
        [row] = train(opt, model, [0])
        assert row["scale"] == 1.0
        assert_same(everything(model, opt), everything(bare_model, bare))


def test_lbfgs_is_refused() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="LBFGS"):
        AdaptiveWarmup(torch.optim.LBFGS(model.parameters()), model)


def test_sparse_adam_is_watched_without_a_trace() -> None:
    def run(wrap: bool) -> tuple[Any, Any]:
        torch.manual_seed(0)
        model: Any = nn.Embedding(10, 4, sparse=True)
        opt: Any = torch.optim.SparseAdam(model.parameters(), lr=0.1)
        opt = AdaptiveWarmup(opt, model, every=1, control=False) if wrap else opt
        for step in range(4):
            rows = torch.tensor([step, step + 1, step])
            opt.step(closure_for(opt, model, rows, lambda m, b: m(b).square().mean()))
        return model, opt

    bare, wrapped = run(False), run(True)
    assert wrapped[1].metrics["probes"] >= 2
    assert_same(wrapped[0].weight, bare[0].weight)
    assert wrapped[0].weight.grad.is_sparse


# Each source of the loss, on a model with buffers and random numbers --------------------------------------


class NoisyLoss(OwnLoss):
    """Draws from every random stream."""

    def __init__(self) -> None:
        super().__init__(noisy_net())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        jitter = 1 + 0.1 * np.random.rand() + 0.1 * random.random()
        return {"loss": super().forward(batch)["loss"] * jitter}


def by_closure(opt: Any, model: nn.Module, batch: Batch) -> None:
    opt.step(closure_for(opt, model, batch, own_loss))


def by_capture(opt: Any, model: nn.Module, batch: Batch) -> None:
    closure_for(opt, model, batch, own_loss)()
    opt.step()


def by_observe(opt: Any, model: nn.Module, batch: Batch) -> None:
    if isinstance(opt, AdaptiveWarmup):
        opt.observe(batch)
    torch.rand(3), np.random.rand(), random.random()  # drawn in between: the probe's draws end elsewhere
    opt.zero_grad()
    (model(batch)["loss"] + 0).backward()
    opt.step()


def by_backward(opt: Any, model: Any, batch: Batch) -> None:
    """No source but the live graph: the loss is computed outside of the model's own forward."""
    opt.zero_grad()
    loss = loss_fn(model.net, batch) * (1 + np.random.rand())
    opt.backward(loss) if isinstance(opt, AdaptiveWarmup) else loss.backward()
    opt.step()


HVPS = ("auto", "finite_difference", "double_backward", "forward_over_reverse")


@pytest.mark.filterwarnings("error::RuntimeWarning")  # a failed probe
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop])
@pytest.mark.parametrize(
    ("hvp", "loop"),
    [*((hvp, by_closure) for hvp in HVPS), ("auto", by_capture), ("auto", by_observe), ("auto", by_backward)],
)
def test_a_probe_leaves_no_trace(hvp: str, loop: Callable[..., None], optimizer_class: Any) -> None:
    """Parameters, gradients, buffers, optimizer state, random streams, modes: as if no probe had been."""
    if loop is by_backward and optimizer_class is torch.optim.Rprop:
        pytest.skip("a rule that is not known is measured after the update, when the live graph is gone")

    def run(wrap: bool) -> tuple[list[dict[str, Any]], int]:
        model = NoisyLoss()
        model.net[4].eval()  # a mixture of modes is kept, too
        opt: Any = optimizer_class(model.parameters(), lr=0.01)
        if wrap:
            source: Any = {"loss_fn": own_loss} if loop is by_observe else {}
            opt = AdaptiveWarmup(opt, model, every=1, control=False, hvp=hvp, **source)
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        trace = []
        for step in range(4):
            loop(opt, model, batch_of(step))
            trace.append(everything(model, opt))
        return trace, opt.metrics["probes"] if wrap else 0

    bare, _ = run(False)
    wrapped, probes = run(True)
    assert probes >= 2
    assert_same(wrapped, bare)


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_the_autograd_mode_stays(grad_enabled: bool) -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=0.1), model, every=1)
    closure = closure_for(opt, model, batch_of(0))
    with torch.set_grad_enabled(grad_enabled):
        opt.step(torch.enable_grad()(closure))
        assert torch.is_grad_enabled() is grad_enabled
    assert opt.metrics["probes"] == 1


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon])
def test_the_same_seed_gives_the_same_run(optimizer_class: Any) -> None:
    def run() -> tuple[Any, Any]:
        _, (model, opt) = pair(optimizer_class, {"lr": 10.0})
        return train(opt, model, range(30)), everything(model, opt)

    first, second = run(), run()
    assert_same(second[0], first[0])
    assert_same(second[1], first[1])
    assert len({row["scale"] for row in first[0]}) > 1  # something was decided


def test_modules_that_a_product_runs_again_keep_their_buffers() -> None:
    def run(wrap: bool) -> Any:
        model = noisy_net()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        opt: Any = AdaptiveWarmup(base, model, control=False, every=1) if wrap else base
        for step in range(3):
            opt.zero_grad()
            x, y = batch_of(step)
            loss = F.mse_loss(model[2:](checkpoint(model[:2], x, use_reentrant=False)), y)
            opt.backward(loss) if wrap else loss.backward()
            opt.step()
        assert not wrap or opt.metrics["probes"] == 3
        return everything(model, base)

    assert_same(run(True), run(False))
