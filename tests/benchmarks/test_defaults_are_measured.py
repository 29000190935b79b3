"""The variants of the ablation table do what they say: on a quadratic, where every quotient is known."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from benchmarks.defaults_are_measured import decisions, readings
from benchmarks.defaults_are_measured.table import compare
from benchmarks.defaults_are_measured.trials import Trial, trials
from benchmarks.defaults_are_measured.variants import DEFAULT, VARIANTS
from warmctl import AdaptiveWarmup
from warmctl.control.cadence import Cadence
from warmctl.control.controller import Controller, Reading
from warmctl.curvature.operators import HessianOperator
from warmctl.curvature.scaled import ScaledOperator
from warmctl.stability.estimator import SharpnessEstimator


def train(variant: str, rule: Callable[..., Optimizer], steps: int = 6) -> tuple[AdaptiveWarmup, list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(steps, 16, 4), torch.randint(0, 3, (steps, 16))
    optimizer = VARIANTS[variant](rule(model.parameters()), model)
    losses = []
    for i in range(steps):

        def closure(i: int = i) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[i]), y[i])
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    return optimizer, losses


def momentum(params: Any) -> Optimizer:
    return SGD(params, lr=3.0, momentum=0.9)


def adam(params: Any) -> Optimizer:
    return Adam(params, lr=0.1)


@pytest.mark.parametrize("rule", [momentum, adam])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains(variant: str, rule: Callable[..., Optimizer]) -> None:
    optimizer, losses = train(variant, rule)
    assert all(map(math.isfinite, losses))
    assert optimizer.counts.probes >= 1
    assert not any("failed" in str(row["reason"]) for row in optimizer.history)


@pytest.mark.parametrize("variant", [n for n, v in VARIANTS.items() if v.group in ("estimator", "products")])
def test_another_reading_gives_another_run(variant: str) -> None:
    default, other = (train(name, adam, steps=5)[0].meter.last for name in (DEFAULT, variant))
    assert default is not None and other is not None
    assert (default.ratio == other.ratio) == (VARIANTS[variant].wrapper is decisions.LagOne)  # nothing flips


def test_realised_ratio_spends_no_products() -> None:
    optimizer, _ = train("realised ratio", momentum)
    assert optimizer.counts.hvps == 0 and optimizer.counts.probes > 1


# -- on a quadratic -------------------------------------------------------------------------------------------

HESSIAN = torch.diag(torch.tensor([4.0, 1.0, 0.5])) + 0.3 * torch.ones(3, 3)
TRACKED = torch.tensor([0.8, 0.6, 0.0])
GRADIENT = torch.tensor([0.2, -1.0, 2.0])


def probe(part: type, rate: float = 1.9, gradients: tuple[Tensor, ...] = (GRADIENT,)) -> list[float]:
    """Eigenvalues read in turn along plain gradient descent at a rate where A = H·rate/2."""
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=rate)
    estimator = SharpnessEstimator(optimizer, "double_backward", "lanczos", 2)
    estimator.__class__ = part
    found = []
    for gradient in gradients:
        p.grad = gradient.clone()
        estimator.vector = [TRACKED.clone()]
        with HessianOperator(lambda: 0.5 * p @ HESSIAN @ p, [p], "double_backward") as operator:
            scaled = ScaledOperator(operator, *estimator.scaling([p]))
            found.append(estimator._solve(scaled, [p], 0)[0].eigenvalue / (rate / 2))
    return found


def quotient(v: Tensor) -> float:
    return float(v @ HESSIAN @ v / (v @ v))


def ritz(*directions: Tensor) -> float:
    basis = torch.linalg.qr(torch.stack(directions, 1))[0]
    return float(torch.linalg.eigvalsh(basis.T @ HESSIAN @ basis)[-1])


def test_readings_are_the_quotients_that_they_claim() -> None:
    plain = ritz(TRACKED, GRADIENT)
    assert probe(SharpnessEstimator)[0] == pytest.approx(plain, rel=1e-5)
    assert probe(readings.Fresh)[0] == pytest.approx(quotient(TRACKED), rel=1e-5)
    assert probe(readings.Krylov)[0] == pytest.approx(ritz(TRACKED, HESSIAN @ TRACKED), rel=1e-2)
    assert probe(readings.RitzAndBatch)[0] == pytest.approx(math.sqrt(plain * quotient(GRADIENT)), rel=1e-5)
    assert probe(readings.RitzAndFresh)[0] == pytest.approx(math.sqrt(plain * quotient(TRACKED)), rel=1e-5)


def test_batch_sharpness_averages_above_and_below() -> None:
    other = torch.tensor([3.0, 0.0, 1.0])
    first, second = probe(readings.BatchSharpness, gradients=(GRADIENT, other))
    above, below = ([float(g @ M @ g) for g in (GRADIENT, other)] for M in (HESSIAN, torch.eye(3)))
    assert first == pytest.approx(quotient(GRADIENT), rel=1e-5)
    assert second == pytest.approx(sum(above) / sum(below), rel=1e-5)


def test_batch_aware_target_falls_with_the_quotient() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.1)
    estimator = readings.BatchAware(optimizer, "double_backward", "lanczos", 2)
    p.grad, estimator.vector = GRADIENT.clone(), [TRACKED.clone()]
    with HessianOperator(lambda: 0.5 * p @ HESSIAN @ p, [p], "double_backward") as operator:
        share = estimator.measure_on(operator, 0).share
    assert share == pytest.approx((quotient(GRADIENT) / ritz(TRACKED, GRADIENT)) ** 0.25, rel=1e-5)


def test_raw_is_one_number_for_adam_and_the_default_for_sgd() -> None:
    for rule in (adam, momentum):
        p = nn.Parameter(torch.ones(3))
        p.grad = GRADIENT.clone()
        optimizer = rule([p])
        parts = (SharpnessEstimator, readings.Raw)
        plain, raw = (part(optimizer, "auto", "lanczos", 2).scaling([p])[0][0] for part in parts)
        assert len(raw.unique()) == 1 and raw[0] == plain.median()
        assert torch.equal(raw, plain) == (rule is momentum)


@pytest.mark.parametrize("variant", [DEFAULT, "default + lag-1 trigger"])
def test_lag_one_probes_where_the_gradient_flips(variant: str) -> None:
    model = nn.Linear(1, 1, bias=False)
    optimizer = VARIANTS[variant].wrapper(SGD(model.parameters(), lr=0.9), model, every=1000, control=False)
    for _ in range(20):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model.weight.square().sum()  # curvature 2: each step multiplies the weight by 1 − 1.8
            loss.backward()
            return loss

        optimizer.step(closure)
    assert (optimizer.counts.probes > 1) == (variant != DEFAULT)


@pytest.mark.parametrize(
    ("part", "shortens", "probed", "looked_at"),
    [
        (Cadence, True, True, True),
        (decisions.NoShocks, False, False, False),
        (decisions.LooksAlone, True, False, True),
        (decisions.NoShortening, False, True, True),
    ],
)
def test_shocks(part: type[Cadence], shortens: bool, probed: bool, looked_at: bool) -> None:
    """At step 30: probed at the next, looked at five steps later."""
    cadence, probes, looks, short = part(), [], [], []
    for step in range(1, 41):
        probes += [step] if cadence.due(2.0, False) == "shock" else []
        cadence.step(50.0 if step == 30 else 1.0, 2.0, False)
        cadence.probed(0.0, math.nan)
        looks += [step] if cadence.look(warming=step < 20) else []
        short += [step] if cadence.surprise > 1.0 else []
    assert short == [30] * shortens and probes == [31] * probed and [s for s in looks if s > 20] == [35] * looked_at


@pytest.mark.parametrize(("part", "early", "late"), [(Cadence, 2, 2), (decisions.AtOnce, 3, 0)])
def test_probes_in_a_burst(part: type[Cadence], early: int, late: int) -> None:
    """Of those after the first, by step 30 and from then to step 2000."""
    cadence, made = part("auto", 0.0), []
    for step in range(2000):
        if cadence.due(3.0, False):
            made.append(step)
        cadence.step(1.0, 3.0, False)
        if made[-1] == step:
            cadence.probed(3.0, 0.1)
    assert [sum(1 <= s <= 30 for s in made), sum(s > 30 for s in made)] == [early, late]


def test_cap_holds_the_rate_where_the_default_holds_the_scale() -> None:
    applied = {}
    for name in ("absolute cap", DEFAULT):
        controller = decisions.Cap(max_warmup=50) if name == "absolute cap" else Controller(max_warmup=50)
        for step in range(200):
            rate = 1.0 - 0.004 * step
            scale = controller.update(rate, Reading(5.0 * rate) if step < 50 else None).scale
            applied.setdefault(name, []).append(scale * rate)
    capped, frozen = applied["absolute cap"], applied[DEFAULT]
    assert capped[:50] == frozen[:50]
    assert capped[-1] == pytest.approx(capped[49]) and frozen[-1] < 0.5 * frozen[49]


# -- the law without one of its parts ----------------------------------------------------------------------------


def law(variant: str, scale: float = 0.1, age: float = 10.0) -> Controller:
    """Of an Adam run, so old and so far, after one reading of r and one of RRC at that scale."""
    model = nn.Linear(2, 2)
    controller = VARIANTS[variant](Adam(model.parameters()), model).controller
    controller.update(1.0, Reading(0.1))
    controller.state.scale = controller.state.highest_scale = scale
    controller.changed(0.01 * scale, scale)
    controller.state.age = age
    return controller


@pytest.mark.parametrize(("variant", "growth"), [(DEFAULT, 1.1**4), ("growth with age at most", 1.1)])
def test_growth_with_age(variant: str, growth: float) -> None:
    controller = law(variant)
    assert controller.update(1.0).scale == pytest.approx(0.1 * growth)


@pytest.mark.parametrize(("variant", "most"), [(DEFAULT, 0.4), ("growth beyond the evidence", 0.1 * 1.6**4)])
def test_growth_past_the_last_reading(variant: str, most: float) -> None:
    controller = law(variant)
    assert [controller.update(1.0).scale for _ in range(6)][-1] == pytest.approx(most)


@pytest.mark.parametrize(("variant", "scale"), [(DEFAULT, 0.08), ("without r", 0.1 * 1.1**4)])
def test_a_ratio_above_target_cuts_the_default(variant: str, scale: float) -> None:
    assert law(variant).update(1.0, Reading(10.0)).scale == pytest.approx(scale)


@pytest.mark.parametrize(("variant", "scale"), [(DEFAULT, 0.08), ("without RRC", 0.1)])
def test_a_change_above_what_is_allowed_cuts_the_default(variant: str, scale: float) -> None:
    controller = law(variant)
    controller.changed(1000.0, 0.1)
    assert controller.update(1.0).scale == pytest.approx(scale)


@pytest.mark.parametrize(("variant", "scale"), [(DEFAULT, 0.1 * 1.1**4), ("RRC whatever the momentum", 0.08)])
def test_without_momentum_a_step_may_change_more_by_default(variant: str, scale: float) -> None:
    controller = law(variant)
    controller.changed(60.0, 0.1)  # averaged in log: 0.24
    controller.slope.take(0.2)
    assert controller.update(1.0, None, math.nan, 1.0, 1.0).scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("variant", "scale"),
    [
        (DEFAULT, 0.1 / 1.1),
        ("without r", 0.1 / 1.1),
        ("no fall where e is surely against", 0.1 * 1.1**0.5),
        ("RRC as a set point", 0.2),
        ("RRC alone", 0.2),
        ("growth with age at least", 0.11),
    ],
)
def test_what_grows_against_e(variant: str, scale: float) -> None:
    controller = law(variant)
    controller.state.turned = 1.0
    controller.slope.mean, controller.slope.square, controller.slope.readings = -0.2, 0.04, 100.0
    assert controller.update(1.0).scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("variant", "found"),
    [
        (DEFAULT, 0.25),
        ("RRC of the mean layer", 0.275),
        ("RRC of the worst layer", 0.5),
        ("RRC of the last layer", 0.2),
    ],
)
def test_over_layers(variant: str, found: float) -> None:
    model = nn.Linear(2, 2)
    change = VARIANTS[variant](Adam(model.parameters()), model).meter.prober._change
    size, moved = torch.ones(3, 2), torch.tensor([[0.1, math.nan], [0.5, 0.3], [0.2, 0.0]])
    assert float(change._typical(size.where(moved.isfinite(), math.nan), moved)) == pytest.approx(found)


@pytest.mark.parametrize(("variant", "scale"), [(DEFAULT, 0.11), ("no return from a cut", 0.1 * 1.1**0.5)])
def test_a_cut_is_made_good_by_the_default(variant: str, scale: float) -> None:
    controller = law(variant)
    controller.state.highest_scale, controller.state.turned = 0.5, 1.0
    controller.slope.mean = controller.slope.square = 0.0
    controller.slope.take(-0.2)
    controller.slope.square = 1.0  # not surely against it
    assert controller.update(1.0).scale == pytest.approx(scale)


@pytest.mark.parametrize(("variant", "scale"), [(DEFAULT, 0.11), ("guard only cuts", 0.1)])
def test_guard_comes_back_from_a_cut_by_default(variant: str, scale: float) -> None:
    controller = law(variant)
    controller.state.phase, controller.state.settled = 1.0, 0.5
    assert controller.update(1.0).scale == pytest.approx(scale)


@pytest.mark.parametrize(
    ("variant", "mean", "allowed"),
    [
        (DEFAULT, 0.2, 0.5 + 0.4 * (1 - 2 * math.exp(-2))),
        ("RRC not lifted by e", 0.2, 0.5),
        ("e never asked", 0.0, 0.5),
        ("e always agrees", 1.0, 0.5 + 0.4 * (1 - 2 * math.exp(-2))),
    ],
)
def test_what_the_slope_does(variant: str, mean: float, allowed: float) -> None:
    gauge = law(variant).slope
    for _ in range(30):
        gauge.take(0.2)
    assert gauge.mean == pytest.approx(mean) and gauge.allowed_change(1.0) == pytest.approx(allowed)


# -- the table ------------------------------------------------------------------------------------------------


def row(loss: float | None, start: float = 100.0) -> dict[str, Any]:
    return {"loss": loss, "start": start, "overhead": 0.1}


def test_lines_are_mean_logs_against_the_default_cell_by_cell() -> None:
    wanted = [t for t in trials([0, 1], 400, False) if t.variant in (DEFAULT, "hold")]
    losses = {DEFAULT: (8.0, 18.0, 98.0, 8.0), "hold": (8.0, 8.0, None, 18.0)}
    rows = {t.key: row(losses[t.variant][i % 4]) for i, t in enumerate(wanted)}
    default, hold = compare(wanted, rows)
    assert hold["1x"] == pytest.approx((math.log(1.0) + math.log(102 / 100)) / 2)
    assert hold["10x"] == pytest.approx((math.log(10 / 20) + math.log(20 / 10)) / 2, abs=1e-12)
    assert hold["failed"] == 1 and hold["better"] == 1 and hold["worst"].startswith("+0.69 task 1 10x")
    assert default["all"] == default["error"] == 0.0


def test_a_variant_that_lacks_a_cell_is_left_out() -> None:
    wanted = trials([0], 400, False)
    rows = {t.key: row(1.0) for t in wanted if t.variant in (DEFAULT, "hold")}
    rows.pop(Trial("hold", 0, "10x", 400).key)
    assert [line["variant"] for line in compare(wanted, rows)] == [DEFAULT]


def test_code_differs_between_variants_and_not_between_calls() -> None:
    codes = [variant.code() for variant in VARIANTS.values()]
    assert len(set(codes)) == len(codes) and codes == [variant.code() for variant in VARIANTS.values()]
