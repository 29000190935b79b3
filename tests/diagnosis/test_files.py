"""Logs of whoever wrote them give the verdict that the same numbers give; what is no row is named, file and line."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import pytest

from tests.diagnosis.trained import Row, net, train
from warmctl.diagnosis import columns, diagnose, diagnose_command, rules
from warmctl.diagnosis.files import log_of
from warmctl.record.history import History

pytestmark = pytest.mark.xdist_group("files")  # its fixture is made once

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return train(net(0), 2.0)  # lost


def jsonl(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_csv(path: Path, rows: list[Row]) -> Path:
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_files_and_rows_say_the_same(rows: list[Row], tmp_path: Path) -> None:
    expected = diagnose(rows)
    assert expected.verdict == "lost"
    assert diagnose(jsonl(tmp_path / "a.jsonl", rows)) == expected
    assert diagnose(as_csv(tmp_path / "a.csv", rows)) == expected
    assert diagnose(History(rows)) == expected
    assert diagnose_command(tmp_path / "a.csv") == f"{tmp_path / 'a.csv'}: {expected}"


def test_the_files_of_a_history(rows: list[Row], tmp_path: Path) -> None:
    history = History(rows)
    history.to_jsonl(tmp_path / "run.jsonl")
    history.to_csv(tmp_path / "run.csv")
    assert diagnose(tmp_path / "run.jsonl") == diagnose(tmp_path / "run.csv") == diagnose(rows)


def test_the_trainers_log(rows: list[Row], tmp_path: Path) -> None:
    """Losses and rates every fifth step, evaluations between them, a mean over training at the end."""
    log: list[Row] = []
    for row in rows[::5]:
        log.append(
            {"loss": row["loss"], "learning_rate": row["lr"], "grad_norm": row["grad_norm"], "step": row["step"]}
        )
        log.append({"eval_loss": 1.0, "step": row["step"]})
    log.append({"train_loss": 0.01, "train_runtime": 3.0, "step": rows[-1]["step"]})
    (tmp_path / "trainer_state.json").write_text(json.dumps({"epoch": 1.0, "log_history": log}, indent=2))
    found = diagnose(log)
    assert found.verdict == "lost" and found.evidence[0].column == "loss"
    assert diagnose(tmp_path / "trainer_state.json") == found


def test_lightnings_metrics(rows: list[Row], tmp_path: Path) -> None:
    """The rate stands in rows of its own, and validation in others."""
    log: list[Row] = []
    for row in rows:
        log.append({"epoch": "", "lr-SGD": row["lr"], "step": row["step"], "train_loss_step": "", "val_loss": ""})
        log.append({"epoch": 0, "lr-SGD": "", "step": row["step"], "train_loss_step": row["loss"], "val_loss": ""})
    found = diagnose(as_csv(tmp_path / "metrics.csv", log))
    assert found.verdict == "lost" and "lr-SGD: " in str(found) and found.evidence[0].column == "train_loss_step"


def test_nested_rows_are_read_by_path(rows: list[Row], tmp_path: Path) -> None:
    nested = [{"iteration": row["step"], "train": {"loss": row["loss"], "lr": row["lr"]}} for row in rows]
    assert diagnose(jsonl(tmp_path / "a.jsonl", nested)).verdict == "lost"


def test_a_loss_alone_is_enough(rows: list[Row]) -> None:
    assert diagnose([{"loss": row["loss"]} for row in rows]).verdict == "lost"


@pytest.mark.parametrize("word", [math.nan, "NaN", "inf", None, ""])
def test_values_that_are_missing_or_not_finite_are_borne(word: object) -> None:
    rows = train(net(0), 0.1, warmup=20)
    for index in (3, 50, 120):
        rows[index] = {**rows[index], "loss": word, "grad_norm": word}
    assert diagnose(rows).verdict == "well warmed"


def test_a_loss_that_stays_not_finite_is_lost() -> None:
    rows = train(net(0), 0.1, warmup=20)
    for row in rows[150:]:
        row["loss"] = math.nan
    found = diagnose(rows)
    assert found.verdict == "lost" and found.evidence[0].steps == (151,)


def test_a_run_begun_again_in_the_same_file_replaces_the_first(rows: list[Row]) -> None:
    well = train(net(0), 0.1, warmup=20)
    found, expected = diagnose([*rows, *well]), diagnose(well)
    assert (found.verdict, found.advice, found.evidence[:-1]) == (expected.verdict, expected.advice, expected.evidence)
    assert found.evidence[-1].says == "step: it begins again; the 200 rows before that are left out"


def test_no_warmup_is_judged_where_steps_begin_again_in_mid_run(rows: list[Row]) -> None:
    """A run that was resumed, with a counter that was not."""
    well = train(net(0), 0.1, warmup=20)
    found = diagnose([*well[:100], *({**row, "step": row["step"] - 100} for row in well[100:])])
    assert found.verdict == "not judged" and "begins again at step 1," in found.evidence[0].says
    assert "the 100 rows before that are left out" in str(found) and "one run alone" in found.advice


def test_rows_without_a_loss_that_stand_before_their_step_are_no_run(rows: list[Row]) -> None:
    assert diagnose([{"step": 200, "parameters": 9.0}, *rows]) == diagnose(rows)


def test_steps_that_are_counted_within_epochs_are_named() -> None:
    with pytest.raises(ValueError, match=r"finds 5 rows.*step: it begins again 39 times; the 195 rows before"):
        diagnose([{"step": index % 5, "loss": 1.0} for index in range(200)])


def test_a_line_torn_by_a_kill_is_passed_over(rows: list[Row], tmp_path: Path) -> None:
    for path in (jsonl(tmp_path / "a.jsonl", rows), as_csv(tmp_path / "a.csv", rows)):
        path.write_text(path.read_text() + ('{"step": 20' if path.suffix == ".jsonl" else "201,1.0"))
        assert diagnose(path) == diagnose(rows)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "step,loss\n1,2.0\n2,1.0,7\n", "line 3: 3 cells under a header of 2"),
        ("a.csv", "step,loss\n1,2.0\n2\n3,1.0\n", "line 3: 1 cells under a header of 2"),
        ("a.csv", "step,loss\n1,2.0\n2,high\n", "line 3: 'loss' is not a number: 'high'"),
        ("a.csv", "step,loss\n1,2.0\nx,1.0\n", "line 3: a step is a number, not 'x'"),
        ("a.csv", "step,loss\n1,2.0\n", "8 rows or more with a loss, and finds 1 rows"),
        ("a.csv", "step,accuracy\n1,2.0\n", "columns step, accuracy. A column of losses is called"),
        ("a.csv", "", "finds no rows"),
        ("a.log", "step 1 loss 2.0\nstep 2 loss 1.0\n", "columns step 1 loss 2.0. A column"),
        ("a.csv", "Step,a - train/loss,b - train/loss\n1,2.0,2.0\n", "a - train/loss, b - train/loss. A column of"),
        ("events.out.tfevents.1", "", "event files are not read: save its scalars as CSV"),
        ("a.jsonl", '{"step": 1, "loss": 2}\n{"step": 2, "loss"\n{"step": 3}\n', "line 2: not JSON"),
        ("a.jsonl", '{"step": 1, "loss": 2}\n7\n', "line 2: a row is an object"),
        ("a.json", '{\n"rows": []\n}', "a list of rows"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        (
            "a.jsonl",
            '{"step": 1, "loss": 2}\n{"loss": ' + "[" * 100_000 + "\n{}\n",
            "line 2: not JSON (nested too deeply",
        ),
    ],
)
def test_what_is_no_row_is_named(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        diagnose(tmp_path / name)
    assert name in str(error.value)


def test_other_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="path of a CSV or JSONL file, not int"):
        diagnose(7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="row 0"):
        diagnose([1.0] * 10)  # type: ignore[list-item]
    with pytest.raises(FileNotFoundError):
        diagnose(tmp_path / "none.csv")


def test_columns_of_layers_are_found_by_name() -> None:
    log = log_of([{"step": 1, "vitals/block.0/ln/sigma": 1.0, "vitals/x/saturated": 0.5}])
    assert list(log.layers("sigma")) == ["block.0/ln"] and list(log.layers("saturated")) == ["x"]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_cells_are_parted_by_other_marks_too(delimiter: str, rows: list[Row], tmp_path: Path) -> None:
    path = as_csv(tmp_path / "a.csv", rows)
    path.write_text(path.read_text().replace(",", delimiter))
    assert diagnose(path) == diagnose(rows)
    path.write_text(path.read_text().replace(".", ","))  # as a German Excel writes
    assert diagnose(path) == diagnose(rows)


def test_a_header_in_the_middle_is_no_row(rows: list[Row], tmp_path: Path) -> None:
    lines = as_csv(tmp_path / "a.csv", rows).read_text().splitlines()
    (tmp_path / "a.csv").write_text("\n".join([*lines[:90], lines[0], *lines[90:]]))
    assert diagnose(tmp_path / "a.csv") == diagnose(rows)


def test_what_tensorboard_exports_is_a_loss(rows: list[Row], tmp_path: Path) -> None:
    export = [{"Wall time": 1e9 + row["step"], "Step": row["step"], "Value": row["loss"]} for row in rows]
    found = diagnose(as_csv(tmp_path / "a.csv", export))
    assert found.verdict == "lost" and found.evidence[0].column == "Value"
    assert found.evidence[-1].says.startswith("Value: taken for the training loss")


def test_what_weights_and_biases_exports_is_read_of_one_run(rows: list[Row], tmp_path: Path) -> None:
    def export(*runs: str) -> Path:
        named = [
            {"Step": row["step"]}
            | {
                f"{run} - train/{kind}{end}": row[kind]
                for run in runs
                for kind in ("loss", "lr")
                for end in ("", "__MIN")
            }
            for row in rows
        ]
        return as_csv(tmp_path / "a.csv", named)

    renamed = [{"Step": row["step"], "train/loss": row["loss"], "train/lr": row["lr"]} for row in rows]
    assert diagnose(export("cosmic-sun - 3")) == diagnose(renamed)
    names = {"loss": "a-1 - train/loss", "lr": "a-1 - train/lr"}
    assert diagnose(export("a-1", "b-2"), **names).advice == diagnose(renamed).advice


@pytest.mark.parametrize("words", [("train", "val"), ("Training", "test"), (None, "eval")])
def test_rows_of_validation_are_left_out(words: tuple[str | None, str], rows: list[Row]) -> None:
    mixed = []
    for row in rows:
        mixed.append({**row, "split": words[0]})
        if row["step"] % 10 == 0:
            mixed.append({**row, "loss": row["loss"] + 9.0, "split": words[1]})
    found, expected = diagnose(mixed), diagnose(rows)
    assert found.evidence[-1].says == f"split: the training rows are read, 20 rows of {words[1]} are left out"
    assert (found.advice, found.evidence[:-1]) == (expected.advice, expected.evidence)


def test_columns_of_any_name_are_read_by_it(rows: list[Row], tmp_path: Path) -> None:
    others = {"loss": "nll", "lr": "eta", "step": "tokens"}
    renamed = as_csv(tmp_path / "a.csv", [{**{others[k]: row[k] for k in others}, "loss": 0.0} for row in rows])
    expected = diagnose([{k: row[k] for k in others} for row in rows])
    assert diagnose(renamed, **others).advice == expected.advice
    with pytest.raises(ValueError, match="no column 'mse', that was given for loss, is among tokens, loss"):
        diagnose([{"tokens": 1, "loss": 2.0}], loss="mse")


def test_of_a_folder_the_logs_in_it_are_named(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1").write_bytes(b"")
    with pytest.raises(ValueError, match="TensorBoard's event files are not read"):
        diagnose(tmp_path)
    (tmp_path / "metrics.csv").write_text("")
    with pytest.raises(ValueError, match=r"a folder: name a log in it, metrics.csv$"):
        diagnose(tmp_path)


@pytest.mark.parametrize("name", ["iters", "n_iter", "train_step", "steps", "Global Steps", "iterations", "iter"])
def test_steps_are_known_by_the_names_that_people_give_them(name: str) -> None:
    rows = train(net(0), 0.1, warmup=140)[9::10]
    found = diagnose([{name: row["step"], "loss": row["loss"], "lr": row["lr"]} for row in rows])
    assert "took 140 of 200 steps" in str(found) and "`warmup_steps=47`" in found.advice


@pytest.mark.parametrize("name", ["epoch", "tokens", None])
@pytest.mark.parametrize(
    ("lr", "warmup", "advice"), [(0.1, 140, "A warmup of 23% of the run"), (2.0, 20, "30% of the")]
)
def test_rows_are_not_taken_for_steps(name: str | None, lr: float, warmup: int, advice: str) -> None:
    rows = [{"loss": row["loss"], "lr": row["lr"]} for row in train(net(0), lr, warmup)[9::10]]
    found = diagnose([{name: index, **row} if name else row for index, row in enumerate(rows)])
    assert advice in found.advice and "warmup_steps" not in found.advice
    assert not re.search(r"step \d|\d steps", str(found)) and "rows are counted, from 0 on" in found.evidence[-1].says


def test_the_page_prints_the_tables_of_the_rules_and_of_the_names() -> None:
    page = (ROOT / "docs/after.md").read_text()
    assert rules.table() in page and len(rules.table().splitlines()) == len(rules.RULES) + 2
    assert columns.table() in page
