"""Warnings that point at the line of the user's own code."""

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
