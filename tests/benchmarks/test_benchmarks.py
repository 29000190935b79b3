"""What the benchmarks make of their rows: by hand-made rows with a known answer, and one small run through."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.harness import cells as stats, policies, results, runs
from benchmarks.harness.problems import PROBLEMS
from benchmarks.harness.results import Results, Row
from benchmarks.harness.rows import append
from benchmarks.harness.runs import Job
from benchmarks.harness.source import bare
from benchmarks.replaces_tuned_warmup import __main__ as command
from benchmarks.replaces_tuned_warmup.targets import verdicts

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row(policy: str, loss: float, lr: float = 0.1, seed: int = 0, problem: str = "cnn", **fields: object) -> Row:
    known = {"split": PROBLEMS[problem].split, "overhead": 0.0, "cpu_seconds": 1.0, "seconds": 1.0, "updates": 100}
    known |= {"train_loss": 2 * loss, "failed": False, "chance": 2.3, "code": "x"}
    return {"problem": problem, "policy": policy, "lr": lr, "seed": seed, "steps": 400, "loss": loss, **known, **fields}


def sweep(**losses: list[float]) -> list[Row]:
    """Rows of policies over RATES; losses at chance have failed."""
    return [
        row(policy.replace("linear_", "linear-") + "%" * policy.startswith("linear"), loss, lr, failed=loss >= 2.3)
        for policy, values in losses.items()
        for lr, loss in zip(RATES, values, strict=True)
    ]


def only(rows: list[Row]) -> stats.Cell:
    (cell,), missing = stats.gather(rows)
    assert missing == 0
    return cell


def test_oracle_is_chosen_on_the_mean_over_seeds() -> None:
    lucky = [row("none", 0.1, seed=0), row("none", 2.0, seed=1)]
    steady = [row("linear-10%", 0.9, seed=seed) for seed in (0, 1)]
    ours = [row("warmctl", 0.5, seed=seed) for seed in (0, 1)]
    assert only([*lucky, *steady, *ours]).oracle == "linear-10%"


def test_peers_and_warmctl_are_no_part_of_the_oracle() -> None:
    assert only([row("schedulefree", 0.1), row("warmctl", 0.2), row("none", 0.9), row("linear-1%", 0.8)]).oracle == (
        "linear-1%"
    )


def test_regret_is_paired_by_seed_with_students_interval() -> None:
    logs = (0.1, 0.2, 0.6)
    rows = [row("none", 1.0 + seed, seed=seed) for seed in range(3)]
    rows += [row("warmctl", (1.0 + seed) * math.exp(log), seed=seed) for seed, log in enumerate(logs)]
    mean, half = only(rows).regret()
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(4.302653 * 0.264575 / math.sqrt(3), rel=1e-5)
    assert only(rows).regret("train_loss")[0] == pytest.approx(0.3)


def test_one_seed_has_no_interval() -> None:
    mean, half = only([row("none", 1.0), row("warmctl", 1.0)]).regret()
    assert mean == 0 and math.isnan(half)


def test_a_cell_holds_the_seeds_that_all_policies_have() -> None:
    rows = [row("none", 1.0, seed=0), row("none", 9.0, seed=1), row("warmctl", 2.0, seed=0)]
    assert only(rows).values("none") == [1.0]


def test_a_cell_without_one_of_its_problems_policies_is_left_out() -> None:
    rows = [*sweep(none=[1.0] * 7, warmctl=[1.0] * 7), row("linear-1%", 1.0, lr=RATES[0])]
    cells, missing = stats.gather(rows)
    assert [cell.lr for cell in cells] == [RATES[0]] and missing == 6


def test_span_counts_half_a_decade_a_cell_within_a_tenth_of_the_best_of_any_policy() -> None:
    cells, _ = stats.gather(
        sweep(none=[2, 1.12, 1.05, 2.3, 2.3, 2.3, 2.3], linear_10=[2, 1.2, 1.2, 1.09, 2.3, 2.3, 2.3], warmctl=[1.0] * 7)
    )
    assert stats.span(cells, "warmctl") == 3.5
    assert stats.span(cells, "none") == 0.5
    assert stats.span(cells, "oracle") == 1.0


def test_mean_rank_shares_places_and_leaves_out_cells_without_a_policy() -> None:
    rows = [row("none", 2.3), row("linear-1%", 2.3), row("warmctl", 1.0)]
    other = [row("none", 1.0, problem="mlp"), row("warmctl", 1.5, problem="mlp")]
    cells, _ = stats.gather(rows + other)
    assert stats.mean_ranks(cells, ["none", "linear-1%", "warmctl"]) == {"none": 2.5, "linear-1%": 2.5, "warmctl": 1.0}
    assert stats.mean_ranks(cells, ["none", "warmctl"]) == {"none": 1.5, "warmctl": 1.5}


def test_price_is_per_update_and_against_fixed_schedules_in_the_same_cell() -> None:
    ours = row("warmctl", 1.0, overhead=0.1, cpu_seconds=1.2)
    diverged = row("linear-1%", 2.3, cpu_seconds=0.1, updates=10, failed=True)
    cells, _ = stats.gather([row("none", 1.0), diverged, ours])
    assert stats.price(cells) == pytest.approx((0.1, 0.2))


FIXED = [2.0, 1.0, 1.5, 2.3, 2.3, 2.3, 2.3]  # the best rate is the second


def test_all_targets_are_met_where_they_should_be() -> None:
    cells, _ = stats.gather(sweep(none=FIXED, warmctl=[2.0, 1.0, 0.99, 1.0, 1.05, 1.05, 1.0]))
    found = verdicts(cells, 400)
    assert all(verdict.met for verdict in found.values()), found


@pytest.mark.parametrize(
    ("target", "losses", "overhead"),
    [
        ("(a)", [2.0, 1.06, 1.0, 1.0, 1.0, 1.0, 1.0], 0.0),
        ("(b)", [2.0, 1.0, 1.6, 1.0, 1.0, 1.0, 1.0], 0.0),
        ("(b)", [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.3], 0.0),
        ("(c)", [2.0, 1.02, 1.02, 1.02, 1.02, 1.02, 1.02], 0.0),
        ("(d)", [2.0, 1.0, 1.0, 1.3, 1.3, 1.3, 1.3], 0.0),
        ("(e)", [2.0, 1.0, 1.0, 1.2, 1.0, 1.0, 1.0], 0.0),
        ("(f)", [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 0.13),
        ("(g)", [2.1, 1.1, 1.6, 2.3, 2.3, 2.3, 2.3], 0.0),
    ],
)
def test_each_target_can_be_missed(target: str, losses: list[float], overhead: float) -> None:
    rows = sweep(none=FIXED, warmctl=losses)
    for one in rows:
        if one["policy"] == "warmctl":
            one |= {"overhead": overhead, "cpu_seconds": 1 + overhead}
    verdict = next(v for key, v in verdicts(stats.gather(rows)[0], 400).items() if key.startswith(target))
    assert verdict.met is False, verdict


def test_a_diverged_run_counts_as_chance_and_has_failed() -> None:
    found = runs.outcome(math.nan, [2.0, 100.0, math.inf], steps=4, chance=2.3)
    assert found["loss"] == 2.3 and found["raw_loss"] is None and found["failed"]
    assert found["train_loss"] == pytest.approx((2.0 + 2.3 + 2.3 + 2.3) / 4)
    assert runs.outcome(50.0, [1.0], steps=1, chance=2.3)["loss"] == 2.3
    assert not runs.outcome(0.5, [1.0], steps=1, chance=2.3)["failed"]


def test_a_line_that_a_kill_cut_short_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append(path, row("none", 1.0))
    path.write_text(path.read_text() + '{"problem": "cnn", "pol')
    append(path, row("none", 0.5))
    append(path, row("warmctl", 2.0))
    assert [saved["loss"] for saved in runs.load(path).values()] == [0.5, 2.0]


def test_comments_and_docstrings_are_no_change_of_code() -> None:
    assert bare('def f():\n    """Words."""\n    return 1  # one\n') == bare("def f():\n    return 1\n")
    assert bare("x = 1") != bare("x = 2")


def test_second_moment_is_seeded_with_the_first_gradient() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    adam = torch.optim.Adam([p], lr=0.1, betas=(0.9, 0.99), eps=0)
    adam.register_step_pre_hook(policies.seed_second_moment)
    p.grad = torch.tensor([3.0, -5.0])
    adam.step()
    assert torch.allclose(adam.state[p]["exp_avg_sq"], p.grad**2)
    assert torch.allclose(p.detach(), torch.tensor([0.99, -1.99]))  # lr √(1 − β₂): the correction stays


@pytest.mark.parametrize("policy", policies.POLICIES)
def test_every_policy_trains(policy: str) -> None:
    found = runs.measure(Job("vit", policy, 1e-3, seed=0, steps=3))
    assert found["updates"] == 3 and math.isfinite(found["raw_loss"])


def test_policies_for_adam_are_left_out_elsewhere() -> None:
    assert policies.policies_for(PROBLEMS["gpt-post"]) == list(policies.POLICIES)
    assert "radam" not in policies.policies_for(PROBLEMS["digits"])


@pytest.mark.usefixtures("one_thread")
def test_run_resume_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.harness.results.RESULTS", tmp_path)
    path = tmp_path / "smoke.jsonl"
    jobs = [Job("digits", policy, 0.1, 0, 5) for policy in ("none", "warmctl")]
    rows = runs.run(jobs, path, workers=1)
    monkeypatch.setattr(runs, "measure", lambda job: pytest.fail("measured twice"))
    assert runs.run(jobs, path, workers=1) == rows
    summary = command.report(list(rows.values()), 5, "smoke", {})
    assert (tmp_path / "smoke.png").stat().st_size > 0 and (tmp_path / "smoke.json").exists()
    assert summary["targets"]["test"].keys() == summary["targets"]["all"].keys()
    monkeypatch.setattr(runs, "library", lambda: "edited")
    with pytest.raises(pytest.fail.Exception, match="measured twice"):
        runs.run(jobs, path, workers=1)


def test_a_report_measures_nothing_and_keeps_the_machine_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "environment", lambda: {"processor": "the first"})
    saved = Results("claim", {"steps": 4})
    saved.row("a", lambda: {"loss": 1.0}, code="old")
    saved.finish({"target": True})
    monkeypatch.setattr(results, "environment", lambda: {"processor": "another"})
    report = Results("claim", {"steps": 4}, only_report=True)
    assert report.row("a", lambda: pytest.fail("measured"), code="new") == {"loss": 1.0, "code": "old"}
    assert report.outdated == {"a"}
    with pytest.raises(SystemExit, match="no row 'b' yet"):
        report.row("b", lambda: pytest.fail("measured"))
    before = saved.path.read_text()
    report.finish({"target": True})
    assert saved.path.read_text() == before
    renewed = Results("claim", {"steps": 4})
    assert renewed.row("a", lambda: {"loss": 2.0}, code="new")["loss"] == 2.0
    assert "another" in saved.path.read_text()
