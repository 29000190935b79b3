"""The README's Python: that of plain PyTorch is run as it stands, that of the frameworks must at least be Python."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import batch_of, mlp

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
LOOP, FRAMEWORKS, SHARPNESS = BLOCKS


def test_the_loop_trains() -> None:
    rows: list[dict[str, Any]] = []
    names = {"model": mlp(), "criterion": nn.MSELoss(), "loader": [batch_of(0)] * 60, "steps": 60, "log": rows.append}
    exec(LOOP, names)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[0]["probes"] == 1 and rows[0]["phase"] == "warmup"
    x, y = batch_of(0)
    model: Any = names["model"]
    with torch.no_grad():
        assert nn.functional.mse_loss(model(x), y) < nn.functional.mse_loss(mlp()(x), y)


def test_sharpness_in_one_line() -> None:
    names: dict[str, Any] = {"model": mlp(), "criterion": nn.MSELoss(), "batch": batch_of(0)}
    exec(SHARPNESS, names)
    result = names["result"]
    assert result.eigenvalue > 0.0 and result.residual <= 1e-3 * result.eigenvalue


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_python(block: str) -> None:
    compile(block, "README.md", "exec")
