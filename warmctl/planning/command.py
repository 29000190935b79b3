"""`warmctl plan FILE.py:build`: a plan for who has a function that builds the run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from warmctl.planning.plan import plan
from warmctl.planning.report import Plan

USAGE = "FILE.py:FUNCTION, a function without arguments that returns model, loss_fn, batch, optimizer"


def plan_command(target: str) -> None:
    """Print the plan of what `FILE.py:FUNCTION` builds.

    The function returns (model, loss_fn, batch, optimizer), and, if it likes, a dict of more arguments of `plan`. The
    file is run as a module, with its folder on the path, not as `__main__`.

    Raises: ValueError or TypeError, in words for who typed the command, for a target or function that will not do;
    FileNotFoundError without the file. What the file itself raises goes through.
    """
    print(plan_of(target))


def plan_of(target: str) -> Plan:
    """The plan itself."""
    built: Any = _function(target)()
    if not isinstance(built, tuple | list) or len(built) not in (4, 5):
        found = f"{len(built)} values" if isinstance(built, tuple | list) else type(built).__name__
        raise TypeError(f"{target} returned {found}; it must return model, loss_fn, batch, optimizer")
    options = built[4] if len(built) == 5 else {}
    if not isinstance(options, dict):
        raise TypeError(
            f"the fifth value of {target} must be a dict of arguments of plan, got {type(options).__name__}"
        )
    return plan(*built[:4], **options)


def _function(target: str) -> Callable[[], Any]:
    file, colon, name = target.rpartition(":")
    if not colon or not name.isidentifier() or not file:
        raise ValueError(f"expected {USAGE}; got {target!r}")
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(2, "there is no such file", file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is not a Python file; expected {USAGE}")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look themselves up there
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent.resolve()))
    function: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{file} has no function {name!r}; expected {USAGE}")
    return function
