"""A long record for who only looks at it: some twenty thousand of its rows, and counts over all of them.

Reading a million rows as rows takes half a minute. Here most lines go through one regular expression that knows the
layout of the file's first line and takes out four values; only rows that are kept are read in full.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from warmctl.record.curves import Floats, floats
from warmctl.record.history import History
from warmctl.record.parsing import Value, parse_row
from warmctl.record.row_files import lines_of

KEPT = 20_000
"""Rows, about, beside those with a reason or another phase."""
BLOCK = 1 << 20
"""Bytes that are read at a time."""
_KEYS = re.compile(rb'"((?:[^"\\]|\\.)*)": ')
_TAKEN = (b"step", b"phase", b"loss", b"stability_ratio")
_NO_REASON = b'"reason": ""}\n'


@dataclass(frozen=True)
class Look:
    """What is seen of a record.

    Of every stretch of the run the rows with the lowest and the highest loss and ratio are there, and its first;
    besides every row with a reason, every change of phase, the first row and the last.
    """

    history: History
    """The rows that were kept. Those of a thinned record have one column more, `loss_mean`, over their stretch."""
    rows: int
    """Of the record."""
    over_edge: float | None
    """Share of the steps with a stability ratio at which it was above 1, of all rows."""


def look(path: str | os.PathLike[str], kept: int = KEPT) -> Look:
    """Read the JSONL file of a history to look at it. A short one is read whole.

    Raises: OSError; ValueError, in one line, for a line that is read in full and is no row of a history.
    """
    path = Path(path)
    width = 5 * _estimated_rows(path) // kept
    if width < 10:
        history = History.from_jsonl(path)
        return Look(history, len(history), _share(*_over(floats(history["stability_ratio"]))))
    thinned = _Thinned(path, width)
    with open(path, "rb") as stream:
        for number, lines in _blocks(stream):
            thinned.take(number, lines)
    thinned.finish()
    return Look(thinned.history, thinned.rows, _share(thinned.over, thinned.measured))


class _Thinned:
    """Takes the lines of a file block by block and keeps some of them."""

    def __init__(self, path: Path, width: int) -> None:
        self.history = History()
        self.rows = self.over = self.measured = 0
        self._path, self._width = path, width
        self._layout: re.Pattern[bytes] | None = None
        self._phase: bytes | None = None
        self._last = (0, b"")

    def take(self, number: int, lines: list[bytes]) -> None:
        """Lines from line `number` on. Runs of lines without a reason are thinned; the others are kept."""
        start = 0
        for index, line in enumerate(lines):
            if not line.endswith(_NO_REASON):
                self._quiet(number + start, lines[start:index])
                self._whole(number + index, line)
                start = index + 1
        self._quiet(number + start, lines[start:])
        whole = len(lines) if lines[-1].endswith(b"\n") else len(lines) - 1
        if whole:
            self._last = number + whole - 1, lines[whole - 1]

    def finish(self) -> None:
        """Keep the last row."""
        number, line = self._last
        if line.strip() and (row := self._read(number, line)) and row["step"] not in self.history["step"][-1:]:
            self.history.append(row)

    def _quiet(self, number: int, lines: list[bytes]) -> None:
        if self._layout is None and lines:
            self._layout = _layout(lines[0])
        for first in range(0, len(lines), self._width):
            stretch = lines[first : first + self._width]
            found = self._layout.findall(b"".join(stretch)) if self._layout else []
            if len(found) == len(stretch):
                self._thin(number + first, stretch, found)
            else:  # another layout: slowly, but surely
                for offset, line in enumerate(stretch):
                    self._whole(number + first + offset, line)

    def _thin(self, number: int, lines: list[bytes], found: list[tuple[bytes, ...]]) -> None:
        _, phases, *columns = zip(*found, strict=True)
        loss, ratio = (np.fromiter(map(_number, column), np.float64, len(lines)) for column in columns)
        self._count(ratio)
        self.rows += len(lines)
        kept = {0, *_extremes(loss), *_extremes(ratio)}
        if set(phases) != {self._phase}:
            changes = [i for i, phase in enumerate(phases) if phase != (phases[i - 1] if i else self._phase)]
            kept.update(changes, (max(i - 1, 0) for i in changes))
            self._phase = phases[-1]
        mean = float(loss[np.isfinite(loss)].mean()) if np.isfinite(loss).any() else None
        for index in sorted(kept):
            if row := self._read(number + index, lines[index]):
                self.history.append({**row, "loss_mean": mean})

    def _whole(self, number: int, line: bytes) -> None:
        if line.strip() and (row := self._read(number, line)):
            self.rows += 1
            self._count(floats([row.get("stability_ratio")]))
            self.history.append({**row, "loss_mean": row.get("loss")})

    def _read(self, number: int, line: bytes) -> dict[str, Value] | None:
        try:
            return parse_row(line, self._path, number)
        except ValueError:
            if line.endswith(b"\n"):
                raise
            return None  # torn by a kill

    def _count(self, ratio: Floats) -> None:
        over, measured = _over(ratio)
        self.over, self.measured = self.over + over, self.measured + measured


def _blocks(stream: io.BufferedReader) -> Iterator[tuple[int, list[bytes]]]:
    number = 1
    while lines := stream.readlines(BLOCK):
        yield number, lines
        number += len(lines)


def _estimated_rows(path: Path) -> int:
    """From the length of the first lines."""
    with open(path, "rb") as stream:
        first = [line for _, (_, _, line) in zip(range(100), lines_of(stream), strict=False)]
    return len(first) * os.path.getsize(path) // max(sum(map(len, first)), 1)


def _layout(line: bytes) -> re.Pattern[bytes] | None:
    """A line with the keys of this one in their order and no reason; its groups are `_TAKEN`. None without these."""
    keys = _KEYS.findall(line)
    if [key for key in keys if key in _TAKEN] != list(_TAKEN) or keys[-1] != b"reason":
        return None
    number = rb'-?[0-9.eE+-]+|null|true|false|"NaN"|"-?Infinity"'
    kinds = {b"step": rb"\d{1,15}", b"phase": rb'"[a-z]*"|null', b"reason": b'""'}
    parts = []
    for key in keys:
        value = kinds.get(key, number)
        parts.append(b'"%s": (%s%s)' % (re.escape(key), b"" if key in _TAKEN else b"?:", value))
    return re.compile(b"^{" + b", ".join(parts) + b"}\n", re.MULTILINE)


def _number(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return {b'"NaN"': np.nan, b'"Infinity"': np.inf, b'"-Infinity"': -np.inf, b"true": 1.0}.get(text, np.nan)


def _extremes(values: Floats) -> list[int]:
    """Indices of the lowest and of the highest value, and of one that is not finite; none where nothing is known."""
    known = np.flatnonzero(~np.isnan(values))
    infinite = np.flatnonzero(~np.isfinite(values))[:1]
    extremes = [known[values[known].argmin()], known[values[known].argmax()]] if len(known) else []
    return [int(index) for index in (*extremes, *infinite)]


def _over(ratio: Floats) -> tuple[int, int]:
    finite = ratio[np.isfinite(ratio)]
    return int((finite > 1).sum()), len(finite)


def _share(over: int, measured: int) -> float | None:
    return over / measured if measured else None
