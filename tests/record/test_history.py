"""History in memory: rows, columns, copies."""

from __future__ import annotations

import copy
import enum
import math
import pickle
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from tests.record.helpers import attach, history, row, steps
from warmctl.record.history import BLOCK, COLUMNS, History, WarmupEnd, warmup_end


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


def test_at_the_interpreters_exit_it_needs_no_name_of_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are None by then."""
    history = History([{"step": 1}])
    names = vars(sys.modules[History.__module__])
    for name in [name for name in names if not name.startswith("__")]:
        monkeypatch.setitem(names, name, None)
    history.__del__()
