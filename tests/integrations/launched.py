"""What test_launched.py starts by `accelerate launch`, on each of two ranks: Accelerate, the Trainer, Lightning.

    accelerate launch --multi_gpu --num_processes 2 -m tests.integrations.launched FOLDER

With `--cpu` it would start one process. Its processes are torchrun's, which the Trainer and Lightning look for too.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from tests.distributed.launch import from_all_ranks
from tests.helpers import weights
from tests.integrations import test_accelerate, test_lightning, test_transformers
from tests.integrations.helpers import Rows, decisions, failures


def seen(model: torch.nn.Module, rows: Rows) -> dict[str, Any]:
    decided = [(row["scale"], row["stability_ratio"], row["phase"]) for row in rows]
    probes = rows[-1]["probes"]
    return {"decisions": decided, "weights": weights(model).tolist(), "probes": probes, "failures": failures(rows)}


def by_accelerate(folder: Path) -> dict[str, Any]:
    """Trained, and resumed in mid-warmup from its own `save_state`."""
    run = test_accelerate.Run(2, every=3).epochs(2)
    assert run.accelerator.num_processes == 2 and type(run.model).__name__ == "DistributedDataParallel"
    phase = run.opt.phase
    run.accelerator.save_state(str(folder / "accelerate"))
    run.epochs(2)
    again = test_accelerate.Run(2, every=3)
    with torch.no_grad():
        next(again.bare.parameters()).zero_()
    again.accelerator.load_state(str(folder / "accelerate"))
    again.epochs(2)
    resumed = decisions(again.rows)
    return seen(run.bare, run.rows) | {
        "phase": phase,
        "resumed": torch.equal(again.weights, run.weights) and resumed == decisions(run.rows)[-len(resumed) :],
    }


def by_trainer(folder: Path) -> dict[str, Any]:
    """Trained, and resumed in mid-warmup from its own checkpoint."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    options: dict[str, Any] = {"lr": 0.3, "every": 2, "steps": 6, "arguments": saving}
    run = test_transformers.Run("gpt2", folder / "trainer", **options).train()
    again = test_transformers.Run("gpt2", folder / "again", **options)
    again.train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-3"))
    return seen(run.model, run.rows) | {
        "phase": run.rows[2]["phase"],
        "resumed": torch.equal(again.weights, run.weights) and decisions(again.rows) == decisions(run.rows)[3:],
    }


def by_lightning(folder: Path) -> dict[str, Any]:
    model = test_lightning.Classifier(every=2)
    trainer = test_lightning.fit(model, 6, strategy="ddp", devices=2, callbacks=[test_lightning.WarmupLogger()])
    assert trainer.world_size == 2
    return seen(model.net, model.rows)


def main(folder: Path) -> None:
    found = {}
    for name, check in {"Accelerate": by_accelerate, "HF Trainer": by_trainer, "Lightning": by_lightning}.items():
        found[name] = from_all_ranks(check(folder))
        AcceleratorState._reset_state(True)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
