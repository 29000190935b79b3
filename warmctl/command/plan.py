"""`warmctl plan`: how far a landscape will let a run go, before it."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from warmctl.command.records import failure, unreadable

USAGE = "FILE.py:FUNCTION, a function without arguments that returns model, loss_fn, batch, optimizer"


def plan(
    target: Annotated[
        str, typer.Argument(metavar="FILE.py:FUNCTION", help="A function that returns what `warmctl.plan` takes.")
    ],
) -> None:
    """Measure a model before it is trained: the largest stable peak rate, and how long a warmup it needs.

    The function returns model, loss_fn, batch, optimizer, and, if it likes, a dict of more arguments of `warmctl.plan`.
    Its file is run as a module, with its folder on the path, not as `__main__`.
    """
    import warmctl

    arguments, options = _taken_apart(target, _function(target)())
    try:
        print(warmctl.plan(*arguments, **options))
    except (ValueError, TypeError) as error:
        if not _is_ours(error):
            raise
        raise failure(f"{target}: {error}") from None


def _is_ours(error: BaseException) -> bool:
    """Whether warmctl itself raised it, for arguments that will not do; not the user's own functions."""
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    return str(last.f_globals["__name__"]).startswith("warmctl.")


def _taken_apart(target: str, built: Any) -> tuple[Any, dict[str, Any]]:
    if not isinstance(built, (tuple, list)) or len(built) not in (4, 5):
        found = f"{len(built)} values" if isinstance(built, (tuple, list)) else type(built).__name__
        raise failure(f"{target} returned {found}; it must return model, loss_fn, batch, optimizer")
    options = built[4] if len(built) == 5 else {}
    if not isinstance(options, dict):
        raise failure(f"the fifth value of {target} must be a dict of arguments of plan, got {type(options).__name__}")
    return built[:4], options


def _function(target: str) -> Callable[[], Any]:
    file, colon, name = target.rpartition(":")
    if not colon or not name.isidentifier() or not file:
        raise failure(f"expected {USAGE}; got {target!r}")
    path = Path(file)
    if not path.is_file():
        raise unreadable(path, FileNotFoundError(2, "there is no such file"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise failure(f"{file} is not a Python file; expected {USAGE}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look themselves up there
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent.resolve()))
    function: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(function):
        raise failure(f"{file} has no function {name!r}; expected {USAGE}")
    return function
