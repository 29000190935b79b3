"""What `warmctl plan FILE.py:build` prints, and what it says of a target that will not do."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

from tests.command.test_commands import invoke
from warmctl.command.app import app

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

def not_a_size():
    return (*build(), {"batch_size": "many"})

def fails():
    raise ValueError("shapes do not match")

def loss_fails():
    model, loss_fn, batch, optimizer = build()
    return model, lambda model, batch: fails(), batch, optimizer
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "neighbour.py").write_text("WIDTH = 4")
    (tmp_path / "my_run.py").write_text(BUILD)
    return str(tmp_path / "my_run.py")


def test_it_prints_the_table(file: str) -> None:
    path = list(sys.path)
    status, printed, _ = invoke("plan", f"{file}:build")
    assert status == 0
    assert "SGD, on 8 rows" in printed and "critical rate" in printed and "scaled rate     " in printed
    assert sys.path == path
    assert "scaled linearly to 24 rows" in invoke("plan", f"{file}:with_more")[1]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{file}:too_few", "returned 2 values; it must return model, loss_fn, batch, optimizer"),
        ("{file}:no_dict", "must be a dict of arguments of plan"),
        ("{file}:not_a_size", "batch_size must be a whole number of at least 1, got 'many'"),
        ("{file}:absent", "has no function 'absent'"),
        ("{file}:", "expected FILE.py:FUNCTION"),
        ("nowhere.py:build", "nowhere.py: there is no such file"),
        ("nowhere.py", "expected FILE.py:FUNCTION"),
    ],
)
def test_a_target_that_will_not_do_is_refused_in_one_line(file: str, target: str, words: str) -> None:
    status, printed, said = invoke("plan", target.format(file=file), columns=500)
    assert (status, printed) == (1, "") and words in said and said.count("\n") == 1


@pytest.mark.parametrize("function", ["fails", "loss_fails"])
def test_an_error_of_the_file_keeps_its_traceback(file: str, function: str) -> None:
    result = CliRunner().invoke(app, ["plan", f"{file}:{function}"])
    assert isinstance(result.exception, ValueError) and str(result.exception) == "shapes do not match"
    *_, (last, _) = traceback.walk_tb(result.exception.__traceback__)
    assert last.f_code.co_name == "fails"
