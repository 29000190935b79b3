"""The table of stacks in the docs, from the marks of the tests: `python -m tests.docs.stacks` writes it into its page.

    @pytest.mark.stack("Lightning", "resume exact")
    def test_checkpoint_and_resume_in_mid_warmup(...)

says that this test holds that cell; with `refused="…"` it holds that this is an error, and the words say what to do
instead. Either may be a tuple, of stacks or of columns, and "every" column is all of them. Marks are read from the
source, so that no framework is imported. A cell without one has its reason in NONE.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "how-to" / "index.md"
BEGIN, END = "<!-- stacks: python -m tests.docs.stacks -->\n\n", "\n<!-- end of stacks -->"
STACKS = (
    "plain PyTorch", "nanoGPT's script", "HF Trainer", "Lightning", "Accelerate", "DDP", "FSDP2", "torch.compile",
    "two optimizers", "other packages' optimizers", "timm-style groups", "torchtitan-style groups",
    "tensor parallel", "FSDP1", "DeepSpeed without ZeRO", "DeepSpeed with ZeRO",
)  # fmt: skip
COLUMNS = (
    "one line changed", "level with bare", "resume exact", "accumulation", "AMP", "several processes", "logs",
)  # fmt: skip
NONE = {
    ("plain PyTorch", "several processes"): "see DDP and FSDP2",
}
"""Why a cell has no test."""


class Held(NamedTuple):
    stack: str
    column: str
    file: Path
    test: str
    refused: str


def marks() -> list[Held]:
    """Every mark of every test, file by file."""
    return [held for file in sorted(TESTS.rglob("test_*.py")) for held in _marks_in(file)]


def _marks_in(file: Path) -> Iterator[Held]:
    source = file.read_text()
    if "mark.stack(" not in source:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.stack":
                    stacks, columns = map(_several, mark.args)
                    refused = "".join(ast.literal_eval(keyword.value) for keyword in mark.keywords)
                    for stack, column in itertools.product(stacks, COLUMNS if columns == ("every",) else columns):
                        yield Held(stack, column, file, node.name, refused)


def _several(argument: ast.expr) -> tuple[str, ...]:
    value = ast.literal_eval(argument)
    return (value,) if isinstance(value, str) else tuple(value)


def cell(stack: str, column: str, held: list[Held]) -> str:
    found = [mark for mark in held if (mark.stack, mark.column) == (stack, column)]
    if not found:
        return NONE[stack, column]
    links = [f'[{n}](../../{m.file.relative_to(TESTS.parent)} "{m.test}")' for n, m in enumerate(found, start=1)]
    return f"{'refused' if found[0].refused else 'held by'} {' '.join(links)}"


def table() -> str:
    held = marks()
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {stack} | {' | '.join(cell(stack, column, held) for column in COLUMNS)} |" for stack in STACKS]
    refused = dict.fromkeys(f"- {mark.stack}: {mark.refused}." for mark in held if mark.refused)
    return "\n".join([*lines, *(["", "Refused:", "", *refused] if refused else [])]) + "\n"


def written(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
