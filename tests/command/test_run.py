"""Scripts that nobody here wrote, unmodified, in processes of their own; and one of the commonest form."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.command.test_commands import invoke
from warmctl.command.place import Place, loss_of
from warmctl.command.run import in_place_of, rise
from warmctl.command.wrapping import Wrapping
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
    (tmp_path / "train.py").write_text("def f():\n    raise KeyError(7)\nf()\n")
    done = run(tmp_path, "train.py")
    trace = done.stderr[done.stderr.index("Traceback") :].splitlines()
    assert done.returncode == 1 and trace[1].startswith('  File "train.py", line 3') and trace[-1] == "KeyError: 7"


def test_a_target_that_cannot_be_is_refused_before_the_script_runs(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("print('here')")
    for target in ("3", "0", "nan"):
        status, printed, said = invoke("run", "--target", target, str(tmp_path / "train.py"))
        assert (status, printed) == (1, "") and f"edge of stability at 1, got {target}" in said


def test_no_record_is_replaced_unheard(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    for name in ("train.jsonl", "train-2.jsonl"):
        assert f"record: {name}\n" in run(tmp_path, "train.py").stderr and (tmp_path / name).stat().st_size
    done = run(tmp_path, "--out", "train.jsonl", "train.py")
    assert done.stderr.startswith("warmctl: train.jsonl holds an earlier run, whose rows this one replaces\n")
    assert not (tmp_path / "train-3.jsonl").exists()
    (tmp_path / "notes").write_text("mine\n")
    status, printed, _ = invoke("run", "--out", str(tmp_path / "notes"), str(tmp_path / "train.py"))
    assert (status, printed, (tmp_path / "notes").read_text()) == (1, "", "mine\n")


OWN = """
import torch
from torch import nn
from warmctl import AdaptiveWarmup

torch.manual_seed(0)
net, other = nn.Linear(4, 1), nn.Linear(4, 1)
base, second = torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
optim = AdaptiveWarmup(base, net, target=0.5)
second = AdaptiveWarmup([second], other)
x = torch.randn(32, 4)
for _ in range(12):
    optim.zero_grad()
    optim.backward(nn.functional.mse_loss(net(x), x[:, :1]))
    optim.step()
print(len(net._forward_hooks), isinstance(base, AdaptiveWarmup))
"""


def test_a_script_that_wraps_its_optimizer_itself_is_left_to_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(OWN)
    done = run(tmp_path, "train.py")
    assert (done.returncode, done.stdout) == (0, "1 False\n"), done.stderr
    assert "the script wraps SGD over Linear itself (train.py:9) and was left to it, 12 steps" in done.stderr
    assert "to keep it for good" not in done.stderr and "left bare" not in done.stderr
    names: dict[str, Any] = {}
    exec(compile(OWN, "by_hand", "exec"), names)
    recorded, own = History.from_jsonl(tmp_path / "train.jsonl"), names["optim"].history
    assert [row["target"] for row in recorded] == [0.5] * 12
    assert all(recorded[name] == own[name] for name in ("loss", "lr", "probes", "overhead"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_sync", "test_script"])
def test_scripts_of_accelerates_wheel(name: str, tmp_path: Path) -> None:
    """Slow: whole scripts in processes of their own. They assert that training is as it should be, bit for bit."""
    pytest.importorskip("accelerate")
    done = run(tmp_path, "--monitor", "-m", f"accelerate.test_utils.scripts.{name}")
    assert done.returncode == 0, done.stderr
    history = History.from_jsonl(tmp_path / f"{name}.jsonl")
    assert history[-1]["probes"] > 0 and "after this statement" in done.stderr  # type: ignore[operator]


def test_the_loss_of_a_backward() -> None:
    assert loss_of("(a + b).backward()") == "a + b"
    assert [loss_of(words) for words in ("accelerator.backward(loss)", "x = 1", "")] == ["loss"] * 3


FORMS = [
    ("opt = AdamW(m.parameters(), lr=0.1)", "after this statement: opt = AdaptiveWarmup(opt, m)"),
    ("m.opt = AdamW(\n    m.parameters(),\n    lr=0.1,\n)", "after this statement: m.opt = AdaptiveWarmup(m.opt, m)"),
    ("opt: object = AdamW(m.parameters())", "after this statement: opt = AdaptiveWarmup(opt, m)"),
    ("o = {}; o['a'] = AdamW(m.parameters())", "after this statement: o['a'] = AdaptiveWarmup(o['a'], m)"),
    ("m = Linear(2, 1); opt = AdamW(m.parameters())", "after this statement: opt = AdaptiveWarmup(opt, m)"),
    ("name, (opt, n) = 'a', [AdamW(m.parameters()), 1]", "after this statement: opt = AdaptiveWarmup(opt, m)"),
    (
        "def f():\n    return AdamW(m.parameters())\nf()",
        f"{(a := 'AdamW(m.parameters())')}  becomes  AdaptiveWarmup({a}, m)",
    ),
    ("opts = {'é': AdamW(m.parameters())}", f"{a}  becomes  AdaptiveWarmup({a}, m)"),
    ("a = b = AdamW(m.parameters())", f"{a}  becomes  AdaptiveWarmup({a}, m)"),
    ("opt, = [AdamW(p) for p in [m.parameters()]]", "AdamW(p)  becomes  AdaptiveWarmup(AdamW(p), m)"),
    ("opt = (lambda c: c)(AdamW)(\n    m.parameters()\n)", "after this statement: opt = AdaptiveWarmup(opt, m)"),
    ("f = [AdamW(\n    m.parameters()\n)]", "AdamW(...)  becomes  AdaptiveWarmup(AdamW(...), m)"),
    ("exec('opt = AdamW(m.parameters())')", "wrap the optimizer that is built here: AdaptiveWarmup(..., m)"),
]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python does not say which of a line's calls it is in")
@pytest.mark.parametrize(("statement", "said"), FORMS, ids=[form for form, _ in FORMS])
def test_what_to_change_fits_the_statement(statement: str, said: str, tmp_path: Path) -> None:
    head = "from torch.nn import Linear\nfrom torch.optim import AdamW\nm = Linear(2, 1)\n"
    assert in_place_of(built_in(tmp_path / "form.py", head + statement), "m") == said


@pytest.mark.parametrize("form", [0, 1, 2, 5, 7])
def test_where_python_does_not_say_the_only_call_of_a_line_is_taken(form: int, tmp_path: Path) -> None:
    statement, said = FORMS[form]
    place = built_in(
        tmp_path / "form.py",
        "from torch.optim import AdamW\nfrom torch.nn import Linear\nm = Linear(2, 1)\n" + statement,
    )
    assert in_place_of(replace(place, end=None), "m") == said


def test_two_calls_of_a_line_are_not_guessed_between(tmp_path: Path) -> None:
    (tmp_path / "form.py").write_text(FORMS[4][0])
    assert in_place_of(Place(str(tmp_path / "form.py"), 1), "m").startswith("wrap the optimizer")


def built_in(path: Path, script: str) -> Place:
    path.write_text(script)
    with Wrapping(None) as wrapping:
        runpy.run_path(str(path))
    assert wrapping.built is not None and wrapping.model_name == "m"
    return wrapping.built


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
    assert "after this statement: og = AdaptiveWarmup(og, G)" in done.stderr
    assert "warmctl: left bare, for only the first is wrapped: gan.py:7: SGD\n" in done.stderr
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
