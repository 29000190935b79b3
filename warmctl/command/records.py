"""Records that a command is given: read, named, or refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from warmctl.record.look import Look, look
from warmctl.record.shown import shown

Runs = Annotated[list[Path], typer.Argument(metavar="RUN.jsonl...", show_default=False)]


def read(paths: list[Path]) -> dict[str, Look]:
    """What is to be seen of each, by name; a message and exit 1 for a file that cannot be read or has no rows."""
    found = {}
    for name, path in zip(names(paths), paths, strict=True):
        try:
            found[name] = look(path)
        except OSError as error:
            raise unreadable(path, error) from None
        except ValueError as error:
            raise failure(str(error)) from None
        if not found[name].history:
            raise failure(f"{path}: the file has no rows")
    return found


def names(paths: list[Path]) -> list[str]:
    """The shortest of stem, folder and stem, or whole path that tells the runs apart."""
    candidates = (
        [path.stem for path in paths],
        [str(Path(path.parent.name, path.stem)) for path in paths],
        [str(path) for path in paths],
    )
    return next((names for names in candidates if len(set(names)) == len(names)), candidates[-1])


def unreadable(path: Path, error: OSError) -> typer.Exit:
    """`failure` for a file that the system does not give, or does not take."""
    return failure(f"{path}: {(error.strerror or str(error)).lower()}")


def failure(message: str) -> typer.Exit:
    """Says the message in one line; raise what it returns."""
    typer.secho(shown(message), fg="red", err=True)
    return typer.Exit(1)


def cell(words: object) -> str:
    """For a table of rich."""
    return escape(shown(words))
