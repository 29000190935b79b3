"""`accelerate launch` on two processes: Accelerate's loop, the Trainer and Lightning, one after another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.distributed.launch import ROOT, needs_gloo

for package in ("accelerate", "transformers", "lightning"):
    pytest.importorskip(package)
pytestmark = [needs_gloo, pytest.mark.slow, pytest.mark.xdist_group("launched")]  # its fixture is made once
COMMAND = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Slow: three processes that import the frameworks."""
    folder = tmp_path_factory.mktemp("launched")
    command = [sys.executable, *COMMAND.split(), "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*command, "-m", "tests.integrations.launched", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results: dict[str, list[Any]] = json.loads((folder / "found.json").read_text())
    return results


@pytest.mark.stack(("HF Trainer", "Lightning", "Accelerate"), "several processes")
@pytest.mark.parametrize("name", ["Accelerate", "HF Trainer", "Lightning"])
def test_ranks_with_different_data_agree(found: dict[str, list[Any]], name: str) -> None:
    first, second = found[name]
    assert repr(first["decisions"]) == repr(second["decisions"]) and first["weights"] == second["weights"]
    assert first["probes"] >= 3 and not first["failures"] and not second["failures"]
    assert min(scale for scale, *_ in first["decisions"]) < 1.0


@pytest.mark.parametrize("name", ["Accelerate", "HF Trainer"])
def test_both_resume_in_mid_warmup(found: dict[str, list[Any]], name: str) -> None:
    assert all(rank["phase"] == "warmup" and rank["resumed"] for rank in found[name])
