"""Scripts that nobody here wrote, unmodified, in processes of their own; and one of the commonest form."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from warmctl.command.run import assigned, loss_of, rise
from warmctl.record.history import History

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Linear(4, 1)
image = torch.zeros(3, requires_grad=True)
other = torch.optim.SGD((p for p in [image]), lr=0.1)     # over no module's parameters; a generator
optim = torch.optim.AdamW(net.parameters(), lr=1.0)
schedule = torch.optim.lr_scheduler.LinearLR(optim, 0.1, total_iters=5)
x = torch.randn(32, 4)
for _ in range(12):
    optim.zero_grad()
    value = nn.functional.mse_loss(net(x), x[:, :1])
    value.backward()
    optim.step()
    schedule.step()
print(sys.argv[1:], type(other).__name__, type(optim).__name__, __name__)
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, "-m", "warmctl", "run", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_script_of_the_commonest_form(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    done = run(tmp_path, "train.py", "--out", "x", "-m")
    assert done.returncode == 0, done.stderr
    assert "['--out', 'x', '-m'] SGD AdaptiveWarmup __main__" in done.stdout
    rows = list(History.from_jsonl(tmp_path / "train.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["probes"] > 0 and not [row for row in rows if "failed" in row["reason"]]  # type: ignore[operator]
    assert "train.py:9: SGD holds no module's parameters" in done.stderr
    assert "train.py:10  after this statement: optim = AdaptiveWarmup(optim, net)" in done.stderr
    assert "train.py:16  value.backward()  becomes  optim.backward(value)" in done.stderr
    assert "the script's own schedule rises for 5 steps" in done.stderr


def test_a_loss_that_cannot_be_differentiated_twice_is_told_the_closure(tmp_path: Path) -> None:
    """The attention of most transformers, by its kernel on a CPU."""
    attention = "class Net(nn.Linear):\n    def forward(self, x):\n        x = super().forward(x)[None, None]\n"
    attention += "        return nn.functional.scaled_dot_product_attention(x, x, x)[0, 0]\n"
    lines = SCRIPT.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith("net ="))
    (tmp_path / "train.py").write_text("".join([*lines[:at], attention, "net = Net(4, 1)\n", *lines[at + 1 :]]))
    done = run(tmp_path, "train.py")
    assert done.returncode == 0, done.stderr
    assert "becomes" not in done.stderr and "into a closure for optim.step(closure)" in done.stderr


def test_an_error_of_the_script_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import sys\nprint('here')\nsys.exit(3)\n")
    done = run(tmp_path, "train.py")
    assert (done.returncode, done.stdout) == (3, "here\n") and "nothing was wrapped" in done.stderr
    done = run(tmp_path, "none.py")
    assert (done.returncode, done.stderr) == (1, "none.py: no such file\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_sync", "test_script"])
def test_scripts_of_accelerates_wheel(name: str, tmp_path: Path) -> None:
    """Slow: whole scripts in processes of their own. They assert that training is as it should be, bit for bit."""
    pytest.importorskip("accelerate")
    done = run(tmp_path, "--monitor", "-m", f"accelerate.test_utils.scripts.{name}")
    assert done.returncode == 0, done.stderr
    history = History.from_jsonl(tmp_path / f"{name}.jsonl")
    assert history[-1]["probes"] > 0 and "after this statement" in done.stderr  # type: ignore[operator]


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("opt = SGD(model.parameters(), lr=0.1)", "opt"),
        ("self.opt = SGD(x)", "self.opt"),
        ("return SGD(x, lr=0.1)", "optimizer"),
        ("SGD(x)", "optimizer"),
        ("", "optimizer"),
    ],
)
def test_the_name_of_the_optimizer(statement: str, name: str) -> None:
    assert assigned(statement) == name


def test_the_loss_of_a_backward() -> None:
    assert loss_of("(a + b).backward()") == "a + b"
    assert [loss_of(words) for words in ("accelerator.backward(loss)", "x = 1", "")] == ["loss"] * 3


def test_the_rise_of_a_schedule() -> None:
    rising: list[Any] = [0.1, 0.2, 0.3, 0.3, 0.2]
    assert (rise(rising), rise([0.3, 0.2]), rise([0.1, 0.1]), rise([])) == (2, 0, 0, 0)


TWO = """
import torch
from torch import nn

torch.manual_seed(0)
G, D = nn.Linear(4, 3), nn.Linear(3, 1)
og, od = torch.optim.SGD(G.parameters(), 0.1), torch.optim.SGD(D.parameters(), 0.1)
for _ in range(16):
    z = torch.randn(8, 4)
    od.zero_grad(); ld = D(G(z).detach()).square().mean(); ld.backward(); od.step()
    og.zero_grad(); lg = nn.functional.softplus(-D(G(z))).mean(); lg.backward(RETAIN); og.step()
"""


@pytest.mark.parametrize("retain", ["", "retain_graph=True"])
def test_only_losses_of_the_wrapped_optimizer_are_its_own(retain: str, tmp_path: Path) -> None:
    (tmp_path / "gan.py").write_text(TWO.replace("RETAIN", retain))
    done = run(tmp_path, "gan.py")
    assert done.returncode == 0, done.stderr
    assert "gan.py:11" in done.stderr and "gan.py:10" not in done.stderr
    by_hand = TWO.replace("RETAIN", "").replace("lg.backward()", "og.backward(lg)")
    by_hand = by_hand.replace("for _", "import warmctl\nog = warmctl.AdaptiveWarmup(og, G)\nfor _")
    names: dict[str, Any] = {}
    exec(compile(by_hand, "by_hand", "exec"), names)
    recorded = History.from_jsonl(tmp_path / "gan.jsonl")
    assert recorded["sharpness"] == names["og"].history["sharpness"]


ARGUMENTS_OF_BACKWARD = """
import torch
from torch import nn

torch.manual_seed(0)
net = nn.Linear(4, 1)
optim = torch.optim.SGD(net.parameters(), 0.1)
x, y = torch.randn(16, 4), torch.randn(16, 1)
for _ in range(12):
    near = x.clone().requires_grad_()
    ADVERSARIAL
    optim.zero_grad()
    loss = nn.functional.mse_loss(net(x), y)
    loss.backward(WEIGHT)
    optim.step()
"""


def test_a_backward_with_arguments(tmp_path: Path) -> None:
    """`gradient` weighs the loss that is measured; a pass to other `inputs` is none of a step's."""
    attack = "nn.functional.mse_loss(net(near), y).backward(inputs=[near])"
    script = ARGUMENTS_OF_BACKWARD.replace("ADVERSARIAL", attack).replace("WEIGHT", "torch.tensor(2.0)")
    (tmp_path / "train.py").write_text(script)
    done = run(tmp_path, "train.py")
    assert done.returncode == 0, done.stderr
    by_hand = ARGUMENTS_OF_BACKWARD.replace("ADVERSARIAL", "").replace(
        "loss.backward(WEIGHT)", "optim.backward(2.0 * loss)"
    )
    by_hand = by_hand.replace("for _", "import warmctl\noptim = warmctl.AdaptiveWarmup(optim, net)\nfor _")
    names: dict[str, Any] = {}
    exec(compile(by_hand, "by_hand", "exec"), names)
    recorded = History.from_jsonl(tmp_path / "train.jsonl")
    assert recorded["sharpness"] == names["optim"].history["sharpness"] and recorded["probes"][-1] > 0  # type: ignore[operator]
