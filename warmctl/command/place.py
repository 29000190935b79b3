"""Where a script made a call, and what becomes of its value: for advice that fits the line."""

from __future__ import annotations

import ast
import itertools
import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

LONGEST = 80
"""Characters of a call that is shown with its arguments."""


@dataclass(frozen=True)
class Place:
    """A call in the script, or in what it uses; `end`: its last line and byte there, which no other call ends at.

    Before 3.11 Python does not say.
    """

    path: str
    line: int
    end: tuple[int, int] | None = None

    @classmethod
    def of(cls, frame: FrameType) -> Place:
        """The call that a frame is in."""
        positions = getattr(frame.f_code, "co_positions", lambda: ())()
        _, line, _, column = next(itertools.islice(positions, frame.f_lasti // 2, None), (None,) * 4)
        end = None if line is None or column is None else (line, column)
        return cls(frame.f_code.co_filename, frame.f_lineno, end)

    @property
    def text(self) -> str:
        return linecache.getline(self.path, self.line).strip()

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"

    @property
    def call(self) -> str:
        """The call in one line, a long one without its arguments; "" if the file has none there."""
        _, call, source = self._found()
        if call is None:
            return ""
        text = ast.get_source_segment(source, call) or ""
        return text if len(text) <= LONGEST and "\n" not in text else f"{ast.unparse(call.func)}(...)"

    @property
    def target(self) -> str:
        """What alone is assigned the call's value as it is: `opt`, `self.opt`, `opts["a"]`; else ""."""
        tree, call, _ = self._found()
        statements = [node for node in ast.walk(tree) if isinstance(node, (ast.Assign, ast.AnnAssign))]
        pairs = [pair for statement in statements for pair in _assigned(statement)]
        return next((ast.unparse(target) for target, value in pairs if value is call is not None), "")

    def _found(self) -> tuple[ast.AST, ast.Call | None, str]:
        source = "".join(linecache.getlines(self.path))
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return ast.Module([], []), None, ""
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        if self.end is None:  # the only one that begins on the line and is no part of another
            calls = [call for call in calls if call.lineno == self.line]
            inner = {part for call in calls for part in ast.walk(call) if part is not call}
            calls = [call for call in calls if call not in inner]
        else:
            calls = [call for call in calls if (call.end_lineno, call.end_col_offset) == self.end]
        return tree, calls[0] if len(calls) == 1 else None, source


def _assigned(statement: ast.Assign | ast.AnnAssign) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
    if len(targets) == 1:
        yield from _matched(targets[0], statement.value)


def _matched(target: ast.expr, value: ast.expr | None) -> Iterator[tuple[ast.expr, ast.expr | None]]:
    """Each target with its value, of `a, b = 1, 2` too."""
    if isinstance(target, (ast.Tuple, ast.List)) and isinstance(value, (ast.Tuple, ast.List)):
        if not any(isinstance(part, ast.Starred) for part in (*target.elts, *value.elts)):
            for part, own in zip(target.elts, value.elts, strict=False):
                yield from _matched(part, own)
    elif isinstance(target, (ast.Name, ast.Attribute, ast.Subscript)):
        yield target, value


def name_in(frame: FrameType, value: Any) -> str:
    """What the code of a frame calls a value: a variable, or an attribute of `self`; "" if it has no name for it."""
    for names in (frame.f_locals, frame.f_globals):
        for name, held in names.items():
            if held is value:
                return name
    own = getattr(frame.f_locals.get("self"), "__dict__", {})
    return next((f"self.{name}" for name, held in own.items() if held is value), "")


def loss_of(statement: str) -> str:
    """What a statement calls `backward` on, "loss" where it is not one call on one line."""
    try:
        call: Any = ast.parse(statement, mode="eval").body
        found = call.func.value if call.func.attr == "backward" and not call.args else None
    except (SyntaxError, AttributeError):
        return "loss"
    return ast.unparse(found) if found is not None else "loss"
