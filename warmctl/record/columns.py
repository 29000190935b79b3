"""A column of a history: plain scalars in nine bytes each."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from warmctl.record.parsing import Value


class Column(Sequence[Value]):
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

    def extend(self, values: Sequence[Value]) -> None:
        if set(map(type, values)) == {float}:
            self._tags.extend(bytes([self._FLOAT]) * len(values))
            self._cells.extend(values)  # type: ignore[arg-type]
        else:
            for value in values:
                self.append(as_plain("", value))

    def truncate(self, length: int) -> None:
        del self._tags[length:], self._cells[length:]

    def __len__(self) -> int:
        return len(self._tags)

    def __getitem__(self, index: Any) -> Any:
        return self._decode(self._tags[index], self._cells[index])

    def __iter__(self) -> Iterator[Any]:
        return map(self._decode, self._tags, self._cells)

    def _decode(self, tag: int, cell: float) -> Any:
        return cell if tag == self._FLOAT else int(cell) if tag == self._INT else self._others[int(cell)]


def as_plain(name: str, value: Any) -> Value:
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
