"""A long record is looked at by some of its rows: which, and what is known of the others."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.record.helpers import TORN, row
from warmctl.record.history import History, warmup_end
from warmctl.record.look import look
from warmctl.record.parsing import as_json
from warmctl.record.summary import summarise

ROWS = 6_000


def rows(count: int = ROWS) -> list[dict[str, object]]:
    noise = np.random.default_rng(0).lognormal(size=(2, count))
    made = [
        row(i + 1, loss=float(noise[0, i]), stability_ratio=float(noise[1, i]), phase="warmup", reason="")
        for i in range(count)
    ]
    for i, found in enumerate(made):
        if i >= 700:
            found["phase"] = "guard"
    made[min(1234, count - 1)]["reason"] = "cut: of a \"loss\": 9, or 'so'"
    return made


def write(path: Path, made: list[dict[str, object]]) -> Path:
    path.write_bytes(b"".join(as_json(found) for found in made))  # type: ignore[arg-type]
    return path


def test_extremes_reasons_and_phases_are_kept_and_all_rows_counted(tmp_path: Path) -> None:
    made = rows()
    path = write(tmp_path / "run.jsonl", made)
    found, whole = look(path, kept=300), History(made)
    assert found.rows == ROWS and len(found.history) < 700
    steps = set(found.history["step"])
    assert {1, 700, 701, 1235, ROWS} <= steps
    for column in ("loss", "stability_ratio"):
        assert max(found.history[column]) == max(whole[column])
        assert min(found.history[column]) == min(whole[column])
    kept = {kept["step"]: kept for kept in found.history}
    assert all(kept[step].items() >= whole[step - 1].items() for step in steps)  # type: ignore[operator]
    assert warmup_end(found.history) == warmup_end(whole)
    assert summarise(found.history, found.over_edge) == summarise(whole)


def test_the_mean_of_a_stretch_is_that_of_all_its_rows(tmp_path: Path) -> None:
    made = rows()
    found = look(write(tmp_path / "run.jsonl", made), kept=300).history
    losses = np.array([r["loss"] for r in made])
    lengths = range(90, 110)  # about 5 rows of 100 are kept
    assert any(found[0]["loss_mean"] == pytest.approx(losses[:length].mean(), rel=1e-12) for length in lengths)


def test_a_short_record_is_read_whole(tmp_path: Path) -> None:
    made = rows(200)
    found = look(write(tmp_path / "run.jsonl", made))
    assert list(found.history) == list(History(made)) and found.rows == 200


def test_values_that_are_not_finite_are_seen(tmp_path: Path) -> None:
    made = rows()
    made[2000]["loss"], made[3000]["loss"], made[4000]["stability_ratio"] = math.nan, math.inf, math.inf
    found = look(write(tmp_path / "run.jsonl", made), kept=300)
    assert {2001, 3001, 4001} <= set(found.history["step"])
    assert found.over_edge == summarise(History(made)).over_edge


@pytest.mark.parametrize("change", ["another order", "more columns", "spaces", "torn"])
def test_lines_of_another_layout_are_read_in_full(tmp_path: Path, change: str) -> None:
    made = rows()
    lines = [json.dumps(r) for r in made]
    for i in range(0, ROWS, 1000):
        if change == "another order":
            lines[i] = json.dumps(dict(reversed(made[i].items())))
        elif change == "more columns":
            lines[i] = json.dumps({"more": 1, **made[i]})
        elif change == "spaces":
            lines[i] = json.dumps(made[i], separators=(" ,", " : "))
    text = "\n".join(lines) + "\n" + (TORN if change == "torn" else "")
    (tmp_path / "run.jsonl").write_text(text)
    found = look(tmp_path / "run.jsonl", kept=300)
    assert found.rows == ROWS and summarise(found.history, found.over_edge) == summarise(History(made))


def test_a_line_that_is_no_row_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(r) for r in rows()]
    lines[3210] = lines[3210].replace('"target": 0.5', '"target": "half"')
    (tmp_path / "run.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"run\.jsonl, line 3211: 'target' is text, not a number: 'half'"):
        look(tmp_path / "run.jsonl", kept=300)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of its memory in /proc")
def test_looking_at_a_long_record_takes_little_memory(tmp_path: Path) -> None:
    """A process of its own that has read 100,000 rows; a million take as much, see docs/looking.md."""
    made = [as_json(row(i, phase="warmup", reason="", loss=i / 7)) for i in range(1, 100_001)]
    (tmp_path / "run.jsonl").write_bytes(b"".join(made))
    program = (
        "import re, sys; from warmctl.record.look import look; seen = look('run.jsonl');"
        "assert seen.rows == 100_000 and 'torch' not in sys.modules;"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000  # KiB, and Python with NumPy needs 35,000 of them
