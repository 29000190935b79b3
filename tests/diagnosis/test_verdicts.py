"""Real small runs, each made to show one verdict, and what the diagnosis says of them.

Thresholds were chosen on the tasks of `benchmarks.diagnoses_hold`, not on these nets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.diagnosis.trained import Row, batch_of, net, saturated, spread, train
from warmctl import AdaptiveWarmup
from warmctl.control.controller import RATIO, REPRESENTATION, SLOPE
from warmctl.diagnosis import Diagnosis, diagnose
from warmctl.diagnosis.files import log_of
from warmctl.diagnosis.rules import VERDICTS

pytestmark = pytest.mark.xdist_group("verdicts")  # its fixture is made once

SEEDS = (0, 1)


def controlled(seed: int, times_the_edge: float) -> list[Row]:
    """AdaptiveWarmup on a noisy quadratic of known curvature, at a scheduled rate beyond the edge."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(8, 1, bias=False)
    curvature = torch.linspace(0.5, 2.0, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=times_the_edge * 2.0 / 2.0)
    opt = AdaptiveWarmup(optimizer, model)
    with torch.no_grad():
        model.weight.fill_(1.0)
    for _ in range(120):
        noise = 0.01 * torch.randn(8, generator=generator)

        def closure(noise: torch.Tensor = noise) -> torch.Tensor:
            opt.zero_grad()
            loss = 0.5 * (curvature * (model.weight[0] - noise).square()).sum() + 1.0
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        opt.step(closure)
    return list(opt.history)


RUNS: dict[str, tuple[Callable[[int], list[Row]], str]] = {
    "right": (lambda seed: train(net(seed), 0.1, warmup=20), "well warmed"),
    "none needed": (lambda seed: train(net(seed), 0.05), "well warmed"),
    "too short": (lambda seed: train(net(seed, nn.Tanh), 1.5), "under-warmed"),
    "in mid-run": (lambda seed: train(net(seed), 0.1, warmup=20)[50:], "not judged"),
    "too long": (lambda seed: train(net(seed), 0.1, warmup=140), "over-warmed"),
    "dead": (lambda seed: train(net(seed), 2.0), "lost"),
    "diverged": (lambda seed: train(net(seed, nn.Identity), 3.0), "lost"),
    "capped": (lambda seed: controlled(seed, 20.0), "capped below the schedule"),
}


@pytest.fixture(scope="module")
def run_of() -> Callable[[str, int], list[Row]]:
    """Each run is trained once."""
    made: dict[tuple[str, int], list[Row]] = {}

    def get(name: str, seed: int) -> list[Row]:
        if (name, seed) not in made:
            made[name, seed] = RUNS[name][0](seed)
        return copy.deepcopy(made[name, seed])

    return get


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RUNS)
def test_the_verdict_on_a_run_made_to_show_it(name: str, seed: int, run_of: Any) -> None:
    found = diagnose(run_of(name, seed))
    assert found.verdict == RUNS[name][1], str(found)
    assert found.evidence and found.advice


def test_every_verdict_is_shown() -> None:
    assert {verdict for _, verdict in RUNS.values()} == set(VERDICTS)


def test_evidence_names_steps_and_values_of_the_run(run_of: Any) -> None:
    rows = {row["step"]: row for row in run_of("too short", 0)}
    sign = diagnose(list(rows.values())).evidence[0]
    assert sign.column == "loss" and sign.steps[0] == 1
    assert sign.values == tuple(rows[step]["loss"] for step in sign.steps)
    assert sign.values[1] == max(row["loss"] for row in rows.values() if row["step"] <= 50)


@pytest.mark.parametrize("name", ["right", "none needed"])
def test_a_warmup_that_is_well_says_nothing_of_the_best_rate(name: str, run_of: Any) -> None:
    assert "does not say that this `lr` is the best" in diagnose(run_of(name, 0)).advice


def test_a_warmup_is_not_to_be_kept_as_it_is_where_much_went_wrong_later(run_of: Any) -> None:
    rows = run_of("right", 0)
    for row in rows[100::20]:
        row["loss"] *= 20
    found = diagnose(rows)
    assert found.verdict == "well warmed" and "There are 5 of them" in found.advice
    assert "Keep" not in found.advice and "See to what is beside it: A spike so late" in found.advice


