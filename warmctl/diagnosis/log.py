"""A run as anyone has logged it: one series of finite and other numbers a column, whichever file they came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from warmctl.diagnosis.columns import HELD_OUT, PHASES, TENSORBOARD, TEXT, TRAINING, named, of_layers, plain

Floats: TypeAlias = NDArray[np.float64]
Placed: TypeAlias = tuple[str, Mapping[str, Any]]
"""Where a row stands, as errors name it, and the row."""


@dataclass(frozen=True)
class Series:
    """The values of a column and the steps they were logged at, in order; what was not logged is not in it."""

    column: str
    steps: Floats
    values: Floats

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def finite(self) -> Series:
        keep = np.isfinite(self.values)
        return Series(self.column, self.steps[keep], self.values[keep])

    def between(self, first: float, last: float) -> Series:
        """The part at steps from `first` to `last`, both included."""
        keep = (self.steps >= first) & (self.steps <= last)
        return Series(self.column, self.steps[keep], self.values[keep])

    def at(self, step: float) -> float:
        """The last value that was logged up to a step; the first one before that; NaN where there is none."""
        if not len(self):
            return math.nan
        return float(self.values[max(0, int(np.searchsorted(self.steps, step, side="right")) - 1)])


class Log:
    """Columns by what they are. `log["lr"]` is a Series, empty where nothing of the kind was logged.

    `log["scheduled_lr"]` is the applied rate over the scale where it was not logged itself, as by `opt.scalars`.
    """

    def __init__(
        self,
        name: str,
        rows: Iterable[Placed],
        called: Mapping[str, str | None] | None = None,
    ) -> None:
        """`rows` are (where, row) pairs: `where` is named in errors. `called`: kind → column, where it is given.

        Raises ValueError for a column that is given and not there, and for what is no number.
        """
        self.name = name
        self.columns: list[str] = []
        self.unit = "step"
        """What is counted: "row" where no column is known to hold steps."""
        self.restarts = 0
        """How often the steps began again from the start; the rows before are left out."""
        self.notes: dict[str, str] = {}
        """By column: how the rows were read, where a reader has to know."""
        self._numbers: dict[str, dict[float, float]] = {}
        self._words: dict[str, dict[float, str]] = {kind: {} for kind in TEXT}
        placed = list(rows)
        self.columns = list({str(key): None for _, row in placed for key in row})
        self._called = self._given({kind: column for kind, column in (called or {}).items() if column is not None})
        self._take(self._of_training(placed))

    def __getitem__(self, kind: str) -> Series:
        for column in self._named(kind, self._numbers):
            if cells := self._numbers[column]:
                return _series(column, cells)
        if kind == "scheduled_lr":
            lr, scale = self["lr"], self["scale"]
            together = lr.column.removesuffix("lr") == scale.column.removesuffix("scale")  # else it may not be applied
            known = together & np.isin(scale.steps, lr.steps) & (scale.values > 0.0) & (scale.values <= 1.0)
            at = zip(scale.steps[known], scale.values[known], strict=True)
            return _series("lr / scale", {step: lr.at(step) / share for step, share in at})
        return _series(kind, {})

    def words(self, kind: str) -> dict[float, str]:
        """Step → text, of the columns "phase" and "reason"."""
        return self._words[kind]

    def layers(self, kind: str) -> dict[str, Series]:
        """Layer → series, of the columns `vitals/<layer>/<kind>`."""
        found = of_layers(kind, self._numbers)
        return {layer: _series(column, self._numbers[column]) for layer, column in found.items()}

    def _named(self, kind: str, columns: Iterable[str]) -> list[str]:
        """The columns of a kind: the one that is called so, else those of known names."""
        return [self._called[kind]] if kind in self._called else named(kind, columns)

    def _given(self, called: dict[str, str]) -> dict[str, str]:
        for kind, column in called.items():
            if (found := next((c for c in self.columns if plain(c) == plain(column)), None)) is None:
                there = ", ".join(self.columns)
                raise ValueError(f"{self.name}: no column {column!r}, that was given for {kind}, is among {there}")
            called[kind] = column if column in self.columns else found
        if "loss" not in called and tuple(map(plain, self.columns)) == TENSORBOARD:
            called["loss"] = self.columns[2]
            self.notes[self.columns[2]] = "taken for the training loss; the rates are not in this file"
        return called

    def _of_training(self, rows: list[Placed]) -> list[Placed]:
        """Without the rows that a column says are of validation."""
        for column in named("split", self.columns):
            words = [str(row.get(column) or "").strip().lower() for _, row in rows]
            held_out = set(words) & set(HELD_OUT)
            if held_out and set(words) - held_out and set(words) <= {"", *TRAINING, *HELD_OUT}:
                kept = [row for row, word in zip(rows, words, strict=True) if word not in held_out]
                left_out = f"{len(rows) - len(kept)} rows of {', '.join(sorted(held_out))}"
                self.notes[column] = f"the training rows are read, {left_out} are left out"
                return kept
        return rows

    def _take(self, rows: list[Placed]) -> None:
        keys = self.columns
        known = (key for key in self._named("step", keys) if any(_is_given(row.get(key)) for _, row in rows))
        counted = next(known, None)
        if counted is None:
            self.unit = "row"
            self.notes["step"] = (
                "no such column is known: rows are counted, from 0 on; if there is one, name it: `step=` (`--step`)"
            )
        text = {column: kind for kind in TEXT for column in named(kind, keys)[:1]}
        unread: set[str] = set()  # columns with words in them
        last, left_out = -math.inf, 0
        for number, (where, row) in enumerate(rows):
            step = float(number) if counted is None else _step(row.get(counted), where, last)
            if step < last:
                begun = len(self["loss"]) > 0
                self._rewind(step)
                if begun and not len(self["loss"]):
                    self.restarts, left_out = self.restarts + 1, number
            last = step
            for key, value in row.items():
                if key in text and (word := _word(text[key], value)):
                    self._words[text[key]][step] = word
                elif key != counted and key not in unread and _is_given(value):
                    self._put(str(key), step, value, where, unread)
        if counted is not None and self.restarts:
            often = "" if self.restarts == 1 else f" {self.restarts} times"
            self.notes[counted] = f"it begins again{often}; the {left_out} rows before that are left out"

    def _put(self, column: str, step: float, value: Any, where: str, unread: set[str]) -> None:
        try:
            number = number_of(value)
        except (TypeError, ValueError):
            if column in self._called.values() or any(named(kind, [column]) for kind in ("loss", "lr", "grad_norm")):
                raise ValueError(f"{where}: {column!r} is not a number: {_short(value)}") from None
            unread.add(column)
            self._numbers.pop(column, None)
            return
        self._numbers.setdefault(column, {})[step] = number

    def _rewind(self, step: float) -> None:
        """A run that was resumed, or begun again, in the same file: its rows replace those of later steps."""
        columns: list[dict[float, Any]] = [*self._numbers.values(), *self._words.values()]
        for cells in columns:
            for later in [s for s in cells if s >= step]:
                del cells[later]


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _word(kind: str, value: Any) -> str:
    """A text, or a phase by its number, as `opt.scalars` has it; "" for anything else."""
    if kind == "phase":
        with suppress(TypeError, ValueError):
            if (number := number_of(value)) in range(len(PHASES)):
                return PHASES[int(number)]
    known = isinstance(value, str) and (kind != "phase" or value in PHASES)
    return value if known else ""


def number_of(value: Any) -> float:
    """A cell as a float; words for true and false count as 1 and 0."""
    if isinstance(value, str):
        word = value.strip().lower()
        return {"true": 1.0, "false": 0.0}[word] if word in ("true", "false") else float(word)
    if hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (bool, int, float)):
        raise TypeError
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _step(value: Any, where: str, last: float) -> float:
    if not _is_given(value):
        return max(last, 0.0)  # a row beside the one before it
    try:
        step = number_of(value)
    except (TypeError, ValueError):
        step = math.nan
    if not math.isfinite(step) or isinstance(value, bool):
        raise ValueError(f"{where}: a step is a number, not {_short(value)}")
    return step


def _series(column: str, cells: dict[float, float]) -> Series:
    return Series(column, np.array(list(cells), dtype=np.float64), np.array(list(cells.values()), dtype=np.float64))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
