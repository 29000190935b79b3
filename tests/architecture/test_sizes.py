"""A file is read in one sitting, a function is seen on one screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("warmctl", "benchmarks", "tests", "examples")
FILE, CLASS, FUNCTION = 400, 250, 60


def too_long(path: Path) -> Iterator[str]:
    """What in a file of Python has more lines than it should, in words."""
    text = path.read_text()
    lines = len(text.splitlines())
    if lines > FILE:
        yield f"{path}: {lines} lines, more than {FILE}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines, most = (node.end_lineno or first) - first + 1, CLASS if isinstance(node, ast.ClassDef) else FUNCTION
            if lines > most:
                yield f"{path}:{first}: {node.name} has {lines} lines, more than {most}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_is_too_long_to_be_read(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"no Python in {folder}/"
    found = [message for path in files for message in too_long(path)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1\n" * FILE, []),
        ("x = 1\n" * (FILE + 1), ["401 lines"]),
        ("class A:\n" + "    x = 1\n" * (CLASS - 1), []),
        ("class A:\n" + "    x = 1\n" * CLASS, ["A has 251 lines"]),
        ("def f():\n" + "    x = 1\n" * (FUNCTION - 1), []),
        ("@cache\ndef f():\n" + "    x = 1\n" * (FUNCTION - 1), ["f has 61 lines"]),
        ("class A:\n    async def f(self):\n" + "        x = 1\n" * FUNCTION, ["f has 61 lines"]),
    ],
)
def test_the_measure_itself(text: str, found: list[str], tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(text)
    messages = list(too_long(path))
    assert len(messages) == len(found)
    for message, words in zip(messages, found, strict=True):
        assert words in message
