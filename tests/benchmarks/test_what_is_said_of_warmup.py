"""The frame that tries what is said of warmup, a few of its cheap claims, and the page made of its rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.tasks.data import Batch
from benchmarks.what_is_said_of_warmup import __main__ as command, collected, report
from benchmarks.what_is_said_of_warmup.claim import HOLDS, NOT_HERE, REVERSE, Claim, Figures, interval, verdict
from benchmarks.what_is_said_of_warmup.detectors import Found, SingleStage, TwoStage, average_precision, fields
from benchmarks.what_is_said_of_warmup.dynamics import leaves_at_minus_one, steep_then_gentle
from benchmarks.what_is_said_of_warmup.setting import Setting
from benchmarks.what_is_said_of_warmup.signals import TANH, saturated, saturation

# -- verdicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("effects", "margin", "expected"),
    [
        ([1.0, 1.1, 0.9, 1.0, 1.05], 0.5, HOLDS),
        ([1.0, 1.1, 0.9, 1.0, 1.05], 1.0, NOT_HERE),  # above the margin on the mean only
        ([-1.0, -1.1, -0.9, -1.0, -1.05], 0.5, REVERSE),
        ([3.0, -1.0, 2.0, 0.5, 1.0], 0.5, NOT_HERE),
        ([2.0], 0.5, NOT_HERE),  # one seed says nothing
    ],
)
def test_a_verdict_is_by_the_whole_interval(effects: list[float], margin: float, expected: str) -> None:
    assert verdict(effects, margin) == expected


def test_the_interval_is_students() -> None:
    mean, low, high = interval([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3)
    assert (high - mean, mean - low) == pytest.approx([4.302653 * 0.264575 / math.sqrt(3)] * 2, rel=1e-5)


# -- claims -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", [steep_then_gentle, saturation])
def test_a_trial_is_deterministic_in_its_seed(trial: Callable[[int, bool], Figures]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = trial(3, True), trial(3, True), trial(4, True)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again != other and all(map(math.isfinite, first.values()))


def test_momentum_is_found_at_its_edges() -> None:
    figures = leaves_at_minus_one(0, True)
    assert len(figures) == 6 and max(map(abs, figures.values())) < 0.01


def test_with_and_without_warmup_share_start_and_data_and_end_at_one_rate() -> None:
    batches: dict[int, list[torch.Tensor]] = {0: [], 4: []}
    weights: dict[int, list[torch.Tensor]] = {0: [], 4: []}
    plain = Setting("", TANH.build, TANH.sample, 0.1, 3, 2.3, optimizer=torch.optim.SGD)
    for warmup in (0, 4):

        def watch(step: int, model: torch.nn.Module, batch: Batch, warmup: int = warmup) -> None:
            batches[warmup].append(batch[0])
            weights[warmup].append(next(model.parameters()).detach().clone())

        plain.train(0, 0.1, warmup, watch=watch)
    assert torch.equal(torch.stack(batches[0]), torch.stack(batches[4]))
    assert torch.equal(weights[0][0], weights[4][0])
    first, warmed = (weights[warmup][1] - weights[warmup][0] for warmup in (0, 4))
    assert torch.allclose(4 * warmed, first, rtol=1e-3, atol=1e-7) and first.abs().max() > 0


def test_units_are_saturated_where_they_are() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Tanh())
    assert saturated(model, torch.tensor([[0.0, 3.0, -3.0, 1.0]])) == 0.5


def test_average_precision_by_hand() -> None:
    truth = torch.tensor([[[4.0, 8, 8], [7.0, 16, 16], [-1.0, -1, -1]]])
    exact = truth[:, :, 1:]
    classes = torch.tensor([[4, 7, 0]])
    assert average_precision(Found(torch.tensor([[0.9, 0.8, 0.1]]), classes, exact), truth) == 1.0
    # The wrong one is surest: precision ½, then ⅔.
    assert average_precision(Found(torch.tensor([[0.8, 0.7, 0.9]]), classes, exact), truth) == pytest.approx(2 / 3)
    # One digit found twice is one hit; the other is missed by class.
    twice = Found(torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[4, 4, 3]]), exact[:, [0, 0, 1]])
    assert average_precision(twice, truth) == pytest.approx(1 / 2)
    apart = Found(torch.tensor([[0.9, 0.8, 0.1]]), classes, exact + torch.tensor([2.7, 0.0]))
    assert average_precision(apart, truth) == 0.0


@pytest.mark.parametrize("detector", [SingleStage, TwoStage])
def test_a_detector_learns_a_picture(detector: type) -> None:
    torch.manual_seed(0)
    model, (x, truth) = detector(), fields(torch.Generator().manual_seed(0), 4, held_out=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        model.loss((x, truth)).backward()
        optimizer.step()
    with torch.no_grad():
        assert average_precision(model.detect(x), truth) > 0.9


# -- rows, report, page -------------------------------------------------------------------------------------------


def test_rows_survive_a_kill_and_are_of_one_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def trial(seed: int, quick: bool) -> dict[str, float]:
        calls.append(seed)
        return {"a": 1.0 + 0.1 * seed}

    lines = [Claim(1, title, "", "", trial, lambda figures: figures["a"], "", 0.5) for title in ("one", "two")]
    monkeypatch.setattr(collected, "collected", lambda: {("dynamics", 1, "one"): lines})
    monkeypatch.setattr(report, "collected", lambda: {("dynamics", 1, "one"): lines})
    monkeypatch.setattr(collected, "ROWS", tmp_path)
    todo = collected.wanted((), 3, True)
    rows = collected.complete(todo, 1)
    path = collected.path("dynamics", True)
    text = path.read_text()
    path.write_text(text[: len(text) - 20])  # killed in the last row
    assert collected.complete(todo, 1) == {**rows, todo[-1]: rows[todo[-1]] | {"seconds": rows[todo[-1]]["seconds"]}}
    assert calls == [0, 1, 2, 2] and not list(collected.kept(collected.wanted((), 3, False)))
    found = report.lines(rows)
    assert [(line["title"], line["verdict"], line["mean"]) for line in found] == [
        ("one", HOLDS, pytest.approx(1.1)),
        ("two", HOLDS, pytest.approx(1.1)),
    ]
    monkeypatch.setattr(collected, "code", lambda module: "edited")
    collected.complete(todo, 1)
    assert calls[4:] == [0, 1, 2]


def test_a_figure_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Claim(1, "one", "", "", lambda seed, quick: {"a": math.nan}, lambda figures: figures["a"], "")
    monkeypatch.setattr(collected, "collected", lambda: {("dynamics", 1, "one"): [claim]})
    with pytest.raises(ValueError, match="claim 1, 'one', seed 0: a not finite"):
        collected.measured(collected.Job("dynamics", 1, "one", 0, True))


def test_code_is_of_the_module_and_what_it_imports_here() -> None:
    assert set(collected._sources("detection")) == {"detection", "detectors", "setting"}
    assert collected.code("detection") != collected.code("signals")


def test_every_claim_has_its_words_a_number_and_a_margin() -> None:
    claims = [claim for claims in collected.collected().values() for claim in claims]
    assert {claim.number for claim in claims} >= set(range(1, 11))
    assert len({(claim.number, claim.title) for claim in claims}) == len(claims)
    for claim in claims:
        assert all((claim.title, claim.source, claim.setting, claim.unit)) and claim.margin >= 0, claim.title


def test_the_table_of_the_page_is_what_the_rows_give() -> None:
    """`python -m benchmarks.what_is_said_of_warmup --report` renews it."""
    found = report.lines(collected.kept(collected.wanted((), command.SEEDS, quick=False)))
    assert {line["claim"] for line in found} >= set(range(1, 11))
    assert all(len(line["effects"]) >= 5 for line in found)
    (table,) = report.TABLE.findall(report.PAGE.read_text())
    assert table.strip() == report.markdown(found).strip()


def test_an_unknown_claim_is_said() -> None:
    app = command.typer.Typer()
    app.command()(command.main)
    result = CliRunner().invoke(app, ["--claim", "77"])
    assert result.exit_code == 2 and "there is no such claim" in result.output
