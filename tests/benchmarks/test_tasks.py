"""Tasks drawn by seed: the same wherever they are drawn, all families among them, and a report that can be checked."""

from __future__ import annotations

import json
import math
import random
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.tasks import report, runs
from benchmarks.tasks.__main__ import app
from benchmarks.tasks.families import FAMILIES
from benchmarks.tasks.optimizers import GROUPS, OPTIMIZERS, ORDER
from benchmarks.tasks.other_families import OTHER_FAMILIES
from benchmarks.tasks.policies import LINEAR, LossDriven, linear, loss_law
from benchmarks.tasks.tasks import CENTRE, DEVELOPMENT, OTHER, RATES, TEST, task
from warmctl.stability.update_rules import update_rule

FIRST = [*range(len(FAMILIES)), *OTHER[: len(OTHER_FAMILIES)]]
QUICK = [seed for seed in range(60) if task(seed).family in ("MLP", "regression", "factorisation", "next symbol")]


def test_the_splits_have_no_seed_in_common() -> None:
    assert len({*DEVELOPMENT, *TEST, *OTHER}) == len(DEVELOPMENT) + len(TEST) + len(OTHER)


def test_every_family_and_every_optimizer_occurs_in_a_few_seeds() -> None:
    assert {task(seed).family for seed in FIRST} == {*FAMILIES, *OTHER_FAMILIES} and not {*FAMILIES} & {*OTHER_FAMILIES}
    assert {task(seed).rule_name for seed in range(len(ORDER))} == set(OPTIMIZERS)
    assert {name for members in GROUPS.values() for name in members} == set(OPTIMIZERS)


def test_two_optimizers_at_least_have_no_registered_rule() -> None:
    unknown = set()
    for seed in range(len(ORDER)):
        optimizer = task(seed).optimizer(task(seed).build(0), 1e-3)
        if update_rule(optimizer) is None:
            unknown.add(type(optimizer).__name__)
    assert len(unknown) >= 2


