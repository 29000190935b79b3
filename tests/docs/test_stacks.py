"""The table of stacks is what the marks of the tests say."""

from __future__ import annotations

from tests.docs.stacks import COLUMNS, PAGE, STACKS, marks, written


def test_the_page_has_the_table_of_the_marks() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "run python -m tests.docs.stacks"


def test_each_mark_is_of_a_cell() -> None:
    held = marks()
    assert len(held) > 20
    assert not [mark for mark in held if mark.stack not in STACKS or mark.column not in COLUMNS]
