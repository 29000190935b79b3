"""A growing record in a real terminal, and by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.command.test_commands import invoke, record, write
from warmctl.command.watch import follow, sparkline
from warmctl.record.history import History

pty = pytest.importorskip("pty")


def test_what_there_is(tmp_path: Path) -> None:
    rows = [row | {"reason": "cut: \x1b[2J" if row["step"] == 30 else ""} for row in record()]
    code, out, _ = invoke("watch", write(tmp_path / "run.jsonl", History(rows)), "--once")
    assert code == 0
    words = out.split()
    assert {"40", "guard", "0.05", "0.025", "0.25", "0.5", "0.125"} <= set(words)
    assert r"30: cut: \x1b[2J" in out and "of 40 steps" in out


def test_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    code, out, _ = invoke("watch", str(tmp_path / "run.jsonl"), "--once")
    assert code == 0 and "waiting for its first row" in out.replace("\n", " ")


def test_rows_are_followed_whole_and_read_again_after_a_rewind(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    rows = follow(path)
    assert next(rows) == []
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert [row["step"] for row in next(rows)] == [1]
    assert next(rows) == []
    with open(path, "a") as stream:
        stream.write('ss": 1.0}\n')
    assert next(rows) == [{"step": 2, "loss": 1.0}]
    path.write_text('{"step": 1}\n')
    assert [row["step"] for row in next(rows)] == [1]
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2: not a row"):
        next(rows)


def test_sparklines() -> None:
    assert sparkline([0.0, 1.0, 2.0, 7.0], 4) == "▁▂▃█"
    assert sparkline([1.0, 10.0, 100.0], 3) == "▁▅█"  # logarithmic
    assert sparkline([1.0, float("nan"), float("inf"), 1.0], 4) == "▁××▁"
    assert sparkline([-1e308, 1e308], 2) == "▁█" and sparkline([float("nan")], 9) == "×" and sparkline([], 9) == ""


def test_in_a_terminal(tmp_path: Path) -> None:
    """A process with a terminal of its own sees rows as they come, until Ctrl-C."""
    history = record(last=7, end=None)
    write(tmp_path / "run.jsonl", history)
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "warmctl", "watch", "run.jsonl", "--every", "0.1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background are told to ignore it
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdin=its, stdout=its, stderr=its, preexec_fn=heeding
    )
    os.close(its)
    screen = b""

    def until(words: bytes) -> None:
        nonlocal screen
        end = time.monotonic() + 60
        while words not in screen and time.monotonic() < end:
            screen += os.read(ours, 65536)
        assert words in screen, screen[-2000:]

    try:
        until(b"of 7 steps")
        history = History.from_jsonl(tmp_path / "run.jsonl")
        history.to_jsonl(tmp_path / "run.jsonl")
        history.append({**history[-1], "step": 8, "reason": "probe failed: \x1b[31m"})
        until(b"of 8 steps")
        until(rb"8: probe failed: \x1b[31m")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(ours)