@pytest.mark.parametrize("seed", FIRST, ids=lambda seed: task(seed).family)
def test_a_task_is_the_same_whenever_it_is_drawn(seed: int) -> None:
    drawn = task(seed)
    task.cache_clear()
    again = task(seed)
    assert again is not drawn
    assert again.choices == drawn.choices
    for p, q in zip(drawn.build(0).parameters(), again.build(0).parameters(), strict=True):
        assert torch.equal(p, q)
    for one, other in zip(islice(drawn.batches(1), 2), islice(again.batches(1), 2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert drawn.evaluate(drawn.build(0)) == again.evaluate(again.build(0))


@pytest.mark.parametrize("seed", FIRST, ids=lambda seed: task(seed).family)
def test_weights_and_batches_depend_on_the_run_and_leave_the_global_streams_alone(seed: int) -> None:
    drawn = task(seed)
    before = torch.get_rng_state(), random.getstate()
    weights = [torch.cat([p.flatten() for p in drawn.build(run).parameters()]) for run in (0, 1)]
    batches = [next(drawn.batches(run))[0] for run in (0, 1)]
    drawn.evaluate(drawn.build(0))
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert not torch.equal(*weights) or drawn.family == "raw features"  # which starts at zero
    assert not torch.equal(*batches)


@pytest.mark.parametrize("seed", FIRST, ids=lambda seed: task(seed).family)
def test_a_small_step_goes_downhill(seed: int) -> None:
    """On the batch it was made on, at a rate far below the centre of the task's eight."""
    drawn = task(seed)
    model = drawn.build(0)
    batch = next(drawn.batches(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = drawn.loss(model, batch)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert drawn.loss(model, batch) < before


def test_the_eight_rates_are_half_decades_round_the_search() -> None:
    rates = task(QUICK[0]).rates()
    assert len(rates) == RATES and CENTRE < RATES
    for low, high in pairwise(rates):
        assert high / low == pytest.approx(10**0.5, rel=0.01)


def test_linear_warmup_reaches_the_peak_and_decays_to_a_tenth() -> None:
    assert [linear(t, 100, 10) for t in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert linear(100, 100, 10) == pytest.approx(0.1)
    assert linear(0, 100, 0) == 1.0


def test_the_loss_driven_warmup_rises_as_the_loss_falls_and_decays_after_its_peak() -> None:
    turn, k0, k1, k2 = loss_law(LossDriven.RISE)
    assert turn / (k0 + k1 * turn + k2 * turn**2) == pytest.approx(1.0)
    assert 1 / (k0 + k1 + k2) == pytest.approx(1 / LossDriven.RISE)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3.0)
    policy = LossDriven(optimizer, 3.0, steps=100)
    seen = [optimizer.param_groups[0]["lr"]]
    for loss in (2.0, 1.6, 1.2, 0.8, 1.99 * turn, 2.0, 2.0):
        policy.tick(loss)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen[0] == pytest.approx(3.0 / LossDriven.RISE)
    assert seen[1] < seen[2] < seen[3] < seen[4] < seen[5] == 3.0
    assert 3.0 > seen[6] > seen[7]


# -- runs ---------------------------------------------------------------------------------------------------


def test_a_run_is_repeatable_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    jobs = [runs.Job(QUICK[0], 3, policy, 5, 0) for policy in ("linear-10%", "warmctl")]
    first = runs.run(jobs, path)
    lines = path.read_text().splitlines()
    path.write_text(lines[0] + "\n" + lines[1][:40])  # killed in the middle of the second row
    again = runs.run(jobs, path)
    assert len(path.read_text().splitlines()) == 3
    for job in jobs:
        assert again[job]["loss"] == first[job]["loss"] and again[job]["updates"] == 5
    assert again[jobs[1]]["overhead"] > 0.0


def test_a_row_of_another_code_is_renewed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    job = runs.Job(QUICK[0], 3, "linear-0%", 2, 0)
    row = runs.run([job], path)[job]
    path.write_text(json.dumps({**row, "code": "older", "loss": -1.0}) + "\n")
    assert runs.run([job], path)[job]["loss"] == row["loss"]


def test_each_look_at_a_split_that_is_kept_for_the_end_is_written_down(tmp_path: Path) -> None:
    for split in ("test", "other"):
        CliRunner().invoke(app, ["report", "--split", split, "--rows", str(tmp_path)])
    assert len((tmp_path / "looks.txt").read_text().splitlines()) == 2
    CliRunner().invoke(app, ["report", "--rows", str(tmp_path)])
    assert len((tmp_path / "looks.txt").read_text().splitlines()) == 2


# -- report -------------------------------------------------------------------------------------------------


def rows(seed: int, losses: dict[str, list[float | None]], start: float = 2.0) -> list[dict[str, Any]]:
    """One task at rates 0, 1, 2…; schedules that are not given end at the start loss."""
    rates = len(next(iter(losses.values())))
    made = []
    for policy in {**dict.fromkeys(LINEAR), **losses}:
        for rate in range(rates):
            loss = losses.get(policy, [start] * rates)[rate]
            made.append(
                {
                    "seed": seed, "run": 0, "rate": rate, "policy": policy, "loss": loss, "start": start,
                    "family": "MLP", "optimizer": "Adam", "overhead": 0.1, "cpu_seconds": 2.0, "updates": 10,
                }
            )  # fmt: skip
    return made


HAND = {"linear-0%": [1.5, 1.0, 1.9, None], "linear-20%": [1.6, 1.2, 1.1, None], "linear-50%": [1.7, 0.9, 0.8, 1.9]}


def test_regret_is_against_the_same_rate_below_the_best_and_against_the_best_above_it() -> None:
    (found,) = report.gather(rows(0, {**HAND, "warmctl": [1.5, 1.1, 1.2, 1.3]}))
    soft = 0.02 * 2.0
    assert found.best == 1
    assert found.regret("warmctl", -1) == pytest.approx(0.0)
    assert found.regret("warmctl", 0) == pytest.approx(math.log((1.1 + soft) / (1.0 + soft)))
    assert found.regret("warmctl", 1) == pytest.approx(math.log((1.2 + soft) / (1.0 + soft)))
    assert found.regret("warmctl", 0, report.ORACLES["0–50 %"]) == pytest.approx(math.log((1.1 + soft) / (0.9 + soft)))
    assert found.regret("warmctl", 2, report.ORACLES["0–50 %"]) == pytest.approx(math.log((1.3 + soft) / (0.8 + soft)))
    assert found.regret("warmctl", 3) is None


def test_a_diverged_run_counts_as_the_start_loss() -> None:
    (found,) = report.gather(rows(0, {**HAND, "warmctl": [1.5, None, 9.0, 1.3]}))
    assert found.losses["warmctl"] == {0: 1.5, 1: 2.0, 2: 2.0, 3: 1.3}


def test_a_cell_is_lost_where_half_of_the_progress_is_missing_and_some_schedule_made_it() -> None:
    found = report.gather(rows(0, {**HAND, "warmctl": [1.9, 1.0, 1.6, 1.9]}))
    # Half of the progress of the best rate is 1.5. Relative rates −1, 1 and 2 are worse; the last for all schedules.
    assert report.lost(found, "warmctl", range(-1, 3)) == (2, 1, 4)


def test_a_task_without_all_schedules_is_left_out() -> None:
    whole = rows(0, {**HAND, "warmctl": [1.0] * 4})
    partial = [row for row in rows(1, HAND) if row["policy"] != "linear-5%"]
    assert [t.seed for t in report.gather(whole + partial)] == [0]


def test_fresh_runs_are_held_against_what_the_first_run_picked() -> None:
    first = rows(0, {**HAND, "warmctl": [1.5, 1.1, 1.2, 1.3]})  # picks linear-0% at rate 1
    again = {("linear-0%", 1): 1.2, ("warmctl", 1): 1.1, ("warmctl", 3): None, ("linear-20%", 2): 0.1}
    for (policy, rate), loss in again.items():
        first.append({**first[0], "run": 1, "policy": policy, "rate": rate, "loss": loss})
    ((at_best,),) = report.fresh_regrets(first, "warmctl", 0)
    assert at_best == pytest.approx(math.log((1.1 + 0.04) / (1.2 + 0.04)))
    ((above,),) = report.fresh_regrets(first, "warmctl", 2)
    assert above == pytest.approx(math.log((2.0 + 0.04) / (1.2 + 0.04)))
    assert report.fresh_regrets(first, "warmctl", 1) == []


def test_ranks_and_price() -> None:
    found = report.gather(rows(0, {**HAND, "warmctl": [1.5, 0.5, 0.5, 0.5]}))
    ranks, cells = report.mean_ranks(found, ["linear-0%", "linear-20%", "warmctl"], (-1, 0))
    assert cells == 2
    assert ranks == {"linear-0%": pytest.approx(1.75), "linear-20%": 3.0, "warmctl": pytest.approx(1.25)}
    evaluations, seconds = report.price(found, "warmctl")
    assert (evaluations, seconds) == (pytest.approx(0.1), pytest.approx(0.0))


def test_intervals_are_drawn_over_tasks() -> None:
    (same,) = report.quantiles([[0.1, 0.3]] * 8, (0.5,))
    assert same == pytest.approx((0.2, 0.2, 0.2))
    ((middle, low, high),) = report.quantiles([[0.0]] * 5 + [[1.0]] * 6, (0.5,))
    assert (middle, low, high) == (1.0, 0.0, 1.0)


def test_tables_and_figure_come_from_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [row for seed in range(3) for row in rows(seed, {**HAND, "warmctl": [1.5, 1.1, 1.2, 1.3]})]
    report.show(made, "warmctl")
    assert "3 tasks" in capsys.readouterr().out
    from benchmarks.tasks.figure import draw

    draw(made, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


# -- of other kinds -----------------------------------------------------------------------------------------


def test_a_task_that_clips_does_so_in_every_policy() -> None:
    clipped = [seed for seed in OTHER[:150] if task(seed).workload.clip is not None]
    assert clipped and {task(seed).family for seed in clipped} == {"multitask"}
    drawn = task(clipped[0])
    model = drawn.build(0)
    loss = drawn.loss(model, next(drawn.batches(0)))
    drawn.backward(model, loss)
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(1.0, rel=1e-4)


def test_the_residual_of_poissons_equation_is_that_of_its_solution() -> None:
    """u'' of u = Σ sin(kπx) is what the sampler gives; a network that is u has no residual."""
    seed = next(seed for seed in OTHER if task(seed).family == "physics")
    drawn = task(seed)

    class Solution(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            frequencies = (1, drawn.choices["frequency"])
            return sum(torch.sin(k * math.pi * x) for k in frequencies)  # type: ignore[return-value]

    batch = next(drawn.batches(0))
    assert float(drawn.loss(Solution(), batch).detach()) < 1e-4 * float(batch[1].square().mean())


def test_a_run_that_breaks_up_between_two_probes_is_caught() -> None:
    """Gradient descent on Poisson's equation at three times its best rate: curvature explodes, the budget is spent."""
    row = runs.measure(runs.Job(2026, 5, "warmctl", 400, 0))
    assert (row["family"], row["optimizer"]) == ("physics", "SGD")
    assert row["updates"] == 400 and row["loss"] is not None and row["loss"] < row["start"]
    assert row["overhead"] < 0.1
