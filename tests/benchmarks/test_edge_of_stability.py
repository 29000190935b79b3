"""The oracle and the verdicts of the benchmark of published results: by closed forms, made-up rows, and short runs."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from benchmarks.edge_of_stability import (
    __main__ as command,
    again,
    controlled,
    heatmap as maps,
    held,
    measured,
    monitored,
    problem,
    series,
    verdicts,
    wide,
)
from benchmarks.edge_of_stability.heatmap import Heatmap
from benchmarks.edge_of_stability.problem import SETTINGS, Setting
from benchmarks.harness.data import Batch
from benchmarks.harness.results import Row
from tests.problems_closed_form import dense_hessian

GD, NESTEROV, ADAM, FAST_ADAM = SETTINGS


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_batch(size: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 40, generator=generator), torch.randn(size, 10, generator=generator)


def linear_sharpness(x: torch.Tensor) -> float:
    """λ_max for a linear layer with bias under the square loss: that of the inputs' second moments, a 1 appended."""
    x = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    return torch.linalg.eigvalsh(x.T @ x / len(x))[-1].item()


def linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer and random data in place of the training problem."""
    for module in (monitored, controlled, held, wide):
        monkeypatch.setattr(module, "signals", lambda count: random_batch(count))
        monkeypatch.setattr(module, "tanh_mlp", lambda seed, width=4: nn.Linear(40, 10))


def run(start: float = 0.4, settled: float = 1.0, back: int | None = None) -> Row:
    return {"start": start, "settled": settled, "back": back, "oracle error": 0.01}


# -- the oracle -------------------------------------------------------------------------------------------


def test_oracle_is_the_dense_eigenvalue_for_gradient_descent() -> None:
    model, batch = problem.tanh_mlp(0, width=4), random_batch()
    exact = torch.linalg.eigvalsh(torch.from_numpy(dense_hessian(model, problem.square_loss, batch)))[-1].item()
    assert problem.oracle_ratio(model, batch, SGD(model.parameters(), lr=0.3), 2.0) == pytest.approx(0.15 * exact)


@pytest.mark.parametrize("steps", [0, 3])
def test_oracle_is_the_dense_eigenvalue_for_adam(steps: int) -> None:
    model, batch = problem.tanh_mlp(0, width=4), random_batch()
    adam = Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
    for _ in range(steps):
        adam.step(problem.closure_for(adam, model, batch))
    exact = dense_hessian(model, problem.square_loss, batch)
    before = [p.detach().clone() for p in model.parameters()]
    value = problem.oracle_ratio(model, batch, adam, 38.0)
    adam.step(problem.closure_for(adam, model, batch))  # now its state holds the second moment of that step
    square = torch.cat([adam.state[p]["exp_avg_sq"].flatten() for p in model.parameters()]).double()
    root = ((square / (1 - 0.99 ** (steps + 1))).sqrt() + 1e-8).rsqrt()
    scaled = torch.from_numpy(exact) * root[:, None] * root
    assert value == pytest.approx(1e-2 / 38 * torch.linalg.eigvalsh(scaled)[-1].item(), rel=1e-4)
    assert any((p != b).any() for p, b in zip(model.parameters(), before, strict=True))


def test_oracle_of_another_loss_and_without_weights_of_small_gradient() -> None:
    model, batch = problem.tanh_mlp(0, width=4), random_batch()
    batch = batch[0], batch[1].softmax(1)
    exact = torch.from_numpy(dense_hessian(model, problem.cross_entropy, batch))
    sgd = SGD(model.parameters(), lr=1.0)
    sgd.zero_grad()
    problem.cross_entropy(model, batch).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).abs()
    kept = gradient > 0.3 * gradient.max()
    for matrix, least in ((exact, 0.0), (exact[kept][:, kept], 0.3)):
        value = problem.oracle_ratio(model, batch, sgd, 1.0, problem.cross_entropy, least)
        assert value == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item())
    assert 1 < kept.sum() < len(kept)


@pytest.mark.parametrize("rule", [partial(SGD, lr=0.3), partial(Adam, lr=1e-2, betas=(0.9, 0.99))])
def test_ratio_along_the_update_is_that_of_the_dense_hessian(rule: Any) -> None:
    model, batch = problem.tanh_mlp(0, width=4), random_batch()
    optimizer = rule(model.parameters())
    closure = problem.closure_for(optimizer, model, batch)
    for _ in range(3):
        optimizer.step(closure)
    before = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
    exact = torch.from_numpy(dense_hessian(model, problem.square_loss, batch))
    value = held.by_update(model, batch, optimizer)
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in model.parameters()]).double())
    optimizer.step(closure)  # as the trial left it, so this is the step that was measured
    update = torch.cat([p.detach().flatten() for p in model.parameters()]).double() - before
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    assert value == pytest.approx((-0.5 * update @ exact @ update / (gradient @ update)).item(), rel=1e-4)


def test_a_quadratic_is_held_at_the_rates_of_its_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    linear(monkeypatch)
    rate = 2 / linear_sharpness(random_batch(256)[0])
    for target in controlled.TARGETS:
        found = held.held(partial(SGD, lr=9.0), held.by_sharpness, target, seed=0, steps=5)
        assert found["rates"][1] == pytest.approx([target * rate] * 5, rel=1e-3) and found["ratio"] == target
    on = held.held(partial(SGD, lr=9.0), held.by_update, 1.0, seed=0, steps=5)["losses"][1]
    assert on == pytest.approx([on[0]] * 5, rel=1e-3)  # at the edge the step ends as high as it began


def test_a_monitored_quadratic_stays_at_the_ratio_of_its_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    linear(monkeypatch)
    found = monitored.monitored(Setting(partial(SGD, lr=0.2, momentum=0.9), 3.8, 1.0), seed=0, steps=60)
    exact = 0.2 * linear_sharpness(random_batch(256)[0]) / 3.8
    assert found["settled"] == pytest.approx(exact, rel=1e-3)
    assert list(found["oracle"].values()) == pytest.approx([exact] * 5)
    assert found["oracle error"] < 0.1


def test_bias_is_the_mean_over_batches_that_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitored, "BIAS", {16: 1.0})
    batch, generator = random_batch(64), torch.Generator().manual_seed(0)
    found = monitored.batch_sharpness(nn.Linear(40, 10), batch, epochs=1, most=99)
    parts = torch.randperm(64, generator=generator).split(16)
    exact = [linear_sharpness(batch[0][rows]) / linear_sharpness(batch[0]) for rows in parts]
    assert found["16"]["mean"] == pytest.approx(sum(exact) / 4, rel=2e-3) and found["16"]["batches"] == 4
    assert found["all"] == pytest.approx(linear_sharpness(batch[0]), rel=1e-3)


def test_bias_of_another_loss_is_of_its_dense_hessians(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitored, "BIAS", {16: 1.0})
    x, y = random_batch(32)
    model, batch = nn.Linear(40, 10), (x, y.softmax(1))

    def exact(rows: torch.Tensor) -> float:
        hessian = dense_hessian(model, problem.cross_entropy, (batch[0][rows], batch[1][rows]))
        return torch.linalg.eigvalsh(torch.from_numpy(hessian))[-1].item()

    found = monitored.batch_sharpness(model, batch, 1, 99, problem.cross_entropy)
    parts = torch.randperm(32, generator=torch.Generator().manual_seed(0)).split(16)
    mean = sum(exact(rows) for rows in parts) / 2 / exact(torch.arange(32))
    assert found["16"]["mean"] == pytest.approx(mean, rel=2e-3)


# -- short runs -------------------------------------------------------------------------------------------


def test_gradient_descent_on_a_small_network_rises_to_the_edge_and_stays() -> None:
    found = monitored.monitored(SETTINGS[GD], seed=0, steps=700, width=16)
    assert found["start"] < 0.7 and found["settled"] == pytest.approx(1, abs=0.1)
    assert found["phase"] == "guard" and found["probes"] == 70  # it goes on measuring when "warmup" is over


def test_weights_of_rounding_size_make_adams_start_and_the_meter_leaves_them_out() -> None:
    found = wide.wide(ADAM, seed=0, steps=1)
    assert 0 < found["left out"] < 10 and found["weights"] == 400 * 40 + 400 * 400 + 400 * 10 + 810
    assert found["start"] == pytest.approx(found["without"], rel=0.01) and found["oracle"]["1"] > 2 * found["start"]


def test_the_oracles_first_ratio_stands_in_for_the_meters() -> None:
    series = [[1 + 10 * i for i in range(12)], [0.5, 0.9, *[1.0] * 10]]
    by_meter = {"start": 0.5, "back": None, "series": series, "oracle": {"1": 5.0}}
    assert wide.by_oracle(by_meter) == by_meter | {
        "start": 5.0,
        "back": 11,
        "series": [series[0], [5.0, *series[1][1:]]],
    }
    assert wide.by_oracle(by_meter | {"oracle": {"1": 0.9}})["back"] is None


def test_a_deeper_map_is_of_deeper_networks() -> None:
    blocks = [len(maps.small_gpt(layers).build(0).blocks) for layers in (maps.LAYERS, measured.DEEP)]
    assert blocks == [3, 6]


def test_a_run_that_diverges_is_kept_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    linear(monkeypatch)
    lost = monitored.monitored(Setting(partial(SGD, lr=1e4), 2.0, 1.0), seed=0, steps=60)
    assert 1 < lost["diverged"] < 60 and lost["series"][0][0] == 1
    assert "1 of 2 diverged" in verdicts.judge_edge(GD, [run(settled=1.0), lost])["measured"]
    assert not any(verdicts.judge_edge(GD, runs)["reproduced"] for runs in ([run(), lost], [lost]))
    assert not any(row["reproduced"] for row in verdicts.judge_start(ADAM, [run(start=5, back=10), lost]))
    held_run = held.held(partial(SGD, lr=1.0), lambda *_: 1e-4, 1.0, seed=0, steps=60)
    good = {"loss": 1.0, "ratio": 1.0}
    row = verdicts.judge_targets("GD", [good | {"ratio": 0.5, "loss": 2.0}] * 2, [good, held_run])
    assert "0.5; r held 0.50 and 1.00; 1 of 4 diverged" in row["measured"] and not row["reproduced"]
    assert not verdicts.judge_targets("GD", [held_run], [held_run])["reproduced"]
    assert series.diverged({1: 1.0, 2: math.nan, 3: 1.0, 4: 1.0}, last=2) is None  # it came back


def test_a_run_that_diverges_counts_as_chance() -> None:
    found = maps.warmed_up("adam", lr=1e30, warmup=0, steps=3, seed=0)
    assert found["diverged"] and found["loss"] == found["chance"]


def test_warmup_is_linear_and_ends_at_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = Adam.step

    def noted(self: Adam, closure: Any = None) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, closure)

    monkeypatch.setattr(Adam, "step", noted)
    maps.warmed_up("seeded", lr=1e-2, warmup=4, steps=6, seed=0)
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


# -- verdicts ---------------------------------------------------------------------------------------------


def test_back_is_where_the_median_of_the_next_probes_is_at_the_edge() -> None:
    ratios = {1 + 10 * i: r for i, r in enumerate([5.0, 3.0, 0.9, 2.0, 2.0, 2.0, 2.0, 2.0, *[1.0] * 20])}
    assert monitored.back_at(ratios) == 81  # 21 is below by itself, but five of the ten from it on are above
    assert monitored.back_at({1: 5.0, **{1 + 10 * i: 1.0 for i in range(1, 20)}}) == 11
    assert monitored.back_at({step: 2.0 for step in ratios}) is None
    assert monitored.summary_of({step: r / 10 for step, r in ratios.items()}, 300)["back"] is None


@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_settled_ratio_decides_on_the_edge(name: str) -> None:
    expected = SETTINGS[name].expected
    assert verdicts.judge_edge(name, [run(settled=expected + 0.04), run(settled=expected)])["reproduced"]
    assert not verdicts.judge_edge(name, [run(settled=expected), run(settled=expected + 0.06)])["reproduced"]


def test_sharpness_that_starts_over_the_edge_has_not_risen_to_it() -> None:
    assert not verdicts.judge_edge(GD, [run(start=1.2)])["reproduced"]
    assert verdicts.judge_edge(NESTEROV, [run(start=1.2)])["reproduced"]


def test_adams_start_and_return() -> None:
    def reproduced(*runs: Row) -> list[bool]:
        return [row["reproduced"] for row in verdicts.judge_start(ADAM, runs)]

    assert reproduced(run(start=190 / 38, back=400)) == [True, True]
    assert reproduced(run(start=190 / 38, back=1100)) == [True, False]
    assert reproduced(run(start=190 / 38, back=400), run(start=190 / 38)) == [True, False]
    assert reproduced(run(start=3.5 * 190 / 38, back=400)) == [False, True]
    assert reproduced(run(start=0.1)) == [False, False]


def bias_row(*means: float) -> Row:
    return {"trained": {str(b): {"mean": m} for b, m in zip(monitored.BIAS, means, strict=True)}, "oracle error": 0.0}


def test_bias_must_fall_and_be_near_every_figure() -> None:
    assert verdicts.judge_bias(bias_row(9.0, 2.2, 1.5, 1.0))["reproduced"]
    assert not verdicts.judge_bias(bias_row(2.6, 2.2, 1.5, 1.0))["reproduced"]
    assert not verdicts.judge_bias(bias_row(9.0, 1.9, 1.95, 1.0))["reproduced"]
    assert not verdicts.judge_bias(bias_row(9.0, 2.2, 1.5, 1.1))["reproduced"]


def test_the_edge_must_beat_below_the_edge_with_every_seed_and_both_targets_held() -> None:
    def judged(*on: float, held: tuple[float, float] = (0.5, 1.0)) -> bool:
        below = [{"loss": 1.0, "ratio": held[0], "oracle error": 0.0}] * len(on)
        rows = [{"loss": loss, "ratio": held[1], "oracle error": 0.0} for loss in on]
        return bool(verdicts.judge_targets("GD", below, rows)["reproduced"])

    assert judged(0.5, 0.9, held=(0.6, 1.05)) and not judged(0.5, 1.1)
    assert not judged(0.5, 0.9, held=(1.0, 1.0)) and not judged(0.5, 0.9, held=(0.5, 0.7))


def heatmap(*adam: list[float], seeded: list[float] | None = None) -> Heatmap:
    other = [seeded or adam[0]] * len(adam)
    rates = tuple(10 ** (-3 + i / 2) for i in range(4))
    diverged = {rule: [[False] * 4] * len(adam) for rule in ("adam", "seeded")}
    return Heatmap(rates, tuple(range(len(adam))), {"adam": list(adam), "seeded": other}, diverged, chance=3.0)


NARROW, WIDE, WIDER = [1.0, 1.9, 2.1, 3.0], [1.5, 1.0, 1.9, 2.1], [2.0, 1.5, 1.0, 2.0]


def test_boundary_is_the_largest_rate_that_learns_half_of_the_way() -> None:
    found = heatmap(NARROW, WIDE, [3.0] * 4)
    assert found.boundary("adam") == pytest.approx([10**-2.5, 1e-2, 0.0])
    assert found.boundary("seeded") == pytest.approx([10**-2.5] * 3)


def test_the_boundary_must_move_by_half_a_decade_and_not_come_back() -> None:
    def reproduced(*rows: list[float], seeded: list[float] | None = None) -> list[bool]:
        return [row["reproduced"] for row in verdicts.judge_heatmap(heatmap(*rows, seeded=seeded))]

    assert reproduced(NARROW, WIDE, WIDER) == [True, False, False]
    assert reproduced(NARROW, NARROW, seeded=WIDE) == [False, False, True]
    assert not reproduced(WIDE, NARROW)[0]
    assert not reproduced(NARROW, WIDER, NARROW, WIDER)[0]
    assert not reproduced([3.0] * 4, WIDER)[0]  # a map without a boundary at W=0 has none that could move


def attempt(cause: str, reproduced: bool) -> again.Try:
    return again.Try(cause, "", {"reproduced": reproduced})


def test_the_cause_is_the_first_change_that_reproduces_and_the_claim_if_none_does() -> None:
    def causes(first: bool, *reproduced: bool) -> list[str | None]:
        tries = [attempt(str(i), met) for i, met in enumerate(reproduced)]
        return [row["cause"] for row in again.judged({"reproduced": first}, tries)]

    assert causes(False, False, True, True) == [None, "1", None]
    assert causes(False, False, False) == [None, "claim"]
    assert causes(True, True, False) == [None, None]


def test_every_claim_that_was_asked_again_is_judged_on_its_own_runs() -> None:
    """Where nothing changes the verdict, the claim is at fault; where all of it does, what was changed."""
    maps_ = {False: heatmap(NARROW, NARROW), True: heatmap(NARROW, WIDER, seeded=WIDE)}
    maps_[True].losses["seeded"][:] = [WIDE, [3.0, 3.0, 1.0, 1.0]]
    starts = {name: SETTINGS[name].start / SETTINGS[name].edge for name in (ADAM, FAST_ADAM)}

    def wide_run(start: float) -> Row:
        around = {
            "without": 0.1,
            "left out": 3,
            "weights": 9,
            "oracle": {"1": start},
            "series": [[1, 11], [start, 1.0]],
        }
        return run(start=start, back=1 if start > 1 else None) | around

    def measured_as(good: bool) -> list[str | None]:
        pairs = {
            name: {0.5: [{"loss": 1.0, "ratio": 0.5}], 1.0: [{"loss": 0.5 if good else 2.0, "ratio": 1.0}]}
            for name in controlled.CONTROLLED
        }
        found = measured.Measured(
            {name: [run(start=0.5)] for name in SETTINGS}, [], bias_row(2, 1.5, 1.1, 1.0),
            {name: {0.5: [{"loss": 1.0, "ratio": 0.9}], 1.0: [{"loss": 0.5, "ratio": 1.0}]} for name in pairs},
            maps_[False],
            measured.Again(
                {name: [wide_run(start if good else 0.5)] for name, start in starts.items()},
                bias_row(*monitored.BIAS.values()) if good else bias_row(2, 1.5, 1.1, 1.0),
                maps_[good], {"λ_max": pairs},
            ),
        )  # fmt: skip
        return [row["cause"] for row in again.asked_again(found) if row.get("cause")]

    assert measured_as(good=True) == ["size"] * 4 + ["depth"] * 2 + ["loss"] + ["law"] * 2
    assert measured_as(good=False) == ["claim"] * 9


def test_measured_once_and_taken_over_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.harness.results.RESULTS", tmp_path)
    monkeypatch.setattr(measured, "WIDTHS", (4,))
    linear(monkeypatch)
    sizes = {"seeds": 1, "steps": 41, "controlled_steps": 60, "epochs": 2, "most": 2, "map_steps": 2, "map_seeds": 1}
    sizes |= {"wide_steps": 41, "held_steps": 4}
    monkeypatch.setattr(command, "FULL", measured.Size(**sizes, rates=(1e-3, 1e-2), warmups=(2,)))
    command.main(quick=False)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"edge_of_stability{end}" for end in (".json", ".png", "-heatmap.png")}
    first = (tmp_path / "edge_of_stability.json").read_text()
    for drawn in ("draw", "draw_heatmap"):
        monkeypatch.setattr(command, drawn, lambda *_: None)
    monkeypatch.setattr(measured, "controlled", lambda *_: pytest.fail("measured twice"))
    command.main(quick=False)
    assert (tmp_path / "edge_of_stability.json").read_text() == first
    monkeypatch.setattr(measured, "library", lambda: "edited")
    monkeypatch.setattr(measured, "monitored", lambda *_: pytest.fail("measured again"))
    command.main(quick=False, only_report=True)
    assert (tmp_path / "edge_of_stability.json").read_text() == first
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        command.main(quick=False)


def test_spread_and_thinning() -> None:
    assert verdicts.spread([1.0, 3.0, 2.0], "{:.0f}") == "2 [1, 3]" and verdicts.spread([1.0], "{:.1f}") == "1.0"
    steps, values = series.thinned({step: math.sqrt(step) for step in range(1, 5001)})
    assert steps[0] == 1 and steps[-1] == 5000 and len(steps) < 250 and values[-1] == pytest.approx(70.71)
