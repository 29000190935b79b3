"""Warnings that point at the line of the user's own code, and errors in one line."""

from __future__ import annotations

import logging
import sys
import warnings

log = logging.getLogger("warmctl")

INSIDE = {"warmctl", "torch", "contextlib", "functools"}


def warn(message: str) -> None:
    """A RuntimeWarning at the first frame that is neither this package's nor torch's.

    Where warnings are made errors it is logged instead: what is worth a word is not worth a run.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in INSIDE:
        level, frame = level + 1, frame.f_back
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=level)
    except Exception:  # RuntimeWarning itself, or whatever the user's own `showwarning` makes of it
        log.warning(message)


def first_line(error: BaseException) -> str:
    """An error in one line, for a log or a reason; some cannot even be put in words."""
    try:
        words = (str(error).strip().splitlines() or [""])[0][:300]
    except Exception as unspeakable:
        words = f"(its own words raise {type(unspeakable).__name__})"
    return f"{type(error).__name__}: {words}"
