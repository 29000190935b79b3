"""Words that come from a file, as a terminal, a figure and a page may show them."""

from __future__ import annotations


def shown(words: object) -> str:
    r"""What cannot be printed becomes its escape: "\x1b" for ESC, "\n", "\u202e", "\udc80" for a lone surrogate.

    Nothing in the result moves a cursor, starts a line, turns text round or fails to be encoded.
    """
    text = str(words)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def plain(words: object) -> str:
    """`shown`, for matplotlib: a dollar sign begins no mathematics."""
    return shown(words).replace("$", r"\$")
