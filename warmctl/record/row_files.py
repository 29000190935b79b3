"""The files of a history: JSON lines and comma-separated values that are whole up to their last line break."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from warmctl.record.parsing import Row, Value, as_json, parse_row, read_json


class RowFile:
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
        for _, offset, line in lines_of(self._stream):
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


class JsonlFile(RowFile):
    def _encode(self, row: Row) -> bytes:
        return as_json(row)

    def _rows(self) -> Iterator[tuple[int, int]]:
        for number, offset, line in lines_of(self._stream):
            if line.strip() and line.endswith(b"\n"):
                step = parse_row(line, self._path, number)["step"]
                assert isinstance(step, int)
                yield offset, step

    def _is_torn(self, line: bytes) -> bool:
        try:
            read_json(line, ValueError)
        except ValueError:
            if not line.startswith(b"{"):
                raise ValueError(f"{self._path} is not a history: it ends in {line[:40]!r}") from None
            return True
        parse_row(line, self._path, sum(1 for _ in lines_of(self._stream)))
        return False


class CsvFile(RowFile):
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
        for number, offset, line in lines_of(self._stream):
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


def lines_of(stream: io.BufferedRandom | io.BufferedReader) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset in bytes, line with its line break) of each line."""
    stream.seek(0)
    offset = 0
    for number, line in enumerate(stream, start=1):
        yield number, offset, line
        offset += len(line)


def read_rows(path: Path) -> Iterator[Row]:
    with open(path, "rb") as stream:
        for number, _, line in lines_of(stream):
            if not line.strip():
                continue
            try:
                yield parse_row(line, path, number)
            except ValueError:
                if line.endswith(b"\n"):
                    raise  # only a line without its line break can have been torn by a kill


def _to_csv(cells: Sequence[Value]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(
        [" ".join(cell.splitlines()) if isinstance(cell, str) else cell for cell in cells]
    )
    return text.getvalue().encode("utf-8", "backslashreplace")
