"""The examples in the docstrings of what a user calls before, during and after a run are run as they stand."""

from __future__ import annotations

import doctest
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import warmctl
from warmctl import AdaptiveWarmup

NAMES = (
    *("plan", "Plan", "rate_range", "RateRange", "ReferenceRun", "ExponentialFall"),
    *("SAMRadius", "BatchNormMomentum", "WeightDecay", "Difficulty", "EasyFirst", "Dither", "Momentum", "Unfreezing"),
    *("Follower", "Vitals", "diagnose", "Diagnosis", "RecordedWarmup", "History"),
)


def names() -> dict[str, Any]:
    """What a reader's script is taken to have: a model, its loss, data, an optimizer, and a loop, `train`."""
    torch.manual_seed(0)
    x = torch.randn(24, 16, 6)
    loader = list(zip(x, x[:, :, :3].argmax(-1), strict=True))
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def train(opt: AdaptiveWarmup) -> None:
        for batch in loader:
            opt.zero_grad()
            opt.backward(loss_fn(opt.model, batch))
            opt.step()

    ready = {
        "torch": torch,
        "nn": nn,
        "math": math,
        "model": model,
        "loss_fn": loss_fn,
        "loader": loader,
        "train": train,
    }
    ready |= {"batch": loader[0], "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)}
    return ready | {name: getattr(warmctl, name) for name in (*NAMES, "AdaptiveWarmup", "plot")}


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with a log of a run whose linear warmup took more than half of it."""
    monkeypatch.chdir(tmp_path)
    rows = [f"{step},{2.3 * 0.97**step},{0.1 * min(1.0, step / 40)}" for step in range(1, 61)]
    Path("metrics.csv").write_text("\n".join(["step,loss,lr", *rows]) + "\n")
    yield


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_docstring_are_true(name: str) -> None:
    found = getattr(warmctl, name)
    tests = [test for test in doctest.DocTestFinder().find(found, name, globs=names()) if test.examples]
    assert tests, f"{name} has no example"
    said: list[str] = []
    for test in tests:
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)
