"""From a file to a log: CSV, JSON lines, or JSON that holds a list of rows, told apart by what is in them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from warmctl.diagnosis.log import Log

Placed = tuple[str, dict[str, Any]]
DEEPEST = 32
"""Of objects in each other."""


def log_of(source: str | os.PathLike[str] | Sequence[Mapping[str, Any]]) -> Log:
    """The log in a file, in a History, or in any list of rows, such as the Trainer's `state.log_history`.

    Raises OSError if the file cannot be read, ValueError with its name and line for what is no row, TypeError for
    another source.
    """
    if isinstance(source, (str, os.PathLike)):
        return read(Path(source))
    if not isinstance(source, Sequence) or isinstance(source, bytes):
        raise TypeError(
            f"diagnose takes a History, a list of rows, or the path of a CSV or JSONL file, not {type(source).__name__}"
        )
    rows = []
    for index, row in enumerate(source):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {index} is not a mapping from columns to values but {type(row).__name__}")
        rows.append((f"row {index}", flat(row)))
    return Log("the history", rows)


def read(path: Path) -> Log:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error})") from None
    if text.lstrip()[:1] == "[" or _is_whole(text):
        return Log(str(path), _whole(text, path))
    return Log(str(path), _lines(text, path) if text.lstrip()[:1] == "{" else _cells(text, path))


def flat(row: Mapping[str, Any], before: str = "", depth: int = 0) -> dict[str, Any]:
    """{"train": {"loss": 1}} as {"train/loss": 1}; lists are left out, and what lies deeper than any log's columns."""
    cells: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, Mapping):
            cells.update(flat(value, f"{before}{key}/", depth + 1) if depth < DEEPEST else {})
        elif not isinstance(value, (list, tuple)):
            cells[f"{before}{key}"] = value
    return cells


def _is_whole(text: str) -> bool:
    """An object over several lines, as the Trainer's trainer_state.json."""
    first = text.lstrip().split("\n", 1)
    return first[0].strip() == "{" or (len(first) == 1 and '"log_history"' in first[0])


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _whole(text: str, path: Path) -> Iterator[Placed]:
    try:
        found = _parsed(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    rows = found.get("log_history") if isinstance(found, dict) else found
    if not isinstance(rows, list):
        raise ValueError(f"{path}: JSON holds a list of rows, or an object with one under 'log_history'")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {index}: not an object")
        yield f"{path}, row {index}", flat(row)


def _lines(text: str, path: Path) -> Iterator[Placed]:
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except ValueError as error:
            if number == len(lines):
                return  # torn by a kill
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a row is an object, not {type(row).__name__}")
        yield f"{path}, line {number}", flat(row)


def _cells(text: str, path: Path) -> Iterator[Placed]:
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                continue
            number = reader.line_num
            if len(cells) < len(header) and not text.endswith("\n") and number == text.count("\n") + 1:
                return  # torn by a kill
            if len(cells) != len(header):
                raise ValueError(f"{path}, line {number}: {len(cells)} cells under a header of {len(header)}")
            yield f"{path}, line {number}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
