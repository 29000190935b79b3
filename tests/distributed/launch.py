"""Real processes on gloo. The ranks of a launch are forks of one process that has imported what they need, where
torchrun and each of its ranks would do so for themselves: six seconds of a processor each.

    python -m tests.distributed.launch MODULE RANKS ARGUMENT ...

MODULE has `main(arguments)`, which returns JSON on rank 0.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
RESULTS = "RESULTS "
needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


def launch(module: str, ranks: int, *arguments: str, timeout: float = 600) -> Any:
    """What the module's `main` returns on rank 0. Fails with what was printed if a rank fails."""
    command = [sys.executable, "-m", "tests.distributed.launch", module, str(ranks), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULTS)]
    assert done.returncode == 0 and lines, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix(RESULTS))


def from_all_ranks(found: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return everyone


def _rank(module: str, rank: int, ranks: int, store: str, arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=wait)
    found = importlib.import_module(module).main(arguments)
    if rank == 0:
        print(RESULTS + json.dumps(found), flush=True)
    dist.barrier()


def main(module: str, ranks: int, arguments: list[str]) -> int:
    """The exit code of the first rank that failed."""
    importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(ranks):
            if child := os.fork():
                children.append(child)
                continue
            code = 1
            try:
                _rank(module, rank, ranks, f"{folder}/store", arguments)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # the interpreter's own end, with gloo's threads still there, aborts now and then
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
