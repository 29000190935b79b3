"""Digests of source code: which code a kept row belongs to."""

from __future__ import annotations

import ast
import hashlib
from functools import lru_cache
from pathlib import Path

import warmctl

ROOMS = "record", "integrations", "planning", "follow", "diagnosis", "command"
"""That have no part in a run, but for followers where a run has some."""


@lru_cache
def library(*used: str) -> str:
    """Of warmctl's modules that decide a run, and of the `ROOMS` that it uses, without comments and docstrings."""
    package = Path(warmctl.__file__).parent
    rooms = [room for room in ROOMS if room not in used]
    apart = {package / "__main__.py", *(file for room in rooms for file in package.glob(f"{room}/*"))}
    files = sorted(file for file in package.rglob("*.py") if file not in apart and file.name != "__init__.py")
    return digest("".join(bare(file.read_text()) for file in files))


def bare(source: str) -> str:
    """The syntax tree of a module without strings that stand alone."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if isinstance(body, list):
                body[:] = [line for line in body if not (isinstance(line, ast.Expr) and _is_string(line.value))]
    return ast.dump(tree)


def _is_string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]
