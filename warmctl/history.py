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

import contextlib
import csv
import io
import json
import math
import os
import warnings
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

Value: TypeAlias = "bool | int | float | str | None"
Row: TypeAlias = "dict[str, Value]"

COLUMNS = (
    "step", "phase", "scale", "lr", "scheduled_lr", "loss", "sharpness", "threshold", "stability_ratio",
    "target", "residual", "hvps", "probes", "overhead", "probed", "reason",
)  # fmt: skip
_TEXT = ("phase", "reason")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class History(Sequence[Row]):
    """Rows of plain scalars, one a step, in order: a sequence of dicts that can also be read by column.

    `history[-1]` is a row, `history["scale"]` a list. A row has at least an integer "step"; its other
    columns are those of `COLUMNS` and any more, and a value not given is None. A cell takes nine bytes
    (measured: 148 bytes a row with all of `COLUMNS`), so nothing is ever dropped: a million steps are
    0.15 GB.

    Pickles and copies hold the rows and no open files: call `to_jsonl` or `to_csv` again to go on writing.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._columns: dict[str, _Column] = {}
        self._length = 0
        self._files: dict[Path, _RowFile] = {}
        for row in rows:
            self.append(row)

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str]) -> History:
        """The history in a file of `to_jsonl`, read as by `read_jsonl`; the file is not attached."""
        return cls(_read_jsonl(Path(path)))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, in memory and to every attached file; rows of the same and of later steps are replaced.

        NumPy scalars and one-element tensors are taken by their `.item()`. A file that cannot be written (a
        full disk) is detached with a warning: it never stops training.

        Raises ValueError if "step" is missing or not an integer, TypeError if a value is not a plain scalar.
        """
        plain = {name: _plain(name, value) for name, value in row.items()}
        step = plain.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"a row of a history needs an integer 'step', got {step!r} in {dict(row)!r}")
        if self._length and step <= self._columns["step"].last:
            self._rewind(step)
        if not plain.keys() <= self._columns.keys():
            self._add_columns(plain)
        for name, column in self._columns.items():
            column.append(plain.get(name))
        self._length += 1
        if self._files:
            self._write_last()

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write all rows to `path`, one JSON object a line, and keep it attached: later rows follow at once.

        An existing file keeps its rows of steps before the first one written; a torn last line is repaired.

        Folders on the way are made. Raises OSError if the file cannot be written, and ValueError, leaving the
        file alone, if it holds something else.
        """
        self._attach(_JsonlFile, Path(path))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """As `to_jsonl`, in comma-separated values under a header line."""
        self._attach(_CsvFile, Path(path))

    def close(self) -> None:
        """Detach and close every file. Every row is on file already: this only frees the handles."""
        while self._files:
            self._files.popitem()[1].close()

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns seen so far, those of `COLUMNS` first."""
        return tuple(self._columns)

    def __len__(self) -> int:
        return self._length

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
                return [None] * self._length
            raise KeyError(f"no column {index!r}; there are {', '.join(self._columns) or 'none'}")
        if isinstance(index, slice):
            return [self._row(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"row {index} of a history of {self._length}")
        return self._row(index % self._length)

    def __repr__(self) -> str:
        if not self._length:
            return "History(0 rows)"
        steps = self._columns["step"]
        return f"History({self._length} rows, steps {steps[0]} to {steps.last})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __copy__(self) -> History:
        return History(self)  # a shallow copy would share columns that both then append to

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _row(self, index: int) -> Row:
        return {name: column[index] for name, column in self._columns.items()}

    def _rewind(self, step: int) -> None:
        self._length = bisect_left(self._columns["step"], step)
        for column in self._columns.values():
            column.truncate(self._length)

    def _add_columns(self, names: Iterable[str]) -> None:
        seen = {**self._columns, **{n: _Column(self._length) for n in names if n not in self._columns}}
        order = [name for name in COLUMNS if name in seen] + [name for name in seen if name not in COLUMNS]
        self._columns = {name: seen[name] for name in order}

    def _attach(self, kind: type[_RowFile], path: Path) -> None:
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
                file.write([self._row(self._length - 1)])
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
    return list(_read_jsonl(Path(path)))


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


# -- memory -------------------------------------------------------------------------------------------------


class _Column(Sequence[Value]):
    """Scalars in nine bytes each: a double, and a tag: it is a float, an int, or an index into `others`."""

    __slots__ = ("_cells", "_index", "_others", "_tags")
    _FLOAT, _INT, _OTHER = range(3)

    def __init__(self, length: int = 0) -> None:
        self._others: list[Value] = [None]
        self._index: dict[Value, int] = {None: 0}
        self._cells = array("d", bytes(8 * length))
        self._tags = bytearray([self._OTHER]) * length

    def append(self, value: Value) -> None:
        if type(value) is float:
            tag, cell = self._FLOAT, value
        elif type(value) is int and -(2**53) <= value <= 2**53:
            tag, cell = self._INT, float(value)
        else:
            tag, cell = self._OTHER, float(self._index.setdefault(value, len(self._others)))
            if cell == len(self._others):
                self._others.append(value)
        self._tags.append(tag)
        self._cells.append(cell)

    def truncate(self, length: int) -> None:
        del self._tags[length:], self._cells[length:]

    @property
    def last(self) -> Any:
        return self[len(self) - 1]

    def __len__(self) -> int:
        return len(self._tags)

    def __getitem__(self, index: Any) -> Any:
        return self._decode(self._tags[index], self._cells[index])

    def __iter__(self) -> Iterator[Any]:
        return map(self._decode, self._tags, self._cells)

    def _decode(self, tag: int, cell: float) -> Any:
        return cell if tag == self._FLOAT else int(cell) if tag == self._INT else self._others[int(cell)]


def _plain(name: str, value: Any) -> Value:
    """`value` as exactly one of the five plain types."""
    if value is None or type(value) in (bool, int, float, str):
        return value  # type: ignore[no-any-return]
    if hasattr(value, "item"):  # numpy scalars come first here: numpy.float64 is a float, and not a plain one
        value = value.item()
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, str):
        return str.__str__(value)  # the text itself of a string enumeration
    raise TypeError(f"column {name!r} takes numbers, strings, booleans and None, not {type(value).__name__}")


