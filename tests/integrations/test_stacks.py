"""What a plain loop may be built of: each trains level with the bare optimizer, accumulates, resumes, logs."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch

from tests.helpers import assert_same, weights
from tests.integrations.helpers import decisions, failures
from tests.integrations.stacks import STACKS, Script
from warmctl.record.history import History

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance", "ignore:.*Dynamo")
BEHIND = 0.1
"""Part of what the bare optimizer takes off the loss that the wrapped one may lack at the end."""


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    pytest.importorskip("lion_pytorch")
    torch._dynamo.reset()


every = pytest.mark.parametrize("name", [name for name in STACKS if name != "plain PyTorch"])
"""But for the one that has its own tests of these, in tests/loss and tests/optimizer."""


@pytest.mark.stack(("plain PyTorch", "torch.compile", "two optimizers"), "level with bare")
@pytest.mark.parametrize("name", ["plain PyTorch", "torch.compile", "two optimizers"])
def test_level_with_bare_training_at_a_usual_rate(name: str) -> None:
    bare, script = Script(name, wrapped=False), Script(name)
    start = script.loss
    reached, ours = (s.train(range(150)).loss for s in (bare, script))
    assert reached < 0.5 * start, "the rate is a sane one"
    assert start - ours > (1 - BEHIND) * (start - reached), (start, reached, ours)
    assert script.opt.phase != "warmup" and not failures(list(script.opt.history))


@pytest.mark.stack(("torch.compile", "two optimizers", "timm-style groups", "torchtitan-style groups"), "resume exact")
@every
def test_resumed_in_mid_warmup_it_goes_on_bit_for_bit(name: str) -> None:
    script = Script(name, every=3).train(range(8))
    assert script.opt.phase == "warmup"
    file = io.BytesIO()
    torch.save((script.model.state_dict(), script.opt.state_dict()), file)
    script.train(range(8, 16))
    file.seek(0)
    model, state = torch.load(file, weights_only=True)
    resumed = Script(name, every=3)
    with torch.no_grad():
        next(resumed.model.parameters()).zero_()
    resumed.model.load_state_dict(model)
    resumed.opt.load_state_dict(state)
    resumed.train(range(8, 16))
    assert_same(weights(resumed.model), weights(script.model))
    assert decisions(list(resumed.opt.history)) == decisions(list(script.opt.history))[8:]
    assert any(row["probed"] for row in resumed.opt.history)


@pytest.mark.stack(
    (
        "torch.compile",
        "two optimizers",
        "other packages' optimizers",
        "timm-style groups",
        "torchtitan-style groups",
    ),
    "accumulation",
)
@every
def test_two_micro_batches_are_measured_as_the_whole_batch(name: str) -> None:
    whole, parts = Script(name, dtype=torch.float64, every=2), Script(name, dtype=torch.float64, every=2)
    whole.train(range(8))
    parts.train(range(8), accumulation=2)
    for expected, found in zip(whole.opt.history, parts.opt.history, strict=True):
        assert found["probed"] == expected["probed"]
        assert found["stability_ratio"] == pytest.approx(expected["stability_ratio"], rel=1e-3, nan_ok=True)
    assert parts.opt.metrics["probes"] >= 3 and not failures(list(parts.opt.history))


@pytest.mark.stack(
    (
        "torch.compile",
        "two optimizers",
        "other packages' optimizers",
        "timm-style groups",
        "torchtitan-style groups",
    ),
    "AMP",
)
@every
def test_bfloat16_autocast_is_measured_and_monitoring_leaves_no_trace(name: str) -> None:
    bare = Script(name, wrapped=False).train(range(8), autocast=True)
    monitored = Script(name, control=False, every=2).train(range(8), autocast=True)
    assert_same(weights(monitored.model), weights(bare.model))
    rows = list(monitored.opt.history)
    exact = list(Script(name, control=False, every=2).train(range(8)).opt.history)
    assert not failures(rows) and rows[-1]["probes"] >= 3
    assert rows[-1]["stability_ratio"] == pytest.approx(exact[-1]["stability_ratio"], rel=0.5)


@pytest.mark.stack(
    (
        "torch.compile",
        "two optimizers",
        "other packages' optimizers",
        "timm-style groups",
        "torchtitan-style groups",
    ),
    "logs",
)
@every
def test_what_is_logged_is_finite_and_what_is_recorded_is_read_back(name: str, tmp_path: Path) -> None:
    script = Script(name)
    script.opt.history.to_jsonl(tmp_path / "run.jsonl")
    for step in range(6):
        logged = script.train([step]).opt.scalars()
        assert logged["warmup/step"] == step + 1 and 0 < logged["warmup/scale"] <= 1
        assert all(type(value) is float and math.isfinite(value) for value in logged.values())
        json.dumps(logged, allow_nan=False)
    assert "warmup/stability_ratio" in logged
    read, kept = History.from_jsonl(tmp_path / "run.jsonl"), script.opt.history
    assert [row["scale"] for row in read] == [row["scale"] for row in kept] and len(kept) == 6
