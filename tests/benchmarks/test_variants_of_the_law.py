"""Variants that add to the law: a scale for each layer, a known horizon, a way back from a death."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from benchmarks.defaults_are_measured import by_layer, trials
from benchmarks.defaults_are_measured.returns import LOWER, Returns
from benchmarks.defaults_are_measured.trials import Trial
from benchmarks.defaults_are_measured.variants import DEFAULT, VARIANTS
from benchmarks.tasks import runs
from warmctl import AdaptiveWarmup
from warmctl.control.controller import FLOOR, Reading
from warmctl.loss.replay import Replay

OWN, OUTPUT = "a scale by layer, of its own RRC", "a scale by layer, of its output's RRC"
HORIZON, RETURN = "growth by a known horizon at least", "return from a death"


def batches(steps: int, width: int = 4) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(16, width, generator=generator)
        yield x, x[:, :1].sin()


def closure(optimizer: AdaptiveWarmup, model: nn.Module, batch: tuple[Tensor, Tensor], factor: float = 1.0) -> Any:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = factor * nn.functional.mse_loss(model(batch[0]), batch[1])
        loss.backward()
        return loss.detach()

    return evaluate


def network(*more: nn.Module) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), *more)


# -- a scale for each layer -----------------------------------------------------------------------------------------


def test_each_layer_is_a_group_and_nothing_else_changes() -> None:
    model, shared = network(nn.Linear(1, 1)), nn.Parameter(torch.ones(1))
    model[3].weight = model[0].bias = nn.Parameter(torch.ones(1, 1))
    given: Any = [{"params": [*model.parameters()]}, {"params": [shared], "lr": 2.0}]
    optimizer = SGD(given, lr=1.0, momentum=0.8)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert by_layer.split(optimizer, model) == [0, 1, 2, None]
    groups = optimizer.param_groups
    assert [len(group["params"]) for group in groups] == [2, 2, 1, 1]
    assert {p for group in groups for p in group["params"]} == held
    assert [group["lr"] for group in groups] == [1.0, 1.0, 1.0, 2.0] and {g["momentum"] for g in groups} == {0.8}


def changes(part: type[by_layer.LayerChange]) -> list[float]:
    """By layer, of an update of the first alone, by a tenth."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)), torch.randn(8, 4)
    change, replay = part(model), Replay.of_loss(lambda: model(x).sum(), list(model.parameters()))
    change.before(replay)
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    change.after(replay)
    return list(change.by_layer)


def test_what_comes_from_below_is_not_a_layers_own() -> None:
    assert changes(by_layer.LayerChange) == pytest.approx([0.1, 0.1], rel=1e-4)
    first, second = changes(by_layer.OwnChange)
    assert first == pytest.approx(0.1, rel=1e-4) and math.isnan(second)


def test_a_lost_layer_is_not_an_unseen_one() -> None:
    change = by_layer.LayerChange(nn.Linear(1, 1))
    change._typical(
        torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.2, 0.2], [math.inf, 0], [0, 0]])
    )
    assert change.by_layer[0] == pytest.approx(0.2) and change.by_layer[1] == math.inf
    assert math.isnan(change.by_layer[2])


