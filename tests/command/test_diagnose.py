"""`warmctl diagnose` prints what `diagnose` says, of columns that are named."""

from __future__ import annotations

import json
import math
from pathlib import Path

from typer.testing import CliRunner

from warmctl.command.app import app
from warmctl.diagnosis import diagnose_command


def test_columns_are_named(tmp_path: Path) -> None:
    rows = [{"tokens": s, "nll": 0.1 + 2 * math.exp(-s / 20), "eta": min(1.0, s / 60)} for s in range(1, 121)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = CliRunner().invoke(app, ["diagnose", str(path), "--loss", "nll", "--lr", "eta", "--step", "tokens"])
    assert named.exit_code == 0 and named.stdout == diagnose_command(path, "nll", "eta", "tokens") + "\n"
    assert "eta: warmup took 60 of 120 steps" in named.stdout
    unnamed = CliRunner().invoke(app, ["diagnose", str(path)])
    assert unnamed.exit_code == 1 and "finds columns tokens, nll, eta. A column of losses" in unnamed.stderr
