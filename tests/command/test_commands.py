"""The command line, in this process and in one of its own."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

from warmctl import __version__
from warmctl.command import plot as plot_command
from warmctl.command.app import app
from warmctl.command.records import names as names_of
from warmctl.record.history import History, WarmupEnd
from warmctl.record.summary import Summary, summarise

ROOT = Path(__file__).parents[2]


def record(last: int = 40, end: int | None = 11, **values: Any) -> History:
    return History(
        {
            "step": step,
            "phase": "warmup" if end is None or step < end else "guard",
            "scale": 0.25,
            "lr": 0.025,
            "scheduled_lr": 0.1,
            "loss": 2 / step,
            "stability_ratio": None if step <= 2 else 1.75 if step <= 4 else 0.5,
            "target": 0.5,
            "probes": step // 4,
            "overhead": 0.125,
            "probed": step % 4 == 0,
            "reason": "warmup ended: the landscape [2.5] carries no more" if step == end else "",
            **values,
        }
        for step in range(1, last + 1)
    )


def write(path: Path, history: History) -> str:
    history.to_jsonl(path)
    history.close()
    return str(path)


def invoke(*arguments: str, columns: int = 120) -> tuple[int, str, str]:
    result = CliRunner(env={"COLUMNS": str(columns), "NO_COLOR": "1"}).invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_summary_of_a_history() -> None:
    summary = summarise(record())
    assert summary == Summary(
        steps=40,
        phase="guard",
        warmup=WarmupEnd(11, "the landscape [2.5] carries no more"),
        scale=0.25,
        peak_ratio=1.75,
        over_edge=2 / 38,  # of the steps that have a ratio
        probes=10,
        overhead=0.125,
        loss=0.05,
    )


def test_summary_of_a_baseline_that_diverged() -> None:
    rows = [{"step": 1, "loss": 1.0, "lr": 0.1}, {"step": 2, "loss": math.nan, "lr": 0.1}]
    summary = summarise(History(rows))
    assert (summary.steps, summary.warmup, summary.peak_ratio, summary.over_edge) == (2, None, None, None)
    assert math.isnan(summary.loss or 0.0)


def test_summary_leaves_failed_probes_out_of_the_peak() -> None:
    rows = [{"step": i, "stability_ratio": r} for i, r in enumerate([0.5, math.nan, math.inf, 2.0])]
    summary = summarise(History(rows))
    assert (summary.peak_ratio, summary.over_edge) == (2.0, 0.5)


@pytest.mark.parametrize("columns", [80, 120])
def test_summary_table(tmp_path: Path, columns: int) -> None:
    runs = [
        write(tmp_path / "controlled.jsonl", record()),
        write(tmp_path / "unfinished.jsonl", record(last=9, end=None)),
        write(tmp_path / "[red]linear.jsonl", History([{"step": 7, "loss": math.nan, "lr": 0.1}])),
    ]
    code, out, err = invoke("summary", *runs, columns=columns)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["controlled", "40", "11", "0.25", "1.75", "5.3%", "10", "12.5%", "0.05"] in rows
    assert ["unfinished", "9", "not", "yet", "0.25", "1.75", "28.6%", "2", "12.5%", "0.2222"] in rows
    assert ["[red]linear", "7", "-", "-", "-", "-", "-", "-", "nan"] in rows  # a name is no markup
    assert "controlled  warmup ended: the landscape [2.5] carries no more" in out
    assert max(len(line) for line in out.splitlines()) <= columns


def test_plot_one_run_beside_its_file(tmp_path: Path) -> None:
    run = write(tmp_path / "run.jsonl", record())
    code, out, _ = invoke("plot", run)
    assert (code, out) == (0, f"wrote {tmp_path / 'run.png'}\n")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_plot_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawn: list[Any] = []
    monkeypatch.setattr(plot_command, "draw", lambda runs, **kwargs: drawn.append((runs, kwargs)))
    for folder in ("a", "b"):
        write(tmp_path / folder / "run.jsonl", record())
    assert invoke("plot", "a/run.jsonl", "b/run.jsonl", "--log-steps")[:2] == (0, "wrote runs.png\n")
    assert invoke("plot", "a/run.jsonl", "--out", "x.svg")[:2] == (0, "wrote x.svg\n")
    (several, how), (one, where) = drawn
    assert (list(several), how) == (["a/run", "b/run"], {"path": Path("runs.png"), "xscale": "log"})
    assert (list(one), where) == (["run"], {"path": Path("x.svg"), "xscale": "linear"})


def test_runs_are_named_by_the_shortest_that_tells_them_apart() -> None:
    def names(*paths: str) -> list[str]:
        return names_of([Path(path) for path in paths])

    assert names("x/a.jsonl", "y/b.jsonl") == ["a", "b"]
    assert names("x/run.jsonl", "y/run.jsonl") == ["x/run", "y/run"]
    assert names("1/x/run.jsonl", "2/x/run.jsonl") == ["1/x/run.jsonl", "2/x/run.jsonl"]


@pytest.mark.parametrize("command", ["plot", "summary"])
def test_errors_are_one_line_and_exit_1(tmp_path: Path, command: str) -> None:
    good = write(tmp_path / "good.jsonl", record())
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "corrupt.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    for name, message in {
        "missing.jsonl": "missing.jsonl: no such file or directory",
        "empty.jsonl": "empty.jsonl: the file has no rows",
        "corrupt.jsonl": "corrupt.jsonl, line 2: not a row of a history",
        ".": "is a directory",
    }.items():
        code, out, err = invoke(command, good, str(tmp_path / name))
        assert (code, out) == (1, "")
        assert message in err
        assert len(err.splitlines()) == 1


def test_a_figure_that_cannot_be_written(tmp_path: Path) -> None:
    run = write(tmp_path / "run.jsonl", record())
    code, _, err = invoke("plot", run, "--out", str(tmp_path / "run.abc"))
    assert code == 1
    assert "run.abc: Format 'abc' is not supported" in err
    code, _, err = invoke("plot", run, "--out", str(tmp_path / "none" / "run.png"))
    assert code == 1
    assert "No such file or directory" in err


def test_its_version() -> None:
    assert invoke("--version")[:2] == (0, f"warmctl {__version__}\n")


def test_no_arguments_is_a_mistake() -> None:
    assert invoke("summary")[0] == 2
    assert "summary" in invoke("--help")[1]


@pytest.mark.parametrize("name", ["typer", "rich.table"])
def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r'pip install "warmctl\[cli\]"'):
        runpy.run_path(str(ROOT / "warmctl" / "__main__.py"), run_name="__main__")


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write(tmp_path / "run.jsonl", record())
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = invoke("plot", run)
    assert (code, err) == (1, 'plot() needs matplotlib: pip install "warmctl[plot]"\n')


def test_python_m_warmctl(tmp_path: Path) -> None:
    """Slow: a process of its own that imports the package, and torch with it."""
    write(tmp_path / "run.jsonl", record())
    with open(tmp_path / "run.jsonl", "a") as stream:  # as a kill leaves it
        stream.write(json.dumps({"step": 41, "loss": 1.0})[:-4])
    done = subprocess.run(
        [sys.executable, "-m", "warmctl", "summary", "run.jsonl"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert ["run", "40", "11", "0.25", "1.75", "5.3%", "10", "12.5%", "0.05"] in [
        line.split() for line in done.stdout.splitlines()
    ]


HOSTILE = "run\x1b[31m$x_$\n.jsonl"


@pytest.mark.parametrize("command", ["plot", "summary", "compare"])
def test_nothing_hostile_reaches_the_terminal(tmp_path: Path, command: str) -> None:
    words = "warmup ended: \x1b[2J\x9b31m[red] $\\frac$ \u202e \udc80"
    runs = [
        write(tmp_path / HOSTILE, History([row | {"reason": words if row["step"] == 11 else ""} for row in record()])),
        write(tmp_path / "_other.jsonl", record()),
    ]
    out = ("--out", str(tmp_path / "$x_$.png")) if command != "summary" else ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, text, err = invoke(command, *runs, *out)
    assert (code, err) == (0, "")
    assert all(line.isprintable() for line in text.splitlines())
    if command != "plot":
        assert r"run\x1b[31m$x_$\n" in text.replace("\n", "")


@pytest.mark.parametrize("command", ["plot", "summary", "compare"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step": 2, "loss": "\\u001b[2J"}', r"line 2: 'loss' is text, not a number"),
        ('{"step": 2, "loss": 1' + "0" * 400 + "}", "line 2: 'loss' is an integer too large"),
        ("[" * 100_000, "line 2: not a row of a history (nested too deeply)"),
    ],
)
def test_a_record_that_is_wrong_is_named(tmp_path: Path, command: str, line: str, message: str) -> None:
    (tmp_path / HOSTILE).write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    good = write(tmp_path / "good.jsonl", record())
    code, out, err = invoke(command, good, str(tmp_path / HOSTILE))
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert message in err and r"run\x1b[31m$x_$\n.jsonl" in err and err.strip().isprintable()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1e308, -1e308, 5e-324, 10**300, None])
def test_any_number_is_drawn_and_tabulated(tmp_path: Path, value: float | None) -> None:
    for column in ("loss", "lr", "stability_ratio", "target", "overhead"):
        write(tmp_path / f"{column}.jsonl", record(**{column: value}))
    runs = [str(path) for path in sorted(tmp_path.glob("*.jsonl"))]
    for command in (("summary",), ("compare", "--out", str(tmp_path / "x.png")), ("diagnose",)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            code, _, err = invoke(*command, *runs)
        refused = command == ("diagnose",) and len(err.splitlines()) == 1  # a run without a loss
        assert refused or (code, err) == (0, ""), command
