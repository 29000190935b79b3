"""Evaluating a loss again leaves nothing behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.loss.noisy import noisy_closure, noisy_model, replay_of
from warmctl.curvature.operators import HessianOperator
from warmctl.loss.replay import Replay
from warmctl.vectors import random_like


def streams() -> tuple[object, ...]:
    _, keys, position, *_ = np.random.get_state()
    return torch.get_rng_state().tolist(), keys.tolist(), position, random.getstate()


EVALUATIONS: dict[str, Callable[[Replay], object]] = {
    "gradient": lambda replay: replay.gradient(),
    "loss": lambda replay: replay.loss(),
    "value": lambda replay: replay.value(),
    "verify": lambda replay: replay.verify(*replay.gradient()),
    "double backward": lambda replay: HessianOperator(replay, replay.params, "double_backward").matvec(
        random_like(replay.params, 0)
    ),
    "forward over reverse": lambda replay: HessianOperator(replay, replay.params, "forward_over_reverse").matvec(
        random_like(replay.params, 0)
    ),
    "finite difference": lambda replay: HessianOperator(replay, replay.params, "finite_difference").matvec(
        random_like(replay.params, 0)
    ),
}


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_no_trace(evaluate: Callable[[Replay], object]) -> None:
    """Parameters, gradients, buffers and counters, modes, random streams: as before, and the same objects."""
    model = noisy_model()
    model[2].eval()  # one module in another mode than the rest
    model(torch.randn(3, 4))
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(i))
    grads, buffers = [p.grad for p in model.parameters()], list(model.buffers())
    state = copy.deepcopy(model.state_dict())
    replay = replay_of(model)
    torch.rand(3), np.random.rand(), random.random()  # the streams have moved on since
    before = streams()

    evaluate(replay)

    assert streams() == before
    for i, (p, grad) in enumerate(zip(model.parameters(), grads, strict=True)):
        assert p.grad is grad
        assert torch.equal(grad, torch.full_like(grad, float(i)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    assert [m.training for m in model.modules()] == [True, True, True, False, True]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_no_trace_after_an_exception(evaluate: Callable[[Replay], object]) -> None:
    model = noisy_model()
    state = copy.deepcopy(model.state_dict())
    calls = 0

    def fail() -> None:
        nonlocal calls
        calls += 1
        model.eval()
        raise KeyError("after backward")

    replay = Replay(noisy_closure(model, fail), list(model.parameters()), module=model)
    before, backward = streams(), torch.autograd.backward
    with pytest.raises(KeyError):
        evaluate(replay)
    assert calls == 1
    assert streams() == before
    assert torch.autograd.backward is backward
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_modes_and_grad_mode_that_the_closure_changes_are_put_back() -> None:
    model = noisy_model()
    replay = Replay(noisy_closure(model, model.eval), list(model.parameters()), module=model)
    with torch.no_grad():
        _, gradient = replay.gradient()
        assert not torch.is_grad_enabled()
    assert any(g.any() for g in gradient)
    assert all(m.training for m in model.modules())


class Registers(torch.nn.Module):
    """Registers buffers in its forwards, replaces one that was None and takes one away."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(4, 3)
        self.register_buffer("later", None)
        self.register_buffer("gone", torch.ones(2))
        self.register_buffer("apart", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.later = x.detach().mean()
        if "gone" in self._buffers:
            del self.gone
        self.register_buffer("apart", torch.zeros(1), persistent=True)
        self.body.register_buffer("mask", torch.ones(3))
        self.body.register_buffer("cache", torch.ones(3), persistent=False)
        out: torch.Tensor = self.body(x) * self.body.mask
        return out


def test_buffers_that_are_registered_inside_go_again() -> None:
    model = Registers()
    x = torch.randn(5, 4)
    before, names = list(model._buffers.items()), list(model.state_dict())

    def loss() -> torch.Tensor:
        value: torch.Tensor = model(x).square().mean()
        return value

    Replay.of_loss(loss, list(model.parameters()), module=model).gradient()
    assert all(model._buffers[name] is buffer for name, buffer in before) and len(model._buffers) == len(before)
    assert not model.body._buffers and not model.body._non_persistent_buffers_set
    assert model._non_persistent_buffers_set == {"apart"} and set(model.state_dict()) == set(names)
    assert model.gone.tolist() == [1.0, 1.0] and model.apart.tolist() == [1.0] and model.later is None