@pytest.mark.parametrize("name", ["too short", "dead", "diverged"])
def test_the_advice_of_a_lower_rate_is_right(name: str, run_of: Any) -> None:
    rows = run_of(name, 0)
    assert "Lower `lr`" in diagnose(rows).advice
    activation = {"too short": nn.Tanh, "dead": nn.ReLU, "diverged": nn.Identity}[name]
    thirds = {"too short": 2, "dead": 2, "diverged": 4}[name]  # as often as it is lost again
    followed = train(net(0, activation), max(row["lr"] for row in rows) / 3**thirds, warmup=10)
    assert diagnose(followed).verdict == "well warmed" and followed[-1]["loss"] < 0.5 * followed[0]["loss"]


def test_the_advice_after_too_long_a_warmup_is_a_number_that_does(run_of: Any) -> None:
    rows = run_of("too long", 0)
    found = diagnose(rows)
    assert "`warmup_steps=47`" in found.advice and "took 140 of 200 steps" in str(found)
    followed = train(net(0), 0.1, warmup=47)
    assert diagnose(followed).verdict == "well warmed" and followed[-1]["loss"] < 1.1 * rows[-1]["loss"]


def test_a_capped_run_is_told_the_rate_that_it_had(run_of: Any) -> None:
    rows = run_of("capped", 0)
    found = diagnose(rows)
    said = float(found.advice.split("`lr=")[1].split("`")[0])
    assert said == pytest.approx(rows[-1]["lr"], rel=0.5) and said < rows[-1]["scheduled_lr"] / 10


def cosine(peak: int, end: int, steps: int = 120, reason: str = "") -> list[Row]:
    """A controlled run on a cosine schedule: the applied rate peaks at one step, its scale is 1 from another on."""
    rows = []
    for step in range(1, steps + 1):
        scheduled = 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))
        at_peak = 0.4 * 0.5 * (1 + math.cos(math.pi * peak / (steps + 1)))
        rate = min(scheduled, at_peak * (step / peak if step <= peak else (steps + 1 - step) / (steps + 1 - peak)))
        rows.append(
            {"step": step, "loss": 0.1 + 2 * math.exp(-step / 20), "lr": rate, "scheduled_lr": scheduled}
            | {"scale": 1.0 if step >= end else rate / scheduled, "phase": "guard" if step >= end else "warmup"}
            | {"reason": reason}
        )
    return rows


@pytest.mark.parametrize("end", [80, 115])
def test_warmup_of_a_controlled_run_ends_where_the_applied_rate_peaks(end: int) -> None:
    """The scale goes on rising while the schedule falls: the phase tells nothing of that."""
    rows = cosine(30, end)
    found, plain = diagnose(rows), diagnose([{k: row[k] for k in ("step", "loss", "lr")} for row in rows])
    assert found.verdict == plain.verdict == "well warmed" and "it took 30 of 120 steps" in str(found)


def test_what_is_said_of_a_controlled_run_that_took_long() -> None:
    for reason, end in (("the rate is rising", 115), (RATIO, 115), (RATIO, 999)):
        found = diagnose(cosine(60, end, reason=reason))
        assert found.verdict == "over-warmed" and found.evidence[0].says.startswith("lr: warmup took 60 of 120 steps;")
        assert "still rising" not in str(found) and "max_warmup" not in found.advice
        assert ("larger `target`" in found.advice) == (reason == RATIO)


@pytest.mark.parametrize("end", [90, 120])
def test_a_rate_is_called_rising_only_where_it_still_was(end: int) -> None:
    rows = [{"step": s, "loss": 0.1 + 2 * math.exp(-s / 20), "lr": min(1.0, s / end)} for s in range(1, 121)]
    says = diagnose(rows).evidence[0].says
    assert f"took {end} of 120 steps" in says and ("still rising" in says) == (end == 120)


