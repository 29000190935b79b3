"""The controller's warmup as a schedule: replayed exactly, its nearest number, its file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import batch_of, closure_for, mlp, sgd, train, weights
from warmctl import AdaptiveWarmup
from warmctl.record.history import History
from warmctl.record.schedule import RecordedWarmup


def linear(warmup: int, steps: int, top: float = 1.0) -> History:
    rows = ({"step": k, "scale": top * min(1.0, k / warmup), "scheduled_lr": 0.1} for k in range(1, steps + 1))
    return History(rows)


def test_a_replay_makes_the_same_run() -> None:
    """Bit for bit: the same rates on the same batches, without the wrapper."""
    model = mlp()
    opt = AdaptiveWarmup(sgd(model, 0.5), model)
    train(opt, model, range(40))
    again = mlp()
    base = sgd(again, 0.5)
    scheduler = opt.history.schedule().scheduler(base)
    for step in range(40):
        base.step(closure_for(base, again, batch_of(step)))
        scheduler.step()
    assert min(opt.history["scale"]) < 1.0
    torch.testing.assert_close(weights(again), weights(model), rtol=1e-6, atol=1e-7)


def test_the_decay_is_multiplied_and_every_group_keeps_its_rate() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    base = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.2}], lr=1.0)
    scheduler = linear(4, 10, top=0.5).schedule().scheduler(base, decay=lambda step: 0.9**step)
    for step in range(12):
        expected = 0.5 * min(1.0, (step + 1) / 4) * 0.9**step
        assert [group["lr"] for group in base.param_groups] == pytest.approx([expected, 0.2 * expected])
        base.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [2, 7, 40, 333])
@pytest.mark.parametrize("top", [1.0, 0.03])
def test_the_number_of_a_linear_warmup_is_its_own(warmup: int, top: float) -> None:
    assert linear(warmup, 500, top).schedule().warmup_steps == warmup


def test_no_warmup_has_the_number_zero() -> None:
    assert linear(1, 50).schedule().warmup_steps == 0


def test_a_file_brings_it_back(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "warmup.json"
    recorded = linear(10, 50).schedule(path)
    assert RecordedWarmup.load(path) == recorded and recorded.length == 50 and len(recorded.steps) == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "it does not say"),
        ({"steps": [2, 1]}, "steps must increase"),
        ({"steps": [0, 1]}, "steps must increase from 1"),
        ({"steps": [1]}, "as many"),
        ({"scales": [0.5, 2.0]}, "scales must lie in (0, 1]"),
        ({"scales": [0.5, "x"]}, "scales takes a tuple of floats"),
        ({"length": 1}, "length must reach"),
        ({"lr": float("inf")}, "lr must be positive and finite"),
        ({"more": 1}, "more"),
    ],
)
def test_a_file_that_is_no_schedule_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "warmup.json"
    linear(2, 5).schedule(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        RecordedWarmup.load(path)
    assert str(path) in str(error.value)


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(ValueError, match="no row has both scale and scheduled_lr"):
        History([{"step": 1, "loss": 2.0}]).schedule()
    with pytest.raises(TypeError, match="decay takes a function"):
        linear(2, 5).schedule().scheduler(sgd(mlp()), decay=0.5)  # type: ignore[arg-type]