def law(changes: tuple[float, ...], scale: float = 0.1) -> tuple[by_layer.LayerBounds, list[float]]:
    """After one reading of r, and of these RRC over the rate at that scale; and the layers' scales a step later."""
    controller = by_layer.LayerBounds()
    controller.groups = [{by_layer.SHARE: 1.0} for _ in changes]
    controller.layers, controller.seen = [by_layer.Layer() for _ in changes], lambda: changes
    controller.update(1.0, Reading(0.1))
    controller.state.scale = controller.state.highest_scale = scale
    for layer in controller.layers:
        layer.scale = scale
    controller.changed(sorted(changes)[len(changes) // 2], scale)
    controller.state.age = 10.0
    controller.update(1.0)
    return controller, [layer.scale for layer in controller.layers]


def test_the_layer_that_moves_far_is_slowed_and_the_calm_one_is_not() -> None:
    calm, far = 0.001, 1.0
    controller, (first, _, last) = law((calm, calm, far))
    assert first == controller.state.scale == pytest.approx(0.1 * 1.1**4)
    assert last == pytest.approx(0.8 * 0.1)
    for _ in range(20):
        controller.update(1.0)
    assert controller.layers[2].scale == pytest.approx(0.8**2 * 0.1)  # a little above 0.5 / (far / 0.1) is let be
    assert controller.groups[2][by_layer.SHARE] == pytest.approx(0.8**2 * 0.1 / controller.state.scale)
    assert controller.groups[0][by_layer.SHARE] == 1.0
    controller.changed(calm, 0.1)  # far counts over its own rate, which is smaller
    assert controller.layers[2].change.per_rate == pytest.approx(10 * far / controller.groups[2][by_layer.SHARE] ** 0.5)


@pytest.mark.parametrize("variant", [OWN, OUTPUT])
def test_a_single_layer_is_the_law_itself(variant: str) -> None:
    """Below, at and above what RRC allows, in warmup and guard."""
    scales = []
    for name in (DEFAULT, variant):
        torch.manual_seed(0)
        model = nn.Linear(4, 1)
        optimizer = VARIANTS[name](Adam(model.parameters(), lr=3.0), model)
        optimizer.controller.max_warmup = 60
        for batch in batches(80):
            optimizer.step(closure(optimizer, model, batch))
        scales.append([optimizer.phase, *(repr(row["scale"]) for row in optimizer.history)])
    assert scales[0] == scales[1] and scales[0][0] == "guard"
    assert any(float(now) < float(before) for before, now in pairwise(scales[0][1:])), "nothing was cut"


def test_an_unseen_layer_has_the_bound_of_the_median() -> None:
    controller, _ = law((1.0, math.nan, 1.0))
    assert controller._bound(controller.layers[1], 0.05, 1.0, 1.0) == 0.05


def test_after_warmup_a_layer_comes_back_to_where_it_ended() -> None:
    controller, _ = law((0.001, 1.0))
    controller.state.phase, controller.state.settled = 1.0, 0.5
    ended = controller.layers[1].scale
    for step in range(50):
        controller.update(1.0 / (1 + step))  # the allowed scale grows as the rate falls
    assert controller.layers[1].scale == ended < controller.layers[0].scale


@pytest.mark.parametrize("variant", [OWN, OUTPUT])
def test_the_step_is_made_at_the_layers_rates(variant: str) -> None:
    model = network()
    optimizer = VARIANTS[variant](SGD(model.parameters(), lr=0.5), model)
    law: Any = optimizer.controller
    moves: list[float] = []
    for batch in batches(4):
        evaluate = closure(optimizer, model, batch)
        law.layers[1].change.take(1e3, 0.5)  # this one may hardly move
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step(evaluate)
        pairs: Any = zip(model.parameters(), before, strict=True)
        moves = [float(((p.detach() - b) / p.grad).nanmean()) for p, b in pairs]
    rates = [0.5 * layer.scale for layer in law.layers]
    assert [-move for move in moves] == pytest.approx([rates[0], rates[0], rates[1], rates[1]], rel=0.05)
    assert rates[1] < 0.7 * rates[0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]  # the schedule's own again


# -- a known horizon ------------------------------------------------------------------------------------------------


OWN = 0.1 * (10 / 9) ** 0.5
"""What the law makes of a scale of 0.1 there."""


def planned(variant: str, updates: int | None, scale: float = 0.1, age: float = 9.0) -> Any:
    """A law that e holds, so old and so far."""
    model = nn.Linear(2, 2)
    controller = VARIANTS[variant](Adam(model.parameters()), model, updates).controller
    controller.update(1.0, Reading(0.1))
    controller.state.scale = controller.state.highest_scale = scale
    controller.changed(0.01 * scale, scale)
    controller.state.age, controller.state.turned = age, 1.0
    controller.slope.mean, controller.slope.square = -0.2, 0.04
    return controller


@pytest.mark.parametrize(
    ("variant", "updates", "scale"),
    [(DEFAULT, 400, OWN), (HORIZON, None, OWN), (HORIZON, 400, 10 / 80), (HORIZON, 4000, OWN), (HORIZON, 100, 0.2)],
)
def test_a_fifth_of_the_horizon_is_a_linear_warmup(variant: str, updates: int | None, scale: float) -> None:
    assert planned(variant, updates).update(1.0).scale == pytest.approx(scale)


def test_a_plan_does_not_pass_r_or_rrc() -> None:
    controller = planned(HORIZON, 100)
    assert controller.update(1.0, Reading(10.0)).scale == pytest.approx(0.08)
    controller = planned(HORIZON, 100)
    controller.changed(1e4, 0.1)
    assert controller.update(1.0).scale == pytest.approx(0.08)


@pytest.mark.parametrize(("variant", "phase"), [(DEFAULT, "guard"), (HORIZON, "warmup")])
def test_warmup_does_not_end_before_a_fifth_of_the_horizon(variant: str, phase: str) -> None:
    controller = planned(variant, 4000, scale=1.0, age=300.0)
    controller.ending.highest, controller.ending.scale, controller.ending.age = 1.0, 1.0, 10.0
    controller.update(1.0)
    assert controller.phase == phase
    controller.state.age = 800.0
    controller.update(1.0)
    assert controller.phase == "guard"


def test_a_trial_tells_its_number_of_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def measure(job: Any, wrap: Any) -> dict[str, Any]:
        told.append(wrap(Adam((model := nn.Linear(2, 2)).parameters()), model).controller.updates)
        return {}

    monkeypatch.setattr(runs, "measure", measure)
    trials.measure(Trial(HORIZON, 0, "1x", 37))
    assert told == [37]


# -- a way back from a death ----------------------------------------------------------------------------------------


def trained(steps: int = 10) -> tuple[Returns, Any]:
    model = network(nn.BatchNorm1d(1))
    optimizer = VARIANTS[RETURN](Adam(model.parameters(), lr=0.01), model)
    assert isinstance(optimizer, Returns)
    for batch in batches(steps):
        optimizer.step(closure(optimizer, model, batch))
    return optimizer, model


def everything(optimizer: AdaptiveWarmup, model: nn.Module) -> list[Tensor]:
    state = [v for values in optimizer.base.state.values() for v in values.values() if isinstance(v, Tensor)]
    return [t.detach().clone() for t in (*model.state_dict().values(), *state)]


def test_a_run_whose_loss_is_not_finite_goes_on_from_its_best_step() -> None:
    optimizer, model = trained()
    snapshot = optimizer.snapshot
    assert snapshot is not None and snapshot.step > 1
    scale = snapshot.law[0][1]
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    evaluations = []
    batch = next(batches(1))

    def evaluate() -> Any:
        evaluations.append(model[0].weight.isfinite().all())
        return closure(optimizer, model, batch)()

    with pytest.warns(
        RuntimeWarning, match=f"not finite. Parameters and optimizer are put back to step {snapshot.step},"
    ):
        loss = optimizer.step(evaluate)
    assert math.isfinite(loss) and evaluations[-1]
    assert all(bool(t.isfinite().all()) for t in everything(optimizer, model))
    assert optimizer.phase == "guard" and optimizer.controller.state.scale == max(LOWER * scale, FLOOR)


def test_what_is_put_back_is_what_there_was() -> None:
    optimizer, model = trained()
    states: list[tuple[int, list[Tensor]]] = []
    take = optimizer._take

    def noted() -> Any:
        states.append((int(optimizer.counts.steps), everything(optimizer, model)))
        return take()

    optimizer._take = noted  # type: ignore[method-assign]
    for batch in batches(10):
        optimizer.step(closure(optimizer, model, batch))
    optimizer.above = 20
    assert optimizer.snapshot is not None and optimizer.snapshot.step == states[-1][0]
    with pytest.warns(RuntimeWarning, match="above its start for 20 steps"):
        optimizer._go_back(optimizer.snapshot)
    found = everything(optimizer, model)
    assert len(found) == len(states[-1][1]) and all(map(torch.equal, found, states[-1][1]))


def test_a_loss_above_its_start_for_twenty_steps_is_a_death_and_there_is_one_return() -> None:
    optimizer, model = trained()
    with pytest.warns(RuntimeWarning) as said:
        for step, batch in enumerate(batches(60)):
            before = optimizer.returned
            optimizer.step(closure(optimizer, model, batch, factor=1e3))
            if optimizer.returned and not before:
                died = step
        with torch.no_grad():
            model[0].weight.fill_(math.nan)
        optimizer.step(closure(optimizer, model, batch))
    assert died == 19
    assert sum("put back" in str(warning.message) for warning in said) == 1
    assert model[0].weight.isnan().any()


def test_a_run_that_learns_is_the_defaults_bit_for_bit() -> None:
    found = []
    for variant in (DEFAULT, RETURN):
        model = network()
        optimizer = VARIANTS[variant](SGD(model.parameters(), lr=0.1, momentum=0.9), model)
        for batch in batches(40):
            optimizer.step(closure(optimizer, model, batch))
        found.append(everything(optimizer, model))
    assert all(map(torch.equal, *found))
