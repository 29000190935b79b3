"""What can be said on a CPU of what matters on a GPU: memory formats, and values that a step reads back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import assert_same, batch_of, closure_for, closure_of, mlp, monitor, train
from warmctl import AdaptiveWarmup
from warmctl.stability import signals


def images(step: int, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    return x.to(memory_format=layout), (x.mean((1, 2, 3)) > 0).long()


def convolutional(layout: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).to(memory_format=layout)


def trained(layout: torch.memory_format, wrapped: bool = True) -> tuple[nn.Module, Any]:
    model = convolutional(layout)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    opt: Any = monitor(model, base) if wrapped else base
    for step in range(4):
        x, y = images(step, layout)
        opt.step(closure_of(opt, lambda x=x, y=y: F.cross_entropy(model(x), y)))
    return model, opt


def test_channels_last_stays_and_is_measured_as_the_usual_layout_is() -> None:
    model, opt = trained(torch.channels_last)
    bare, _ = trained(torch.channels_last, wrapped=False)
    assert_same(model.state_dict(), bare.state_dict())
    first: Any = model[0]  # type: ignore[index]
    assert first.weight.is_contiguous(memory_format=torch.channels_last)
    assert first.weight.grad.is_contiguous(memory_format=torch.channels_last)
    usual = trained(torch.contiguous_format)[1].history
    assert opt.metrics["probes"] == 4 and not [row for row in opt.history if "failed" in row["reason"]]
    assert list(opt.history["sharpness"]) == pytest.approx(list(usual["sharpness"]), rel=1e-2)


def reads(opt: Any, model: nn.Module) -> set[int]:
    """Values read back from tensors by each of five steps, of which none is probed: on a GPU each waits for it."""
    found = set()
    for step in range(20, 25):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            opt.step(closure_for(opt, model, batch_of(step)))
        found.add(sum(event.count for event in profile.key_averages() if event.key == "aten::_local_scalar_dense"))
    return found


@pytest.mark.parametrize(
    ("options", "phase", "most"),
    [({}, "warmup", 0), ({"max_warmup": 12}, "guard", 0), ({"max_warmup": 12, "after": "hold"}, "done", 1)],
)
def test_values_that_a_step_between_probes_reads(
    options: dict[str, Any], phase: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where reading is not free a step sends what it says in one tensor; the loss of the last is not read on a GPU."""
    monkeypatch.setattr(signals, "loss_is_free", lambda params: False)
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=1e-2), model, every=10**6, **options)
    train(opt, model, range(20))
    assert opt.phase == phase
    found = reads(opt, model)
    assert opt.metrics["probes"] == 1 and max(found) == most
    bare = mlp()
    assert reads(torch.optim.SGD(bare.parameters(), lr=1e-2), bare) == {0}
