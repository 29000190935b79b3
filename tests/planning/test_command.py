"""What `warmctl plan FILE.py:build` prints, and what it says of a target that will not do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from warmctl.planning.command import plan_command

BUILD = """
import torch
from dataclasses import dataclass
from neighbour import WIDTH

@dataclass
class Settings:
    rate: float = 0.1

def build():
    model = torch.nn.Linear(WIDTH, 1)
    batch = torch.randn(8, WIDTH), torch.randn(8, 1)
    loss_fn = lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    return model, loss_fn, batch, torch.optim.SGD(model.parameters(), Settings().rate)

def with_more():
    return (*build(), {"batch_size": 24})

def too_few():
    return 1, 2

def no_dict():
    return (*build(), 3)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "neighbour.py").write_text("WIDTH = 4")
    (tmp_path / "my_run.py").write_text(BUILD)
    return str(tmp_path / "my_run.py")


def test_it_prints_the_table(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = list(sys.path)
    plan_command(f"{file}:build")
    printed = capsys.readouterr().out
    assert "SGD, on 8 rows" in printed and "critical rate" in printed and "scaled rate     " in printed
    assert sys.path == path
    plan_command(f"{file}:with_more")
    assert "scaled linearly to 24 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        ("too_few", TypeError, "returned 2 values; it must return model, loss_fn, batch, optimizer"),
        ("no_dict", TypeError, "must be a dict of arguments of plan"),
        ("absent", ValueError, "has no function 'absent'"),
        ("", ValueError, "expected FILE.py:FUNCTION"),
    ],
)
def test_a_function_that_will_not_do(file: str, function: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        plan_command(f"{file}:{function}")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        plan_command("nowhere.py:build")
    with pytest.raises(ValueError, match="expected FILE"):
        plan_command("nowhere.py")
