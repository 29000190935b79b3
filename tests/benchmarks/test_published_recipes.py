"""The recipes against what was published of them, the comparison by hand-made rows, and one small run through."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from benchmarks.harness import results
from benchmarks.published_recipes import __main__ as command, nanogpt as gpt, runs, signals
from benchmarks.published_recipes.comparison import Comparison, comparisons
from benchmarks.published_recipes.nanogpt import nanogpt
from benchmarks.published_recipes.recipe import Recipe
from benchmarks.published_recipes.report import report
from benchmarks.published_recipes.runs import RECIPES, Job

SYMBOLS = 65  # of Tiny Shakespeare


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Thirty thousand characters of two words in an order that can be learnt in part."""
    path = tmp_path / "words.txt"
    draws = torch.randint(0, 2, (6000,), generator=torch.Generator().manual_seed(0))
    path.write_text("".join(("abba ", "cde. ")[i] for i in draws) * 2)
    return path


@pytest.fixture
def small(text: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """nanoGPT's recipe on that text, one narrow layer."""
    recipe = nanogpt(text)
    tiny = Recipe(**{**vars(recipe), "model": lambda: gpt.GPT(9, layers=1, heads=2, width=16)})
    monkeypatch.setitem(RECIPES, tiny.name, tiny)
    runs.signature.cache_clear()
    return tiny


# -- the recipes --------------------------------------------------------------------------------------------


def test_nanogpt_has_the_published_size_and_start() -> None:
    """nanoGPT prints 0.80M parameters, positions apart, and starts at chance over the alphabet."""
    recipe = nanogpt()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = gpt.GPT(SYMBOLS)
    count = sum(p.numel() for p in model.parameters()) - model.positions.weight.numel()
    assert f"{count / 1e6:.2f}M" == "0.80M"
    x = torch.randint(0, SYMBOLS, (4, gpt.CONTEXT), generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(1).flatten())
    assert loss.item() == pytest.approx(math.log(SYMBOLS), abs=0.15)
    decayed, others = recipe.rule(model, 1e-3).param_groups
    assert (len(decayed["params"]), len(others["params"])) == (2 + 4 * 4, 2 * 4 + 1)
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"]) == (0.1, 0.0, (0.9, 0.99))
    residual = [block.fall.weight.std().item() for block in model.blocks]
    assert residual == pytest.approx([0.02 / math.sqrt(8)] * 4, rel=0.02)
    assert model.blocks[0].rise.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_nanogpt_looks_at_no_later_character() -> None:
    model = gpt.GPT(9, layers=2, heads=2, width=16)
    x = torch.zeros(1, 8, dtype=torch.long)
    other = x.clone()
    other[0, 5:] = 3
    assert torch.allclose(model(x)[0, :5], model(other)[0, :5])
    assert not torch.allclose(model(x)[0, 5:], model(other)[0, 5:])


def test_nanogpts_schedule_is_its_get_lr() -> None:
    """Rates of train.py's get_lr at learning_rate 1e-3, min_lr 1e-4, warmup_iters 100, lr_decay_iters 2000."""
    recipe = nanogpt()
    known = {0: 1e-3 / 101, 99: 1e-3 * 100 / 101, 100: 1e-3, 1050: 5.5e-4, 2000: 1e-4}
    for step, lr in known.items():
        assert recipe.lr * recipe.share(step, 2000, 100) == pytest.approx(lr)
    assert recipe.share(0, 2000, 0) == 1.0 and recipe.share(1000, 2000, 0) == pytest.approx(0.55)
    assert recipe.warmups(2000) == {
        "none": 0,
        "published-100": 100,
        "linear-2%": 40,
        "linear-10%": 200,
        "linear-20%": 400,
    }


def test_text_is_split_as_published_and_read_whole(text: Path) -> None:
    words = text.read_text()
    train, held_out = gpt.split(text)
    alphabet = sorted(set(words))
    assert (len(train), len(held_out)) == (54_000, 6_000)
    assert "".join(alphabet[i] for i in train[:50]) == words[:50]
    x = torch.cat([x.flatten() for x, _ in gpt.windows(text)])
    y = torch.cat([y.flatten() for _, y in gpt.windows(text)])
    assert torch.equal(x, held_out[: len(x)]) and torch.equal(y, held_out[1 : len(y) + 1])
    with pytest.raises(ValueError, match=r"short\.txt has 100 characters"):
        short = text.with_name("short.txt")
        short.write_text("ab" * 50)
        gpt.split(short)


def test_the_standard_librarys_source_stands_in_for_a_text() -> None:
    train, held_out = gpt.split(None)
    assert 800_000 < len(train) + len(held_out) < 2_000_000
    assert nanogpt().name == "nanogpt/standard-library"


def test_mnist1ds_network_and_order_are_the_published_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its notebook prints 5210 parameters; batches come in the data's one order, whatever the seed."""
    assert sum(p.numel() for p in signals.cnn().parameters()) == 5210
    data = torch.arange(300.0).view(300, 1, 1).expand(300, 1, 40), torch.arange(300) % 10
    monkeypatch.setattr(signals, "mnist1d", lambda samples: (data, data))
    recipe = signals.signals()
    first = [int(x[0, 0, 0]) for x, _ in islice(recipe.batches(3), 5)]
    assert first == [0, 100, 200, 0, 100]
    assert recipe.published == "none" and "none" in recipe.warmups(6000)
    assert [recipe.share(step, 6000, 0) for step in (0, 3000, 5999)] == [1.0, 1.0, 1.0]
    assert recipe.chance() == pytest.approx(0.9)


def test_gradients_are_clipped_where_the_recipe_clips(small: Recipe) -> None:
    batch = next(small.batches(0))
    model = small.build(0)
    Recipe(**{**vars(small), "clip": None}).gradient(model, batch)
    bare = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    model.zero_grad()
    Recipe(**{**vars(small), "clip": float(bare) / 2}).gradient(model, batch)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert float(clipped) == pytest.approx(float(bare) / 2, rel=1e-4)


# -- runs ---------------------------------------------------------------------------------------------------


def test_a_run_follows_the_rates_of_its_policy(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def update(recipe: Recipe, model: nn.Module, optimizer: Any, batch: Any) -> float:
        seen.append(optimizer.param_groups[1]["lr"])
        return 1.0

    monkeypatch.setattr(runs, "update", update)
    row = runs.measure(Job(small.name, "linear-20%", 10, 0, 20))
    assert seen[:5] == pytest.approx([0.01 * i / 5 for i in (1, 2, 3, 4, 5)])
    assert row["lr"] == 0.01 and row["train"] == [1.0] * 20 and not row["published"]


def test_a_run_that_diverges_ends_there_and_counts_as_chance(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([2.0, 1.0, math.nan])
    monkeypatch.setattr(runs, "update", lambda *_: next(losses))
    row = runs.measure(Job(small.name, "none", 1, 0, 20))
    assert row["updates"] == 3 and row["score"] == row["chance"] and row["failed"] and row["loss"] is None
    assert row["train"] == [2.0, 1.0]


def test_only_warmctls_rows_hang_on_its_code(small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    jobs = [Job(small.name, policy, 1, 0, 3) for policy in ("none", "warmctl")]
    first = runs.run(jobs, path)
    monkeypatch.setattr(runs, "library", lambda: "edited")
    again = runs.run(jobs, path)
    assert len(path.read_text().splitlines()) == 3
    assert again[jobs[0]] == first[jobs[0]]
    assert again[jobs[1]]["code"].endswith("+edited") and again[jobs[1]]["loss"] == first[jobs[1]]["loss"]
    assert first[jobs[1]]["overhead"] > 0.0 and len(first[jobs[1]]["scales"]) == 3


def test_another_text_is_another_code(small: Recipe, text: Path) -> None:
    before = runs.signature(small.name)
    words = text.read_text()
    text.write_text(words[:-3000] + words[-3000:].replace("b", "a", 1))
    for cached in (gpt.split, gpt.windows, runs.signature):
        cached.cache_clear()
    assert runs.signature(small.name) != before


@pytest.mark.usefixtures("one_thread")
def test_run_resume_and_report(small: Recipe, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "nanogpt", lambda given: small)
    asked = ["--text", str(text), "--recipe", "nanogpt", "--steps", "4", "--seeds", "2", "--multiple", "1"]
    app = typer.Typer()
    app.command()(command.main)
    done = CliRunner().invoke(app, [*asked, "--policy", "by-hand", "--policy", "warmctl"])
    assert done.exit_code == 0, done.output
    monkeypatch.setattr(runs, "measure", lambda job: pytest.fail("measured twice"))
    assert CliRunner().invoke(app, [*asked, "--policy", "none"]).exit_code == 0
    assert CliRunner().invoke(app, ["--report"]).exit_code == 0
    rows = (tmp_path / "published_recipes" / "rows.jsonl").read_text().splitlines()
    assert len(rows) == 2 * 6
    summary = json.loads((tmp_path / "published_recipes.json").read_text())["summary"]
    assert summary["nanogpt/words, 4 updates"]["seeds"] == 2
    for name in ("published_recipes.png", "published_recipes-curves.png"):
        assert (tmp_path / name).stat().st_size > 10_000


# -- comparison ---------------------------------------------------------------------------------------------


def row(policy: str, multiple: float, score: float, seed: int = 0, **fields: Any) -> dict[str, Any]:
    known = {"recipe": "nanogpt/x", "steps": 300, "lr": 1e-3 * multiple, "by": "loss", "stated": None, "chance": 3.3}
    known |= {"failed": False, "train": [3.0, 2.5], "overhead": 0.0, "updates": 10, "code": "x"}
    known |= {"published": policy == "published-100", "policy": policy, "multiple": multiple}
    return {**known, "seed": seed, "score": score, **fields}


def compared(rows: list[dict[str, Any]]) -> Comparison:
    (found,) = comparisons(rows)
    return found


def test_the_best_by_hand_is_chosen_on_means_over_every_rate_and_is_never_warmctl() -> None:
    rows = [row("none", 1, score, seed) for seed, score in enumerate((1.0, 3.0))]
    rows += [row("published-100", 3, 1.9, seed) for seed in (0, 1)] + [row("warmctl", 3, 0.5, seed) for seed in (0, 1)]
    assert compared(rows).best_by_hand() == ("published-100", 3)


def test_the_gap_is_against_the_published_warmup_at_its_rate_and_against_the_best_above_it() -> None:
    scores = {"none": (2.5, 2.7), "published-100": (2.4, 2.2), "warmctl": (2.43, 2.3)}
    rows = [
        row(policy, multiple, score + (0.1 * seed if policy == "warmctl" else 0.0), seed)
        for policy, pair in scores.items()
        for multiple, score in zip((1, 3), pair, strict=True)
        for seed in (0, 1)
    ]
    found = compared(rows)
    assert found.reference(1) == ("published-100", 1) and found.reference(3) == ("published-100", 3)
    gap, half = found.gap(1)
    assert gap == pytest.approx(0.03 + 0.05)
    assert half == pytest.approx(12.7062 * 0.1 / 2, rel=1e-4)  # Student's t of one degree times s/√2
    assert found.gap(3)[0] == pytest.approx(0.1 + 0.05)


def test_only_seeds_that_every_run_has_are_compared() -> None:
    rows = [row("none", 1, 2.0, 0), row("none", 1, 9.0, 1), row("warmctl", 1, 2.5, 0)]
    assert compared(rows).mean(("none", 1)) == 2.0


def test_price_is_the_mean_over_runs() -> None:
    ours = row("warmctl", 1, 2.0, overhead=0.05)
    diverged = row("none", 30, 3.3, updates=5, failed=True)
    found = compared([row("none", 1, 2.0), diverged, ours, row("warmctl", 30, 2.0, overhead=0.07)])
    assert found.price("warmctl") == pytest.approx(0.06) and found.price("none") == 0.0
    assert found.failures("none") == (1, 2)


@pytest.mark.usefixtures("one_thread")
def test_targets_are_met_and_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    rows = [row("published-100", 1, 2.40), row("none", 3, 2.35), row("warmctl", 1, 2.409)]
    rows += [row("warmctl", 3, 2.36), row("warmctl", 10, 2.38)]
    lines = report(rows, "published_recipes", {"quick": False})["nanogpt/x, 300 updates"]["warmctl"]
    assert [(line["against"], line["met"]) for line in lines] == [
        ("published-100 at 1 ×", True), ("none at 3 ×", True), ("none at 3 ×", False),
    ]  # fmt: skip
