"""What the controller found, as a schedule: recorded once, replayed in other seeds and sweeps without a probe."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

FORMAT = "warmctl recorded warmup, 1"


@dataclass(frozen=True)
class RecordedWarmup:
    """The scales of a controlled run, to be applied again: `recorded(t)` is that of the t-th step, counted from 0.

    >>> train(opt := AdaptiveWarmup(torch.optim.SGD(model.parameters(), lr=30.0), model))
    >>> recorded = opt.history.schedule("warmup.json")
    >>> again = torch.optim.SGD(model.parameters(), lr=30.0)
    >>> scheduler = RecordedWarmup.load("warmup.json").scheduler(again, decay=lambda step: 0.999**step)
    >>> again.param_groups[0]["lr"] == opt.history[0]["lr"]
    True

    It belongs to the model, the batch size, the optimizer and the peak rate it was recorded with. After the last
    recorded step the last scale stays. Costs no gradient evaluation.

    Args:
        steps: at which the scale changed, counted from 1, increasing.
        scales: the scale from each of them on, in (0, 1].
        length: the last recorded step.
        lr: the largest scheduled rate of the run's first group.

    Raises: ValueError or TypeError, naming the field, for what cannot be a schedule.
    """

    steps: tuple[int, ...]
    scales: tuple[float, ...]
    length: int
    lr: float

    def __post_init__(self) -> None:
        for name, value, of in (("steps", self.steps, int), ("scales", self.scales, float)):
            if not isinstance(value, tuple) or not all(type(item) is of for item in value):
                raise TypeError(f"{name} takes a tuple of {of.__name__}s, not {_short(value)}")
        if type(self.length) is not int or type(self.lr) is not float:
            raise TypeError(f"length and lr take an int and a float, not {self.length!r} and {self.lr!r}")
        if not self.steps or len(self.steps) != len(self.scales):
            raise ValueError(f"steps and scales must be as many, and not none: {len(self.steps)}, {len(self.scales)}")
        if self.steps[0] < 1 or any(b <= a for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"steps must increase from 1 on, not {_short(self.steps)}")
        if not all(0.0 < scale <= 1.0 for scale in self.scales):
            raise ValueError(f"scales must lie in (0, 1], not {_short(self.scales)}")
        if self.length < self.steps[-1]:
            raise ValueError(f"length must reach the last of steps, {self.steps[-1]}, not {self.length}")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, not {self.lr}")

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> RecordedWarmup:
        """The schedule in the rows of a history: `History.schedule`."""
        steps: list[int] = []
        scales: list[float] = []
        length, lr = 0, 0.0
        for row in rows:
            scale, scheduled = row.get("scale"), row.get("scheduled_lr")
            length = int(row["step"])
            if scheduled is not None and math.isfinite(scheduled):
                lr = max(lr, float(scheduled))
            if scale is not None and (not scales or scale != scales[-1]):
                steps.append(length)
                scales.append(float(scale))
        if not scales or lr == 0.0:
            raise ValueError("a schedule is made from a run of AdaptiveWarmup: no row has both scale and scheduled_lr")
        return cls(tuple(steps), tuple(scales), length, lr)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RecordedWarmup:
        """The schedule in a file of `save`. Raises OSError, and ValueError naming the file for one that is none."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
                raise ValueError(f'it does not say "format": "{FORMAT}"')
            for name in ("steps", "scales"):
                found[name] = tuple(found.get(name, ()))
            return cls(**found)
        except (ValueError, TypeError) as error:  # JSONDecodeError and UnicodeDecodeError are the first
            raise ValueError(f"{path} is not a recorded warmup: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON. Folders on the way are made."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({"format": FORMAT, **asdict(self)}) + "\n", encoding="utf-8")

    def __call__(self, step: int) -> float:
        """The scale of a step, counted from 0 as schedulers do."""
        return self.scales[max(0, bisect_right(self.steps, step + 1) - 1)]

    def scheduler(self, optimizer: Optimizer, decay: Callable[[int], float] | None = None) -> LambdaLR:
        """A LambdaLR that sets each group to its own rate times the scale, times decay(step) if there is one.

        A LambdaLR writes the rate and cannot be chained with another scheduler: give the decay here.
        """
        from torch.optim.lr_scheduler import LambdaLR

        if decay is not None and not callable(decay):
            raise TypeError(f"decay takes a function from a step to a factor, not {type(decay).__name__}")
        return LambdaLR(optimizer, lambda step: self(step) * (1.0 if decay is None else decay(step)))

    @cached_property
    def warmup_steps(self) -> int:
        """W of the linear warmup min(1, step / W) that is nearest to scale / last scale in squares.

        Where `scales` end below 1, it goes with a peak rate of `scales[-1] * lr`.
        """
        step = np.arange(1, 2 * self.steps[-1] + 1)
        at = np.searchsorted(self.steps, step, side="right").clip(1) - 1
        shape = np.asarray(self.scales)[at] / self.scales[-1]

        def distance(width: Any) -> float:
            return float(np.square(np.minimum(1.0, step / width) - shape).sum())

        best = min(np.geomspace(1, 2 * self.steps[-1], 200), key=distance)
        nearest = round(min(np.linspace(max(1.0, 0.93 * best), 1.07 * best, 100).round(), key=distance))
        return 0 if nearest == 1 else nearest  # a warmup of one step is none


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
