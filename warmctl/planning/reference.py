"""The run that a plan refers to: what is known to work, and what its record says of the curvature."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from warmctl.numeric import is_number
from warmctl.planning.warmup import ExponentialFall
from warmctl.record.history import History

Record: TypeAlias = "History | Iterable[Mapping[str, Any]] | str | os.PathLike[str]"


@dataclass(frozen=True)
class ReferenceRun:
    """A run that trains well, to scale from. All of it may be left out.

    >>> works = ReferenceRun(rate=0.05, batch_size=64)
    >>> plan(model, loss_fn, batch, optimizer, batch_size=128, reference=works).scaled_rate
    0.1

    Args:
        rate: its peak learning rate; that of its record, or else the one set in the optimizer, if omitted.
        batch_size: the batch size that goes with this rate; the rows of the batch measured on, if omitted.
        warmup_steps: the warmup that it had, which a warmup for another batch size starts from.
        history: how its curvature went: its `History`, rows, or the path of its JSONL file; or, where no run has been
            recorded, an `ExponentialFall`.

    `plan` takes a pair `(rate, batch_size)`, a record or an `ExponentialFall` by itself as well.

    Raises: TypeError or ValueError for a field that cannot be one.
    """

    rate: float | None = None
    batch_size: float | None = None
    warmup_steps: int | None = None
    history: Record | ExponentialFall | None = None

    def __post_init__(self) -> None:
        positive("rate of ReferenceRun", self.rate)
        positive("batch_size of ReferenceRun", self.batch_size)
        if self.warmup_steps is not None and not (is_number(self.warmup_steps) and self.warmup_steps >= 0):
            raise ValueError(f"warmup_steps of ReferenceRun must be at least 0, got {self.warmup_steps!r}")

    @classmethod
    def of(cls, reference: Any) -> ReferenceRun:
        """From what `plan` was given; its history read, if it is a record."""
        if isinstance(reference, cls):
            run = reference
        elif isinstance(reference, tuple) and len(reference) == 2 and all(map(is_number, reference)):
            run = cls(*reference)
        else:
            run = cls(history=reference)
        return run if run.history is None else replace(run, history=_read(run.history))

    @property
    def recorded_rate(self) -> float | None:
        """The peak rate: as given, or the highest scheduled (else applied) in the record."""
        if self.rate is not None or not isinstance(self.history, History):
            return self.rate
        rates = [v for name in ("scheduled_lr", "lr") for v in self.history[name] if v is not None and v > 0]
        return max(rates, default=None)


def positive(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is None or a number above 0."""
    if value is not None and not (is_number(value) and 0 < value < float("inf")):
        raise ValueError(f"{name} must be a number above 0, got {value!r}")


def _read(history: Any) -> History | ExponentialFall:
    if isinstance(history, (History, ExponentialFall)):
        return history
    if isinstance(history, (str, os.PathLike)):
        return History.from_jsonl(Path(history))
    if isinstance(history, Sequence) and all(isinstance(row, Mapping) for row in history):
        return History(history)
    raise TypeError(
        "reference must be a pair (rate, batch_size), a History, rows or the path of a JSONL file, an ExponentialFall, "
        f"or a ReferenceRun of these, got {type(history).__name__}"
    )
