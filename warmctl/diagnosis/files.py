"""From a file to a log: CSV, JSON lines, or JSON that holds a list of rows, told apart by what is in them.

The cells of a CSV are parted by commas, semicolons or tabs. What is exported from W&B has columns `RUN - METRIC`.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from warmctl.diagnosis.log import Log, Placed

DEEPEST = 32
"""Of objects in each other."""
DELIMITERS = ",;\t"
COMMA = re.compile(r"(\s*[-+]?\d*),(\d+([eE][-+]?\d+)?\s*)")
"""A number with a decimal comma."""
EVENTS = "events.out.tfevents"


def log_of(
    source: str | os.PathLike[str] | Sequence[Mapping[str, Any]], called: Mapping[str, str | None] | None = None
) -> Log:
    """The log in a file, in a History, or in any list of rows, such as the Trainer's `state.log_history`.

    `called`: the names of columns, by their kinds, where they are given.

    Raises OSError if the file cannot be read, ValueError with its name and line for what is no row, TypeError for
    another source.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        return Log(str(path), read(path), called)
    if not isinstance(source, Sequence) or isinstance(source, bytes):
        raise TypeError(
            f"diagnose takes a History, a list of rows, or the path of a CSV or JSONL file, not {type(source).__name__}"
        )
    rows = []
    for index, row in enumerate(source):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {index} is not a mapping from columns to values but {type(row).__name__}")
        rows.append((f"row {index}", flat(row)))
    return Log("the history", rows, called)


def read(path: Path) -> Iterator[Placed]:
    """The rows of a file. Raises as `log_of`."""
    files = sorted(path.iterdir()) if path.is_dir() else []
    if logs := [file.name for file in files if file.suffix in (".csv", ".jsonl", ".json")]:
        raise ValueError(f"{path}: a folder: name a log in it, {' or '.join(logs)}")
    if any(EVENTS in file.name for file in (path, *files)):
        raise ValueError(
            f"{path}: TensorBoard's event files are not read: save its scalars as CSV, or log to CSV or JSONL"
        )
    if path.is_dir():
        raise ValueError(f"{path}: a folder, without a CSV or JSONL file in it")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file ({error})") from None
    if text.lstrip()[:1] == "[" or _is_whole(text):
        return _whole(text, path)
    return _lines(text, path) if text.lstrip()[:1] == "{" else _cells(text, path)


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
    head = text.lstrip().splitlines()[:1] or [""]
    delimiter = max(DELIMITERS, key=lambda mark: len(next(csv.reader(head, delimiter=mark))))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header: list[str] | None = None
    first: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                first, header = cells, _without_run([cell.strip() for cell in cells])
                continue
            if cells == first:
                continue  # a run appended with its header
            number = reader.line_num
            if len(cells) < len(header) and not text.endswith("\n") and number == text.count("\n") + 1:
                return  # torn by a kill
            if len(cells) != len(header):
                raise ValueError(f"{path}, line {number}: {len(cells)} cells under a header of {len(header)}")
            if delimiter != ",":
                cells = [COMMA.sub(r"\1.\2", cell) if COMMA.fullmatch(cell) else cell for cell in cells]
            yield f"{path}, line {number}", dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _without_run(header: list[str]) -> list[str]:
    """The metrics of a W&B export without the name of their run, if all but the steps are of one."""
    parts = [name.rsplit(" - ", 1) for name in header]
    runs = {part[0] for part in parts if len(part) == 2}
    alone = sum(len(part) == 1 for part in parts)
    return [part[-1] for part in parts] if len(runs) == 1 and alone <= 1 else header
