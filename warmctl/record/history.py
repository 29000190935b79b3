"""The record of a run: one row a step, kept in memory and, if asked, in files that survive a kill.

    history.to_jsonl("run.jsonl")       # or .to_csv("run.csv")

serves two uses. It writes every row so far **and keeps the file attached**: each later row is written at
once, as a whole line. Called before training it makes a live log, called after it an export. A killed
process leaves a file that is readable up to its last whole line.

One rule covers reruns, resumed runs and rewinds, in memory and in files alike: **a row of step k replaces
every row of step k or later.** A run resumed from a checkpoint of step 100, into a file that had reached
step 137, keeps rows 1 to 100 there and writes 101 onwards again: nothing twice, and nothing that the
present run did not do. A run started afresh on an old path replaces the old rows with its first one.

JSON has no NaN: non-finite floats are written as the strings "NaN", "Infinity" and "-Infinity", and read
back as floats. CSV holds None as an empty cell, and a line break inside a string as a space: one line is
one row.
"""

from __future__ import annotations

import math
import os
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

from warmctl.record.about import About, write_about
from warmctl.record.columns import Column, as_plain
from warmctl.record.notebook import as_html
from warmctl.record.parsing import Row
from warmctl.record.row_files import CsvFile, JsonlFile, RowFile, read_rows
from warmctl.record.schedule import RecordedWarmup


class StepRow(NamedTuple):
    """What a step leaves behind, in the order of the columns; `History.record` takes it as it is.

    `representation_change` is as last read, `end_slope` too while warmup lasts, nan before; `reason` says what was done
    or what holds the scale below 1, "" at the full rate.
    """

    step: int
    phase: str
    scale: float
    lr: float
    scheduled_lr: float
    loss: float | None
    sharpness: float
    threshold: float
    stability_ratio: float
    representation_change: float
    end_slope: float
    target: float
    residual: float
    hvps: int
    probes: int
    overhead: float
    probed: bool
    reason: str


COLUMNS = StepRow._fields
BLOCK = 256
"""Rows of `record` that are kept as they are before they are taken into columns."""


