"""The table of stacks is what the marks of the tests say."""

from __future__ import annotations

import itertools

from tests.docs.stacks import COLUMNS, NONE, PAGE, STACKS, marks, written


def test_the_page_has_the_table_of_the_marks() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "run python -m tests.docs.stacks"


def test_each_mark_is_of_a_cell_and_each_cell_has_a_test_or_says_why_not() -> None:
    held = {(mark.stack, mark.column) for mark in marks()}
    cells = set(itertools.product(STACKS, COLUMNS))
    assert held <= cells and NONE.keys() <= cells
    assert held | NONE.keys() == cells and not held & NONE.keys()