def test_a_log_that_counts_from_zero_counts_all_its_steps() -> None:
    rows = [{"step": s, "loss": 0.1 + 2 * math.exp(-s / 20), "lr": min(1.0, (s + 1) / 20)} for s in range(300)]
    assert "it took 20 of 300 steps" in str(diagnose(rows))


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("held", [RATIO, REPRESENTATION, SLOPE])
def test_a_larger_target_is_advised_where_the_ratio_held_the_rate(run_of: Any, held: str, ended: bool) -> None:
    rows = [{**row, "reason": "" if ended else held} for row in run_of("capped", 0)]
    rows[len(rows) // 2]["reason"] = (
        f"warmup ended: the scale settled at 0.05: {held}" if ended else "the rate is rising"
    )
    rows[-1]["reason"] = rows[-1]["reason"] and "resumed"
    advice = diagnose(rows).advice
    assert ("lets the rate nearer to the edge" in advice) == (held == RATIO)
    assert ("`target` changes nothing" in advice) == (held != RATIO)


def test_the_same_rates_without_a_scale_are_capped_too(run_of: Any) -> None:
    rows = [{k: row[k] for k in ("step", "loss", "lr", "scheduled_lr")} for row in run_of("capped", 0)]
    assert diagnose(rows).verdict == "capped below the schedule"


def test_a_loss_that_never_moves_is_not_told_to_lower_its_rate() -> None:
    found = diagnose(train(net(0), 1e-6))
    assert found.verdict == "lost" and "does not tell" in found.advice and "Lower" not in found.advice


def test_a_late_spike_is_explained_by_what_moved_before_it() -> None:
    """The batch is the cause: the gradient norm moves at the same step, and the loss comes back."""
    found = diagnose(train(net(0), 0.1, warmup=20, bad_batch=150))
    assert found.verdict == "well warmed"
    spike, cause = found.evidence[1:3]
    assert spike.steps == (149, 150) and spike.values[1] > 2 * spike.values[0]
    assert cause.column == "grad_norm" and "at the same step" in cause.says


def test_a_vital_that_moves_first_is_the_explanation() -> None:
    rows = train(net(0), 0.1, warmup=20, bad_batch=150)
    for row in rows:
        row["vitals/2/sigma"] = 1.0 + 0.01 * math.sin(row["step"]) if row["step"] < 147 else 0.3
    cause = diagnose(rows).evidence[2]
    assert cause.column == "vitals/2/sigma" and cause.steps == (147,) and "3 steps before" in cause.says


def test_float16_that_overflows() -> None:
    """A real GradScaler: gradients of float16 activations, times a scale that is doubled every fourth step."""
    model, rows = net(0), []
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=4)
    for step in range(1, 121):
        x, y = batch_of(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(50 * x).float(), y)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.get_scale() < scale
        rows.append({"step": step, "loss": loss.item(), "loss_scale": scale, "overflow": skipped})
    skips = sum(row["overflow"] for row in rows if row["step"] > 21)
    assert skips >= 5
    for columns in (("step", "loss", "overflow"), ("step", "loss", "loss_scale")):
        found = diagnose([{k: row[k] for k in columns} for row in rows])
        assert f"{skips} of 120 steps overflowed" in str(found) and "init_scale" in found.advice


def test_clipping_at_every_step() -> None:
    rows = train(net(0), 0.3, warmup=20, clip=0.05)
    norms = sorted(row["grad_norm"] for row in rows)
    limited = diagnose([{**row, "clip_norm": 0.05} for row in rows])
    assert "100% of the steps from 21 on are clipped" in str(limited) and "raise it to about" in limited.advice
    assert norms[100] < float(limited.advice.split("raise it to about ")[1].split()[0]) < norms[-1]
    assert "clipped" in str(diagnose([{**row, "clipped": True} for row in rows]))
    assert "clip" not in str(diagnose([{**row, "clip_norm": norms[-5]} for row in rows]))


def test_units_that_saturate() -> None:
    found = diagnose(train(net(0, nn.Tanh), 3.0, watch=saturated))
    assert found.verdict == "lost" and "vitals/1/saturated" in [item.column for item in found.evidence]
    assert "saturated" not in str(diagnose(train(net(0, nn.Tanh), 0.05, watch=saturated)))


def test_a_norm_whose_input_loses_its_spread() -> None:
    """Weight decay that is far too strong shrinks what the norm divides by."""
    found = diagnose(train(net(0, norm=True), 0.05, 20, watch=spread, weight_decay=0.5))
    item = next(item for item in found.evidence if item.column.endswith("/sigma"))
    assert item.values[1] < 0.1 * item.values[0] and "times what they were" in found.advice
    assert "sigma" not in str(diagnose(train(net(0, norm=True), 0.05, 20, watch=spread)))


