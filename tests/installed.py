"""What an installed wheel must do, without a checkout: `python installed.py` in an environment that has it alone.

Trains a small network at ten times a good rate, with a save and load in the middle, and writes and reads the record.
Prints one line and exits with 0 if the wrapped run has learned.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

import warmctl

torch.manual_seed(0)
x = torch.randn(512, 16)
y = (x @ torch.randn(16, 4)).argmax(-1)


def new() -> tuple[nn.Module, warmctl.AdaptiveWarmup]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    return model, warmctl.AdaptiveWarmup(torch.optim.AdamW(model.parameters(), lr=3e-2), model)


def closure_of(model: nn.Module, opt: warmctl.AdaptiveWarmup) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def main() -> None:
    warnings.filterwarnings("error", message="warmctl")  # a probe that fails
    here = Path(warmctl.__file__).parent
    assert "site-packages" in here.parts, f"{here} is a checkout"
    assert (here / "py.typed").exists() and warmctl.__version__ == version("warmctl")
    model, opt = new()
    first = float(closure_of(model, opt)().detach())
    for _ in range(20):
        opt.step(closure_of(model, opt))
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again, resumed = new()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for _ in range(60):
        opt.step(closure_of(model, opt))
        resumed.step(closure_of(again, resumed))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    last = float(closure_of(model, opt)().detach())
    assert last < 0.2 * first and opt.metrics["probes"] > 1, (first, last, opt.metrics)
    opt.history.to_jsonl("run.jsonl")
    assert len(warmctl.History.from_jsonl("run.jsonl")) == 80
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"warmctl {version('warmctl')}, Python {python}, torch {torch.__version__}, numpy {numpy.__version__}: "
          f"loss {first:.2f} to {last:.3f}, {opt.phase}, resumed bit for bit")  # fmt: skip


if __name__ == "__main__":
    main()
