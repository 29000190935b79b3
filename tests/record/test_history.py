"""History: rows and columns in memory; files that survive kills, reruns and resumed runs."""

from __future__ import annotations

import copy
import csv
import enum
import gc
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

import warmctl.record.history
from warmctl.record.history import BLOCK, COLUMNS, History, WarmupEnd, read_jsonl, warmup_end

TORN = '{"step": 4, "phase": "warm'


def row(step: int, **values: Any) -> dict[str, Any]:
    """A full row as the wrapper writes it."""
    full = {
        "step": step,
        "phase": "warmup" if step < 5 else "guard",
        "scale": 0.1 * step,
        "lr": 0.003 * step,
        "scheduled_lr": 0.03,
        "loss": 2.0 / step,
        "sharpness": None,
        "threshold": 3.8,
        "stability_ratio": 1 / 3,
        "target": 0.5,
        "residual": 0.01,
        "hvps": 2 * step,
        "probes": step,
        "overhead": 0.7,
        "probed": step % 2 == 0,
        "reason": "warmup ended: full rate, as scheduled" if step == 5 else "",
    }
    return {**full, **values}


def history(first: int = 1, last: int = 3, **values: Any) -> History:
    return History(row(step, **values) for step in range(first, last + 1))


def steps(path: Path) -> list[int]:
    if path.suffix == ".csv":
        with open(path, newline="") as stream:
            return [int(cells["step"]) for cells in csv.DictReader(stream)]
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def attach(record: History, path: Path) -> None:
    record.to_csv(path) if path.suffix == ".csv" else record.to_jsonl(path)


@pytest.fixture(params=["run.jsonl", "run.csv"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


# In memory


def test_is_a_sequence_of_the_rows_that_went_in() -> None:
    record = history(last=8)
    assert isinstance(record, Sequence)
    assert len(record) == 8
    assert list(record) == [row(step) for step in range(1, 9)]
    assert (record[0], record[-1], record[2:4]) == (row(1), row(8), [row(3), row(4)])
    assert record[::-3] == [row(8), row(5), row(2)]
    assert [type(value) for value in record[5].values()] == [type(value) for value in row(6).values()]
    assert repr(record) == "History(8 rows, steps 1 to 8)"
    for index in (8, -9):
        with pytest.raises(IndexError):
            record[index]


def test_columns() -> None:
    record = history()
    assert record.columns == COLUMNS
    assert record["step"] == [1, 2, 3]
    assert record["phase"] == ["warmup"] * 3
    assert record["probed"] == [False, True, False]
    baseline = History([{"loss": 1.5, "step": 1}])
    assert baseline.columns == ("step", "loss")
    assert baseline["stability_ratio"] == [None]  # known, and nobody wrote it
    with pytest.raises(KeyError, match=r"no column 'los'; there are step, loss"):
        baseline["los"]


def test_empty() -> None:
    record = History()
    assert (len(record), list(record), record["scale"], record.columns) == (0, [], [], ())
    assert not record
    assert repr(record) == "History(0 rows)"


def test_a_later_column_is_none_before() -> None:
    record = History([{"step": 1}, {"step": 2, "accuracy": 0.5, "loss": 1.0}, {"step": 3}])
    assert record.columns == ("step", "loss", "accuracy")
    assert record["accuracy"] == [None, 0.5, None]


scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text("aé \n", max_size=3)
)


@settings(max_examples=50, deadline=None)
@example([{"a": 2**60 + 1, "b": True}, {"a": 1, "b": 1.0}, {"a": True, "b": ""}])
@given(st.lists(st.fixed_dictionaries({"a": scalars, "b": scalars}), max_size=20))
def test_any_scalar_comes_back_with_its_type(rows: list[dict[str, Any]]) -> None:
    record = History({"step": step, **values} for step, values in enumerate(rows))
    for got, given_row in zip(record, rows, strict=True):
        for name, value in given_row.items():
            assert got[name] == value
            assert type(got[name]) is type(value)


class _Phase(str, enum.Enum):
    WARMUP = "warmup"


def test_numpy_torch_and_enumerations_become_plain() -> None:
    record = History([{"step": np.int64(1), "loss": torch.tensor(0.5, requires_grad=True), "lr": np.float64(0.25)}])
    record.append({"step": 2, "scale": np.float32(0.5), "probed": np.bool_(True), "phase": _Phase.WARMUP})
    expected = {"step": 1, "phase": None, "scale": None, "lr": 0.25, "loss": 0.5, "probed": None}
    assert list(record[0].items()) == list(expected.items())
    assert [type(value) for value in record[1].values()] == [int, str, float, type(None), type(None), bool]
    assert record[1]["phase"] == "warmup"


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_record_is_append_for_full_rows(count: int) -> None:
    """Whenever it is read: at every step, or after blocks of steps were taken into columns."""
    odd = {3: {"loss": None, "target": np.float64(0.5)}, 5: {"hvps": 2**60 + 1, "ratio": math.inf}}
    rows = [{name: {**row(step), **odd.get(step, {})}[name] for name in COLUMNS} for step in range(1, count + 1)]
    appended, recorded, read = History(rows), History(), History()
    for index, values in enumerate(rows, start=1):
        recorded.record(tuple(values.values()))
        read.record(tuple(values.values()))
        assert len(read) == index and read[-1]["step"] == index
    for record in (recorded, read):
        assert list(record) == list(appended) and repr(record) == repr(appended)
        assert [[type(v) for v in r.values()] for r in record] == [[type(v) for v in r.values()] for r in appended]


@pytest.mark.parametrize("read", [list, copy.copy, copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))])
def test_rows_just_recorded_are_in_copies_and_go_with_a_rewind(read: Any) -> None:
    record = History([{"step": 1, "extra": 1.5}])
    for step in (2, 3, 4):
        record.record(tuple(row(step)[name] for name in COLUMNS))
    assert [r["step"] for r in read(record)] == [1, 2, 3, 4]
    record.record(tuple(row(3, loss=9.0)[name] for name in COLUMNS))
    assert record["step"] == [1, 2, 3] and record["loss"][-1] == 9.0
    assert record["extra"] == [1.5, None, None] and record.columns == (*COLUMNS, "extra")


