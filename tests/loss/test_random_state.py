"""Whatever was drawn is drawn again, from every global random stream."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.loss.noisy import noisy_closure, noisy_model, replay_of
from warmctl.loss import random_state
from warmctl.loss.random_state import RandomState
from warmctl.loss.replay import Replay


def test_every_evaluation_draws_the_same_mask() -> None:
    model = noisy_model()
    replay = replay_of(model)
    loss, gradient = replay.gradient()
    torch.rand(7), np.random.rand(), random.random()
    again, repeated = replay.gradient()
    assert again == loss == replay.value() == replay.loss().item()
    assert all(torch.equal(a, b) for a, b in zip(gradient, repeated, strict=True))
    replay.verify(loss, gradient)


def test_a_random_state_of_the_past_is_repeated() -> None:
    model = noisy_model()
    closure = noisy_closure(model)
    past = RandomState()
    loss = closure()
    gradient = [p.grad.clone() for p in model.parameters()]
    _, replayed = Replay(closure, list(model.parameters()), model, random_state=past).gradient()
    assert all(torch.equal(a, b) for a, b in zip(gradient, replayed, strict=True))
    present, _ = Replay(closure, list(model.parameters()), model).gradient()
    assert present != loss.item()


DRAWS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "numpy": np.random.rand,
    "numpy normal": np.random.randn,
    "numpy normals": lambda: np.random.randn(2),
    "numpy, far": lambda: np.random.rand(1000),
    "python": random.random,
    "python normal": lambda: random.gauss(0, 1),
    "python normals": lambda: (random.gauss(0, 1), random.gauss(0, 1)),
    "python, far": lambda: [random.random() for _ in range(1000)],
}


@pytest.fixture(params=[True, False], ids=["as in a fresh process", "after spare normals"])
def generators(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's generator is watched by its words at first, and read in full once a spare normal was seen."""
    monkeypatch.setattr(random_state._NUMPY, "spares", not request.param)
    monkeypatch.setattr(random_state._NUMPY, "last", (None, None))


@pytest.mark.usefixtures("generators")
@pytest.mark.parametrize("between", DRAWS)
@pytest.mark.parametrize("before", DRAWS)
def test_whatever_was_drawn_is_drawn_again(before: str, between: str) -> None:
    """Reading the state is skipped where the generator has not moved; a spare normal hides in one that has not."""
    np.random.seed(3)
    random.seed(3)
    for _ in range(3):
        DRAWS[before]()
        state = RandomState()
        first = np.random.randn(3).tolist(), random.gauss(0, 1), random.random()
        state.restore()
        DRAWS[between]()
        inner = RandomState()
        DRAWS[before]()
        inner.restore()
        state.restore()
        assert (np.random.randn(3).tolist(), random.gauss(0, 1), random.random()) == first


@pytest.mark.usefixtures("generators")
def test_numpys_state_is_read_again_only_where_the_generator_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    np.random.seed(3)
    monkeypatch.setattr(random_state._NUMPY, "spares", False)
    first = RandomState().numpy[1]
    assert RandomState().numpy[1] is first
    np.random.rand()
    assert RandomState().numpy[1] is not first
