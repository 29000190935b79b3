"""Files that survive reruns, resumed runs, torn lines and kills."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import warmctl.record.history
from tests.record.helpers import TORN, attach, history, row, steps
from warmctl.record.history import History, read_jsonl


def test_a_resumed_run_goes_on_in_its_file(path: Path) -> None:
    """Killed at step 8, resumed from a checkpoint of step 5 in a new process: no row twice, none stale."""
    before = history(last=8)
    attach(before, path)
    before.close()
    resumed = History()
    attach(resumed, path)
    assert steps(path) == list(range(1, 9))  # nothing is lost before the first new row is there
    for step in range(6, 11):
        resumed.append(row(step, loss=0.125))
    assert steps(path) == list(range(1, 11))
    straight = path.with_stem("straight")
    attach(History([*history(last=5), *history(6, 10, loss=0.125)]), straight)
    assert path.read_bytes() == straight.read_bytes()


def test_a_resumed_run_exported_at_its_end_keeps_the_rows_before(path: Path) -> None:
    attach(history(last=8), path)
    attach(history(first=6, last=10), path)
    assert steps(path) == list(range(1, 11))


def test_a_gap_is_left_a_gap(path: Path) -> None:
    attach(history(last=3), path)
    attach(history(first=6, last=7), path)
    assert steps(path) == [1, 2, 3, 6, 7]


def test_a_rewind_within_a_process_rewinds_the_file(path: Path) -> None:
    record = history(last=8)
    attach(record, path)
    for step in (4, 5):
        record.append(row(step, loss=7.0))
    assert steps(path) == record["step"] == [1, 2, 3, 4, 5]


def test_a_fresh_run_on_an_old_path_replaces_it(path: Path) -> None:
    attach(history(last=8), path)
    fresh = History()
    attach(fresh, path)
    fresh.append({"step": 1, "loss": 0.5})
    fresh.append({"step": 2, "loss": 0.25})
    expected = {
        ".csv": "step,loss\n1,0.5\n2,0.25\n",
        ".jsonl": '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n',
    }
    assert path.read_text() == expected[path.suffix]


# Torn and corrupt lines -------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out_by_the_reader(tmp_path: Path) -> None:
    history().to_jsonl(tmp_path / "run.jsonl")
    whole = (tmp_path / "run.jsonl").read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in (1, *range(2, len(last) + 1, 5)):
        (tmp_path / "run.jsonl").write_bytes(whole[:-cut])
        expected = [1, 2, 3] if cut == 1 else [1, 2]  # the line break alone may be missing
        assert History.from_jsonl(tmp_path / "run.jsonl")["step"] == expected


def test_a_torn_last_line_is_repaired_by_the_writer(path: Path) -> None:
    attach(history(), path)
    whole = path.read_bytes()
    for cut in (1, 2, 20, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        resumed = History()
        attach(resumed, path)
        resumed.append(row(3))
        resumed.close()
        assert path.read_bytes() == whole


def test_a_missing_last_line_break_loses_no_row(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text('{"step": 1}\n{"step": 2}')
    record = History()
    record.to_jsonl(tmp_path / "run.jsonl")
    record.append({"step": 3})
    record.append({"step": 2})
    assert steps(tmp_path / "run.jsonl") == [1, 2]


def test_a_csv_torn_in_its_header_starts_again(tmp_path: Path) -> None:
    for torn in ("s", "step", "step,pha"):
        (tmp_path / "run.csv").write_text(torn)
        History([{"step": 1, "loss": 0.5}]).to_csv(tmp_path / "run.csv")
        assert (tmp_path / "run.csv").read_text() == "step,loss\n1,0.5\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (TORN + "\n", r"run\.jsonl, line 2: not a row of a history"),
        ("[1, 2]\n", r"line 2: .*an object with an integer 'step'"),
        ('{"loss": 1.0}\n', r"line 2: .*an object with an integer 'step'"),
        ('{"step": 2, "loss": [1]}\n', r"line 2: 'loss' is not a plain value"),
    ],
)
def test_other_corruption_is_named_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    content = '{"step": 1}\n' + line + '{"step": 3}\n'
    (tmp_path / "run.jsonl").write_text(content)
    for read in (History.from_jsonl, read_jsonl, History().to_jsonl, history().to_jsonl):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "run.jsonl")
    assert (tmp_path / "run.jsonl").read_text() == content


def test_a_corrupt_csv_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "run.csv").write_text("step,loss\n1,0.5\nx,y\n")
    with pytest.raises(ValueError, match=r"run\.csv, line 3: not a row of a history"):
        history().to_csv(tmp_path / "run.csv")


# Killed processes -------------------------------------------------------------------------------------------


WRITER = """
import sys, types
sys.modules["warmctl"] = package = types.ModuleType("warmctl")  # without torch, whose import takes seconds
package.__path__ = [sys.argv[4]]
from warmctl.record.history import History
first, jsonl, table = int(sys.argv[1]), sys.argv[2], sys.argv[3]
history = History()
history.to_jsonl(jsonl)
history.to_csv(table)
for step in range(first, 10**9):
    history.append({"step": step, "phase": "warmup", "loss": 1 / step, "reason": "x" * (step % 300)})
"""


def _write_until_killed(first: int, jsonl: Path, table: Path, size: int) -> None:
    """Run a writer in another process and kill it, not before the file has grown by `size` bytes."""
    grown = size + (jsonl.stat().st_size if jsonl.exists() else 0)
    package = str(Path(warmctl.record.history.__file__).parents[1])
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(first), str(jsonl), str(table), package])
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (jsonl.exists() and jsonl.stat().st_size > grown):
            assert process.poll() is None
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_process_leaves_a_readable_file_that_the_next_goes_on_with(tmp_path: Path) -> None:
    """Slow: two real processes."""
    jsonl, table = tmp_path / "run.jsonl", tmp_path / "run.csv"
    _write_until_killed(1, jsonl, table, 100_000)
    record = History.from_jsonl(jsonl)
    assert len(record) > 50
    assert record["step"] == list(range(1, len(record) + 1))
    assert record["loss"] == [1 / step for step in record["step"]]

    with open(jsonl, "ab") as stream:  # a kill within a write is rare: force one
        stream.write(TORN.encode())
    with open(table, "ab") as stream:
        stream.write(b"123456789,war")
    assert History.from_jsonl(jsonl)["step"] == record["step"]

    _write_until_killed(len(record) - 9, jsonl, table, 100_000)  # resumed from ten steps before
    again = History.from_jsonl(jsonl)
    assert len(again) > len(record) + 50
    assert again["step"] == list(range(1, len(again) + 1))
    with open(table, newline="") as stream:
        found = [int(cells["step"]) for cells in csv.DictReader(stream) if cells["reason"] is not None]
    assert found[: len(again) - 1] == again["step"][: len(found)][: len(again) - 1]
    assert len(found) >= len(again) - 1