def test_recorded_rows_reach_a_file(path: Path) -> None:
    record = History()
    for step in range(1, 6):
        record.record(tuple(row(step)[name] for name in COLUMNS))
        if step == 3:
            attach(record, path)
        if step >= 3:
            assert steps(path) == list(range(1, step + 1))


@pytest.mark.parametrize("bad", [{}, {"step": None}, {"step": 1.5}, {"step": True}, {"step": "1"}])
def test_a_row_needs_an_integer_step(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="integer 'step'"):
        History().append(bad)


def test_a_bad_value_is_refused_and_changes_nothing() -> None:
    record = history()
    with pytest.raises(TypeError, match=r"column 'loss' takes .* not list"):
        record.append({"step": 2, "loss": [1.0]})
    assert list(record) == list(history())


def test_a_row_replaces_those_of_its_step_and_later() -> None:
    record = history(last=8)
    record.append(row(5, loss=9.0))
    assert record["step"] == [1, 2, 3, 4, 5]
    assert record["loss"][-1] == 9.0
    record.append({"step": 0})
    assert record["step"] == [0]


def test_bytes_a_row() -> None:
    tracemalloc.start()
    try:
        record = history(last=5_000)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert used / len(record) < 180


def test_pickle_and_copies_hold_rows_and_no_files(path: Path) -> None:
    record = history()
    attach(record, path)
    for twin in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record), copy.copy(record)):
        assert list(twin) == list(record)
        twin.append(row(4))
        assert len(record) == 3
        assert steps(path) == [1, 2, 3]
    record.append(row(4))
    assert steps(path) == [1, 2, 3, 4]


def test_warmup_end() -> None:
    assert warmup_end(history(last=9)) == WarmupEnd(5, "full rate, as scheduled")
    assert warmup_end(history(last=4)) is None
    assert warmup_end(history(first=6, last=9)) is None
    assert warmup_end(History([{"step": 1, "loss": 1.0}])) is None
    assert warmup_end(History([{"step": 1, "phase": "warmup"}, {"step": 2, "phase": "done"}])) == (2, "")


# Files


def test_writes_what_there_is_and_then_each_row_at_once(path: Path) -> None:
    record = history(last=2)
    attach(record, path)
    assert steps(path) == [1, 2]
    for step in (3, 4):
        record.append(row(step))
        assert steps(path)[-1] == step
        assert path.read_bytes().endswith(b"\n")


def test_export_after_the_run_equals_the_live_file(path: Path) -> None:
    live = History()
    attach(live, path)
    for step in range(1, 9):
        live.append(row(step))
    export = path.with_stem("export")
    attach(live, export)
    assert export.read_bytes() == path.read_bytes()


