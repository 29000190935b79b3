"""Files of rows: written at once, read back, closed; other files are left alone."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
from pathlib import Path

import pytest

from tests.record.helpers import attach, history, row, steps
from warmctl.record.history import COLUMNS, History, read_jsonl


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
