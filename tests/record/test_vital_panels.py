"""What the legends of vital signs call the layers."""

from __future__ import annotations

from tests.record.helpers import row
from warmctl.record.history import History
from warmctl.record.plotting import plot


def test_layers_of_a_sequential_are_called_layers() -> None:
    """Its names are numbers."""
    signs = {"vitals/0/update": 0.1, "vitals/2.1/update": 0.2, "vitals/0/gradient": 1.0, "vitals/head/gradient": 2.0}
    figure = plot(History(row(step, **signs) for step in range(1, 9)))
    named = {axis.get_ylabel(): axis.get_legend() for axis in figure.axes}
    assert [text.get_text() for text in named["relative update"].get_texts()] == ["layer 0", "layer 2.1"]
    assert [text.get_text() for text in named["gradient norm"].get_texts()] == ["layer 0", "head"]