def test_jsonl_round_trip(tmp_path: Path) -> None:
    record = history(last=8, loss=1 / 3)
    record.to_jsonl(tmp_path / "deep" / "run.jsonl")
    assert list(History.from_jsonl(tmp_path / "deep" / "run.jsonl")) == list(record)
    assert read_jsonl(str(tmp_path / "deep" / "run.jsonl")) == list(record)


def test_non_finite_floats_are_valid_json_and_round_trip(tmp_path: Path) -> None:
    record = History([{"step": 1, "loss": math.nan, "scale": math.inf, "lr": -math.inf, "reason": "NaN"}])
    record.to_jsonl(tmp_path / "run.jsonl")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "run.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "scale": "Infinity", "lr": "-Infinity", "loss": "NaN", "reason": "NaN"}
    (back,) = read_jsonl(tmp_path / "run.jsonl")
    assert math.isnan(back.pop("loss"))  # type: ignore[arg-type]
    assert back == {"step": 1, "scale": math.inf, "lr": -math.inf, "reason": "NaN"}


def test_csv_read_back(tmp_path: Path) -> None:
    record = history(last=5, loss=1 / 3, residual=math.nan)
    record.append(row(6, reason='cut, "at once"\nsecond line; é'))
    record.to_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert tuple(rows[0]) == COLUMNS
    assert [float(cells["loss"]) for cells in rows] == record["loss"]  # to the last bit
    assert rows[0]["sharpness"] == ""
    assert math.isnan(float(rows[0]["residual"]))
    assert [cells["probed"] for cells in rows[:2]] == ["False", "True"]
    assert rows[4]["reason"] == "warmup ended: full rate, as scheduled"
    assert rows[5]["reason"] == 'cut, "at once" second line; é'
    assert len((tmp_path / "run.csv").read_text(encoding="utf-8").splitlines()) == 7


def test_a_later_column_widens_the_csv(tmp_path: Path) -> None:
    record = History([{"step": 1, "loss": 0.5}])
    record.to_csv(tmp_path / "run.csv")
    record.append({"step": 2, "loss": 0.25, "accuracy": 0.9})
    record.append({"step": 3})
    assert (tmp_path / "run.csv").read_text() == "step,loss,accuracy\n1,0.5,\n2,0.25,0.9\n3,,\n"
    assert [file.name for file in tmp_path.iterdir()] == ["run.csv"]


def test_both_formats_at_once_and_attaching_twice(tmp_path: Path) -> None:
    record = history()
    for _ in range(2):
        record.to_jsonl(tmp_path / "run.jsonl")
        record.to_csv(tmp_path / "run.csv")
    record.append(row(4))
    assert steps(tmp_path / "run.jsonl") == steps(tmp_path / "run.csv") == [1, 2, 3, 4]


def test_close_detaches_and_attaching_again_goes_on(path: Path) -> None:
    record = history()
    attach(record, path)
    record.close()
    record.append(row(4))
    assert steps(path) == [1, 2, 3]
    attach(record, path)
    record.append(row(5))
    assert steps(path) == [1, 2, 3, 4, 5]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
@pytest.mark.filterwarnings("error")
def test_garbage_collection_closes(path: Path) -> None:
    record = history()
    attach(record, path)

    def is_open() -> bool:
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        return str(path) in [os.readlink(link) for link in links if os.path.islink(link)]

    assert is_open()
    del record
    gc.collect()
    assert not is_open()


# Reruns, resumed runs, torn lines


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


@pytest.mark.parametrize(
    "content",
    [b'{"lr": 0.1}', b'{\n  "lr": 0.1\n}', b"plain text", b"a,b\n1,2\n", b"\x80\x02PK", b"a,b", b"stem"],
)
def test_a_file_of_something_else_is_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\."):
        attach(history(), path)
    assert path.read_bytes() == content


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        History.from_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert len(History.from_jsonl(tmp_path / "empty.jsonl")) == 0
    with pytest.raises(OSError):
        history().to_jsonl(tmp_path)  # a folder


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_warns_once_and_never_stops_training(path: Path) -> None:
    record = history()
    attach(record, path)
    (file,) = record._files.values()
    file._stream.close()
    file._stream = open("/dev/full", "r+b")  # noqa: SIM115
    with pytest.warns(RuntimeWarning, match="can no longer be written .* detached"):
        record.append(row(4))
    record.append(row(5))
    assert record["step"] == [1, 2, 3, 4, 5]
    attach(record, path)
    assert steps(path) == [1, 2, 3, 4, 5]


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
