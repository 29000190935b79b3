"""Runs beside each other: the figure, and the differences from the first."""

from __future__ import annotations

from pathlib import Path

from tests.command.test_commands import invoke, record, write
from warmctl.record.history import History


def test_differences_from_the_first_run(tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", record(last=200, overhead=0.125))
    rows = [row | {"loss": row["loss"] + 1.0, "lr": 0.05} for row in record(last=150, overhead=0.25)]  # type: ignore[operator]
    second = write(tmp_path / "second.jsonl", History(rows))
    code, out, err = invoke("compare", first, second, "--out", str(tmp_path / "x.png"))
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    loss = (2 / 150 + 2 / 149) / 2  # of the last hundredth of 150 steps: those above 148.5
    (a,) = [line for line in lines if line[:1] == ["first"]]
    (b,) = [line for line in lines if line[:1] == ["second"]]
    assert "at 150" in out
    assert (a[1], b[1]) == (format(loss, ".4g"), format(loss + 1, ".4g"))
    assert a[2:] == ["0.01", "11", "0.25", "0.025", "1.75", "1.0%", "12.5%"]
    assert b[3:] == ["11", "0.25", "0.05", "1.75", "1.4%", "25.0%"]
    assert any(line[:1] == ["+1"] and "+0.025" in line and "+12.5%" in line for line in lines)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_one_run_is_no_comparison(tmp_path: Path) -> None:
    code, _, err = invoke("compare", write(tmp_path / "run.jsonl", record()))
    assert code == 1 and "two runs or more" in err
