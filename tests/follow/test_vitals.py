"""Vital signs against numbers computed by hand from the same run, and what looking at them leaves behind: nothing."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from tests.helpers import assert_same, batch_of, closure_for, loss_fn, mlp, train
from warmctl import AdaptiveWarmup, Vitals
from warmctl.follow.backward_pass import LARGEST, BackwardPass


class Recorded(nn.Module):
    """A net with one of everything; keeps the inputs and outputs of its last forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU())
        self.head, self.gate = nn.Linear(8, 3), nn.Sigmoid()

    def forward(self, x: Tensor) -> Any:
        self.seen = []
        for module in [*self.body, self.head, self.gate]:
            given, x = x, module(x)
            self.seen.append((given.detach(), x.detach()))
        return x


def run(model: Any, vitals: Any, steps: int = 7, rate: float = 3.0, **options: Any) -> AdaptiveWarmup:
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=rate), model, **options).follow(vitals)
    train(opt, model, range(steps))
    return opt


def test_activations_are_what_the_modules_saw() -> None:
    model = Recorded()
    with torch.no_grad():
        model.body[3].bias[:3] = -100.0  # three dead units
        model.body[1].weight.mul_(3.0)
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=1e-3), model).follow(Vitals(model))
    loss = loss_fn(model, batch_of(0))
    norm, tanh, relu, gate = (model.seen[i] for i in (1, 2, 4, 6))
    opt.backward(loss)
    opt.step()
    row = opt.history[0]
    assert row["vitals/body.1/sigma"] == pytest.approx(float(norm[0].std(-1, correction=0).mean()), rel=1e-5)
    assert row["vitals/body.2/saturated"] == pytest.approx(float((tanh[1].abs() > 0.97).float().mean()))
    assert row["vitals/gate/saturated"] == pytest.approx(float(((gate[1] < 0.03) | (gate[1] > 0.97)).float().mean()))
    dead = float((relu[1] == 0).all(0).float().mean())
    assert row["vitals/body.4/dead"] == pytest.approx(dead) and dead >= 3 / 8
    assert 0.0 < row["vitals/body.2/saturated"] < 1.0


def test_of_images_a_dead_unit_is_a_channel_and_rms_norms_and_group_norms_are_seen() -> None:
    conv = nn.Conv2d(1, 4, 3)
    with torch.no_grad():
        conv.bias.copy_(torch.tensor([-100.0, 100.0, 100.0, 100.0]))
    model = nn.Sequential(conv, nn.ReLU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.RMSNorm(36), nn.Linear(36, 1))
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=1e-4), model).follow(Vitals(model))
    x = torch.randn(5, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rectified, normed = model[:2](x), model[:4](x)
    opt.backward(model(x).square().mean())
    opt.step()
    row = opt.history[0]
    assert row["vitals/1/dead"] == 0.25
    by_group = rectified.reshape(10, -1).std(-1, correction=0).mean()
    assert row["vitals/2/sigma"] == pytest.approx(float(by_group), rel=1e-5)
    assert row["vitals/4/sigma"] == pytest.approx(float(normed.square().mean(-1).sqrt().mean()), rel=1e-5)


def test_gradients_and_updates_are_those_of_the_layers() -> None:
    """The update of a sample is the one before it."""
    model = mlp()
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=3.0), model).follow(Vitals(model, every=1))
    rows = []
    for step in range(5):
        weights = [model[i].weight.detach().clone() for i in (0, 2)]
        opt.step(closure_for(opt, model, batch_of(step)))
        moved = [float((model[i].weight.detach() - w).norm() / w.norm()) for i, w in zip((0, 2), weights, strict=True)]
        rows.append((opt.history[-1], [float(model[i].weight.grad.norm()) for i in (0, 2)], moved))
    for (row, norms, _), (_, _, moved) in zip(rows[1:], rows, strict=False):
        assert [row[f"vitals/{i}/gradient"] for i in (0, 2)] == pytest.approx(norms, rel=1e-6)
        assert [row[f"vitals/{i}/update"] for i in (0, 2)] == pytest.approx(moved, rel=1e-3)
        assert row["vitals/gradient_ratio"] == pytest.approx(norms[0] / norms[1], rel=1e-6)
    assert math.isnan(rows[0][0]["vitals/0/update"])


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("limit", [None, 0.01, 100.0, "longer"])
def test_clipping_is_seen_behind_a_gradient_scaler_too(limit: float | str | None, scale: float) -> None:
    model = mlp()
    params = list(model.parameters())
    opt = AdaptiveWarmup(SGD(params, lr=0.1), model, loss_fn=loss_fn).follow(Vitals(model))
    opt.observe(batch_of(0))
    scale = 1.0 if limit == "longer" else scale  # behind another it is not told from a shortening
    (loss_fn(model, batch_of(0)) * scale).backward()
    largest = max(float(p.grad.abs().max()) for p in params)
    torch._foreach_div_([p.grad for p in params], scale)
    if limit == "longer":
        torch._foreach_mul_([p.grad for p in params], 3.0)
    elif limit is not None:
        nn.utils.clip_grad_norm_(params, float(limit))

    opt.step()
    row = opt.history[0]
    assert row["vitals/clipped"] == (1.0 if limit == 0.01 else 0.0)
    assert row["vitals/float16_headroom"] == pytest.approx(LARGEST / largest, rel=1e-6)


