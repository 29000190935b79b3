"""The range test: beside torch-lr-finder, against closed forms, and without a trace."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from tests.helpers import assert_same, batch_of, everything, loss_fn, mlp, noisy_net, train
from warmctl import History, rate_range
from warmctl.planning.rate_range import suggestions


def loader(seed: int = 1) -> DataLoader[Any]:
    x, y = batch_of(0, size=96)
    return DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator().manual_seed(seed))


def test_the_same_curve_as_torch_lr_finder(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = pytest.importorskip("torch_lr_finder")
    ours, theirs = noisy_net(), noisy_net()
    make = torch.optim.SGD
    torch.manual_seed(3)
    found = rate_range(ours, loss_fn, loader(), make(ours.parameters(), 0.1, momentum=0.9), 1e-4, 1e3, 60)
    torch.manual_seed(3)
    peer = finder.LRFinder(theirs, make(theirs.parameters(), 1e-4, momentum=0.9), nn.MSELoss(), device="cpu")
    peer.range_test(loader(), end_lr=1e3, num_iter=60)
    assert found.history["lr"] == pytest.approx(peer.history["lr"])
    assert found.history["smoothed_loss"] == pytest.approx(peer.history["loss"], rel=1e-5)
    assert len(found.history) < 60 and found.diverged == pytest.approx(peer.history["lr"][-1])


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace_bit_for_bit(fails: bool) -> None:
    model = noisy_net()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    train(optimizer, model, range(3))
    data = loader()
    data.sampler.jitter = np.random.default_rng(0)  # type: ignore[attr-defined]
    calls = 0

    def drawing_loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        random.random(), np.random.rand(), data.sampler.jitter.random()  # type: ignore[attr-defined]
        if fails and calls == 7:
            raise RuntimeError("out of data")
        return loss_fn(model, batch)

    before, stream = everything(model, optimizer), data.generator.get_state()
    jitter = data.sampler.jitter.bit_generator.state  # type: ignore[attr-defined]
    first = [x for x, _ in data]
    data.generator.set_state(stream)
    if fails:
        with pytest.raises(RuntimeError, match="out of data"):
            rate_range(model, drawing_loss, data, optimizer, steps=20)
    else:
        rate_range(model, drawing_loss, data, optimizer, steps=20)
    torch.set_rng_state(before["random"]["torch"])  # `first` drew from it
    assert_same(everything(model, optimizer), before)
    assert data.sampler.jitter.bit_generator.state == jitter  # type: ignore[attr-defined]
    assert_same([x for x, _ in data], first)


def test_a_sampler_of_its_own_generator_is_put_back() -> None:
    x, y = batch_of(0, size=32)
    generator = torch.Generator().manual_seed(5)
    data = DataLoader(TensorDataset(x, y), 8, sampler=RandomSampler(x, generator=generator))  # type: ignore[arg-type]
    state = generator.get_state()
    model = mlp()
    rate_range(model, loss_fn, data, torch.optim.SGD(model.parameters(), 0.1), steps=6, probes=0)
    assert torch.equal(generator.get_state(), state)


class Bowl(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.ones(2, dtype=torch.float64))


def bowl_loss(model: Any, batch: Any) -> Tensor:
    loss: Tensor = (torch.tensor([2.0, 1e-3], dtype=torch.float64) * model.x**2).sum()
    return loss


def test_by_curvature_it_finds_the_edge_of_a_quadratic() -> None:
    """Curvatures of 4 and .002: plain descent is unstable from ½ on, whichever way the sweep went."""
    model = Bowl()
    found = rate_range(model, bowl_loss, [0], torch.optim.SGD(model.parameters(), 1.0), 1e-3, 30.0, 80)
    assert found.suggestion_by_curvature == pytest.approx(0.5, rel=1e-3)
    assert found.suggestion is not None and found.suggestion < 0.5
    assert found.diverged is not None and found.diverged > 0.5


def test_steepest_descent_of_a_known_curve() -> None:
    """A logistic fall, steepest at 10⁻², and a rise after 1."""
    rates = np.geomspace(1e-4, 100, 121)
    losses = 1 - np.tanh(2 * np.log10(rates / 1e-2)) + np.maximum(np.log10(rates), 0) ** 2 * 50
    rows = [{"step": i, "lr": float(r), "loss": float(v)} for i, (r, v) in enumerate(zip(rates, losses, strict=True))]
    steepest, by_curvature = suggestions(History(rows), 121)
    assert steepest == pytest.approx(1e-2, rel=0.15) and by_curvature is None
    rising = History([{**row, "loss": float(i)} for i, row in enumerate(rows)])
    assert suggestions(rising, 121) == (None, None)
    assert suggestions(History(rows[:4]), 121) == (None, None)


def test_groups_keep_the_proportions_of_their_rates() -> None:
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append([group["lr"] for group in self.param_groups])
            return super().step(closure)

    model = mlp()
    optimizer = Spy([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.02}])
    rate_range(model, loss_fn, [batch_of(0)], optimizer, 1e-3, 1e-1, 3)
    assert np.allclose(seen, [[1e-3, 2e-4], [1e-2, 2e-3], [1e-1, 2e-2]])
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.02]


def test_a_loss_that_is_not_finite_ends_it() -> None:
    model = mlp()
    found = rate_range(
        model, lambda m, b: loss_fn(m, b) * math.nan, [batch_of(0)], torch.optim.SGD(model.parameters(), 0.1), steps=9
    )
    assert len(found.history) == 1 and found.diverged == 1e-6 and found.suggestion is None


def test_the_figure_marks_both_suggestions(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = mlp()
    found = rate_range(model, loss_fn, loader(), torch.optim.SGD(model.parameters(), 0.1), 1e-3, 100.0, 60)
    figure = found.plot(tmp_path / "range.png")
    words = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert words[1:] == [
        f"steepest descent: {found.suggestion:.2g}",
        f"edge of stability: {found.suggestion_by_curvature:.2g}",
    ]
    assert (tmp_path / "range.png").stat().st_size > 5000
    assert found.plot(axis=figure.axes[0]) is figure


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"low": 0}, ValueError, "low must be a learning rate above 0"),
        ({"low": 1.0, "high": 0.1}, ValueError, "low must be below high"),
        ({"steps": 1}, ValueError, "steps must be a whole number of at least 2"),
        ({"smoothing": 0}, ValueError, "smoothing must be in"),
        ({"probes": -1}, ValueError, "probes must be"),
        ({"batches": 3}, TypeError, "batches must be an iterable"),
        ({"batches": []}, ValueError, "batches are empty"),
        ({"batches": iter([batch_of(0), batch_of(1)])}, ValueError, "batches ended after 2, and 100 are needed"),
        ({"optimizer": None}, TypeError, "optimizer must be a torch.optim.Optimizer"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    model = mlp()
    good: dict[str, Any] = {
        "model": model,
        "loss_fn": loss_fn,
        "batches": [batch_of(0)],
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
    }
    with pytest.raises(error, match=words):
        rate_range(**good | change)
