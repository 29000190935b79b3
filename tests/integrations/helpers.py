"""What the tests of every framework look at: failed probes, decisions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

Rows = list[dict[str, Any]]


def failures(rows: Rows) -> list[str]:
    return [row["reason"] for row in rows if "fail" in row["reason"]]


def decisions(rows: Rows) -> list[tuple[Any, ...]]:
    return [(row["step"], row["scale"], repr(row["stability_ratio"]), row["overhead"], row["lr"]) for row in rows]


class Resumable(DataLoader[Any]):
    """Goes on with the batch that a checkpoint of Lightning was written after, as torchdata's StatefulDataLoader does.

    Any other begins its epoch again, whatever the optimizer.
    """

    done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        first, self.done = self.done, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= first:
                self.done = index + 1
                yield batch
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


def saved_at(step: int, path: Path) -> Any:
    """A callback of Lightning that writes a checkpoint after that step."""
    from lightning.pytorch.callbacks import Callback

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == step and not path.exists():
                trainer.save_checkpoint(path)

    return Save()