def test_underflow_is_the_share_of_entries_that_float16_has_no_number_for() -> None:
    p = nn.Parameter(torch.zeros(10))
    watched = BackwardPass([p])
    watched.watch()
    (p * torch.tensor([0.0, 1e-9, 1e-8, 1e-7, 1e-6, 1.0, 2.0, 70000.0, 1.0, 1.0])).sum().backward()
    found = watched.take()
    assert found["vitals/float16_underflow"] == pytest.approx(2 / 9)
    assert found["vitals/float16_headroom"] == pytest.approx(65504 / 70000)
    assert not watched.watching and watched.take() == {}


def test_samples_come_at_the_start_every_so_many_steps_and_after_probes() -> None:
    model = mlp()
    opt = run(model, vitals := Vitals(model, every=10), steps=60, rate=0.3, every=35)
    sampled = [row["step"] for row in opt.history if row.get("vitals/0/gradient") is not None]
    probed = [row["step"] for row in opt.history if row["probed"]]
    gaps = [b - a for a, b in pairwise(sampled)]
    assert sampled[0] == 1 and vitals.sampled == len(sampled)
    assert max(gaps) == 10 and min(gaps) >= 2
    for step in probed[1:]:
        assert any(step < s <= step + 2 for s in sampled), (step, sampled)


def test_between_samples_there_are_no_hooks_and_nothing_is_kept() -> None:
    model = Recorded()
    vitals = Vitals(model, every=10)

    def hooks() -> int:
        on_params = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
        return sum(len(m._forward_hooks) for m in model.modules()) + on_params

    opt = AdaptiveWarmup(SGD(model.parameters(), lr=1e-3), model, every=1000)
    opt.sources.captured.capture.remove()
    plain = hooks()
    opt.follow(vitals)
    assert hooks() > plain
    counts = []
    for step in range(21):
        opt.step(closure_for(opt, model, batch_of(step)))
        kept = bool(vitals._before) or bool(vitals._activations._found)
        counts.append((hooks() > plain, kept))
    assert [i + 1 for i, (hooked, _) in enumerate(counts) if hooked] == [
        i + 1 for i, (_, kept) in enumerate(counts) if kept
    ]
    assert sum(hooked for hooked, _ in counts) <= 4

    output = weakref.ref(model.seen[1][1])
    model.seen = []
    gc.collect()
    assert output() is None


def test_probes_and_passes_without_gradient_are_not_looked_at() -> None:
    model = Recorded()
    rows = []
    for evaluate in (False, True):
        torch.manual_seed(0)
        twin = copy.deepcopy(model)
        opt = AdaptiveWarmup(SGD(twin.parameters(), lr=0.3), twin, every=1).follow(Vitals(twin, every=1))
        for step in range(4):
            if evaluate:
                with torch.no_grad():
                    twin(100 * torch.randn(4, 6))
            opt.step(closure_for(opt, twin, batch_of(step)))
        rows.append(list(opt.history))
    assert_same(*rows)


def test_a_copied_model_carries_no_hook_that_does_anything() -> None:
    model = Recorded()
    vitals = Vitals(model, every=1)
    opt = AdaptiveWarmup(SGD(model.parameters(), lr=1e-3), model).follow(vitals)
    twin = copy.deepcopy(model)
    twin(torch.randn(4, 6))
    assert not vitals._activations._found
    train(opt, model, range(1))
    assert opt.metrics["vitals/body.1/sigma"] > 0.0


def test_a_compiled_model_shows_gradients_and_says_so() -> None:
    model = Recorded()
    model.body.compile(backend="eager")
    with pytest.warns(RuntimeWarning, match="does not see activations inside of compiled modules"):
        vitals = Vitals(model)
    opt = run(model, vitals, steps=1)
    assert opt.metrics["vitals/body.0/gradient"] > 0.0
    assert [c for c in opt.metrics if c.endswith("saturated") or c.endswith("sigma")] == ["vitals/gate/saturated"]


def test_of_many_layers_some_are_looked_at_the_first_and_the_last_among_them() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(20)])
    vitals = Vitals(model, layers=4)
    assert list(vitals.weights) == ["0.0", "6.0", "13.0", "19.0"]
    opt = run(nn.Sequential(nn.Linear(6, 4), model, nn.Linear(4, 3)), vitals, steps=1)
    saturated = [column for column in opt.history.columns if column.endswith("/saturated")]
    assert saturated == [f"vitals/{i}.1/saturated" for i in (0, 6, 13, 19)]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="Module, got function"):
        Vitals(F.relu)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Tanh has no trainable weight"):
        Vitals(nn.Tanh())
    for options in ({"every": 0}, {"layers": 0}, {"every": 1.5}, {"every": True}):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            Vitals(mlp(), **options)  # type: ignore[arg-type]
