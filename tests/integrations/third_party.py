"""Optimizers from other packages: how each is made and at which rate it trains here, and what the docs say of it.

`python -m tests.integrations.third_party` writes the table into its page.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

RULE, ALONG = "its own", "along the update"


@dataclass(frozen=True)
class Tried:
    """One optimizer, and its row of the table.

    Args:
        where: module and class.
        options: of the class; rates at which the bare optimizer trains well.
        measured: RULE or ALONG.
        note: what its user must know, "" if nothing.
        refused: what the error says, where it cannot be wrapped.
        inside: the optimizer that a wrapper of optimizers is given, as its second argument or in place of parameters.
        calls_first: whether the closure is called before it is given to `step`.
        steps: after which they are compared; more where the bare optimizer is slow to find its rate.
        around: a context that its steps need here.
    """

    name: str
    where: str
    options: dict[str, Any]
    measured: str = ALONG
    note: str = ""
    refused: str = ""
    inside: Callable[..., Optimizer] | None = None
    calls_first: bool = False
    steps: int = 200
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def package(self) -> str:
        return self.where.split(".")[0]

    def make(self, params: Iterator[nn.Parameter]) -> Any:
        module, cls = self.where.rsplit(".", 1)
        build = getattr(importlib.import_module(module), cls)
        optimizer = build(self.inside(params)) if self.refused and self.inside else build(params, **self.options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    @property
    def row(self) -> str:
        if self.refused:
            return f"| {self.name} | `{self.where}` | refused | – | – | – | {self.note} |"
        works = "works, see note" if self.note else "works"
        return f"| {self.name} | `{self.where}` | {works} | {self.measured} | yes | bit for bit | {self.note} |"


def _eagerly() -> AbstractContextManager[Any]:
    """torchao compiles its step, which takes a minute on a CPU."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


ADAPTS = "leave `lr` at 1: the scale multiplies the rate that it finds; warmup lasts while that rate still grows"
MODES = "`opt.train()` before training and `opt.eval()` before evaluating and saving, on the wrapper"

TRIED = [
    Tried("schedule-free", "schedulefree.AdamWScheduleFree", {"lr": 1e-2}, RULE, MODES),
    Tried("", "schedulefree.SGDScheduleFree", {"lr": 1.0}, RULE, MODES),
    Tried("", "schedulefree.RAdamScheduleFree", {"lr": 3e-2}, note=MODES),
    Tried("Prodigy", "prodigyopt.Prodigy", {"lr": 1.0}, note=ADAPTS),
    Tried("D-adaptation", "dadaptation.DAdaptAdam", {"lr": 1.0}, note=ADAPTS, steps=400),
    Tried("", "dadaptation.DAdaptSGD", {"lr": 1.0}, note=ADAPTS),
    Tried("Lion", "lion_pytorch.Lion", {"lr": 2e-3}),
    Tried("Muon", "torch.optim.Muon", {"lr": 2e-2}, note="matrices only"),
    Tried("Adan", "pytorch_optimizer.Adan", {"lr": 1e-2}),
    Tried("LAMB", "pytorch_optimizer.Lamb", {"lr": 2e-2}),
    Tried("SOAP", "pytorch_optimizer.SOAP", {"lr": 1e-2}, note="its first step moves nothing"),
    Tried("AdaBelief", "pytorch_optimizer.AdaBelief", {"lr": 3e-3}, RULE),
    Tried("MADGRAD", "pytorch_optimizer.MADGRAD", {"lr": 3e-3}),
    Tried("ADOPT", "pytorch_optimizer.ADOPT", {"lr": 3e-3}, RULE, "its first step moves nothing"),
    Tried(
        "SAM",
        "pytorch_optimizer.SAM",
        {"base_optimizer": torch.optim.SGD, "lr": 0.1, "momentum": 0.9},
        note="`closure(); opt.step(closure)`, as its own documentation has it",
        calls_first=True,
    ),
    Tried(
        "Lookahead",
        "pytorch_optimizer.Lookahead",
        {},
        note="its state dict is none of torch's; give it the wrapper: `Lookahead(AdaptiveWarmup(…))`",
        refused="state_dict.. of Lookahead has no 'param_groups'",
        inside=lambda params: torch.optim.AdamW(params, lr=3e-3),
    ),
    Tried("bitsandbytes", "bitsandbytes.optim.AdamW8bit", {"lr": 3e-3}),
    Tried(
        "torchao",
        "torchao.optim.AdamW8bit",
        {"lr": 3e-3},
        RULE,
        "keeps its rate in a tensor, which is filled in place",
        around=_eagerly,
    ),
]
HEADER = "| optimizer | tried | | measured by | level with bare | resumes | note |\n|---|---|---|---|---|---|---|"


def table() -> str:
    return "\n".join([HEADER, *(tried.row for tried in TRIED)])


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "optimizers.md"
BEGIN, END = "<!-- tried: python -m tests.integrations.third_party -->\n\n", "\n\n<!-- end of tried -->"


def written(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
