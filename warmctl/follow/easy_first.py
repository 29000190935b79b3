"""A sampler that draws from the easiest part of the data, for DataLoader."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from warmctl.follow.kept import whole


class EasyFirst(Sampler[int]):
    """Indices of the easiest ⌈d·n⌉ of n examples in random order, d being the present `difficulty`.

    An epoch has n draws. At difficulty 1 it is a permutation of the data, as by `shuffle=True`; below, each example of
    the easy part comes about 1/d times an epoch. What comes depends on the seed, on the place in the run and on the
    difficulty at that moment alone, so that a run continues where it was saved. Every `iter` goes on where the last one
    stopped. A loader with workers draws ahead: of what it had drawn and not yet delivered nothing comes back.

    >>> sampler = EasyFirst(scores=[3.0, 1.0, 2.0, 4.0])
    >>> sampler.difficulty = 0.5
    >>> sorted(set(sampler))
    [1, 2]

    Args:
        scores: one a row of the data, higher is harder: a length, a loss under a small model, a human's mark.
        seed: of the order.

    Attributes:
        difficulty: in [0, 1]; 1 until something sets it, `Difficulty` for instance.

    Raises: ValueError without scores, or for scores that are no finite numbers.
    """

    def __init__(self, scores: Sequence[float] | Tensor, seed: int = 0) -> None:
        values = torch.as_tensor(scores, dtype=torch.float64).flatten()
        if not len(values) or not bool(values.isfinite().all()):
            raise ValueError("scores must be finite numbers, one for each example of the data, higher for harder")
        self.order = values.argsort(stable=True)
        self.seed, self.difficulty = seed, 1.0
        self._epoch, self._drawn = 0, 0

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        if self._drawn == len(self):
            self._epoch, self._drawn = self._epoch + 1, 0
        places = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed + self._epoch)).tolist()
        while self._drawn < len(self):
            easy = min(max(math.ceil(self.difficulty * len(self)), 1), len(self))
            index = int(self.order[places[self._drawn] * easy // len(self)])
            self._drawn += 1
            yield index
        self._epoch, self._drawn = self._epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._epoch, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """To go on from there. Raises ValueError for a state of other data."""
        epoch, drawn = whole("epoch", state["epoch"]), whole("drawn", state["drawn"])
        if drawn > len(self):
            raise ValueError(f"the state has drawn {drawn} of an epoch, the data have {len(self)} examples")
        self._epoch, self._drawn = epoch, drawn
