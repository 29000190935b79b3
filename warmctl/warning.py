"""Warnings that point at the line of the user's own code, and errors in one line."""

from __future__ import annotations

import sys
import warnings

INSIDE = {"warmctl", "torch", "contextlib", "functools"}


def warn(message: str) -> None:
    """A RuntimeWarning at the first frame that is neither this package's nor torch's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def first_line(error: BaseException) -> str:
    """An error in one line, for a log or a reason."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