class History(Sequence[Row]):
    """Rows of plain scalars, one a step, in order: a sequence of dicts that can also be read by column.

    `history[-1]` is a row, `history["scale"]` a list. A row has at least an integer "step"; its other
    columns are those of `COLUMNS` and any more, and a value not given is None. A cell takes nine bytes
    (measured: 173 bytes a row with all of `COLUMNS`), so nothing is ever dropped: a million steps are
    0.17 GB.

    `about` says in words what the run was made with. `to_jsonl("run.jsonl")` writes it, with the environment, to
    `run.about.json`.

    Pickles and copies hold the rows and no open files: call `to_jsonl` or `to_csv` again to go on writing.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = (), about: About | None = None) -> None:
        self.about = about
        self._stored: dict[str, Column] = {}
        self._length = 0
        self._recent: list[tuple[Any, ...]] = []
        self._last_step: float = -math.inf
        self._files: dict[Path, RowFile] = {}
        for row in rows:
            self.append(row)

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str]) -> History:
        """The history in a file of `to_jsonl`, read as by `read_jsonl`; the file is not attached."""
        return cls(read_rows(Path(path)))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, in memory and to every attached file; rows of the same and of later steps are replaced.

        NumPy scalars and one-element tensors are taken by their `.item()`. A file that cannot be written (a
        full disk) is detached with a warning: it never stops training.

        Raises ValueError if "step" is missing or not an integer, TypeError if a value is not a plain scalar.
        """
        plain = {name: as_plain(name, value) for name, value in row.items()}
        step = plain.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"a row of a history needs an integer 'step', got {step!r} in {dict(row)!r}")
        if step <= self._last_step:
            self._rewind(step)
        if not plain.keys() <= self._columns.keys():
            self._add_columns(plain)
        for name, column in self._columns.items():
            column.append(plain.get(name))
        self._length += 1
        self._last_step = step
        if self._files:
            self._write_last()

    def record(self, values: tuple[Any, ...], beside: Mapping[str, Any] | None = None) -> None:
        """`append` for a row of all `COLUMNS` in their order, plain already, at a tenth of the cost.

        Not so cheap with columns `beside` them.
        """
        if self._files or beside or values[0] <= self._last_step:
            return self.append({**dict(zip(COLUMNS, values, strict=True)), **(beside or {})})
        self._recent.append(values)
        self._last_step = values[0]
        if len(self._recent) == BLOCK:
            self._store()
        return None

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write all rows to `path`, one JSON object a line, and keep it attached: later rows follow at once.

        An existing file keeps its rows of steps before the first one written; a torn last line is repaired.

        Folders on the way are made. Raises OSError if the file cannot be written, and ValueError, leaving the
        file alone, if it holds something else.
        """
        self._attach(JsonlFile, Path(path))
        if self.about:
            write_about(Path(path), self.about)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """As `to_jsonl`, in comma-separated values under a header line."""
        self._attach(CsvFile, Path(path))

    def schedule(self, path: str | os.PathLike[str] | None = None) -> RecordedWarmup:
        """What the controller did, as a schedule that other seeds and sweeps can replay; written to `path` if given.

        >>> train(opt := AdaptiveWarmup(optimizer, model))
        >>> recorded = opt.history.schedule("warmup.json")
        >>> [recorded(t) for t in range(24)] == opt.history["scale"]
        True

        Raises ValueError for a history without scales.
        """
        recorded = RecordedWarmup.of(self)
        if path is not None:
            recorded.save(path)
        return recorded

    def close(self) -> None:
        """Detach and close every file. Every row is on file already: this only frees the handles."""
        while self._files:
            self._files.popitem()[1].close()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns seen so far, those of `COLUMNS` first."""
        return tuple(self._columns)

    def __len__(self) -> int:
        return self._length + len(self._recent)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    @overload
    def __getitem__(self, index: str) -> list[Any]: ...
    def __getitem__(self, index: int | slice | str) -> Row | list[Row] | list[Any]:
        if isinstance(index, str):
            if index in self._columns:
                return list(self._columns[index])
            if index in COLUMNS:
                return [None] * len(self)
            raise KeyError(f"no column {index!r}; there are {', '.join(self._columns) or 'none'}")
        if isinstance(index, slice):
            return [self._row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a history of {len(self)}")
        return self._row(index % len(self))

    def __repr__(self) -> str:
        return f"History({len(self)} rows" + (f", steps {self['step'][0]} to {self._last_step})" if len(self) else ")")

    def _repr_html_(self) -> str:
        return as_html(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __copy__(self) -> History:
        return History(self, self.about)  # a shallow copy would share columns that both then append to

    def __del__(self) -> None:
        try:  # noqa: SIM105 - at the interpreter's exit contextlib may be gone
            self.close()
        except Exception:
            pass

    @property
    def _columns(self) -> dict[str, Column]:
        self._store()
        return self._stored

    def _store(self) -> None:
        """Take the recent rows into the columns, where they need an eighth of the memory."""
        rows, self._recent = self._recent, []
        if not rows:
            return
        if not self._stored.keys() >= set(COLUMNS):
            self._add_columns(COLUMNS)
        recent = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
        for name, column in self._stored.items():
            column.extend(recent.get(name, (None,) * len(rows)))
        self._length += len(rows)

    def _row(self, index: int) -> Row:
        return {name: column[index] for name, column in self._columns.items()}

    def _rewind(self, step: int) -> None:
        self._length = bisect_left(self._columns["step"], step)
        for column in self._stored.values():
            column.truncate(self._length)

    def _add_columns(self, names: Iterable[str]) -> None:
        seen = {**self._stored, **{n: Column(self._length) for n in names if n not in self._stored}}
        order = [name for name in COLUMNS if name in seen] + [name for name in seen if name not in COLUMNS]
        self._stored = {name: seen[name] for name in order}

    def _attach(self, kind: type[RowFile], path: Path) -> None:
        path = path.resolve()
        if path in self._files:
            self._files.pop(path).close()
        file = kind(path)
        try:
            file.write(self)
        except BaseException:
            file.close()
            raise
        self._files[path] = file

    def _write_last(self) -> None:
        for path, file in list(self._files.items()):
            try:
                file.write([self._row(len(self) - 1)])
            except (OSError, ValueError) as error:
                self._files.pop(path).close()
                warnings.warn(
                    f"{path} can no longer be written ({error}) and is detached; rows stay in memory: write "
                    "them again with to_jsonl or to_csv",
                    RuntimeWarning,
                    stacklevel=3,
                )


def read_jsonl(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a file of `to_jsonl`; a last line torn by a kill is left out.

    Raises FileNotFoundError, and ValueError with the line's number for a line that is not a row.
    """
    return list(read_rows(Path(path)))


class WarmupEnd(NamedTuple):
    """Where warmup ended: the first step of another phase, and why in words ("" if nobody said)."""

    step: int
    reason: str


def warmup_end(history: History) -> WarmupEnd | None:
    """The first change from phase "warmup" to another; None if warmup goes on or the record begins later."""
    phases = history["phase"]
    for i in range(1, len(phases)):
        if phases[i - 1] == "warmup" and phases[i] not in ("warmup", None):
            row = history[i]
            reason = str(row.get("reason") or "").removeprefix("warmup ended").lstrip(": ")
            return WarmupEnd(int(row["step"] or 0), reason)
    return None