# -- files --------------------------------------------------------------------------------------------------


class _RowFile:
    """An attached file: each row becomes one whole line and replaces the lines of its step or later."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._open()
        try:
            self._last = max((step for _, step in self._rows()), default=None)
            self._repair()
        except BaseException:
            self.close()
            raise

    def write(self, rows: Iterable[Row]) -> None:
        for row in rows:
            step = row["step"]
            assert isinstance(step, int)
            if self._last is not None and step <= self._last:
                self._drop_from(step)
            line = self._encode(row)  # before the stream is looked at: a new column has it replaced
            self._stream.write(line)
            self._last = step
        self._stream.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk fails again here, and has been reported
            self._stream.close()

    def _open(self) -> None:
        # append mode: whatever was read before, writes go to the end
        self._stream = open(self._path, "a+b")  # noqa: SIM115

    def _rows(self) -> Iterator[tuple[int, int]]:
        """(offset in bytes, step) of each row."""
        raise NotImplementedError

    def _encode(self, row: Row) -> bytes:
        raise NotImplementedError

    def _is_torn(self, line: bytes) -> bool:
        """Whether a last line without its line break was cut short; ValueError if it is no row at all."""
        raise NotImplementedError

    def _repair(self) -> None:
        """End the file with a whole line."""
        for _, offset, line in _lines(self._stream):
            if not line.endswith(b"\n"):
                if self._is_torn(line):
                    self._truncate(offset)
                else:
                    self._stream.write(b"\n")
                    self._stream.flush()
                    self._last = max(step for _, step in self._rows())
                return

    def _drop_from(self, step: int) -> None:
        self._last = None
        for offset, found in self._rows():
            if found >= step:
                self._truncate(offset)
                return
            self._last = found

    def _truncate(self, size: int) -> None:
        self._stream.flush()
        self._stream.truncate(size)
        self._stream.seek(0, os.SEEK_END)


class _JsonlFile(_RowFile):
    def _encode(self, row: Row) -> bytes:
        text = json.dumps({k: _to_json(v) for k, v in row.items()}, allow_nan=False, ensure_ascii=False)
        return text.encode("utf-8", "backslashreplace") + b"\n"

    def _rows(self) -> Iterator[tuple[int, int]]:
        for number, offset, line in _lines(self._stream):
            if line.strip() and line.endswith(b"\n"):
                step = _parse_json(line, self._path, number)["step"]
                assert isinstance(step, int)
                yield offset, step

    def _is_torn(self, line: bytes) -> bool:
        try:
            json.loads(line)
        except ValueError:
            if not line.startswith(b"{"):
                raise ValueError(f"{self._path} is not a history: it ends in {line[:40]!r}") from None
            return True
        _parse_json(line, self._path, sum(1 for _ in _lines(self._stream)))
        return False


class _CsvFile(_RowFile):
    """The header is the columns of the first row; a column that comes later has the file rewritten once."""

    _header: list[str] | None = None

    def _encode(self, row: Row) -> bytes:
        head = b""
        if self._header is None:
            self._header = list(row)
            head = _to_csv(self._header)
        elif not set(row) <= set(self._header):
            self._widen([name for name in row if name not in self._header])
        return head + _to_csv([row.get(name) for name in self._header])

    def _rows(self) -> Iterator[tuple[int, int]]:
        self._header = None
        for number, offset, line in _lines(self._stream):
            if not line.endswith(b"\n"):
                break
            try:
                (cells,) = csv.reader([line.decode()])
                if self._header is None:
                    self._header, column = cells, cells.index("step")
                    continue
                step = int(cells[column])
            except (ValueError, IndexError) as error:
                raise ValueError(f"{self._path}, line {number}: not a row of a history ({error})") from None
            yield offset, step

    def _drop_from(self, step: int) -> None:
        super()._drop_from(step)
        if self._last is None:  # nothing is left of the older run: nor is its header
            self._truncate(0)
            self._header = None

    def _is_torn(self, line: bytes) -> bool:
        if self._header is None and line[:4] != b"step"[: len(line)]:
            raise ValueError(f"{self._path} is not a history: it begins with {line[:40]!r}")
        return True  # a cell may be cut anywhere: nothing tells a whole row but its line break

    def _widen(self, names: list[str]) -> None:
        assert self._header is not None
        self._stream.flush()
        self._stream.seek(0)
        old = csv.reader(line.decode() for line in self._stream)
        width = len(next(old))
        self._header = self._header + names
        draft = self._path.with_name(self._path.name + ".tmp")
        with open(draft, "wb") as stream:
            stream.write(_to_csv(self._header))
            stream.writelines(_to_csv(cells[:width] + [""] * len(names)) for cells in old)
        self._stream.close()
        os.replace(draft, self._path)
        self._open()


def _lines(stream: io.BufferedRandom | io.BufferedReader) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset in bytes, line with its line break) of each line."""
    stream.seek(0)
    offset = 0
    for number, line in enumerate(stream, start=1):
        yield number, offset, line
        offset += len(line)


def _read_jsonl(path: Path) -> Iterator[Row]:
    with open(path, "rb") as stream:
        for number, _, line in _lines(stream):
            if not line.strip():
                continue
            try:
                yield _parse_json(line, path, number)
            except ValueError:
                if line.endswith(b"\n"):
                    raise  # only a line without its line break can have been torn by a kill


def _parse_json(line: bytes, path: Path, number: int) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise ValueError(f"{path}, line {number}: not a row of a history ({error})") from None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        raise ValueError(f"{path}, line {number}: not a row of a history (an object with an integer 'step')")
    for name, value in row.items():
        if isinstance(value, (dict, list)):
            raise ValueError(f"{path}, line {number}: {name!r} is not a plain value")
        row[name] = _from_json(name, value)
    return row


def _to_json(value: Value) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return value


def _from_json(name: str, value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) and name not in _TEXT else value


def _to_csv(cells: Sequence[Value]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(
        [" ".join(cell.splitlines()) if isinstance(cell, str) else cell for cell in cells]
    )
    return text.getvalue().encode("utf-8", "backslashreplace")
