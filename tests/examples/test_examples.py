"""Every example as a user runs it: a process of its own, in an empty folder, told nothing but its command.

Its last line says what it shows, and is read here: three losses, at the start, with the bare optimizer and with
AdaptiveWarmup, at a rate that is far too high.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed

from warmctl.record.history import History

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAST_LINE = re.compile(
    r"(?:val|held-out) loss: ([\d.]+) at the start, ([\d.]+) with bare \w+, ([\d.]+) with AdaptiveWarmup"
)
SECONDS = 300  # an example takes 7 to 25 of them alone, several times that beside others

NEEDS = {"hugging_face": "transformers", "lightning_module": "lightning", "accelerate_loop": "accelerate"}
DISTRIBUTED = ("ddp", "fsdp2")
ALL = sorted(file.stem for file in EXAMPLES.glob("*.py"))


def run(name: str, folder: Path, *command: str) -> str:
    """Run an example to its end; what it printed. Fails with its errors, or if it warned of a failed probe."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    if name in DISTRIBUTED and not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("needs gloo")
    environment = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*(command or (sys.executable,)), str(EXAMPLES / f"{name}.py")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "warmctl: " not in done.stderr and "RuntimeWarning" not in done.stderr, done.stderr[-4000:]
    return done.stdout


def check(name: str, printed: str, folder: Path) -> None:
    """The claim of the last line, and the two records that it was made from."""
    said = LAST_LINE.fullmatch(printed.splitlines()[-1])
    assert said is not None, printed[-2000:]
    start, bare, adaptive = map(float, said.groups())
    assert adaptive < 0.5 * start and adaptive < 0.95 * bare, said.group()

    bare_file, adaptive_file = f"{name}_bare", f"{name}_adaptive"
    records = {file.stem: History.from_jsonl(file) for file in folder.glob("*.jsonl")}
    assert records.keys() == {bare_file, adaptive_file}
    for rows in records.values():
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert sum(bool(row["probed"]) for row in rows) > 2
        assert not [row["reason"] for row in rows if "failed" in str(row["reason"])]
    assert len(records[bare_file]) == len(records[adaptive_file])
    assert set(records[bare_file]["scale"]) == {1.0}
    assert records[adaptive_file]["scale"][0] < 0.1


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop", "during"])
def test_shows_what_it_says(name: str, tmp_path: Path) -> None:
    check(name, run(name, tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nanogpt_style", "hugging_face", "lightning_module"])
def test_shows_what_it_says_slow(name: str, tmp_path: Path) -> None:
    """Slow: 200 steps of two micro-batches, the imports of transformers and of lightning, twice the training."""
    check(name, run(name, tmp_path), tmp_path)


@pytest.mark.stack("DDP", "one line changed")
@pytest.mark.stack("FSDP2", "one line changed")
@pytest.mark.slow
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_on_two_processes(name: str, tmp_path: Path) -> None:
    """Slow: two processes that wait for each other at every step, on two cores that others use too."""
    printed = run(name, tmp_path, *TORCHRUN)
    assert printed.splitlines()[0].startswith("bare ")
    assert printed.count("AdaptiveWarmup\n") == 2  # rank 0 alone speaks
    check(name, printed, tmp_path)


@pytest.mark.slow
def test_without_torchrun_it_says_so_and_runs_on_one(tmp_path: Path) -> None:
    """Slow: as above, in one process. That of fsdp2.py begins with the same lines."""
    name = "ddp"
    printed = run(name, tmp_path)
    assert printed.splitlines()[0] == f"one process; for two: torchrun --nproc-per-node 2 examples/{name}.py"
    check(name, printed, tmp_path)


def test_warmup_begins_again_at_every_thawing(tmp_path: Path) -> None:
    """The claim of fine_tuning beside its losses: nothing but `requires_grad_` tells the wrapper."""
    name = "fine_tuning"
    printed = run(name, tmp_path)
    assert printed.count("warmup began at steps [1, 61, 121]\n") == 2
    check(name, printed, tmp_path)


def test_three_runs_are_told_apart(tmp_path: Path) -> None:
    printed = run("diagnose_runs", tmp_path)
    verdicts = re.findall(r"^(\w+)\.csv: (.+)$", printed, re.MULTILINE)
    assert verdicts == [("dead", "lost"), ("slow", "over-warmed"), ("well", "well warmed")]
    assert "Lower `lr` from 3 to 1" in printed and printed.count("What to do: ") == 3


def test_the_range_test_sees_what_one_measurement_cannot(tmp_path: Path) -> None:
    """The claim of before_a_run: it says the two losses, after its own asserts."""
    said = re.fullmatch(
        r"loss: ([\d.]+) at the suggested rate, ([\d.]+) at the peak that was set",
        run("before_a_run", tmp_path).splitlines()[-1],
    )
    assert said is not None and float(said[1]) < 0.2 < 2.0 < float(said[2])


def test_every_example_is_in_the_table_with_its_command() -> None:
    table = (EXAMPLES / "README.md").read_text()
    rows = dict(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \|.*\| `(.+)` \|$", table, re.MULTILINE))
    assert sorted(rows) == ALL
    for name, command in rows.items():
        launcher = "torchrun --nproc-per-node 2" if name in DISTRIBUTED else "python"
        assert command == f"{launcher} examples/{name}.py"
        assert command in (EXAMPLES / f"{name}.py").read_text().split('"""')[1]
