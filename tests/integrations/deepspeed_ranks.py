"""Checks of test_deepspeed.py, on each of its two ranks: real engines, on the CPU."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState

from tests.distributed.launch import from_all_ranks
from tests.distributed.regression import batch, build, own, seen
from tests.helpers import weights
from tests.integrations.helpers import decisions
from tests.integrations.on_ranks import last_of_all_ranks
from warmctl import AdaptiveWarmup, sharpness


class Script:
    """A training under an engine: the loop of DeepSpeed's documentation."""

    def __init__(
        self, stage: int = 0, *, wrapped: bool = True, parts: int = 1, lr: float = 8.0, dtype: str = "", **options: Any
    ) -> None:
        self.parts, self.model = parts, build().float()
        base = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9)
        self.opt: Any = AdaptiveWarmup(base, self.model, **{"every": 1, "probe_steps": 14, **options})
        settings = {
            "train_micro_batch_size_per_gpu": 16 // parts,
            "gradient_accumulation_steps": parts,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            **({dtype: {"enabled": True}} if dtype else {}),
        }
        self.engine, self.engines, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.opt if wrapped else base, config=settings
        )

    def train(self, steps: range = range(6)) -> Script:
        for step in steps:
            for part in range(self.parts):
                x, y = (t.float() for t in own(step % 8, part, self.parts))
                self.engine.backward(self.engine(x, y)["loss"])
                self.engine.step()
        return self

    @property
    def loss(self) -> float:
        with torch.no_grad():
            return float(sum(self.model(*(t.float() for t in batch(step)))["loss"] for step in range(8)))


def refusal(stage: int, wrapped: bool, dtype: str = "") -> str:
    """What is said of an optimizer that is wrapped before the engine takes it, or of the engine's own."""
    try:
        script = Script(stage, wrapped=wrapped, dtype=dtype)
        if not wrapped:
            AdaptiveWarmup(script.engines, script.model)
        x, y = own(0)
        kind = next(script.engine.parameters()).dtype
        script.engine.backward(script.engine(x.to(kind), y.to(kind))["loss"])
        script.engine.step()
    except (RuntimeError, TypeError) as error:
        return str(error)
    return ""


def resumed() -> dict[str, Any]:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    whole = Script(every=3, lr=1.0).train(range(4))
    phase = whole.opt.phase
    whole.engine.save_checkpoint(folder[0])
    whole.train(range(4, 10))
    again = Script(every=3, lr=1.0)
    with torch.no_grad():
        next(again.model.parameters(), strict=True).zero_()
    again.engine.load_checkpoint(folder[0])
    again.train(range(4, 10))
    return {
        "phase": phase,
        "equal": torch.equal(weights(whole.model), weights(again.model)),
        "decisions": [decisions(list(whole.opt.history))[4:], decisions(list(again.opt.history))],
    }


def by_accelerate(stage: int) -> dict[str, Any]:
    AcceleratorState._reset_state(True)
    plugin = DeepSpeedPlugin(zero_stage=stage)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 16
    plugin.deepspeed_config["zero_allow_untested_optimizer"] = True
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = build().float()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=8.0, momentum=0.9), model, every=1)
    called, prepared = accelerator.prepare(model, opt)
    said = ""
    try:
        for step in range(4):
            accelerator.backward(called(*(t.float() for t in own(step)))["loss"])
            prepared.step()
            prepared.zero_grad()
    except RuntimeError as error:
        said = str(error)
    return {
        "engine": type(called).__name__,
        "said": said,
        "scales": list(opt.history["scale"]),
        "probes": opt.metrics["probes"],
    }


def main(arguments: list[str]) -> dict[str, list[Any]]:
    rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # the group is there
    if arguments:  # Accelerate counts one process on a CPU, however many there are
        return {"accelerate": [by_accelerate(stage) for stage in (0, 2)]}
    found: dict[str, Any] = {}
    for parts in (1, 2):
        script = Script(parts=parts)
        expected = sharpness(build(), lambda m, b: m(*b)["loss"], last_of_all_ranks(0, parts), tol=1e-8).eigenvalue
        found[f"trained in {parts}"] = seen(script.model, script.train().opt, expected) | {"log": script.opt.scalars()}
    bare, ours = Script(wrapped=False, lr=0.1), Script(lr=0.1, every="auto")
    found["level"] = [bare.loss, *(s.train(range(200)).loss for s in (bare, ours))]
    found["resumed"] = resumed()
    found["refused"] = [
        *(refusal(stage, wrapped=True) for stage in (1, 2, 3)),
        *(refusal(stage, wrapped=False) for stage in (1, 2, 3)),
        refusal(0, wrapped=True, dtype="bf16"),
    ]
    return {name: from_all_ranks(value) for name, value in found.items()}
