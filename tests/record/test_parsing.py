"""A record is read field by field: what is wrong is one line with file, line and field that a terminal can show."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from tests.record.helpers import row
from warmctl.record.history import COLUMNS, History
from warmctl.record.parsing import NUMBERS, TEXT, parse_row
from warmctl.record.scalars import scalars
from warmctl.record.shown import plain, shown

NESTED = "[" * 100_000


def test_every_column_is_a_number_or_text() -> None:
    assert NUMBERS.isdisjoint(TEXT) and NUMBERS | set(TEXT) == set(COLUMNS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 2, "loss": "much"}', "'loss' is text, not a number: 'much'"),
        ('{"step": 2, "lr": "\\u001b[2J"}', r"'lr' is text, not a number: '\\x1b[2J'"),
        ('{"step": 2, "loss": 1' + "0" * 400 + "}", "'loss' is an integer too large for a number"),
        ('{"step": 1' + "0" * 400 + "}", "'step' is beyond 2**53"),
        ('{"step": 2, "loss": 1' + "0" * 5000 + "}", "not a row of a history"),
        ('{"step": 2, "loss": ' + NESTED, "not a row of a history (nested too deeply)"),
        ('{"step": 2, "loss": [1]}', "'loss' is not a plain value"),
        ('{"step": 2, "\\ud800\\n": {}}', r"'\\ud800\\n' is not a plain value"),
        ('{"step": 2, "phase": 3}', "'phase' is a number, not text"),
        ('{"step": Infinity}', "an object with an integer 'step'"),
        ('{"step": "NaN"}', "an object with an integer 'step'"),
        ("[2]", "an object with an integer 'step'"),
        ("nonsense", "Expecting value"),
        ("step,phase,scale", "records are read as JSONL"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "run\x1b[31m\n.jsonl"
    path.write_text(json.dumps(row(1)) + "\n" + line + "\n" + json.dumps(row(3)) + "\n")
    with pytest.raises(ValueError) as error:
        History.from_jsonl(path)
    assert str(error.value).startswith(f"{tmp_path}/run\\x1b[31m\\n.jsonl, line 2: ")
    assert message in str(error.value) and str(error.value).isprintable()


def test_infinities_and_lone_surrogates_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1, "loss": Infinity, "lr": 1e999, "scale": "-Infinity", "reason": "\\udc80"}\n')
    (found,) = History.from_jsonl(path)
    assert (found["loss"], found["lr"], found["scale"]) == (math.inf, math.inf, -math.inf)
    assert found["reason"] == "\udc80" and shown(found["reason"]) == r"\udc80"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=2)
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*COLUMNS, "more"]), json_values))
def test_any_json_is_a_row_or_one_line(values: dict[str, object]) -> None:
    try:
        found = parse_row(json.dumps(values).encode(), Path("run.jsonl"), 7)
    except ValueError as error:
        assert str(error).startswith("run.jsonl, line 7: ") and str(error).isprintable()
    else:
        assert all(isinstance(value, (int, float, type(None))) for name, value in found.items() if name in NUMBERS)


@settings(deadline=None)
@given(st.text())
def test_what_is_shown_can_be_printed_and_encoded(text: str) -> None:
    assert shown(text).isprintable()
    shown(text).encode()


def test_what_is_shown() -> None:
    assert shown("é – [b] $x_$") == "é – [b] $x_$"
    assert shown("\x1b[31m\u202ea\r\n\udc80\x9b") == r"\x1b[31m\u202ea\r\n\udc80\x9b"
    assert plain("$x_$") == r"\$x_\$"


def test_scalars_are_finite_numbers_under_names_with_slashes() -> None:
    metrics = row(5, residual=math.inf, sharpness=math.nan, probed=True)
    found = scalars(metrics)
    assert found["warmup/phase"] == 1.0 and found["warmup/lr"] == metrics["lr"] and found["warmup/probes"] == 5.0
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert found.keys().isdisjoint({f"warmup/{name}" for name in ("residual", "sharpness", "reason")})
    assert [scalars({"phase": phase}, "")["phase"] for phase in ("warmup", "guard", "done")] == [0.0, 1.0, 2.0]
    assert scalars({"phase": None}) == {}
