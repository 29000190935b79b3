"""What the tests of the record share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["run.jsonl", "run.csv"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)