def test_it_prints(run_of: Any) -> None:
    found = diagnose(run_of("too short", 0))
    lines = str(found).splitlines()
    assert isinstance(found, Diagnosis) and lines[0] == "under-warmed"
    assert all(line.startswith("  - ") for line in lines[1:-1]) and lines[-1].startswith("  What to do: ")
    html = found._repr_html_()
    assert html.startswith("<b>under-warmed</b>") and html.count("<li>") == len(found.evidence)


def capped_by_loggers() -> list[dict[str, Any]]:
    """As `log_warmup` leaves it in the Trainer's history: held at 5 % of the rate."""
    steps = range(10, 1001, 10)
    logged = {"learning_rate": 3e-3, "warmup/scale": 0.05, "warmup/lr": 1.5e-4, "warmup/phase": 1.0}
    return [{"step": step, "loss": 0.5 + 2.0 * math.exp(-step / 300), **logged} for step in steps]


def test_the_columns_of_warmctls_own_loggers_are_known() -> None:
    of_loggers = capped_by_loggers()
    names = {"learning_rate": "scheduled_lr", "warmup/scale": "scale", "warmup/lr": "lr", "warmup/phase": "phase"}
    own = [{names.get(k, k): "guard" if k == "warmup/phase" else v for k, v in row.items()} for row in of_loggers]
    found, expected = diagnose(of_loggers), diagnose(own)
    assert found.verdict == expected.verdict == "capped below the schedule"
    assert found.advice == expected.advice


def test_a_run_without_warmup_that_does_well_needs_none() -> None:
    rows = [{"loss_step": 0.1 + 2.0 * math.exp(-step / 20), "lr": 0.1} for step in range(100)]
    found = diagnose([{"step": step, **row} for step, row in enumerate(rows)])
    assert found.verdict == "well warmed" and "Nothing here asks for a warmup" in found.advice
    with pytest.raises(ValueError, match=r"A column of losses is called one of loss, .*: rename yours"):
        diagnose([{"step": step, "error": 0.1} for step in range(20)])
    with pytest.raises(ValueError, match=r"finds 5 rows with a loss$"):
        diagnose([{"step": step, "loss": 0.1} for step in range(5)])


def test_a_record_that_begins_after_warmup_has_none() -> None:
    on_guard = {"lr": 2.9e-3, "scale": 0.97, "phase": "guard"}
    rows = [{"step": step, "loss": 0.5 + math.exp(-step / 600), **on_guard} for step in range(1001, 2001)]
    found = diagnose(rows)
    assert found.verdict == "not judged" and "the log begins at step 1001" in str(found)


def test_a_log_that_begins_in_mid_run_is_not_judged(run_of: Any) -> None:
    """Its flat loss is not dead, its rise not one of warmup; what needs no start is told all the same."""
    for name, since in (("right", 150), ("too long", 80)):
        found = diagnose(run_of(name, 0)[since:])
        assert found.verdict == "not judged" and f"begins at step {since + 1}," in found.evidence[0].says
        assert "Keep" not in found.advice and "warmup_steps" not in found.advice
    rows = run_of("right", 0)[100:]
    rows[50]["loss"] *= 20
    spiked = diagnose(rows)
    assert spiked.verdict == "not judged" and "a spike from" in str(spiked)
    diverged = [*run_of("right", 0)[100:], *({"step": 201 + i, "loss": math.nan, "lr": 0.1} for i in range(5))]
    found = diagnose(diverged)
    assert found.verdict == "lost" and "warmup" not in str(found)


@pytest.mark.parametrize("every", [1, 10, 25])
def test_a_log_of_every_so_many_steps_begins_at_the_start(every: int, run_of: Any) -> None:
    assert diagnose(run_of("right", 0)[every - 1 :: every]).verdict == "well warmed"


def test_of_two_wrapped_optimizers_the_first_is_read_whole() -> None:
    logged = {"warmup_0/scale": 0.5, "warmup_1/scale": 1.0, "warmup_1/phase": 1.0}
    rows = [{"step": step, "loss": 1.0, **logged, "warmup_0/phase": float(step >= 50)} for step in range(100)]
    phases = log_of(rows).words("phase")
    assert [step for step, phase in phases.items() if phase == "guard"] == list(range(50, 100))
